"""Casts from one dtype to another."""

from __future__ import annotations

import torch
from torch import Tensor

from bwsk_fx.rules.bijections import per_element
from bwsk_fx.rules.registry import Call, erases, labels, preserves
from bwsk_fx.rules.sizes import narrowed_bits, short, widens
from bwsk_fx.rules.undo import Run, Undo
from bwsk_fx.verdict import REFINED, Verdict


@labels(methods="to type type_as cpu cuda float double half bfloat16 int long bool short char byte")
@labels(methods="cfloat cdouble chalf", atens="_to_copy to type_as convert_element_type")
def cast(call: Call) -> Verdict:
    """A cast: S when it widens, K by its mantissa tail when it narrows."""
    before, after = call.before.dtype, call.value.dtype
    if widens(before, after) or _wraps(before, after):
        how = "keeps the dtype" if before is after else "widens"
        why = f"{short(before)} → {short(after)} {how}, so the cast back undoes it"
        return preserves(why, confidence=REFINED, undo=Undo(_cast_back))
    why = f"{short(before)} → {short(after)} narrows"
    if before.is_complex and not after.is_complex:
        return erases("the imaginary part is dropped", per_element(call, 0.5), confidence=REFINED)
    if _inexact(before) and _inexact(after):
        bits = narrowed_bits(call.before, after)
        parts = 2 if before.is_complex else 1
        return erases(
            f"{why} and erases the mantissa's tail", bits=None if bits is None else parts * bits, confidence=REFINED
        )
    return erases(why, bits=_integer_bits(call, before, after), confidence=REFINED)


def _inexact(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


def _wraps(before: torch.dtype, after: torch.dtype) -> bool:
    """Whether both are integers that wrap around, and the result has all of the bits."""
    exact = not (_inexact(before) or _inexact(after) or after is torch.bool)
    return exact and after.itemsize >= before.itemsize


def _integer_bits(call: Call, before: torch.dtype, after: torch.dtype) -> float | None:
    """Bits that are cut off an integer, or off anything that becomes a truth value."""
    if after is torch.bool:
        return per_element(call, 8 * before.itemsize - 1)
    if _inexact(before) or _inexact(after):
        return None
    return per_element(call, 8 * (before.itemsize - after.itemsize))


def _cast_back(run: Run) -> Tensor:
    value = run.output
    return (value.real if value.is_complex() and not run.before.is_complex() else value).to(run.before.dtype)
