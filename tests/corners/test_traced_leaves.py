"""What leaf modules of real models do inside: numbers that become tensors, remembered indices, resampling."""

import copy
from functools import lru_cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import bwsk_fx
from bwsk_fx.modes import apply


class Bias(nn.Module):
    """As BEiT's relative positions: an index that a method makes of numbers, and remembers."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(9, 4))

    @staticmethod
    @lru_cache(maxsize=2)
    def index(size: int) -> Tensor:
        index = torch.arange(size) + 1
        index[0] = 7
        return index

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table[self.index(x.shape[-2])]


class Remembering(nn.Module):
    """As LeViT's: what it computes in eval mode is put into a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.known = nn.Parameter(torch.randn(4)), {}

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return x * self.weight.sigmoid()
        return x * self.known.setdefault("scale", self.weight.sigmoid())


def test_an_index_made_of_numbers_and_remembered(assert_as_eager, sandwich):
    x = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert_as_eager(lambda: sandwich(Bias()), x, plans=[("exact", 0.0), ("rounded", 0.1)])
    assert type(Bias.index(4)) is Tensor and Bias.index(4).tolist() == [7, 2, 3, 4]


def test_capturing_puts_nothing_into_a_modules_dictionaries(x, sandwich):
    middle = Remembering()
    model = sandwich(middle)
    bwsk_fx.capture(model, x)
    assert middle.known == {}
    copy.deepcopy(apply(model))


class Resampled(nn.Module):
    def __init__(self, mode: str, align: bool | None, antialias: bool) -> None:
        super().__init__()
        dims = {"nearest": 2, "linear": 1, "trilinear": 3}.get(mode, 2)
        layer = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
        self.first, self.second = layer(2, 3, 1), layer(3, 3, 1)
        self.options = {"mode": mode, "align_corners": align, "antialias": antialias}

    def forward(self, x: Tensor) -> Tensor:
        y = functional.interpolate(self.first(x).tanh(), scale_factor=2.5, **self.options)
        return self.second(y).tanh()


@pytest.mark.parametrize(
    ("mode", "align", "antialias"),
    [
        ("nearest", None, False),
        ("nearest-exact", None, False),
        ("linear", False, False),
        ("bilinear", True, False),
        ("bilinear", False, True),
        ("bicubic", False, False),
        ("bicubic", True, True),
        ("trilinear", False, False),
    ],
)
def test_resampling_has_eagers_bits(assert_same_bits, mode, align, antialias):
    """Tracing prefers Python code of PyTorch's that rounds otherwise."""
    torch.manual_seed(0)
    model = Resampled(mode, align, antialias)
    x, found = torch.randn(2, 2, *[5] * (model.first.weight.dim() - 2)), []
    for candidate in (model, apply(copy.deepcopy(model), faith="exact", budget=0.0)):
        output = candidate(x)
        output.sin().sum().backward()
        gradients = {name: parameter.grad for name, parameter in candidate.named_parameters()}
        found.append({"output": output.detach()} | gradients)
    assert_same_bits(*found)
