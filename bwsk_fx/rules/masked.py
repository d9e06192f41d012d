"""`torch.masked`: reductions and scans that leave elements out."""

from __future__ import annotations

import torch
from torch import fx, masked

from bwsk_fx.rules.reduction import reduce
from bwsk_fx.rules.registry import Call, erases, fewer_elements, labels, preserves, unproven
from bwsk_fx.rules.scans import running_extreme, running_sum
from bwsk_fx.rules.sorting import positions
from bwsk_fx.rules.undo import Run, Undo
from bwsk_fx.verdict import REFINED, Verdict


@labels(masked.sum, masked.mean, masked.prod, masked.amax, masked.amin, masked.median, masked.logsumexp)
def masked_reduce(call: Call) -> Verdict:
    """Merges elements, and leaves out those that are masked."""
    return _masked_out(call) or reduce(call)


@labels(masked.argmax, masked.argmin)
def masked_position(call: Call) -> Verdict:
    """Where an extreme is."""
    return positions(call)


@labels(masked.normalize)
def masked_normalize(call: Call) -> Verdict:
    """The norm of each row goes; a count of its elements does not."""
    hidden = _masked_out(call)
    if hidden is None and call.argument(1, "ord") == 0:
        undo = Undo(_times_count)
        return preserves("as many elements are not zero as before", confidence=REFINED, undo=undo)
    return hidden or erases("the norm of each row goes")


def _times_count(run: Run) -> torch.Tensor:
    dim = run.argument(2, "dim")
    if run.output.dim() == 0:
        return run.output  # type: ignore[no-any-return]
    return run.output * run.output.count_nonzero(dim).unsqueeze(dim).clamp(min=1)


@labels(masked.norm, masked.var, masked.std)
def masked_moment(call: Call) -> Verdict:
    """Moments: signs go as well."""
    return _masked_out(call) or fewer_elements(call, "it merges elements")


@labels(masked.cumsum)
def masked_sum(call: Call) -> Verdict:
    """A running sum that leaves elements out."""
    return _masked_out(call) or running_sum(call)


@labels(masked.cumprod)
def masked_product(call: Call) -> Verdict:
    """A running product that leaves elements out."""
    return _masked_out(call) or running_extreme(call)


def _masked_out(call: Call) -> Verdict | None:
    """Return the verdict of leaving elements out; None where none are left out."""
    if not call.is_dynamic(call.argument(0, "input")):
        return unproven("only the mask is dynamic")
    mask = call.kwargs.get("mask")
    if not isinstance(mask, fx.Node):
        return None
    values = call.static(mask)
    if values is None:
        return fewer_elements(call, "elements that are masked out go, and others are merged")
    hidden = int((~values.expand(call.before.shape)).sum()) if _has_numbers(call.before) else None
    if hidden == 0:
        return None
    merged = call.erased()
    if hidden is None or merged is None:
        return erases("elements that are masked out go")
    return erases("elements that are masked out go", max(hidden, merged), confidence=REFINED)


def _has_numbers(value: torch.Tensor) -> bool:
    return all(isinstance(size, int) for size in value.shape)
