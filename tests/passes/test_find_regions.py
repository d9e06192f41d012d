"""Which nodes become one region, at each granularity, and that regions are convex, connected and apart."""

from collections import Counter

import networkx as nx
import pytest
import torch
from torch import Tensor, fx, nn

import bwsk_fx
from bwsk_fx.errors import PlanError
from bwsk_fx.passes.find_regions import REGION, FindRegions
from bwsk_fx.verdict import Label

GRANULARITIES = ["block", "s-run", "whole"]


def _regions(graph: fx.GraphModule) -> dict[str, list[fx.Node]]:
    found: dict[str, list[fx.Node]] = {}
    for node in graph.graph.nodes:
        if REGION in node.meta:
            found.setdefault(node.meta[REGION], []).append(node)
    return found


def _assigned(model: nn.Module, *inputs: Tensor, granularity: str = "block") -> fx.GraphModule:
    graph = bwsk_fx.capture(model, inputs)
    bwsk_fx.type_nodes(graph)
    FindRegions(granularity).run(graph)
    return graph


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def vit(request, make_vit, make_images):
    graph = bwsk_fx.capture(make_vit(request.param), make_images())
    bwsk_fx.type_nodes(graph)
    return graph


def _edges(graph: fx.GraphModule) -> nx.DiGraph:
    edges = nx.DiGraph()
    edges.add_nodes_from(graph.graph.nodes)
    edges.add_edges_from((operand, node) for node in graph.graph.nodes for operand in node.all_input_nodes)
    return edges


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_regions_are_convex_connected_and_of_two_nodes_or_more(vit, granularity):
    FindRegions(granularity).run(vit)
    edges = _edges(vit)
    assert _regions(vit)
    for name, members in _regions(vit).items():
        assert len(members) >= 2, name
        assert nx.is_weakly_connected(edges.subgraph(members)), name
        below = set().union(*(nx.descendants(edges, node) for node in members)) - set(members)
        assert not any(below & nx.ancestors(edges, node) for node in members), name


def test_blocks_and_the_stretches_between_them(vit):
    FindRegions("block").run(vit)
    regions = _regions(vit)
    assert list(regions) == ["segment_0", "vit_layers_0", "vit_layers_1", "segment_1"]
    assert len(regions["vit_layers_0"]) == len(regions["vit_layers_1"])
    assert all(node.name in [n.name for n in regions["segment_1"]] for node in vit.graph.nodes if "loss" in node.name)
    tensors = [node for node in vit.graph.nodes if isinstance(node.meta.get("val"), Tensor)]
    outside = {node.op for node in tensors if REGION not in node.meta}
    assert outside <= {"placeholder", "get_attr"}


def test_whole_is_one_region(vit):
    FindRegions("whole").run(vit)
    assert list(_regions(vit)) == ["whole"]


def test_an_s_run_holds_s_nodes_and_is_maximal(vit):
    FindRegions("s-run").run(vit)
    members = [node for nodes in _regions(vit).values() for node in nodes]
    assert {_label(node) for node in members} == {Label.S}
    kinds = Counter(type(vit.get_submodule(node.target)).__name__ for node in members if node.op == "call_module")
    assert kinds["LayerNorm"] >= 4 and "GELUActivation" not in kinds
    assert all(name.startswith("s_run_") for name in _regions(vit))


def _label(node: fx.Node) -> Label:
    source = node.args[0] if "getitem" in str(node.target) and isinstance(node.args[0].meta["val"], tuple) else node
    return source.meta["bwsk"].label


def test_assigning_twice_is_assigning_once(vit):
    FindRegions("s-run").run(vit)
    FindRegions("block").run(vit)
    once = {node.name: node.meta.get(REGION) for node in vit.graph.nodes}
    FindRegions("block").run(vit)
    assert {node.name: node.meta.get(REGION) for node in vit.graph.nodes} == once
    assert not any("s_run" in str(name) for name in once.values())


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh()) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x).sin()
        return x.sum()


@pytest.mark.parametrize("granularity", ["block", "whole"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_only_a_batch_norm_that_counts_stays_outside_in_train_mode(granularity, training, momentum):
    model = Net().train(training)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.momentum = momentum
    graph = _assigned(model, torch.randn(4, 8), granularity=granularity)
    norms = [node for node in graph.graph.nodes if str(node.target).rpartition(".")[2] == "1"]
    assert len(norms) == 2
    assert all((REGION in node.meta) == (not training or momentum is not None) for node in norms)


def test_a_batch_norm_whose_forward_method_was_replaced_stays_outside_in_train_mode():
    model = Net()
    norm = model.blocks[0][1]
    norm.forward = norm.forward
    graph = _assigned(model, torch.randn(4, 8))
    norms = [node for node in graph.graph.nodes if str(node.target).rpartition(".")[2] == "1"]
    assert [REGION in node.meta for node in norms] == [False, True]


def test_batch_norm_without_statistics_may_be_inside():
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.Tanh())
    assert [len(nodes) for nodes in _regions(_assigned(model, torch.randn(4, 8))).values()] == [3]


class Alternating(nn.Module):
    """Two stretches that are not connected, their nodes in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Bilinear(8, 8, 2), nn.Tanh())])

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x, y = x.sin(), y.sin()
        x, y = x.cos(), y.cos()
        x = x.exp().tanh()
        y = y.exp().tanh()
        return x, y


def test_a_region_is_one_stretch_of_the_execution_order():
    graph = _assigned(Alternating(), torch.randn(4, 8), torch.randn(4, 8))
    order = {node: place for place, node in enumerate(graph.graph.nodes)}
    names = [[node.name for node in nodes] for nodes in _regions(graph).values()]
    assert names == [["exp", "tanh"], ["exp_1", "tanh_1"]]
    for nodes in _regions(graph).values():
        assert [order[node] for node in nodes] == list(range(order[nodes[0]], order[nodes[0]] + len(nodes)))


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.linear = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        attended, _ = self.attention(x, x, x, need_weights=False)
        first, second = self.linear(attended).chunk(2, dim=-1)
        return first * second


def test_only_tensors_cross_the_border():
    graph = _assigned(Parts(), torch.randn(2, 3, 8), granularity="whole")
    (members,) = _regions(graph).values()
    assert "chunk" in [node.name for node in members]
    operands = {operand for node in members for operand in node.all_input_nodes} - set(members)
    assert all(isinstance(operand.meta["val"], Tensor) for operand in operands)


def test_errors():
    with pytest.raises(PlanError, match=r"^granularity is 'layer': expected one of 'block', 's-run', 'whole'$"):
        FindRegions("layer")
    graph = bwsk_fx.capture(nn.Sequential(nn.Linear(8, 8), nn.Tanh()), torch.randn(4, 8))
    with pytest.raises(
        PlanError, match=r"^node \w+ has no label: run TypeNodes before FindRegions\(granularity='s-run'\)$"
    ):
        FindRegions("s-run").run(graph)
