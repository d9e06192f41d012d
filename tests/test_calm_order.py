"""The partial order on one device: exact widths, FLOPs by hand, and what runs side by side."""

import random
from collections import Counter

import networkx as nx
import pytest
import torch
from torch import nn

import bwsk_fx
from bwsk_fx.calm_cost import Trials
from bwsk_fx.calm_order import critical_path, maximum_antichain, order_of

TOKENS, LAYERS, HIDDEN, WIDE, HEADS, LABELS = 17, 2, 32, 64, 4, 5


def _dag(edges, flops=(), nodes=0):
    graph = nx.DiGraph()
    for node in range(max([nodes - 1, *(end for edge in edges for end in edge)]) + 1):
        work = flops[node] if flops else 1
        graph.add_node(node, name=f"n{node}", flops=work, bytes=1, known=True)
    graph.add_edges_from(edges)
    return graph


def _order(module, *inputs, **options):
    return bwsk_fx.analyze_calm(bwsk_fx.capture(module, inputs, **options)).order


@pytest.fixture(scope="module")
def vit(make_vit):
    model = make_vit(
        num_hidden_layers=LAYERS,
        hidden_size=HIDDEN,
        intermediate_size=WIDE,
        num_attention_heads=HEADS,
        image_size=32,
        patch_size=8,
        num_labels=LABELS,
    )
    pixels = torch.randn(2, 3, 32, 32)
    return bwsk_fx.analyze_calm(bwsk_fx.capture(model, {"pixel_values": pixels, "labels": torch.zeros(2).long()})).order


# -- width and critical path ------------------------------------------------------------------------------------------


def _width_by_matching(graph: nx.DiGraph) -> int:
    """Dilworth and Fulkerson: nodes less the largest matching between ancestors and descendants."""
    closure, pairs = nx.transitive_closure_dag(graph), nx.Graph()
    upper = [("above", node) for node in graph]
    pairs.add_nodes_from([*upper, *(("below", node) for node in graph)])
    pairs.add_edges_from((("above", one), ("below", other)) for one, other in closure.edges)
    return len(graph) - len(nx.bipartite.hopcroft_karp_matching(pairs, top_nodes=upper)) // 2


@pytest.mark.parametrize("density", [0.05, 0.15, 0.4])
def test_the_width_is_that_of_dilworths_matching(density):
    draw = random.Random(density)
    for nodes in [*range(1, 25), 60]:
        edges = [(a, b) for a in range(nodes) for b in range(a + 1, nodes) if draw.random() < density]
        graph = _dag(edges, nodes=nodes)
        widest, closure = maximum_antichain(graph), nx.transitive_closure_dag(graph)
        assert len(widest) == _width_by_matching(graph)
        assert not any(closure.has_edge(one, other) for one in widest for other in widest)


def test_chains_are_shared_where_that_takes_fewer():
    """Two diamonds in a row: greedy chains through 1 and 4, and 2 and 5, have to share the node between."""
    graph = _dag([(0, 1), (0, 2), (1, 3), (2, 3), (3, 4), (3, 5), (3, 6), (4, 7), (5, 7), (6, 7)])
    assert maximum_antichain(graph) == [4, 5, 6]


def test_the_critical_path_has_the_most_flops():
    graph = _dag([(0, 1), (1, 4), (0, 2), (2, 3), (3, 4)], flops=[1, 10, 3, 3, 1])
    assert critical_path(graph) == [0, 1, 4]
    order = order_of(graph)
    assert (order.critical_flops, order.flops, order.parallelism) == (12, 18, 1.5)
    assert order.critical_path == ("n0", "n1", "n4")


def test_an_empty_graph_has_an_order():
    order = order_of(nx.DiGraph())
    assert (order.nodes, order.width, order.critical_path, order.parallelism) == (0, 0, (), 1.0)


# -- ViT --------------------------------------------------------------------------------------------------------------


def _linear(inner: int, outer: int, rows: int = TOKENS) -> int:
    return 2 * rows * inner * outer


def test_flops_of_a_vit_by_hand(vit):
    attention = 2 * 2 * TOKENS * TOKENS * HIDDEN
    layer = 4 * _linear(HIDDEN, HIDDEN) + attention + _linear(HIDDEN, WIDE) + _linear(WIDE, HIDDEN)
    ends = _linear(3 * 8 * 8, HIDDEN, rows=16) + _linear(HIDDEN, LABELS, rows=1)
    assert vit.flops == LAYERS * layer + ends
    # All but two of q, k and v lie one after the other.
    assert vit.critical_flops == vit.flops - LAYERS * 2 * _linear(HIDDEN, HIDDEN)
    assert vit.unmeasured == ()


