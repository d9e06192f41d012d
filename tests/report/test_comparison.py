"""Both rulesets over the same calls: counts, where they disagree, and that the graph stays as it was."""

import json

import pytest
import torch
from rich.console import Console
from torch import nn

import bwsk_fx
from bwsk_fx.report.comparison import BlockCounts, LabelCounts, OperatorCounts, compare_rulesets
from bwsk_fx.verdict import Label


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(48)
        self.fc1 = nn.Linear(48, width)
        self.act = nn.ReLU()
        self.fc2 = nn.Linear(width, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.fc2(self.act(self.fc1(self.norm(x))))


class _Patches(nn.Module):
    """A patch embedding that does not shrink, two wide blocks and a square one; functions between them."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 48, 4, stride=4)
        self.layers = nn.ModuleList([_Block(96), _Block(96), _Block(48)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = layer(x)
        return torch.tanh(x)


@pytest.fixture(scope="module")
def graph():
    return bwsk_fx.capture(_Patches(), torch.randn(2, 3, 8, 8))


@pytest.fixture(scope="module")
def comparison(graph):
    return compare_rulesets(graph)


def test_both_columns_count_the_leaf_module_calls(comparison):
    # The study: the patch embedding and the activations are K. Sound: the two contractions and the activations are.
    assert comparison.total == 1 + 3 * 4
    assert comparison.published == LabelCounts(s=9, k=4, gray=0)
    assert comparison.sound == LabelCounts(s=8, k=5, gray=0)
    assert comparison.agreed == 13 - 3


def test_the_published_column_is_that_of_the_summary(graph, comparison):
    summary = bwsk_fx.summarize(bwsk_fx.type_nodes(graph, "published"))
    assert comparison.published == LabelCounts(summary.s, summary.k, summary.gray)
    assert [(row.section, row.index, row.published) for row in comparison.blocks] == [
        (block.section, block.index, LabelCounts(block.s, block.k, block.gray)) for block in summary.blocks
    ]


def test_a_row_per_block(comparison):
    published, contracting, square = LabelCounts(3, 1, 0), LabelCounts(2, 2, 0), LabelCounts(3, 1, 0)
    assert comparison.blocks == (
        BlockCounts(published, contracting, "layers", 0),
        BlockCounts(published, contracting, "layers", 1),
        BlockCounts(published, square, "layers", 2),
    )


def test_a_row_per_class_of_modules(comparison):
    assert comparison.operators == (
        OperatorCounts(LabelCounts(0, 1, 0), LabelCounts(1, 0, 0), "Conv2d"),
        OperatorCounts(LabelCounts(3, 0, 0), LabelCounts(3, 0, 0), "LayerNorm"),
        OperatorCounts(LabelCounts(6, 0, 0), LabelCounts(4, 2, 0), "Linear"),
        OperatorCounts(LabelCounts(0, 3, 0), LabelCounts(0, 3, 0), "ReLU"),
    )


def test_disagreements_are_grouped_by_reason_and_name_an_example(graph, comparison):
    contraction, patch = comparison.disagreements
    assert (contraction.operator, contraction.published, contraction.sound) == ("Linear", Label.S, Label.K)
    assert (contraction.count, contraction.example) == (2, "layers_0_fc2")
    assert (patch.operator, patch.published, patch.sound) == ("Conv2d", Label.K, Label.S)
    assert (patch.count, patch.example) == (1, "patch")
    verdicts = {node.name: node.meta["bwsk"] for node in bwsk_fx.type_nodes(graph).graph.nodes}
    for group in comparison.disagreements:
        assert group.rationale == verdicts[group.example].rationale


def test_verdicts_stay_as_they_were():
    graph = bwsk_fx.capture(_Patches(), torch.randn(2, 3, 8, 8))
    before = [dict(node.meta) for node in graph.graph.nodes]
    compare_rulesets(graph)
    assert [node.meta for node in graph.graph.nodes] == before
    bwsk_fx.type_nodes(graph, "published")
    verdicts = [node.meta["bwsk"] for node in graph.graph.nodes]
    compare_rulesets(graph)
    assert all(node.meta["bwsk"] is verdict for node, verdict in zip(graph.graph.nodes, verdicts, strict=True))


def test_verdicts_stay_as_they_were_when_a_rule_fails(graph, monkeypatch):
    bwsk_fx.type_nodes(graph, "published")

    def broken(graph, ruleset):
        for node in graph.graph.nodes:
            node.meta["bwsk"] = "half done"
        raise ValueError("broken")

    monkeypatch.setattr("bwsk_fx.report.comparison.type_nodes", broken)
    with pytest.raises(ValueError, match="broken"):
        compare_rulesets(graph)
    assert {node.meta["bwsk"].ruleset for node in graph.graph.nodes} == {"published"}


def test_calls_on_static_values_are_s_in_both_columns():
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(4, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.table(torch.arange(4))

    comparison = compare_rulesets(bwsk_fx.capture(Positions(), torch.randn(2, 4, 8)))
    assert comparison.published == comparison.sound == LabelCounts(1, 0, 0)


def test_to_json_is_json_with_totals(comparison):
    report = json.loads(json.dumps(comparison.to_json()))
    assert (report["total"], report["agreed"]) == (13, 10)
    assert report["published"] == {"s": 9, "k": 4, "gray": 0}
    assert report["blocks"][2]["sound"] == {"s": 3, "k": 1, "gray": 0}
    assert report["disagreements"][0]["sound"] == "K"


def test_prints_runs_of_equal_blocks_as_one_row(comparison):
    lines = str(comparison).splitlines()
    assert lines[:3] == [
        "13 leaf-module calls, 10 with the same label under both rulesets",
        "published: 9 S, 4 K, 0 GRAY; S ratio 69.2%",
        "sound: 8 S, 5 K, 0 GRAY; S ratio 61.5%",
    ]
    rows = [line.split() for line in lines if line.startswith(("layers.", "Linear "))]
    assert rows == [
        ["layers.0-1", "3", "1", "0", "2", "2", "0"],
        ["layers.2", "3", "1", "0", "3", "1", "0"],
        ["Linear", "6", "0", "0", "4", "2", "0"],
    ]
    assert any(
        line.startswith("Linear: S in published, K in sound (2 calls, such as layers_0_fc2): ") for line in lines
    )
    assert any(line.startswith("Conv2d: K in published, S in sound (1 call, such as patch): ") for line in lines)


def test_rich_prints_the_same_text(comparison):
    console = Console(width=100, highlight=False)
    with console.capture() as captured:
        console.print(comparison)
    assert [line.rstrip() for line in captured.get().splitlines()] == str(comparison).splitlines()


def test_a_graph_without_leaf_modules():
    class Sine(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.sin(x)

    comparison = compare_rulesets(bwsk_fx.capture(Sine(), torch.randn(2, 4)))
    assert (comparison.total, comparison.agreed, comparison.disagreements) == (0, 0, ())
    assert str(comparison).startswith("0 leaf-module calls")
