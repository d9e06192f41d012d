"""Cost models by name, and the short measurement that fits a roofline to the device at hand."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from bwsk_fx.errors import PlanError, first_line
from bwsk_fx.planning.cost import KEPT_BLOCK, CostModel, DeviceProfile, Roofline, profile_of
from bwsk_fx.planning.figures import FigureFile, figures_path
from bwsk_fx.planning.options import COSTS
from bwsk_fx.planning.timing import MeasuredCosts, Stopwatch, undisturbed

aten = torch.ops.aten

# Other work on a machine comes in bursts, so that each figure is taken at several times, and the best counts.
_PASSES = 3
_NEAR = 3.0
_SIZES = (128, 256, 512, 1024, 2048, 4096, 8192)
# Work is made larger until a run takes this many seconds, so that launches are a small part of it on any device.
_LONG_ENOUGH = 3e-4
_CHAIN = 64

# Something to time: how much of it is done (FLOPs, bytes, elements), and what does it.
Work = tuple[float, Callable[[], Any]]


def cost_model(device: torch.device, kind: str) -> CostModel:
    """Return what says how long calls take on a device.

    Args:
        device: Where the planned calls run.
        kind: `builtin` (the figures of `profile_of`; nothing is measured), `roofline` (the device's own figures, which
            take a second or two to measure) or `measured` (each distinct call is timed when it is first asked for).

    Returns:
        The model; the same object for the same device and kind, so that nothing is measured twice. What `roofline`
        and `measured` find is read from the device's file and written to it.

    Raises:
        PlanError: The kind is unknown.
    """
    if kind not in COSTS:
        raise PlanError(f"costs is {kind!r}: expected one of {', '.join(map(repr, COSTS))}")
    if kind == "builtin":
        return Roofline(profile_of(device))
    path = figures_path(device)
    return _roofline(device, path) if kind == "roofline" else _measured(device, path)


@functools.cache
def _figures(path: Path | None) -> FigureFile:
    return FigureFile(path)


@functools.cache
def _roofline(device: torch.device, path: Path | None) -> Roofline:
    figures = _figures(path)
    if figures.profile is not None:
        return Roofline(figures.profile)
    profile, steady = calibrate(Stopwatch.of(device, limit=0.01))
    if steady:
        figures.keep(profile)
    else:
        warnings.warn(
            f"{device} is so busy that its figures are uncertain: plans use them, and the next process measures again",
            stacklevel=2,
        )
    return Roofline(profile)


@functools.cache
def _measured(device: torch.device, path: Path | None) -> MeasuredCosts:
    return MeasuredCosts(_roofline(device, path), Stopwatch.of(device), _figures(path))


def calibrate(watch: Stopwatch) -> tuple[DeviceProfile, bool]:
    """Measure what a device does per second; takes one to two seconds on two idle CPU cores.

    A figure that cannot be measured, such as that of a dtype which the device does not know, is the built-in one, and a
    warning says so.

    Returns:
        The best of several passes, and whether there was for each figure another pass that came near it.
    """
    with undisturbed(watch.device):
        passes = [_figures_once(watch) for _ in range(_PASSES)]
    ranked = {name: sorted((one[name] for one in passes), reverse=name != "launch") for name in passes[0]}
    # Whether the allocator keeps a block may change from pass to pass.
    compared = [values for name, values in ranked.items() if name != "fresh"]
    steady = all(max(first, second) <= _NEAR * min(first, second) for first, second, *_ in compared)
    return DeviceProfile(**{name: values[0] for name, values in ranked.items()}), steady


def _figures_once(watch: Stopwatch) -> dict[str, float]:
    """Measure every figure of a profile, by its name."""
    found = {name: _rate(watch, name, make, dtype) for name, (make, dtype) in _WORKS.items()}
    return {**found, "fresh": fresh_rate(watch), "launch": launch_seconds(watch)}


def _rate(watch: Stopwatch, name: str, make: Callable[..., Work], dtype: torch.dtype) -> float:
    try:
        for size in _SIZES:
            amount, run = make(size, dtype, watch.device)
            if watch.roughly(run) >= _LONG_ENOUGH:
                break
        return amount / watch.seconds(run)
    except RuntimeError as error:
        known = float(getattr(profile_of(watch.device), name))
        warnings.warn(
            f"the rate {name} cannot be measured on {watch.device} ({first_line(error)}): the built-in "
            f"{known:.2g}/s is used",
            stacklevel=2,
        )
        return known


def product(size: int, dtype: torch.dtype, device: torch.device) -> Work:
    """A square matrix product, in FLOPs."""
    left, right = (_random((size, size), dtype, device) for _ in range(2))
    return 2.0 * size**3, lambda: aten.mm.default(left, right)


def attention(size: int, dtype: torch.dtype, device: torch.device) -> Work:
    """Fused attention, forward and backward, in FLOPs; 256 tokens, heads of 64."""
    heads, tokens, width = size // _SIZES[0], 256, 64
    query, key, value = (_random((1, heads, tokens, width), dtype, device).requires_grad_() for _ in range(3))

    def run() -> None:
        # A caller's hooks must not see what is saved here.
        with torch.enable_grad(), saved_tensors_hooks(lambda saved: saved, lambda saved: saved):
            output = F.scaled_dot_product_attention(query, key, value)
            torch.autograd.grad(output, (query, key, value), output.detach())

    return 7 * 2.0 * heads * tokens**2 * width, run


def movement(size: int, dtype: torch.dtype, device: torch.device) -> Work:
    """A sum, a cast to half precision and a sum there, in bytes."""
    whole = _random((size, 2 * size), dtype, device)
    half = whole.bfloat16()

    def run() -> None:
        aten.add.Tensor(whole, whole)
        aten._to_copy.default(whole, dtype=torch.bfloat16)
        aten.add.Tensor(half, half)

    return whole.numel() * float(8 + 6 + 4), run


def function(size: int, dtype: torch.dtype, device: torch.device) -> Work:
    """GELU, SiLU, exp and softmax, in elements."""
    operand = _random((size, 2 * size), dtype, device)

    def run() -> None:
        aten.gelu.default(operand)
        aten.silu.default(operand)
        aten.exp.default(operand)
        aten._softmax.default(operand, -1, False)

    return 4.0 * operand.numel(), run


def normalization(size: int, dtype: torch.dtype, device: torch.device) -> Work:
    """LayerNorm of rows of 256, in elements."""
    operand = _random((size * size // 128, 256), dtype, device)
    weight, bias = (_random((256,), dtype, device) for _ in range(2))
    return float(operand.numel()), lambda: aten.native_layer_norm.default(operand, [256], weight, bias, 1e-5)


_WORKS: dict[str, tuple[Callable[..., Work], torch.dtype]] = {
    "products_float32": (product, torch.float32),
    "products_bfloat16": (product, torch.bfloat16),
    "products_float16": (product, torch.float16),
    "attention_float32": (attention, torch.float32),
    "attention_bfloat16": (attention, torch.bfloat16),
    "attention_float16": (attention, torch.float16),
    "bandwidth": (movement, torch.float32),
    "functions": (function, torch.float32),
    "normalizations": (normalization, torch.float32),
}


def fresh_rate(watch: Stopwatch) -> float:
    """Return the bytes/s at which large results come from the operating system; infinite where they do not."""
    if watch.device.type != "cpu":
        return math.inf
    size = KEPT_BLOCK + 2**20
    kept = torch.ones(size, dtype=torch.uint8)
    new, old = watch.roughly(lambda: torch.ones(size, dtype=torch.uint8)), watch.roughly(lambda: kept.fill_(1))
    return size / (new - old) if new > 1.25 * old else math.inf


def launch_seconds(watch: Stopwatch) -> float:
    """Return the seconds of a tiny operator in generated code."""
    graph = fx.Graph()
    operand = value = graph.placeholder("operand")
    for _ in range(_CHAIN):
        value = graph.call_function(aten.add.Tensor, (value, operand))
    graph.output(value)
    module = fx.GraphModule(nn.Module(), graph)
    tiny = torch.ones(1, device=watch.device)
    return watch.seconds(lambda: module(tiny)) / _CHAIN


def _random(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.rand(shape, device=device).to(dtype)