def test_queries_keys_and_values_run_side_by_side(vit):
    projections = [fork for fork in vit.forks if fork.join.startswith("scaled_dot_product_attention")]
    assert len(projections) == LAYERS
    assert projections[0].after == ("vit_layers_0_layernorm_before",)
    names = [branch.nodes[0] for branch in projections[0].branches]
    assert names == [f"vit_layers_0_attention_{name}_proj" for name in "qkv"]
    assert {branch.flops for branch in projections[0].branches} == {_linear(HIDDEN, HIDDEN)}
    # Each projection reads tokens and weights and writes tokens; the views that follow move nothing.
    moved = 4 * (2 * TOKENS * HIDDEN + HIDDEN * HIDDEN + HIDDEN)
    assert {branch.bytes for branch in projections[0].branches} == {moved}
    # q, k, v, and the labels that wait for the end.
    assert vit.width == 4


def test_equal_blocks_are_run_once(make_vit, make_images, monkeypatch):
    """What the analysis of a deeper model runs is what that of a shallow one does."""
    counted = Counter()
    original = Trials._counted
    monkeypatch.setattr(Trials, "_counted", lambda *given: counted.update(["runs"]) or original(*given))
    runs = []
    for layers in (2, 5):
        bwsk_fx.analyze_calm(bwsk_fx.capture(make_vit(num_hidden_layers=layers), make_images()))
        runs.append(counted.pop("runs"))
    assert runs[0] == runs[1] > 0


# -- other graphs -----------------------------------------------------------------------------------------------------


class Experts(nn.Module):
    """A sum of experts that is accumulated one by one, as mixtures of experts do it."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(count))

    def forward(self, x):
        x = x.relu()
        total = torch.zeros_like(x)
        for expert in self.experts:
            total = total + expert(x).tanh()
        return total


def test_experts_are_branches_of_one_fork():
    order = _order(Experts(4), torch.randn(2, 8))
    (fork,) = [fork for fork in order.forks if len(fork.branches) > 3]
    experts = [branch for branch in fork.branches if branch.flops]
    assert [branch.nodes for branch in experts] == [
        (f"experts_{place}", "tanh" if place == 0 else f"tanh_{place}") for place in range(4)
    ]
    assert fork.after == ("relu",)
    assert order.parallelism == 4.0


class TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.decoder, self.keys, self.values = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, source, target):
        memory = self.encoder(source)
        query, key, value = self.decoder(target), self.keys(memory), self.values(memory)
        return nn.functional.scaled_dot_product_attention(query, key, value)


def test_an_encoder_runs_beside_its_decoder():
    order = _order(TwoTowers(), torch.randn(2, 5, 8), torch.randn(2, 3, 8))
    towers, projections = order.forks
    assert [branch.nodes for branch in towers.branches] == [
        ("encoder_0", "encoder_1", "encoder_2", "keys", "values"),
        ("decoder",),
    ]
    assert towers.after == ()
    assert [branch.nodes for branch in projections.branches] == [("keys",), ("values",)]
    assert projections.after == ("encoder_2",)
    assert order.width == 3


class Residual(nn.Module):
    def __init__(self, writes: bool) -> None:
        super().__init__()
        self.linear, self.writes = nn.Linear(8, 8), writes

    def forward(self, x):
        y = x.sin()
        z = self.linear(y)
        if self.writes:
            y.mul_(2)
        return z + y.cos()


@pytest.mark.parametrize(("writes", "width"), [(False, 2), (True, 1)])
def test_a_write_comes_after_earlier_reads_and_before_later_ones(writes, width):
    assert _order(Residual(writes), torch.randn(2, 8)).width == width


class Branching(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum() > 0 else x * 3


def test_a_leaf_that_depends_on_data_is_named():
    model = nn.Sequential(nn.Linear(8, 8), Branching())
    order = _order(model, torch.randn(2, 8), is_leaf=lambda module: isinstance(module, (nn.Linear, Branching)))
    assert len(order.unmeasured) == 1
    assert order.flops == _linear(8, 8, rows=1)
