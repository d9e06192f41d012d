"""Typing a whole model: every node has a verdict, and the numbers are those of its shapes."""

import copy

import pytest
import torch
from torch import nn

import bwsk_fx
from bwsk_fx.errors import RuleError
from bwsk_fx.passes import PassError, PassPipeline, PropagateValues, TypeNodes
from bwsk_fx.passes.type_nodes import type_nodes
from bwsk_fx.rules import registry
from bwsk_fx.verdict import Label, Verdict

TOKENS, HIDDEN, HEADS, INNER, LABELS = 5, 48, 3, 192, 10
HEAD = HIDDEN // HEADS


def _vit(attention: str = "sdpa", dropout: float = 0.0, labels: bool = True, training: bool = True):
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        intermediate_size=INNER,
        image_size=16,
        patch_size=8,
        num_labels=LABELS,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    config._attn_implementation = attention
    inputs = {"pixel_values": torch.randn(2, 3, 16, 16)}
    if labels:
        inputs["labels"] = torch.arange(2)
    return bwsk_fx.capture(ViTForImageClassification(config).train(training), inputs)


def _k_nodes(graph) -> dict[str, tuple]:
    erasures = {node.name: node.meta["bwsk"] for node in graph.graph.nodes if node.meta["bwsk"].label is Label.K}
    return {name: (verdict.erasure.elements, verdict.erasure.bits) for name, verdict in erasures.items()}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("labels", [True, False])
def test_no_node_of_a_vit_is_unknown(attention, dropout, labels):
    graph = type_nodes(_vit(attention, dropout, labels))
    verdicts = [node.meta["bwsk"] for node in graph.graph.nodes]
    assert all(isinstance(verdict, Verdict) for verdict in verdicts)
    assert [verdict.rationale for verdict in verdicts if verdict.label is Label.GRAY] == []


def test_what_a_vit_erases_with_fused_attention():
    expected = {"vit_embeddings_patch_embeddings_projection": (4 * (192 - 48), None)}
    for index, suffix in enumerate(("", "_1")):
        expected[f"scaled_dot_product_attention{suffix}"] = (2 * TOKENS * HIDDEN, None)
        expected[f"vit_layers_{index}_mlp_activation_fn"] = (None, TOKENS * INNER)
        expected[f"vit_layers_{index}_mlp_fc2"] = (TOKENS * (INNER - HIDDEN), None)
    expected |= {"getitem": ((TOKENS - 1) * HIDDEN, None), "classifier": (HIDDEN - LABELS, None)}
    assert _k_nodes(type_nodes(_vit())) == expected | {"cross_entropy": (LABELS, None)}


def test_what_eager_attention_and_dropout_erase():
    erased = _k_nodes(type_nodes(_vit("eager", dropout=0.1, labels=False)))
    probabilities = HEADS * TOKENS * TOKENS
    assert erased["dropout"] == (pytest.approx(0.1 * probabilities), None)
    assert erased["vit_layers_0_dropout"] == (pytest.approx(0.1 * TOKENS * HIDDEN), None)
    # Five tokens of sixteen dimensions: scores of queries and keys contract, products with values expand.
    assert erased["matmul"] == (HEADS * TOKENS * (HEAD - TOKENS), None)
    assert "matmul_1" not in erased


def test_dropout_erases_nothing_in_eval_mode():
    graph = type_nodes(_vit(dropout=0.1, training=False))
    labels = {node.meta["bwsk"].label for node in graph.graph.nodes if "dropout" in node.name}
    assert labels == {Label.S}


def test_residuals_name_their_other_operand():
    graph = type_nodes(_vit())
    witness = {node.name: node.meta["bwsk"].witness for node in graph.graph.nodes}["add_1"]
    assert witness.names == ("vit_embeddings_dropout",)
    assert witness.elements == TOKENS * HIDDEN


