"""What broadcasting and masks leave of an operand: copies of its elements, of which one has to survive."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, wraps

import torch
from torch import Tensor

from bwsk_fx.rules import sizes
from bwsk_fx.rules.bijections import per_element
from bwsk_fx.rules.registry import Call, erases, preserves, unproven
from bwsk_fx.rules.undo import Run, Undo, unbroadcast
from bwsk_fx.verdict import NOTHING, REFINED, Verdict, Witness


def broadcasts(rule: Callable[[Call], Verdict]) -> Callable[[Call], Verdict]:
    """Decorate the rule of an operator that broadcasts: where the result has no element, everything is erased."""

    @wraps(rule)
    def checked(call: Call) -> Verdict:
        if sizes.elements(call.value) == 0:
            return erases("broadcasting leaves no element", call.elements(), confidence=REFINED)
        return rule(call)

    return checked


def where_kept(call: Call, kept: Tensor, why: str, estimate: Callable[[Run], Tensor], loss: str) -> Verdict:
    """Return the verdict of a call whose result holds an element of the operand where a static mask says so.

    Args:
        call: The call.
        kept: The mask, broadcastable to the result.
        why: Why the operand is preserved where the mask is True everywhere.
        estimate: Rebuilds a tensor of the result's shape, right where `kept`.
        loss: Why it is erased elsewhere.
    """
    lost = _lost_share(call, kept)
    if lost is None:
        return unproven("which copies of the operand the mask keeps depends on the batch size")
    if lost > 0:
        return erases(loss, per_element(call, lost), confidence=REFINED)
    if bool(kept.all()):
        return preserves(why, confidence=REFINED, undo=Undo(partial(_first_copy, estimate)))
    undo = Undo(partial(_kept_copies, estimate, kept))
    return preserves("at least one copy of each element is kept", confidence=REFINED, undo=undo)


def _first_copy(estimate: Callable[[Run], Tensor], run: Run) -> Tensor:
    return _as_real(unbroadcast(estimate(run), run.before.shape), run)


def _kept_copies(estimate: Callable[[Run], Tensor], kept: Tensor, run: Run) -> Tensor:
    values = estimate(run)
    kept = kept.expand(values.shape)
    total = torch.where(kept, values, torch.zeros_like(values)).sum_to_size(run.before.shape)
    return _as_real(total / kept.to(torch.float64).sum_to_size(run.before.shape), run)


def _as_real(value: Tensor, run: Run) -> Tensor:
    return value.real if value.is_complex() and not run.before.is_complex() else value


def _lost_share(call: Call, kept: Tensor) -> float | None:
    """Return the share of the operand's elements of which no copy is kept; None where it cannot be told."""
    if bool(kept.all()):
        return 0.0
    before, after = call.before.shape, call.value.shape
    if same_sizes(before, after):
        return int((~kept).sum()) / kept.numel()
    if not all(isinstance(size, int) for size in (*before, *after)):
        return None
    copies = kept.to(torch.float64).expand(after).sum_to_size(before)
    return int((copies == 0).sum()) / copies.numel()


def same_sizes(one: Sequence[int], other: Sequence[int]) -> bool:
    """Whether two shapes are alike; the batch size, which is symbolic, is not taken for a number."""
    alike = (type(a) is type(b) and a == b for a, b in zip(one, other, strict=False))
    return len(one) == len(other) and all(alike)


def from_result(
    why: str,
    estimate: Callable[[Run], Tensor],
    witness: Witness = NOTHING,
    confidence: float = REFINED,
    domain: str | None = None,
) -> Verdict:
    """Return an S verdict whose operand is the first of the copies that `estimate` rebuilds in the result's shape."""
    return preserves(why, witness, confidence, undo=Undo(partial(_first_copy, estimate)), domain=domain)
