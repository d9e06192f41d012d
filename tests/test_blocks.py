"""Blocks are the modules that a container holds under a number."""

import pytest
import torch
from torch import nn

import bwsk_fx
from bwsk_fx.blocks import block_of, blocks, section_and_index


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 4)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(x)


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.ones(4))
        self.stem = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.layers = nn.ModuleList([_Block(), _Block()])
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x) + self.shift
        for layer in self.layers:
            x = layer(x)
        return self.head(x).view(x.shape[0], 2)


@pytest.fixture(scope="module")
def graph():
    return bwsk_fx.capture(_Model(), torch.randn(2, 4)).graph


def test_blocks_group_nodes_by_the_outermost_index(graph):
    names = {path: [node.name for node in nodes] for path, nodes in blocks(graph)}
    assert names == {
        f"layers.{index}": [
            f"layers_{index}_inner_0",
            f"layers_{index}_inner_1_0",
            f"layers_{index}_inner_1_1",
            f"add_{index + 1}",
        ]
        for index in (0, 1)
    }


def test_operators_in_a_sequential_inputs_attributes_and_sizes_are_in_no_block(graph):
    outside = [node for node in graph.nodes if block_of(node) is None]
    assert [node.name for node in outside] == [
        "x",
        "stem_0",
        "stem_1",
        "shift",
        "add",
        "head",
        "size",
        "view",
        "output",
    ]


def test_section_and_index():
    assert section_and_index("vit.layers.11") == ("vit.layers", 11)
    assert section_and_index("3") == ("", 3)