def test_inputs_static_values_sizes_and_outputs_are_not_counted():
    graph = type_nodes(_vit())
    uncounted = [node.name for node in graph.graph.nodes if not node.meta["bwsk"].counted]
    assert uncounted == [
        "pixel_values",
        "labels",
        "vit_embeddings_cls_token",
        "size",
        "expand",
        "vit_embeddings_position_embeddings",
        "image_classifier_output",
        "output",
    ]
    static = next(node for node in graph.graph.nodes if node.name == "expand")
    assert "static" in static.meta["bwsk"].rationale


def test_an_unknown_ruleset_names_the_known_ones():
    with pytest.raises(RuleError, match="no ruleset 'strict'; the rulesets are sound, published"):
        TypeNodes(ruleset="strict")
    with pytest.raises(RuleError, match="sound, published"):
        type_nodes(_vit(), "strict")


def test_typing_again_replaces_every_verdict():
    graph = _vit()
    fc2 = next(node for node in graph.graph.nodes if node.name == "vit_layers_0_mlp_fc2")
    labels = [type_nodes(graph, ruleset) and fc2.meta["bwsk"].label for ruleset in ("sound", "published", "sound")]
    assert labels == [Label.K, Label.S, Label.K]
    assert {node.meta["bwsk"].ruleset for node in graph.graph.nodes} == {"sound"}


def test_typing_changes_nothing_but_meta():
    graph = _vit()
    code = graph.code
    assert type_nodes(graph) is graph
    graph.recompile()
    assert graph.code == code
    # Verdicts survive a copy, which training and saving make.
    assert all("bwsk" in node.meta for node in copy.deepcopy(graph).graph.nodes)


def test_a_graph_without_values_is_refused():
    graph = _vit()
    del next(node for node in graph.graph.nodes if node.name == "add_1").meta["val"]
    with pytest.raises(PassError, match=r"before pass 'type-nodes': node 'add_1' .* PropagateValues"):
        type_nodes(graph)


def test_a_rule_that_fails_is_named_with_node_and_source_line(monkeypatch):
    def broken(call):
        raise KeyError("oops")

    monkeypatch.setitem(registry._RULES, nn.GELU, broken)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.GELU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.act(x)

    with pytest.raises(RuleError, match=r"node 'act' .*test_type_nodes\.py.* failed: KeyError: 'oops'"):
        type_nodes(bwsk_fx.capture(Model(), torch.randn(2, 3)))


def test_values_are_refreshed_from_the_placeholders():
    graph = _vit("eager", dropout=0.1)
    shapes = {node: node.meta["val"].shape for node in graph.graph.nodes if hasattr(node.meta["val"], "shape")}
    random_state = torch.get_rng_state()
    for node in graph.graph.nodes:
        if node.op != "placeholder":
            node.meta["val"] = None if node.op != "get_attr" else torch.empty(0)
        node.meta["mine"] = node.name
    PassPipeline([PropagateValues(), TypeNodes()])(graph)
    assert {node: node.meta["val"].shape for node in shapes} == shapes
    assert all(node.meta["mine"] == node.name for node in graph.graph.nodes)
    assert torch.equal(torch.get_rng_state(), random_state)


def test_propagating_leaves_buffers_alone():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU())
    graph = bwsk_fx.capture(model, torch.randn(4, 3))
    PropagateValues().run(graph)
    assert torch.equal(model[0].running_mean, torch.zeros(3))
    assert model[0].num_batches_tracked == 0
    assert [str(node.meta["val"].dtype) for node in graph.graph.nodes if node.op == "call_module"] == [
        "torch.float32"
    ] * 2


def test_propagating_needs_fake_placeholders():
    graph = bwsk_fx.capture(nn.Sequential(nn.ReLU()), torch.randn(4, 3))
    next(iter(graph.graph.nodes)).meta["val"] = torch.randn(4, 3)
    with pytest.raises(PassError, match="'propagate-values': no placeholder has a fake tensor"):
        PropagateValues().run(graph)
