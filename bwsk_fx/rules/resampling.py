"""Resampling: pixels are copied, mixed or left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bwsk_fx import _torch_private as private
from bwsk_fx.rules.axis import AxisCall, Behaviour, Effect, axis_rule, claims
from bwsk_fx.rules.registry import Call, erases, labels, preserves, unproven
from bwsk_fx.rules.separable import separable, spatial_sizes
from bwsk_fx.rules.single import run_target
from bwsk_fx.rules.sizes import as_int, elements
from bwsk_fx.rules.undo import Run, Undo
from bwsk_fx.verdict import REFINED, Verdict

aten = torch.ops.aten

_NEAREST = {"nearest": aten.upsample_nearest1d.default, "nearest-exact": aten._upsample_nearest_exact1d.default}
_ANTIALIASED = ("bilinear", "bicubic", "lanczos")
_PLANES = {f"{kind}-aa": getattr(aten, f"_upsample_{kind}2d_aa", None) for kind in _ANTIALIASED}
_PLANES["bicubic"] = aten.upsample_bicubic2d


@dataclass(frozen=True)
class Resampling:
    """How a call resamples.

    Attributes:
        mode: As in `F.interpolate`, with `-aa` where it is antialiased.
        align_corners: Whether the corners' centres coincide.
        scales: The scale of each dimension where it does not follow from the sizes.
    """

    mode: str
    align_corners: bool
    scales: tuple[float | None, ...]

    def weights(self, dim: int, before: int, after: int) -> Tensor:
        """Return the matrix (after, before) that one dimension is multiplied by."""
        unit = torch.eye(before, dtype=torch.float64).view(before, 1, before)
        if self.mode == "area":
            return F.adaptive_avg_pool1d(unit, after)[:, 0].mT
        if self.mode.endswith("linear"):
            return aten.upsample_linear1d(unit, [after], self.align_corners, self.scales[dim])[:, 0].mT
        resample: Any = _PLANES[self.mode]
        # Columns of one pixel come out wrong from the antialiased kernels of torch 2.13, rows do not.
        plane = resample(unit.unsqueeze(2), [1, after], self.align_corners, None, self.scales[dim])
        return plane[:, 0, 0].mT

    def sources(self, dim: int, before: int, after: int) -> Tensor:
        """Return, for nearest neighbours, which of `before` pixels each of `after` is a copy of."""
        numbers = torch.arange(before, dtype=torch.float64).view(1, 1, before)
        return _NEAREST[self.mode](numbers, [after], self.scales[dim]).view(after).long()


@labels(F.interpolate, F.upsample, nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d)
def interpolate(call: Call) -> Verdict:
    """Resampling in a mode that is an argument."""
    mode = call.option(3, "mode", "nearest")
    if call.node.target is F.interpolate and call.argument(6, "antialias", False):
        mode = f"{mode.removeprefix('tri')}-aa"
    scales = call.option(2, "scale_factor") if call.option(1, "size") is None else None
    recompute = call.option(5, "recompute_scale_factor", False) if call.node.target is not F.upsample else False
    return _resampled(call, mode, bool(call.option(4, "align_corners", False)), None if recompute else scales)


@labels(F.upsample_nearest, F.upsample_bilinear)
def upsample(call: Call) -> Verdict:
    """The older names of resampling, each with one mode."""
    nearest = call.node.target is F.upsample_nearest
    scales = call.argument(2, "scale_factor") if call.argument(1, "size") is None else None
    return _resampled(call, "nearest" if nearest else "bilinear", not nearest, scales)


@labels(atens="upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d")
@labels(atens="_upsample_nearest_exact2d _upsample_nearest_exact3d")
def upsample_nearest(call: Call) -> Verdict:
    """Nearest neighbours in ATen."""
    mode = "nearest-exact" if "exact" in str(call.node.target) else "nearest"
    return _resampled(call, mode, False, _aten_scales(call, 2))


@labels(atens="upsample_linear1d upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d")
@labels(*private.operators("_C._nn._upsample_bilinear2d_aa", "_C._nn._upsample_bicubic2d_aa"))
@labels(atens="_upsample_bilinear2d_aa _upsample_bicubic2d_aa _upsample_lanczos2d_aa")
def upsample_smooth(call: Call) -> Verdict:
    """Linear, cubic and antialiased resampling in ATen."""
    name = str(getattr(call.node.target, "__name__", call.node.target))
    mode = next(kind for kind in ("linear", "bicubic", "lanczos") if kind in name)
    mode = f"{mode.replace('linear', 'bilinear')}-aa" if "_aa" in name else mode
    return _resampled(call, mode, bool(call.argument(2, "align_corners")), _aten_scales(call, 3))


def _aten_scales(call: Call, place: int) -> Any:
    """Return the scales of an ATen call: one argument each, or a list of them."""
    if any(name == "scale_factors" for name in call.kwargs) or isinstance(call.argument(place, ""), (tuple, list)):
        return call.argument(place, "scale_factors")
    return call.args[place:] or None


def _resampled(call: Call, mode: str, align_corners: bool, scales: Any) -> Verdict:
    spatial = call.before.dim() - 2
    given = scales if isinstance(scales, (tuple, list)) else [scales] * spatial
    numbers = [scale if isinstance(scale, (int, float)) else None for scale in given]
    plan = Resampling(mode, align_corners, tuple(numbers) or (None,) * spatial)
    if mode in _NEAREST:
        return _copied(call, spatial, plan)
    return separable(call, spatial, partial(Resampling.weights, plan), sure=mode.endswith("linear") or mode == "area")


def _copied(call: Call, spatial: int, plan: Resampling) -> Verdict:
    before, after = spatial_sizes(call, spatial)
    if before is None or after is None:
        return unproven("its spatial sizes are not numbers")
    total, missing = call.elements(), 1.0
    for dim, sizes in enumerate(zip(before, after, strict=True)):
        missing *= plan.sources(dim, *sizes).unique().numel() / sizes[0]
    if missing == 1:
        why = "every pixel is copied at least once"
        return preserves(why, confidence=REFINED, undo=Undo(partial(_first_copies, spatial, plan)))
    lost = None if total is None else round(total * (1 - missing))
    return erases("it leaves pixels out", lost, confidence=REFINED)


def _first_copies(spatial: int, plan: Resampling, run: Run) -> Tensor:
    value = run.output
    for dim in range(spatial):
        size, place = run.before.shape[2 + dim], 2 + dim
        sources = plan.sources(dim, size, value.shape[place])
        first = torch.searchsorted(sources, torch.arange(size))
        value = value.index_select(place, first)
    return value


@labels(F.grid_sample, torch.grid_sampler, torch.grid_sampler_2d, torch.grid_sampler_3d)
@labels(atens="grid_sampler grid_sampler_2d grid_sampler_3d")
def grid_sample(call: Call) -> Verdict:
    """Samples at places that are data; K where there are fewer of them than pixels."""
    counts: Sequence[int | None] = [elements(operand.meta["val"]) for operand in call.operands]
    kept = elements(call.value)
    if kept is None or None in counts:
        return unproven("it samples pixels at places that are not known")
    missing = sum(count for count in counts if count is not None) - kept
    if missing > 0:
        return erases(f"it has {missing} elements less than its operands", missing, confidence=REFINED)
    grid = call.static(call.argument(1, "grid"))
    unseen = 0 if grid is None or call.module is not None else _never_sampled(call, grid)
    if unseen:
        return erases(f"{unseen} elements are never sampled", unseen, confidence=REFINED)
    return unproven("it has as many elements as its operands, and every pixel may be sampled")


def _never_sampled(call: Call, grid: Tensor) -> int:
    """Return how many elements of the image have no weight in any sample."""
    shape = [as_int(size) for size in call.before.shape]
    if None in shape:
        return 0
    image = torch.zeros(shape, dtype=grid.dtype, requires_grad=True)  # type: ignore[arg-type]
    options = {name: value for name, value in call.kwargs.items() if name not in ("input", "grid")}
    with torch.enable_grad():
        samples = run_target(call.node.target, (image, grid, *call.args[2:]), options)  # type: ignore[arg-type]
        # Samples count differently, so that weights of both signs do not cancel.
        counts = 1 + torch.arange(samples.numel(), dtype=grid.dtype).view_as(samples) / max(samples.numel(), 1)
        (weights,) = torch.autograd.grad((samples * counts).sum(), image)
    return int((weights == 0).sum())


@axis_rule(F.interpolate, F.upsample, nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d)
def resampled_axes(call: AxisCall) -> Effect:
    """Maps samples and channels; positions are mixed with their neighbours across shards."""
    leading, positions = call.operand.layout[:2], call.operand.layout[2:]
    why = "pixels are mixed with, or copied from, neighbours that another shard may have"
    said = claims(leading, Behaviour.MAP, "each channel of each sample is resampled on its own")
    said += claims(positions, Behaviour.BARRIER, why, produced=False)
    made = call.axes.fresh(call.shape[2:])
    for axis, before in zip(made, positions, strict=True):
        call.axes.call(axis, "" if before is None else call.axes.name(before))
    said += claims(made, Behaviour.BARRIER, why, consumed=False)
    return Effect(tuple(said), ((*leading, *made),))
