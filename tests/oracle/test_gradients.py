"""Rounded plans stay within 1.5 times eager's own error, exact plans have eager's bits."""

from collections import defaultdict

import pytest
import torch
from torch import Tensor, nn

import bwsk_fx

BF16, FP16 = torch.bfloat16, torch.float16
BOUND = 1.5
SEEDS = (0, 1, 2)


def _reseeded(model: nn.Module, seed: int) -> nn.Module:
    """Draw every parameter anew, norms and biases included, so that nothing is one or zero by construction."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
            if "layernorm" in name and "weight" in name:
                parameter.add_(1.0)
    return model


def _total(errors: dict[str, Tensor], sums: dict[str, Tensor]) -> None:
    for name, error in errors.items():
        sums[name] = sums[name] + error


@pytest.fixture(scope="module")
def pair(make_vit, make_images):
    model = make_vit()
    return model, bwsk_fx.capture(model, make_images())


@pytest.mark.parametrize(
    ("dtype", "granularity", "budget"),
    [
        (None, "block", 0.0),
        (BF16, "block", 0.0),
        (FP16, "block", 0.25),
        (BF16, "block", 0.25),
        (BF16, "s-run", 0.0),
        (None, "whole", 0.0),
        (FP16, "whole", 0.0),
    ],
)
def test_rounded(pair, make_images, gradients, in_float64, squared_errors, dtype, granularity, budget):
    model, graph = pair
    fused = bwsk_fx.fuse_regions(graph, budget, granularity=granularity)
    eager_sums, fused_sums = defaultdict(float), defaultdict(float)
    for seed in SEEDS:
        inputs = make_images(8)
        inputs["pixel_values"] = inputs["pixel_values"].roll(seed, dims=0)
        exact = in_float64(_reseeded(model, seed), inputs)
        _total(squared_errors(gradients(model, inputs, dtype), exact), eager_sums)
        _total(squared_errors(gradients(fused, inputs, dtype), exact), fused_sums)
    ratios = {name: (fused_sums[name] / eager_sums[name]) ** 0.5 for name in eager_sums}
    assert ratios.pop("") <= BOUND
    assert {name: ratio for name, ratio in ratios.items() if ratio > BOUND} == {}


@pytest.mark.parametrize("dtype", [None, BF16])
def test_exact(pair, make_images, gradients, dtype):
    model, graph = pair
    fused = bwsk_fx.fuse_regions(graph, 0.25, faith="exact")
    for seed in SEEDS:
        _reseeded(model, seed)
        expected = gradients(model, make_images(8), dtype)
        found = gradients(fused, make_images(8), dtype)
        assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


@pytest.mark.parametrize(("dtype", "gamma"), [(BF16, 1e-4), (FP16, 1e-4), (FP16, 0.0), (BF16, -1e-4)])
def test_tiny_norm_weights(pair, make_images, gradients, in_float64, dtype, gamma):
    """Dividing a LayerNorm's output by γ would lose these gradients; x̂ does not."""
    model, graph = pair
    fused = bwsk_fx.fuse_regions(graph)
    _reseeded(model, 0)
    names = [name for name, _ in model.named_parameters() if "layernorm" in name and name.endswith("weight")]
    with torch.no_grad():
        for name in names:
            model.get_parameter(name)[::2] = gamma
    exact, eager = in_float64(model, make_images(8)), gradients(model, make_images(8), dtype)
    found = gradients(fused, make_images(8), dtype)
    assert len(names) == 5
    for part in (slice(0, None, 2), slice(1, None, 2)):
        errors = [
            sum((one[name][part] - exact[name][part]).square().sum() for name in names) ** 0.5 for one in (found, eager)
        ]
        assert errors[0] <= BOUND * errors[1]
        assert errors[0] <= 0.05 * sum(exact[name][part].square().sum() for name in names) ** 0.5


@pytest.mark.parametrize("dtype", [None, BF16, FP16])
@pytest.mark.parametrize("tier", ["balanced", "smallest"])
def test_outliers_and_norm_weights_of_every_size(pair, make_images, gradients, in_float64, squared_errors, tier, dtype):
    """Pixels of 1e4 beside ordinary ones; norm weights that are zero, tiny and negative."""
    model, graph = pair
    fused = bwsk_fx.fuse_regions(graph, tier=tier)
    inputs = make_images(8)
    inputs["pixel_values"][::3, 0, ::5, ::7] = 1e4
    inputs["pixel_values"][1::3, 1, ::6, ::5] = -1e4
    eager_sums, fused_sums = defaultdict(float), defaultdict(float)
    for seed in SEEDS:
        _reseeded(model, seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "layernorm" in name and name.endswith("weight"):
                    parameter[::4], parameter[1::4], parameter[2::4] = 0.0, 1e-4, -0.5
        exact = in_float64(model, inputs)
        _total(squared_errors(gradients(model, inputs, dtype), exact), eager_sums)
        _total(squared_errors(gradients(fused, inputs, dtype), exact), fused_sums)
    assert 0.0 < eager_sums[""] < float("inf")
    ratios = {name: (fused_sums[name] / eager_sums[name]) ** 0.5 for name in eager_sums if eager_sums[name]}
    assert ratios.pop("") <= BOUND
    assert {name: ratio for name, ratio in ratios.items() if ratio > BOUND} == {}


class Stream(nn.Module):
    """A residual stream far larger, or far smaller, than what its blocks add, with values that only a sum gives."""

    def __init__(self, offset: float, scale: float) -> None:
        super().__init__()
        self.embed, self.offset = nn.Linear(32, 32), offset
        self.blocks = nn.ModuleList([Branches(scale) for _ in range(2)])

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.embed(x) * self.offset
        for block in self.blocks:
            x = block(x)
        return {"loss": (x / self.offset).sin().float().mean()}


class Branches(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(32), nn.LayerNorm(32)])
        self.maps = nn.ModuleList([nn.Linear(32, 32), nn.Linear(32, 32)])
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        for norm, linear in zip(self.norms, self.maps, strict=True):
            x = x + linear(norm(x)).tanh() * self.scale
        return x


@pytest.mark.parametrize("dtype", [None, BF16])
@pytest.mark.parametrize(("offset", "scale"), [(1.0, 1.0), (1e3, 1.0), (1e3, 0.5), (1.0, 1e3), (1.0, 1e-3)])
def test_streams_of_unequal_size(gradients, in_float64, squared_errors, dtype, offset, scale):
    torch.manual_seed(0)
    model, inputs = Stream(offset, scale), {"x": torch.randn(64, 32)}
    fused = bwsk_fx.fuse_regions(bwsk_fx.capture(model, inputs))
    exact = in_float64(model, inputs)
    eager = squared_errors(gradients(model, inputs, dtype), exact)[""]
    found = squared_errors(gradients(fused, inputs, dtype), exact)[""]
    assert found**0.5 <= BOUND * eager**0.5
