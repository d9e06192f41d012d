"""The round trip of one call: forward, back through the verdict's inverse, and the comparison.

An element of an operand counts as

* *rebuilt* where it comes back with a relative error of at most the square root of the dtype's machine epsilon: half
  of the digits. Errors are relative to max(|element|, root mean square of the operand);
* *lost* where it does not, and the output, moved by one unit in the last place, rebuilds another element: the claim may
  hold in exact arithmetic, but the bits of the output do not determine the element (a saturated tanh, a summand that
  was absorbed, an ill-conditioned matrix);
* *wrong* where it does not, although the output determines it: the claim is false.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bwsk_fx.errors import first_line
from bwsk_fx.rules.decomposition import untouched
from bwsk_fx.rules.registry import Call
from bwsk_fx.rules.single import Target, call_of, run_target
from bwsk_fx.rules.undo import Run, Undo, wide
from bwsk_fx.verdict import Verdict, WitnessKind

# How far a last-place change may move an element that counts as determined, as a share of the tolerance. An output is
# off by several such units where many products are summed.
_MARGIN = 1 / 16

# Ways of moving an output: all elements up, all down, or each in a random direction, with the pattern as seed.
_UP, _DOWN = 1, -1
_FIRST = (_UP, 2, 3)
_AGAIN = (_DOWN, *range(4, 12))


@dataclass(frozen=True)
class RoundTrip:
    """What came back from one call, or from several.

    Attributes:
        elements: Elements of the operands that the verdict claims to rebuild.
        lost: How many of them did not come back because the output does not determine them in its dtype.
        wrong: How many did not come back although the output determines them.
        error: Worst relative error over the elements that are not lost.
        tolerance: Largest relative error that passes.
        condition: Condition number of a linear map, else None.
        note: Why nothing could be compared, where the inverse failed or used what is not in its witness.
    """

    elements: int
    lost: int
    wrong: int
    error: float
    tolerance: float
    condition: float | None = None
    note: str = ""

    @property
    def holds(self) -> bool:
        """Whether every element that is determined came back."""
        return self.wrong == 0 and not self.note

    @property
    def complete(self) -> bool:
        """Whether every element came back."""
        return self.holds and self.lost == 0


@dataclass(frozen=True)
class Executed:
    """A call with its values.

    Attributes:
        call: The call, as rules see it.
        run: Its values; operands as they were before the call, which may have written to them.
    """

    call: Call
    run: Run


def execute(
    target: Target,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    dynamic: Collection[int] | None = None,
    names: Mapping[int, str] | None = None,
) -> Executed:
    """Run a call without gradients on copies of its tensors; a module's buffers stay as they are.

    Args:
        target: A module, a function, or the name of a method.
        args: Positional arguments.
        kwargs: Keyword arguments.
        dynamic: Identities (`id`) of the tensors that are dynamic; all by default.
        names: Names of tensors by identity, as the witnesses of verdicts use them.
    """
    module = target if isinstance(target, nn.Module) else None
    given_args, given_kwargs = _copies((tuple(args), dict(kwargs)))
    with torch.no_grad(), torch.random.fork_rng(devices=()), untouched(module):
        output = run_target(target, given_args, given_kwargs)
    call = call_of(target, args, kwargs, output, dynamic, names)
    operands = tuple(node.meta["val"] for node in call.operands)
    return Executed(call, Run(target, module, tuple(args), dict(kwargs), operands, output))


def round_trip(executed: Executed, verdict: Verdict, with_condition: bool = True) -> RoundTrip:
    """Return what the inverse of an S verdict rebuilds of an executed call's operands.

    Args:
        executed: The call with its values.
        verdict: The claim.
        with_condition: Whether to compute the condition number of a linear map, which takes a factorization.
    """
    undo = verdict.undo
    if undo is None:
        return _failure(executed, "it has no inverse that could be run")
    try:
        with torch.no_grad():
            return _compare(executed, verdict, undo, with_condition)
    except Exception as error:
        return _failure(executed, f"the inverse failed with {type(error).__name__}: {first_line(error)}")


def _compare(executed: Executed, verdict: Verdict, undo: Undo, with_condition: bool) -> RoundTrip:
    run = executed.run
    if undo.by_products is not None:
        run = replace(run, by_products=undo.by_products(run))
    hidden = _hide(executed, run, verdict)
    rebuilt = _rebuilt(undo, hidden)
    moved: list[list[Tensor]] = []
    trip = _told_apart(run, undo, rebuilt, moved)
    for patterns in (_FIRST, _AGAIN):
        # Where everything came back there is nothing to tell apart. A few changes can cancel out by chance; before an
        # element is called wrong, more are tried.
        if trip.wrong:
            moved += [_rebuilt(undo, _moved(hidden, pattern)) for pattern in patterns]
            trip = _told_apart(run, undo, rebuilt, moved)
    condition = None if undo.condition is None else cache(partial(undo.condition, run))
    if trip.wrong and condition is not None and condition() * trip.tolerance**2 > 1:
        # The map is singular in this dtype: solving it has rounding errors of its own, larger than those changes.
        trip = _told_apart(run, undo, rebuilt, moved, singular=True)
    return trip if condition is None or not with_condition else replace(trip, condition=condition())


def _told_apart(
    run: Run, undo: Undo, rebuilt: list[Tensor], moved: list[list[Tensor]], singular: bool = False
) -> RoundTrip:
    if singular:
        moved = [*moved, [torch.full_like(tensor, math.nan) for tensor in rebuilt]]
    trips = [
        _one_operand(run.operands[number], rebuilt[place], [other[place] for other in moved], run.output)
        for place, number in enumerate(undo.operands)
    ]
    return merged(trips)


def merged(trips: Sequence[RoundTrip]) -> RoundTrip:
    """Return the sum of several round trips: counts add up, the worst error and condition number stay."""
    conditions = [trip.condition for trip in trips if trip.condition is not None]
    return RoundTrip(
        sum(trip.elements for trip in trips),
        sum(trip.lost for trip in trips),
        sum(trip.wrong for trip in trips),
        max((trip.error for trip in trips), default=0.0),
        max((trip.tolerance for trip in trips), default=0.0),
        max(conditions, default=None),
        next((trip.note for trip in trips if trip.note), ""),
    )


def _hide(executed: Executed, run: Run, verdict: Verdict) -> Run:
    """Put every dynamic operand that the witness does not name on the meta device."""
    witness = verdict.witness
    shown = witness.names if witness is not None and witness.kind is WitnessKind.OTHER_OPERAND else ()
    named = zip(executed.call.operands, run.operands, strict=True)
    shadows = {id(value): value.to("meta") for node, value in named if node.name not in shown}

    def shadow(leaf: Any) -> Any:
        return shadows.get(id(leaf), leaf)

    args, kwargs, operands = pytree.tree_map(shadow, (run.args, dict(run.kwargs), run.operands))
    return replace(run, args=args, kwargs=kwargs, operands=operands)


def _rebuilt(undo: Undo, run: Run) -> list[Tensor]:
    result = undo.rebuild(run)
    tensors = [result] if isinstance(result, Tensor) else list(result)
    if len(tensors) != len(undo.operands):
        raise ValueError(f"it rebuilt {len(tensors)} operands instead of {len(undo.operands)}")
    for tensor, number in zip(tensors, undo.operands, strict=True):
        if tensor.is_meta and not run.operands[number].numel() == 0:
            raise ValueError("it uses a value that its witness does not name")
        if tensor.shape != run.operands[number].shape:
            raise ValueError(f"it rebuilt the shape {tuple(tensor.shape)}, not {tuple(run.operands[number].shape)}")
    return tensors


def _moved(run: Run, pattern: int) -> Run:
    """Move every floating-point value that the inverse reads by one unit in the last place."""
    output, by_products = pytree.tree_map_only(
        Tensor, lambda value: _moved_tensor(value, pattern), (run.output, dict(run.by_products))
    )
    return replace(run, output=output, by_products=by_products)


def _moved_tensor(value: Tensor, pattern: int) -> Tensor:
    if value.layout is not torch.strided:
        return value
    if value.is_complex():
        return torch.view_as_complex(_moved_tensor(torch.view_as_real(value.resolve_conj()).contiguous(), pattern))
    if not value.is_floating_point() or value.numel() == 0:
        return value
    info = torch.finfo(value.dtype)
    # Numbers of eight bits have no arithmetic of their own.
    exact = value.float() if value.itemsize == 1 else value
    signs = _signs(value.numel(), pattern).to(exact).view_as(value)
    exact = exact.nan_to_num(nan=math.nan, posinf=info.max, neginf=info.min)
    step = (exact.abs() * info.eps).clamp(min=info.smallest_normal) * signs
    # What overflowed stands for any large number, so it moves to the largest one.
    return (exact + step).nan_to_num(nan=math.nan, posinf=info.max, neginf=info.min).to(value.dtype)


def _signs(count: int, pattern: int) -> Tensor:
    if pattern in (_UP, _DOWN):
        return torch.full((count,), pattern)
    return torch.randint(0, 2, (count,), generator=torch.Generator().manual_seed(pattern)) * 2 - 1


def _one_operand(operand: Tensor, rebuilt: Tensor, moved: Sequence[Tensor], output: Any) -> RoundTrip:
    tolerance = _tolerance(operand, output)
    if not (operand.is_floating_point() or operand.is_complex()):
        missed = _rounded(rebuilt, operand.dtype) != operand
        lost = missed & _between_integers(rebuilt, moved, output)
        wrong = int((missed & ~lost).sum())
        return RoundTrip(operand.numel(), int(lost.sum()), wrong, math.inf if wrong else 0.0, 0.0)
    scale = _scale(operand)
    errors = _relative(rebuilt.to(operand.dtype), operand, scale)
    errors = errors.masked_fill(~torch.isfinite(operand.to(wide(operand.dtype))), 0)
    missed = errors > tolerance
    lost = missed & _undetermined(operand, rebuilt, moved, output, scale, tolerance) if missed.any() else missed
    error = float(errors.masked_fill(lost, 0).amax()) if errors.numel() else 0.0
    return RoundTrip(operand.numel(), int(lost.sum()), int((missed & ~lost).sum()), error, tolerance)


def _between_integers(rebuilt: Tensor, moved: Sequence[Tensor], output: Any) -> Tensor:
    """Tell where other bits of a result in floating point lead to another integer, or to none."""
    value = rebuilt.to(wide(rebuilt.dtype))
    open_ = torch.zeros_like(value, dtype=torch.bool) | _without_value(rebuilt, output)
    for other in moved:
        open_ |= ~((value - other.to(value.dtype)).abs() < 0.5)
    return open_


def _without_value(operand: Tensor, output: Any) -> Tensor | bool:
    """Tell where a call gave NaN or an infinity, which no integer is."""
    results = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.layout is torch.strided]
    if len(results) == 1 and results[0].shape == operand.shape:
        return ~results[0].isfinite()
    return any(not bool(result.isfinite().all()) for result in results)


def _undetermined(
    operand: Tensor, rebuilt: Tensor, moved: Sequence[Tensor], output: Any, scale: Tensor, tolerance: float
) -> Tensor:
    """Tell which elements other bits of the output, or a NaN in it, leave open."""
    open_ = torch.zeros_like(scale, dtype=torch.bool) | _undefined(operand, output)
    for other in moved:
        open_ |= _relative(rebuilt, other, scale) > tolerance * _MARGIN
    return open_


def _undefined(operand: Tensor, output: Any) -> Tensor | bool:
    """Tell where a call gave NaN, which says that the operand is outside the operator's domain."""
    leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
    results = [leaf for leaf in leaves if leaf.layout is torch.strided]
    if len(results) == 1 and results[0].shape == operand.shape:
        return results[0].isnan()
    return any(bool(result.isnan().any()) for result in results)


