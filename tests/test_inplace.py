"""Regions take in-place operators that write into what comes from outside, where nobody can tell the difference."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import bwsk_fx
from bwsk_fx.inplace import is_read_again, written_operand
from bwsk_fx.measure import saved_for_backward


class Residual(nn.Module):
    """As torchvision and transformers write ResNets: batch norms and in-place operators."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.second, self.second_norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.shortcut = nn.Conv2d(3, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.second_norm(self.second(self.relu(self.norm(self.first(x)))))
        y += self.shortcut(x)
        y *= 2
        return F.relu(y, inplace=True).sin()


def _gradients(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    model(x).sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def _fused(model: nn.Module, x: torch.Tensor, **options) -> nn.Module:
    return bwsk_fx.fuse_regions(bwsk_fx.type_nodes(bwsk_fx.capture(model, x)), **options)


@pytest.fixture
def images():
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("faith", ["exact", "rounded"])
@pytest.mark.parametrize("granularity", ["block", "s-run", "whole"])
def test_residual_networks_have_eagers_bits(images, granularity, faith):
    torch.manual_seed(0)
    model = Residual().train()
    fused = _fused(copy.deepcopy(model), images, granularity=granularity, faith=faith)
    for expected, found in zip(_gradients(model, images), _gradients(fused, images), strict=True):
        assert torch.equal(expected, found)
    assert saved_for_backward(fused, images) <= saved_for_backward(model, images)


@pytest.mark.parametrize("scale", [torch.tensor(2.0), torch.tensor(2.0, dtype=torch.float64), 2])
def test_the_dtype_stays_that_of_what_was_written_into(scale):
    class Scaled(nn.Module):
        def forward(self, x):
            y = self.norm(x)
            y *= scale
            return y.exp().sin()

    model = Scaled().train()
    model.norm = nn.BatchNorm1d(4)
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    fused = _fused(copy.deepcopy(model), x)
    assert fused(x).dtype is torch.float32
    assert all(map(torch.equal, _gradients(model, x), _gradients(fused, x)))


def test_what_is_read_again_stays_outside_of_regions(images):
    class Read(nn.Module):
        def forward(self, x):
            y = self.norm(x)
            z = y.view(-1)
            y += 1
            return (y.sin() + 1).exp().sum() + z.cos().sum()

    model = Read().train()
    model.norm = nn.BatchNorm2d(3)
    graph = bwsk_fx.capture(copy.deepcopy(model), images)
    (write,) = [node for node in graph.graph.nodes if node.target == "add_"]
    assert is_read_again(write, written_operand(write, graph))
    fused = bwsk_fx.fuse_regions(graph, faith="exact", budget=float("inf"))
    assert all(map(torch.equal, _gradients(model, images), _gradients(fused, images)))


def test_inputs_and_buffers_are_never_spared(images):
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x):
            self.count.add_(1)
            x.mul_(2)
            return x.sin().exp()

    graph = bwsk_fx.capture(Writes(), images.clone())
    writes = [node for node in graph.graph.nodes if written_operand(node, graph) is not None]
    assert [node.target for node in writes] == ["add_", "mul_"]
    assert all(is_read_again(node, written_operand(node, graph)) for node in writes)


def test_operators_that_write_nowhere():
    class Plain(nn.Module):
        def forward(self, x):
            return F.relu(x + 1, inplace=False).__add__(1).add(2)

    graph = bwsk_fx.capture(Plain(), torch.randn(2, 3))
    assert {written_operand(node, graph) for node in graph.graph.nodes} == {None}
