"""The summary counts what its ruleset counts, adds up erasure, and prints."""

import json

import pytest
import torch
from rich.console import Console
from torch import nn

import bwsk_fx
from bwsk_fx.errors import RuleError
from bwsk_fx.passes.type_nodes import type_nodes
from bwsk_fx.report.summary import Summary, summarize


class _Own(nn.Module):
    """A leaf without a rule, whose decomposition cannot be followed."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        y[:, 0].fill_(1.0)
        return y


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(4, width)
        self.act = nn.GELU()
        self.down = nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.act(self.up(x)))


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([_Block(8), _Block(8), _Block(6)])
        self.squash = nn.ReLU6()
        self.own = _Own()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.own(self.squash(x)).mean(1)


@pytest.fixture
def graph():
    return bwsk_fx.capture(_Model(), torch.randn(2, 3, 4))


def test_sound_counts_operators_and_adds_up_erasure(graph):
    summary = summarize(type_nodes(graph))
    # Per block: up and the sum are S, the activation and down are K; then ReLU6 K, the own module GRAY, the mean K.
    assert (summary.s, summary.k, summary.gray, summary.total) == (6, 8, 1, 15)
    assert (summary.s_ratio, summary.k_ratio) == (6 / 15, 8 / 15)
    # Three vectors per sample: each down erases the difference of widths, and the mean two vectors of three.
    assert summary.erased_elements == 3 * (4 + 4 + 2) + 2 * 4
    assert summary.erased_bits == 3 * (8 + 8 + 6)
    assert summary.unmeasured == 1
    assert summary.ruleset == "sound"


def test_published_counts_leaf_modules(graph):
    summary = summarize(type_nodes(graph, "published"))
    assert (summary.s, summary.k, summary.gray) == (6, 4, 1)
    assert summary.ruleset == "published"
    assert (summary.erased_elements, summary.erased_bits) == (0, 0)


def test_a_row_per_block(graph):
    rows = summarize(type_nodes(graph)).blocks
    assert [(row.section, row.index, row.s, row.k, row.gray) for row in rows] == [
        ("layers", i, 2, 2, 0) for i in range(3)
    ]
    assert [(row.erased_elements, row.erased_bits) for row in rows] == [(12, 24), (12, 24), (6, 18)]


def test_gray_nodes_are_listed(graph):
    (gray,) = summarize(type_nodes(graph)).gray_nodes
    assert (gray.name, gray.operator) == ("own", "own")
    assert "no rule for _Own" in gray.rationale


def test_to_json_is_json_with_totals(graph):
    report = json.loads(json.dumps(summarize(type_nodes(graph)).to_json()))
    assert {key: report[key] for key in ("s", "k", "gray", "total", "s_ratio", "k_ratio", "ruleset")} == {
        "s": 6,
        "k": 8,
        "gray": 1,
        "total": 15,
        "s_ratio": 0.4,
        "k_ratio": 8 / 15,
        "ruleset": "sound",
    }
    assert report["blocks"][2] == {
        "s": 2,
        "k": 2,
        "gray": 0,
        "erased_elements": 6,
        "erased_bits": 18,
        "unmeasured": 0,
        "section": "layers",
        "index": 2,
    }
    assert report["gray_nodes"][0]["name"] == "own"


def test_prints_runs_of_equal_blocks_as_one_row(graph):
    lines = str(summarize(type_nodes(graph))).splitlines()
    assert lines[0] == "6 S, 8 K, 1 GRAY of 15 operators on dynamic tensors; S ratio 40.0%"
    assert lines[1] == "erased per sample: 38 elements and 66 bits, and an unknown amount by 1 K node"
    rows = [line.split() for line in lines if line.startswith("layers.")]
    assert rows == [["layers.0-1", "2", "2", "0", "12", "24"], ["layers.2", "2", "2", "0", "6", "18"]]
    assert any(line.startswith("GRAY own") for line in lines)


def test_rich_prints_the_same_text(graph):
    summary = summarize(type_nodes(graph, "published"))
    console = Console(width=100, highlight=False)
    with console.capture() as captured:
        console.print(summary)
    assert captured.get().rstrip() == str(summary)
    assert "erased" not in str(summary)


def test_a_graph_that_is_not_typed_is_refused(graph):
    with pytest.raises(RuleError, match=r"node 'x' has no verdict; call bwsk_fx.type_nodes\(graph\) first"):
        summarize(graph)


def test_nothing_counted_is_no_division_by_zero():
    assert (Summary().s_ratio, Summary().k_ratio) == (0.0, 0.0)
