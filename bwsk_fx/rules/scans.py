"""Running sums and differences: what a neighbour tells of an element."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from bwsk_fx.rules.axis import AxisCall, Behaviour, Effect, along, axis_rule
from bwsk_fx.rules.moving import axis_size
from bwsk_fx.rules.registry import Call, erases, fewer_elements, labels, others, preserves, unproven
from bwsk_fx.rules.sizes import short, widens
from bwsk_fx.rules.sorting import same_element
from bwsk_fx.rules.undo import Run, Undo, wide
from bwsk_fx.verdict import REFINED, Verdict


@labels(ops="cumsum")
def running_sum(call: Call) -> Verdict:
    """Differences of neighbours undo a running sum."""
    before, after = call.before.dtype, call.value.dtype
    if not widens(before, after):
        return erases(f"it also turns {short(before)} into {short(after)}")
    return preserves("differences of neighbours rebuild the operand", undo=Undo(_differences))


def _differences(run: Run) -> Tensor:
    dim = run.argument(1, "dim")
    total = run.output
    return total if total.dim() == 0 else total - _shifted(total, dim, 0)


def _shifted(value: Tensor, dim: int, fill: float) -> Tensor:
    """Return each element's predecessor, and `fill` for the first one."""
    start = torch.full_like(value.narrow(dim, 0, 1), fill)
    return torch.cat((start, value.narrow(dim, 0, value.shape[dim] - 1)), dim)


@labels(ops="logcumsumexp", atens="_logcumsumexp")
def running_logsumexp(call: Call) -> Verdict:
    """Differences of neighbours, in exponentials."""
    if call.value.dtype.is_complex:
        return erases("a complex logarithm has many branches")
    undo = Undo(_log_differences)
    return preserves("differences of exponentials rebuild it", undo=undo, domain="no summand is absorbed")


def _log_differences(run: Run) -> Tensor:
    total = run.output
    if total.dim() == 0:
        return total  # type: ignore[no-any-return]
    before = _shifted(total, run.argument(1, "dim"), -torch.inf)
    share = torch.where(before == -torch.inf, 0.0, (before - total).exp())
    return total + torch.log1p(-share)


@labels(ops="cumprod cummax cummin", atens="_cummax_helper _cummin_helper")
def running_extreme(call: Call) -> Verdict:
    """A running maximum forgets what is smaller; a running product ends at the first zero."""
    length = axis_size(call.before, call.argument(1, "dim"))
    if isinstance(length, int) and length == 1 and widens(call.before.dtype, call.value.dtype):
        return preserves("the dimension has one element", confidence=REFINED, undo=Undo(same_element))
    return erases("elements behind a larger one (or a zero) leave no trace")


@labels(torch.trapezoid, torch.trapz, atens="trapezoid trapz")
def area(call: Call) -> Verdict:
    """One area is left of a dimension."""
    return fewer_elements(call, "one area is left of a dimension")


@labels(torch.cumulative_trapezoid, atens="cumulative_trapezoid")
def running_area(call: Call) -> Verdict:
    """One number less than there are points: the first point is unknown."""
    return fewer_elements(call, "the areas do not tell the first point")


@labels(torch.gradient)
def gradient(call: Call) -> Verdict:
    """A constant has no gradient."""
    if not call.is_dynamic(call.argument(0, "input")):
        return unproven("only the spacing is dynamic")
    return erases("a constant that is added does not show")


@labels(ops="diff")
def difference(call: Call) -> Verdict:
    """Differences of neighbours need as many elements at one end as they are repeated."""
    times, dim = call.argument(1, "n", 1), call.argument(2, "dim", -1)
    ends = (call.argument(3, "prepend"), call.argument(4, "append"))
    if times == 0:
        return preserves("it takes no difference", confidence=REFINED, undo=Undo(same_element))
    if call.argument(0, "input") is not call.operands[0]:
        return unproven("the ends of the operand are the operands")
    if sum(_length(end, dim) for end in ends) < times:
        return fewer_elements(call, "a constant (for n-th differences, a polynomial) does not show")
    return preserves("running sums from a known end", others(call), REFINED, undo=Undo(_summed))


def _length(end: Any, dim: int) -> int:
    """Return how many elements an end is known to add to a row."""
    size = axis_size(end.meta["val"], dim) if isinstance(end, fx.Node) else 0
    return size if isinstance(size, int) else 0


def _summed(run: Run) -> Tensor:
    times, dim = run.argument(1, "n", 1), run.argument(2, "dim", -1)
    prepend, append = run.argument(3, "prepend"), run.argument(4, "append")
    output = run.output
    first, last = (0 if end is None else end.shape[dim] for end in (prepend, append))
    if first >= times:
        whole = _integrated(output, prepend, times, dim)
    elif last >= times:
        turned = output.flip(dim) if times % 2 == 0 or output.dtype is torch.bool else -output.flip(dim)
        whole = _integrated(turned, append.flip(dim), times, dim).flip(dim)
    else:
        whole = _between(output, prepend, append, times, dim)
    return whole.narrow(dim, first, whole.shape[dim] - first - last)


def _between(differences: Tensor, prepend: Tensor, append: Tensor, times: int, dim: int) -> Tensor:
    """Return the sequence with these n-th differences that starts and ends with known elements.

    Two such sequences differ by a polynomial of degree n - 1, which as many elements determine.
    """
    differences, prepend, append = (value.to(wide(value.dtype)) for value in (differences, prepend, append))
    some = _integrated(
        differences, torch.zeros_like(differences.narrow(dim, 0, 1)).repeat_interleave(times, dim), times, dim
    )
    some, prepend, append = (value.movedim(dim, 0) for value in (some, prepend, append))
    powers = torch.linspace(-1, 1, len(some), dtype=torch.float64)[:, None] ** torch.arange(times)
    powers = powers.to(some.dtype)
    ends = torch.cat((powers[: len(prepend)], powers[len(powers) - len(append) :]))
    missing = torch.cat((prepend - some[: len(prepend)], append - some[len(some) - len(append) :]))
    factors = torch.linalg.lstsq(ends, missing.flatten(1) if missing.dim() > 1 else missing[:, None]).solution
    return (some + (powers @ factors).view(some.shape)).movedim(0, dim)


def _integrated(differences: Tensor, start: Tensor, times: int, dim: int) -> Tensor:
    """Return the sequence with these n-th differences that begins with `start`."""
    boolean = differences.dtype is torch.bool
    value = differences.int() if boolean else differences
    begin = start.int() if boolean else start
    for order in range(times - 1, -1, -1):
        head = begin.diff(n=order, dim=dim).narrow(dim, 0, 1) if order else begin.narrow(dim, 0, 1)
        value = torch.cat((head, value), dim).cumsum(dim).to(value.dtype)
    return value % 2 == 1 if boolean else value


@axis_rule(ops="cumsum cumprod logcumsumexp cummax cummin")
def scan_axes(call: AxisCall) -> Effect:
    """Waits along the scanned axis, where every element needs all before it."""
    why = "an element needs all that come before it; a scan of the shards' totals would make it a REDUCE"
    return along(call, call.dims(), Behaviour.BARRIER, why, "each row is scanned on its own", keeps=True)
