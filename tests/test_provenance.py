"""Ways back from a node and the erasure budget, on small models whose every label is certain."""

import json

import pytest
import torch
from torch import nn

import bwsk_fx
from bwsk_fx.errors import RuleError
from bwsk_fx.provenance import erasure_budget, trace_back
from bwsk_fx.verdict import OPERATOR, Label, Verdict, WitnessKind


def _typed(model, *inputs, ruleset="sound"):
    return bwsk_fx.type_nodes(bwsk_fx.capture(model, inputs), ruleset)


def _function(forward):
    """A module without parameters that computes `forward`."""
    signature = type("Own", (nn.Module,), {"forward": forward})
    return signature()


def _judge(graph, name, label):
    """Give a node a verdict without amounts, whatever the rules know of it."""
    node = next(node for node in graph.graph.nodes if node.name == name)
    node.meta["bwsk"] = Verdict(label, None, None, OPERATOR, "test: as judged here", "test")


def _nodes(way):
    return [step.node for step in way.steps]


class _Chain(nn.Module):
    """4 → 8 → 8, all S, then 8 → 3, which is K."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.up = nn.Linear(4, 8)
        self.down = nn.Linear(8, 3)
        self.last = nn.Linear(3, 3)

    def forward(self, x):
        return self.last(self.down(self.up(self.norm(x)).transpose(1, 2).transpose(1, 2)))


@pytest.fixture(scope="module")
def chain():
    return _typed(_Chain(), torch.randn(2, 5, 4))


def test_a_chain_of_s_nodes_reaches_the_input(chain):
    found = trace_back(chain, "transpose_1")
    (way,) = found.ways
    assert (found.node, found.operator, found.label) == ("transpose_1", "transpose", Label.S)
    assert _nodes(way) == ["transpose_1", "transpose", "up", "norm"]
    assert [step.operator for step in way.steps] == ["transpose", "transpose", "Linear", "LayerNorm"]
    assert {step.label for step in way.steps} == {Label.S}
    assert found.inputs == ("x",)
    assert found.cuts == ()
    assert way.steps[2].source.startswith(f"{__file__}:")


def test_by_products_are_witnesses(chain):
    (way,) = trace_back(chain, "norm").ways
    (witness,) = way.witnesses
    assert (witness.kind, witness.names) == (WitnessKind.BY_PRODUCTS, ("mean", "rstd"))
    # A mean and a reciprocal deviation for each of five vectors.
    assert (way.witness_elements, way.witness_bytes) == (10, 40)


def test_a_contraction_cuts(chain):
    found = trace_back(chain, "last")
    (way,) = found.ways
    assert _nodes(way) == ["last"]
    assert found.inputs == ()
    (cut,) = found.cuts
    assert (cut.node, cut.operator, cut.label) == ("down", "Linear", Label.K)
    assert cut.erasure.elements == 5 * (8 - 3)
    assert "8 → 3 contracts" in cut.rationale
    assert cut.source.startswith(f"{__file__}:")


def test_a_k_node_cuts_its_own_way_back(chain):
    (way,) = trace_back(chain, "down").ways
    assert way.steps == ()
    assert way.cut.node == "down"


def test_an_input_determines_itself(chain):
    found = trace_back(chain, "x")
    assert found.inputs == ("x",)
    assert _nodes(found.ways[0]) == []


def test_a_node_of_the_graph_will_do_as_well_as_its_name(chain):
    node = next(node for node in chain.graph.nodes if node.name == "last")
    assert trace_back(chain, node) == trace_back(chain, "last")


def test_a_sum_rebuilds_one_operand_with_the_other_at_hand():
    def forward(self, x, y):
        return (x.transpose(1, 2) + y).neg()

    found = trace_back(_typed(_function(forward), torch.randn(2, 3, 3), torch.ones(2, 3, 3)), "neg")
    (way,) = found.ways
    assert _nodes(way) == ["neg", "add", "transpose"]
    assert found.inputs == ("x",)
    (witness,) = way.witnesses
    assert (witness.kind, witness.names) == (WitnessKind.OTHER_OPERAND, ("y",))
    assert (way.witness_elements, way.witness_bytes) == (9, 36)


def test_an_operand_that_two_sums_need_counts_once():
    graph = _typed(_function(lambda self, x, y: (x + y).neg() + y), torch.randn(2, 3), torch.ones(2, 3))
    (way,) = trace_back(graph, "add_1").ways
    assert _nodes(way) == ["add_1", "neg", "add"]
    assert way.witness_elements == 3


def test_a_way_back_to_its_own_witness_is_no_news():
    # Given x, the sum determines x: true of any function, so it is no way back to x.
    graph = _typed(_function(lambda self, x: x.neg() + x), torch.randn(2, 3))
    found = trace_back(graph, "add")
    assert found.inputs == ()
    (cut,) = found.cuts
    assert (cut.node, cut.label, cut.erasure) == ("add", Label.S, None)
    assert "needs x here, which determines 'x' already" in cut.rationale


def test_a_witness_that_determines_the_input_makes_it_no_news_either():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.left(x) + self.right(x)

    (way,) = trace_back(_typed(Two(), torch.randn(2, 3)), "add").ways
    assert _nodes(way) == ["add", "left"]
    assert (way.input, way.cut.node) == (None, "add")


def test_witnesses_are_no_news_together():
    # x + 2y and y determine x together, though neither does alone.
    def forward(self, x, y):
        return (x.neg() + y) + (x + y)

    graph = _typed(_function(forward), torch.randn(2, 3), torch.randn(2, 3))
    (way,) = trace_back(graph, "add_2").ways
    assert _nodes(way) == ["add_2", "add", "neg"]
    assert way.input is None
    assert "which determines 'x' already" in way.cut.rationale


def test_a_witness_that_erases_leaves_news():
    def forward(self, x):
        return x.neg() + x.relu()

    graph = _typed(_function(forward), torch.randn(2, 3))
    found = trace_back(graph, "add")
    assert found.inputs == ("x",)
    assert found.ways[0].witnesses[0].names == ("relu",)


def test_cat_determines_all_that_it_joins():
    def forward(self, x, y):
        return torch.cat([x.neg(), y], 1)

    found = trace_back(_typed(_function(forward), torch.randn(2, 3), torch.randn(2, 4)), "cat")
    assert {way.input: _nodes(way) for way in found.ways} == {"x": ["cat", "neg"], "y": ["cat"]}
    assert found.cuts == ()
    assert all(way.witness_elements == 0 for way in found.ways)


def test_one_way_is_open_and_another_is_cut():
    def forward(self, x, y):
        return torch.cat([x.relu(), y], 1).neg()

    found = trace_back(_typed(_function(forward), torch.randn(2, 3), torch.randn(2, 4)), "neg")
    assert found.inputs == ("y",)
    assert [(cut.node, cut.label) for cut in found.cuts] == [("relu", Label.K)]


def test_an_operand_that_lends_its_shape_is_not_determined():
    def forward(self, x, y):
        return x.view_as(y)

    found = trace_back(_typed(_function(forward), torch.randn(2, 6), torch.randn(2, 2, 3)), "view_as")
    assert found.inputs == ("x",)


def test_a_node_counts_once_and_by_its_smallest_witnesses():
    # x by way of the sum costs y, by way of the negation nothing.
    def forward(self, x, y):
        z = x.neg()
        return torch.cat([z + y, z], 1)

    (way,) = trace_back(_typed(_function(forward), torch.randn(2, 3), torch.ones(2, 3)), "cat").ways
    assert (way.input, _nodes(way), way.witness_elements) == ("x", ["cat", "neg"], 0)


def test_selecting_a_token_cuts():
    found = trace_back(_typed(_function(lambda self, x: x[:, 0].neg()), torch.randn(2, 5, 4)), "neg")
    (cut,) = found.cuts
    assert (cut.node, cut.operator, cut.erasure.elements) == ("getitem", "getitem", 4 * 4)


def test_a_node_that_no_rule_proves_cuts():
    graph = _typed(_function(lambda self, x: x.exp().neg()), torch.randn(2, 3))
    _judge(graph, "exp", Label.GRAY)
    (cut,) = trace_back(graph, "neg").cuts
    assert (cut.node, cut.label, cut.erasure, cut.rationale) == ("exp", Label.GRAY, None, "test: as judged here")


def test_a_piece_does_not_determine_what_it_was_cut_from_but_all_pieces_do():
    def forward(self, x):
        a, b = x.split([1, 3], 1)
        return a.neg(), torch.cat([b, a], 1)

    graph = _typed(_function(forward), torch.randn(2, 4))
    (cut,) = trace_back(graph, "neg").cuts
    assert (cut.node, cut.label, cut.erasure.elements) == ("getitem", Label.S, 3)
    assert "'split' has 2 results" in cut.rationale
    found = trace_back(graph, "cat")
    assert found.inputs == ("x",)
    assert set(_nodes(found.ways[0])) == {"cat", "getitem", "getitem_1", "split"}


def test_what_is_written_over_is_not_reached():
    def forward(self, x):
        y = x.neg()
        before = y.exp()
        y.view(-1)[0] = 0
        return before, y.exp()

    graph = _typed(_function(forward), torch.randn(2, 4))
    assert trace_back(graph, "exp").inputs == ("x",)
    found = trace_back(graph, "exp_1")
    assert found.inputs == ()
    assert [cut.node for cut in found.cuts] == ["setitem"]


def test_writing_through_a_view_is_not_followed():
    def forward(self, x):
        y = x.neg()
        y[:, 0].add_(1)
        return y.exp()

    (cut,) = trace_back(_typed(_function(forward), torch.randn(2, 4)), "exp").cuts
    assert (cut.node, cut.label) == ("add_", Label.S)
    assert "into the memory of 'neg' through a view" in cut.rationale


def test_random_values_are_no_input():
    found = trace_back(_typed(_function(lambda self, x: torch.rand(3) + x), torch.randn(2, 3)), "rand")
    assert [(way.input, way.cut) for way in found.ways] == [(None, None)]
    assert "ends in random values" in str(found)


def test_a_static_node_has_no_ways(chain):
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return x + self.shift.exp()

    graph = _typed(Shifted(), torch.randn(2, 3))
    assert trace_back(graph, "exp").ways == ()
    assert trace_back(graph, "add").inputs == ("x",)


def test_the_output_goes_back_to_all_results():
    def forward(self, x, y):
        return x.neg(), y.relu()

    found = trace_back(_typed(_function(forward), torch.randn(2, 3), torch.randn(2, 3)), "output")
    assert found.inputs == ("x",)
    assert [cut.node for cut in found.cuts] == ["relu"]


def test_a_vits_classifier_and_last_block(make_vit, make_images):
    graph = bwsk_fx.type_nodes(bwsk_fx.capture(make_vit(), make_images()))
    (cut,) = trace_back(graph, "classifier").cuts
    assert (cut.node, cut.erasure.elements) == ("classifier", 32 - 5)
    (way,) = trace_back(graph, "vit_layernorm").ways
    assert _nodes(way)[:2] == ["vit_layernorm", "add_4"]
    # The branch of the last block, which its second linear map cuts; the residual stream would have to be at hand.
    assert way.cut.node == "vit_layers_1_mlp_fc2"
    tokens, hidden = 17, 32
    assert way.witness_elements == tokens * hidden + 2 * tokens
    # Patches of 48 pixels become 32 features: sixteen patches lose sixteen each.
    (cut,) = trace_back(graph, "vit_layers_0_layernorm_before").cuts
    assert (cut.node, cut.erasure.elements) == ("vit_embeddings_patch_embeddings_projection", 16 * 16)


def test_unknown_names_are_met_with_near_ones(chain):
    with pytest.raises(RuleError, match=r"no node 'dwon'; did you mean 'down'"):
        trace_back(chain, "dwon")
    with pytest.raises(RuleError, match=r"no node 'zzz'; its first are 'x', 'norm', 'up', 'transpose', and"):
        trace_back(chain, "zzz")


def test_nodes_of_other_graphs_are_refused(chain):
    other = _typed(_Chain(), torch.randn(2, 5, 4))
    node = next(node for node in other.graph.nodes if node.name == "last")
    with pytest.raises(RuleError, match="node 'last' belongs to another graph"):
        trace_back(chain, node)


@pytest.mark.parametrize("query", [lambda graph: trace_back(graph, "last"), erasure_budget], ids=["trace", "budget"])
def test_a_graph_that_is_not_typed_is_refused(query):
    graph = bwsk_fx.capture(_Chain(), torch.randn(2, 5, 4))
    with pytest.raises(RuleError, match=r"node 'x' has no verdict; call bwsk_fx.type_nodes\(graph\) first"):
        query(graph)


# -- the erasure budget ---------------------------------------------------------------------------------------------


class _Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up = nn.Linear(4, width)
        self.act = nn.GELU()
        self.down = nn.Linear(width, 4)

    def forward(self, x):
        return x + self.down(self.act(self.up(x)))


class _Model(nn.Module):
    """A stem, three blocks inside a body, a head; the first block runs again at the end."""

    def __init__(self, own=None):
        super().__init__()
        self.stem = nn.ModuleDict({"norm": nn.LayerNorm(4), "drop": nn.Dropout(0.3)})
        self.body = nn.ModuleDict({"layers": nn.ModuleList([_Block(8), _Block(8), _Block(6)]), "norm": nn.LayerNorm(4)})
        self.squash = nn.ReLU()
        self.own = own
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.stem["drop"](self.stem["norm"](x))
        for layer in self.body["layers"]:
            x = layer(x)
        x = self.body["layers"][0](self.body["norm"](x))
        x = self.squash(x)
        if self.own is not None:
            x = self.own(x)
        return self.head(x[:, 0])


@pytest.fixture(scope="module")
def model_graph():
    graph = _typed(_Model(_function(lambda self, x: x * 2)), torch.randn(2, 3, 4))
    _judge(graph, "squash", Label.K)
    _judge(graph, "own", Label.GRAY)
    return graph


def test_a_row_per_layer_in_graph_order(model_graph):
    layers = erasure_budget(model_graph).layers
    assert [layer.layer for layer in layers] == [
        "stem.norm",
        "stem.drop",
        "body.layers.0",
        "body.layers.1",
        "body.layers.2",
        "body.norm",
        "body.layers.0",
        "squash",
        "own",
        "",
        "head",
    ]
    # Three vectors per sample: `down` erases the difference of widths, GELU a bit per element.
    assert [layer.erased_elements for layer in layers if "layers" in layer.layer] == [12, 12, 6, 12]
    assert [layer.erased_bits for layer in layers if "layers" in layer.layer] == [24, 24, 18, 24]
    assert [(layer.k, layer.unmeasured, layer.gray) for layer in layers] == [
        (0, 0, 0),
        (1, 0, 0),
        *[(2, 0, 0)] * 3,
        (0, 0, 0),
        (2, 0, 0),
        (1, 1, 0),
        (0, 0, 1),
        (1, 0, 0),
        (1, 0, 0),
    ]


def test_sums_so_far_end_in_the_summarys_totals(model_graph):
    budget, summary = erasure_budget(model_graph), bwsk_fx.summarize(model_graph)
    running = [layer.cumulative_elements for layer in budget.layers]
    assert running[:7] == pytest.approx([0, 3.6, 15.6, 27.6, 33.6, 33.6, 45.6])
    assert budget.erased_elements == running[-1] == summary.erased_elements
    assert budget.erased_bits == budget.layers[-1].cumulative_bits == summary.erased_bits
    assert (budget.unmeasured, budget.gray) == (summary.unmeasured, summary.gray)
    assert sum(layer.k for layer in budget.layers) == summary.k
    assert sum(layer.erased_elements for layer in budget.layers) == pytest.approx(summary.erased_elements)


def test_a_row_per_k_node_with_its_share_of_the_operands(model_graph):
    nodes = {node.node: node for layer in erasure_budget(model_graph).layers for node in layer.nodes}
    down = nodes["body_layers_2_down"]
    assert (down.operator, down.module, down.erased_elements, down.operand_elements) == (
        "Linear",
        "body.layers.2.down",
        6,
        18,
    )
    assert down.share == pytest.approx(1 / 3)
    assert nodes["stem_drop"].share == pytest.approx(0.3)
    assert nodes["getitem"].share == pytest.approx(2 / 3)
    # Bits are no part of the elements.
    assert (nodes["body_layers_2_act"].erased_bits, nodes["body_layers_2_act"].share) == (18, None)


def test_a_vit_has_a_row_per_block(make_vit, make_images):
    graph = bwsk_fx.type_nodes(bwsk_fx.capture(make_vit(num_hidden_layers=3), make_images()))
    budget, summary = erasure_budget(graph), bwsk_fx.summarize(graph)
    assert [layer.layer for layer in budget.layers] == [
        "vit.embeddings",
        *(f"vit.layers.{index}" for index in range(3)),
        "vit.layernorm",
        "",
        "classifier",
        "",
    ]
    blocks = {f"{block.section}.{block.index}": block for block in summary.blocks}
    for layer in budget.layers[1:4]:
        block = blocks[layer.layer]
        assert layer.k == block.k
        assert (layer.erased_elements, layer.erased_bits) == (block.erased_elements, block.erased_bits)
    assert (budget.erased_elements, budget.erased_bits) == (summary.erased_elements, summary.erased_bits)
    assert budget.erased_elements > 0


def test_the_published_table_measures_nothing(model_graph):
    graph = _typed(_Model(), torch.randn(2, 3, 4), ruleset="published")
    budget, summary = erasure_budget(graph), bwsk_fx.summarize(graph)
    assert budget.unmeasured == summary.unmeasured == summary.k > 0
    assert (budget.erased_elements, budget.erased_bits) == (0, 0)


def test_to_json_is_json(chain, model_graph):
    trace = json.loads(json.dumps(trace_back(chain, "last").to_json()))
    assert (trace["node"], trace["label"], trace["inputs"]) == ("last", "S", [])
    assert [step["node"] for step in trace["ways"][0]["steps"]] == ["last"]
    assert trace["cuts"][0] == trace["ways"][0]["cut"]
    assert trace["cuts"][0]["erasure"] == {"elements": 25, "bits": None, "expected": False}
    budget = json.loads(json.dumps(erasure_budget(model_graph).to_json()))
    assert budget["erased_elements"] == budget["layers"][-1]["cumulative_elements"]
    assert budget["layers"][2]["layer"] == "body.layers.0"
    assert budget["layers"][2]["k"] == 2
    assert [node["share"] for node in budget["layers"][2]["nodes"]] == [None, 0.5]


def test_a_graph_without_operators_erases_nothing():
    graph = _typed(_function(lambda self, x: x), torch.randn(2, 3))
    assert (erasure_budget(graph).layers, erasure_budget(graph).erased_elements) == ((), 0)
