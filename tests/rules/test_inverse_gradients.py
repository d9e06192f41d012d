"""Gradients from rebuilt values: their error against float64 is at most 1.5 times eager execution's own."""

import copy
from collections import defaultdict
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bwsk_fx
from bwsk_fx.rules import inverse_activation as activation
from bwsk_fx.rules.inverse_activation import VALLEYS, from_side, from_side_and_place, side_and_place

BF16, FP16 = torch.bfloat16, torch.float16
BOUND = 1.5
SEEDS = range(3)


class Rebuilt(torch.autograd.Function):
    """An activation whose backward pass reads its input as `rebuild(input, output)` gives it."""

    @staticmethod
    def forward(ctx, operand: Tensor, function: Callable, rebuild: Callable) -> Tensor:
        result = function(operand)
        ctx.function = function
        ctx.save_for_backward(rebuild(operand, result))
        return result

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (operand,) = ctx.saved_tensors
        with torch.enable_grad():
            operand = operand.detach().requires_grad_()
            result = ctx.function(operand)
        return torch.autograd.grad(result, operand, gradient)[0], None, None


class Mlp(nn.Module):
    """A residual stream that a last normalisation reads, or the loss itself."""

    def __init__(self, norm: Callable, function: Callable, last: Callable | None = None) -> None:
        super().__init__()
        width, blocks = 32, 2
        self.function, self.last = function, (last or norm)(width)
        self.norms = nn.ModuleList([norm(width) for _ in range(blocks)])
        self.up = nn.ModuleList([nn.Linear(width, 2 * width) for _ in range(blocks)])
        self.down = nn.ModuleList([nn.Linear(2 * width, width) for _ in range(blocks)])

    def forward(self, x: Tensor) -> Tensor:
        for norm, up, down in zip(self.norms, self.up, self.down, strict=True):
            x = x + down(self.function(2.0 * up(norm(x))))
        return _loss(self.last(x))


class GroupNormNet(nn.Module):
    """A stream in float32 to which convolutions of its normalised values are added."""

    def __init__(self, channels: int = 8, blocks: int = 3) -> None:
        super().__init__()
        self.last = nn.GroupNorm(2, channels)
        self.norms = nn.ModuleList([nn.GroupNorm(2, channels) for _ in range(blocks)])
        self.maps = nn.ModuleList([nn.Conv2d(channels, channels, 3, padding=1) for _ in range(blocks)])

    def forward(self, x: Tensor) -> Tensor:
        for norm, convolution in zip(self.norms, self.maps, strict=True):
            x = x + convolution(norm(x)).tanh()
        return _loss(self.last(x))


class LlamaNorm(nn.Module):
    """RMSNorm as Llama writes it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32) if x.dtype is not torch.float64 else x
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def _loss(x: Tensor) -> Tensor:
    return (x if x.dtype is torch.float64 else x.float()).sin().mean()


def _gradients(model: nn.Module, x: Tensor, dtype: torch.dtype | None) -> dict[str, Tensor]:
    model.zero_grad()
    with torch.autocast("cpu", dtype=dtype or BF16, enabled=dtype is not None):
        loss = model(x)
    # As a gradient scaler does, so that half precision does not underflow.
    (loss * 1024.0).backward()
    return {name: parameter.grad.double() / 1024.0 for name, parameter in model.named_parameters()}


def _ratios(
    make: Callable[[], nn.Module],
    shape: tuple[int, ...],
    dtype: torch.dtype | None,
    rewrite: Callable,
    disturb: Callable[[nn.Module, Tensor], None] = lambda model, x: None,
) -> dict[str, float]:
    """Return the error of a rewritten model over eager's, by kind of parameter, and in total under the empty name."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for seed in SEEDS:
        torch.manual_seed(seed)
        model, x = make(), torch.randn(shape)
        for parameter in model.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
        disturb(model, x)
        exact = _gradients(copy.deepcopy(model).double(), x.double(), None)
        for place, one in enumerate((rewrite(model, x), model)):
            for name, gradient in _gradients(one, x, dtype).items():
                error = (gradient - exact[name]).square().sum().item()
                for kind in ("", ".".join(part for part in name.split(".") if not part.isdecimal())):
                    sums[kind][place] += error
    return {kind: (found / eager) ** 0.5 for kind, (found, eager) in sums.items() if eager}


