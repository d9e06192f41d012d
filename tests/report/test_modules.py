"""The summary of a module tree: what is a leaf, in which block it is, and that calls do not matter."""

import json

import pytest
import torch
from torch import nn

import bwsk_fx
from bwsk_fx.report.modules import summarize_modules


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.act = nn.ReLU()
        self.never = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.linear(self.act(x)))


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([_Block(), _Block()])
        self.head = nn.Sequential(nn.BatchNorm1d(4), nn.Hardshrink())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def test_every_leaf_counts_once_however_often_it_is_called():
    model = _Model()
    modules = summarize_modules(model)
    assert (modules.s, modules.k, modules.gray, modules.total) == (2, 5, 1, 8)
    calls = bwsk_fx.summarize(bwsk_fx.type_nodes(bwsk_fx.capture(model, torch.randn(3, 4)), "published"))
    # Per block two calls of the activation, none of the dropout.
    assert (calls.s, calls.k, calls.gray) == (2, 5, 1)
    assert [(block.s, block.k) for block in calls.blocks] == [(1, 2), (1, 2)]


def test_shared_modules_count_once():
    model = _Model()
    model.layers[1] = model.layers[0]
    assert summarize_modules(model).total == 3 + 2


def test_blocks_are_modules_held_under_a_number_and_leaves_are_none():
    blocks = summarize_modules(_Model()).blocks
    assert [(block.section, block.index, block.s, block.k, block.gray) for block in blocks] == [
        ("layers", 0, 1, 2, 0),
        ("layers", 1, 1, 2, 0),
    ]


def test_blocks_are_those_of_the_graph_where_each_leaf_is_called_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Tanh(), nn.ELU())))
    graph = bwsk_fx.type_nodes(bwsk_fx.capture(model, torch.randn(3, 4)), "published")
    modules, calls = summarize_modules(model), bwsk_fx.summarize(graph)
    assert modules.to_json() == calls.to_json()
    assert [(block.section, block.index, block.total) for block in modules.blocks] == [("", 1, 3)]


def test_the_mode_decides_batch_norms():
    model = _Model()
    assert (summarize_modules(model.train()).k, summarize_modules(model.eval()).k) == (5, 4)


def test_prints_what_it_counts_and_lists_gray_modules():
    summary = summarize_modules(_Model())
    lines = str(summary).splitlines()
    assert lines[0] == "2 S, 5 K, 1 GRAY of 8 leaf modules; S ratio 25.0%"
    assert [line.split() for line in lines if line.startswith("layers.")] == [["layers.0-1", "1", "2", "0"]]
    assert lines[-1] == "GRAY head.1 (Hardshrink): published.Hardshrink: Hardshrink is not in the published table"
    assert json.loads(json.dumps(summary.to_json()))["ruleset"] == "published"


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.Tanh()])
def test_a_leaf_is_a_model_of_one_module(model):
    summary = summarize_modules(model)
    assert (summary.total, summary.blocks) == (1, ())
