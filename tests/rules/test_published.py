"""The published table: its numbers for ViT-base, its attribute rules, and what it leaves unknown."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import bwsk_fx
from bwsk_fx.passes.type_nodes import type_nodes
from bwsk_fx.report.summary import summarize
from bwsk_fx.rules.published import published_table
from bwsk_fx.verdict import Label, WitnessKind

STUDY = json.loads((Path(__file__).parents[1] / "data" / "published_sk_ratios.json").read_text())["models"]
IMAGE = torch.randn(2, 3, 4, 4)


@pytest.fixture(scope="module")
def vit_base():
    from transformers import ViTConfig, ViTForImageClassification

    # Counts do not depend on widths: the depth is ViT-base's, the rest is small.
    config = ViTConfig(hidden_size=12, num_attention_heads=3, intermediate_size=24, image_size=32)
    return bwsk_fx.capture(ViTForImageClassification(config).train(), torch.randn(2, 3, 32, 32))


def test_vit_base_counts_as_in_the_study(vit_base):
    study = STUDY["vit-base"]
    summary = summarize(type_nodes(vit_base, "published"))
    assert summary.total == study["leaf_modules"] == 136
    assert (summary.s, summary.k, summary.gray) == (study["s"], study["k"], study["gray"]) == (98, 38, 0)
    assert summary.s_ratio == pytest.approx(0.721, abs=0.0005)
    assert len(summary.blocks) == study["n_blocks"] == 12
    first = study["blocks"][0]
    expected = (first["s_count"], first["k_count"], first["gray_count"])
    assert {(block.s, block.k, block.gray) for block in summary.blocks} == {expected} == {(8, 3, 0)}


def test_two_calls_of_one_dropout_are_two_calls(vit_base):
    type_nodes(vit_base, "published")
    calls = [node for node in vit_base.graph.nodes if node.target == "vit.layers.0.dropout"]
    assert len(calls) == 2
    assert all(node.meta["bwsk"].counted and node.meta["bwsk"].label is Label.K for node in calls)


def test_what_is_no_module_is_labelled_and_not_counted(vit_base):
    type_nodes(vit_base, "published")
    verdicts = {node.name: node.meta["bwsk"] for node in vit_base.graph.nodes}
    assert {name: verdicts[name].label for name in ("add", "view", "scaled_dot_product_attention", "getitem")} == {
        "add": Label.S,
        "view": Label.S,
        "scaled_dot_product_attention": Label.GRAY,
        "getitem": Label.GRAY,
    }
    counted = {node.op for node in vit_base.graph.nodes if node.meta["bwsk"].counted}
    assert counted == {"call_module"}
    assert {verdict.ruleset for verdict in verdicts.values()} == {"published"}


def test_attribute_rules(verdict_of):
    def label(module):
        verdict = verdict_of(module, IMAGE, ruleset="published")
        assert verdict.confidence == 0.8
        return verdict.label

    assert label(nn.Conv2d(3, 3, 3)) is Label.S
    assert label(nn.Conv2d(3, 48, 4, stride=4)) is Label.K
    assert label(nn.Conv2d(3, 3, 3, stride=(1, 2))) is Label.K
    assert label(nn.BatchNorm2d(3).train()) is Label.K
    assert label(nn.BatchNorm2d(3).eval()) is Label.S


@pytest.mark.parametrize(
    ("module", "label"),
    [(nn.Linear(4, 1), Label.S), (nn.Softmax(-1), Label.K), (nn.Tanh(), Label.K), (nn.Dropout(0.0), Label.K)],
)
def test_the_table_ignores_shapes_and_rates(verdict_of, module, label):
    verdict = verdict_of(module, IMAGE, ruleset="published")
    assert (verdict.label, verdict.confidence) == (label, 0.5)
    if label is Label.S:
        assert verdict.witness.kind is WitnessKind.UNSTATED


def test_model_specific_modules(verdict_of):
    from transformers.activations import GELUActivation

    assert verdict_of(GELUActivation(), IMAGE, ruleset="published").rule == "published.GELUActivation"


def test_what_the_table_does_not_name_is_gray(verdict_of):
    verdict = verdict_of(nn.Hardshrink(), IMAGE, ruleset="published")
    assert (verdict.label, verdict.confidence) == (Label.GRAY, 0.3)
    assert "Hardshrink is not in the published table" in verdict.rationale


def test_the_table_says_labels_only():
    table = published_table()
    specific = [label for family in table["model_specific_modules"].values() for label in family.values()]
    assert {*table["modules"].values(), *table["functions"].values(), *specific} == {"S", "K", "GRAY"}
    assert table["unknown"] == "GRAY"