def _by_side(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, y: from_side(y, x > VALLEYS[name].bottom, name)


def _by_place(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, y: from_side_and_place(y, side_and_place(x, name), name)


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


@pytest.mark.parametrize(
    ("function", "rebuild", "dtypes"),
    [
        (F.gelu, _by_place("gelu"), [None]),
        (F.gelu, _by_side("gelu"), [BF16, FP16]),
        (_gelu_tanh, _by_place("gelu_tanh"), [None]),
        (_gelu_tanh, _by_side("gelu_tanh"), [BF16, FP16]),
        (F.silu, _by_place("silu"), [None]),
        (F.silu, _by_side("silu"), [BF16, FP16]),
        (F.leaky_relu, lambda x, y: activation.unbent(y, 0.01), [None, BF16, FP16]),
        (F.elu, lambda x, y: activation.unit_input(y, 1.0, 1.0, 1.0), [None]),
        (F.softplus, lambda x, y: activation.softplus_input(y, 1.0, 20.0), [None, BF16, FP16]),
        (torch.sqrt, lambda x, y: y.square(), [None, BF16]),
        (torch.reciprocal, lambda x, y: y.reciprocal(), [None, BF16]),
    ],
    ids=[
        *("gelu", "gelu-half", "gelu_tanh", "gelu_tanh-half", "silu", "silu-half"),
        *("leaky", "elu", "softplus", "sqrt", "reciprocal"),
    ],
)
def test_of_activations(function, rebuild, dtypes):
    def positive(x: Tensor) -> Tensor:
        return x.abs() + 0.5 if function in (torch.sqrt, torch.reciprocal) else x

    def rewrite(model: nn.Module, x: Tensor) -> nn.Module:
        rewritten = copy.deepcopy(model)
        rewritten.function = lambda value: Rebuilt.apply(positive(value), function, rebuild)
        return rewritten

    for dtype in dtypes:
        ratios = _ratios(lambda: Mlp(nn.LayerNorm, lambda x: function(positive(x))), (64, 32), dtype, rewrite)
        assert {kind: ratio for kind, ratio in ratios.items() if ratio > BOUND} == {}, dtype


@pytest.mark.parametrize("name", VALLEYS)
def test_a_side_alone_would_not_do_in_float32(name):
    function = {"gelu": F.gelu, "gelu_tanh": _gelu_tanh, "silu": F.silu}[name]

    def rewrite(model: nn.Module, x: Tensor) -> nn.Module:
        rewritten = copy.deepcopy(model)
        rewritten.function = lambda value: Rebuilt.apply(value, function, _by_side(name))
        return rewritten

    ratios = _ratios(lambda: Mlp(nn.LayerNorm, function), (64, 32), None, rewrite)
    assert max(ratios.values()) > BOUND


class Planner:
    """Makes one reversible region of a model, and remembers which inverses the plans used."""

    def __init__(self) -> None:
        self.fused: list[nn.Module] = []

    def __call__(self, model: nn.Module, x: Tensor) -> nn.Module:
        self.fused.append(bwsk_fx.fuse_regions(bwsk_fx.capture(model, (x,)), 0.0, granularity="whole"))
        return self.fused[-1]

    def rules(self) -> list[set[str]]:
        """Return the rules of each plan."""
        plans = [
            [region.program.plan for region in fused.modules() if hasattr(region, "program")] for fused in self.fused
        ]
        return [{value.rule for plan in found for value in plan.values if value.action == "invert"} for found in plans]


def _plan(fused: nn.Module):
    (program,) = (region.program for region in fused.modules() if hasattr(region, "program"))
    return program.plan


@pytest.mark.parametrize("dtype", [None, BF16, FP16])
@pytest.mark.parametrize("norm", [LlamaNorm, nn.RMSNorm])
def test_of_rms_norm(norm, dtype):
    planner = Planner()
    ratios = _ratios(lambda: Mlp(norm, F.gelu), (64, 32), dtype, planner)
    assert {kind: ratio for kind, ratio in ratios.items() if ratio > BOUND} == {}
    assert dtype is None or all("RMSNorm input from x̂" in rules for rules in planner.rules())


def _identity(width: int) -> nn.Module:
    return nn.Identity()


@pytest.mark.parametrize("dtype", [None, BF16, FP16])
@pytest.mark.parametrize("last", [None, _identity])
@pytest.mark.parametrize("norm", [LlamaNorm, nn.LayerNorm])
def test_of_norms_with_outliers_and_weights_of_every_size(norm, last, dtype):
    """Without a last norm the loss differentiates the sine of 1e4, which no half precision x̂ gives back."""

    def disturb(model: nn.Module, x: Tensor) -> None:
        x[::3, ::5] = 1e4
        for one in model.norms:
            one.weight.data[::4], one.weight.data[1::4], one.weight.data[2::4] = 0.0, 1e-4, -0.5

    ratios = _ratios(lambda: Mlp(norm, F.gelu, last), (64, 32), dtype, Planner(), disturb)
    # One vector of 32 elements is too few to compare errors by.
    assert {kind: ratio for kind, ratio in ratios.items() if ratio > BOUND and "last" not in kind} == {}


@pytest.mark.parametrize("dtype", [None, BF16, FP16])
def test_of_group_norm(dtype):
    planner = Planner()
    ratios = _ratios(GroupNormNet, (4, 8, 12, 12), dtype, planner)
    assert {kind: ratio for kind, ratio in ratios.items() if ratio > BOUND} == {}
    assert dtype is None or all("GroupNorm input from x̂" in rules for rules in planner.rules())