def _tolerance(operand: Tensor, output: Any) -> float:
    dtypes = [leaf.dtype for leaf in (operand, *pytree.tree_leaves(output)) if isinstance(leaf, Tensor)]
    inexact = [torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point or dtype.is_complex]
    return math.sqrt(max(inexact, default=0.0))


def _scale(operand: Tensor) -> Tensor:
    magnitude = operand.to(wide(operand.dtype)).abs()
    finite = magnitude[torch.isfinite(magnitude)]
    typical = finite.square().mean().sqrt() if finite.numel() else magnitude.new_zeros(())
    return magnitude.clamp(min=max(float(typical), torch.finfo(operand.dtype).tiny))


def _relative(one: Tensor, other: Tensor, scale: Tensor) -> Tensor:
    """Return relative differences in float64; equal values, infinite ones and NaNs among them, differ by 0."""
    one, other = one.to(wide(one.dtype)), other.to(wide(other.dtype))
    same = (one == other) | (one.isnan() & other.isnan())
    return ((one - other).abs() / scale).nan_to_num(nan=math.inf).masked_fill(same, 0)


def _rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    return (value.round() if value.is_floating_point() else value).to(dtype)


def _copies(values: Any) -> Any:
    """Copy every tensor once, so that what was one tensor stays one."""
    copies: dict[int, Tensor] = {}
    return pytree.tree_map_only(Tensor, lambda leaf: copies.setdefault(id(leaf), leaf.detach().clone()), values)


def _failure(executed: Executed, note: str) -> RoundTrip:
    elements = sum(operand.numel() for operand in executed.run.operands[:1])
    return RoundTrip(elements, 0, elements, math.inf, 0.0, note=note)
