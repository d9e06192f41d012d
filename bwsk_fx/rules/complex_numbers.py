"""Complex numbers: their parts, and how they are put together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bwsk_fx.rules.bijections import identity, per_element, unchanged, undo_by, widened
from bwsk_fx.rules.broadcasting import broadcasts, from_result
from bwsk_fx.rules.registry import Call, erases, every, labels, preserves, witness_of
from bwsk_fx.rules.spelling import plain_name, spellings
from bwsk_fx.rules.undo import Run, Undo, unbroadcast
from bwsk_fx.verdict import REFINED, Verdict


@labels(*spellings("real imag angle"))
def part(call: Call) -> Verdict:
    """One of the two parts of a complex number; the other is gone."""
    if not call.before.is_complex():
        return (
            unchanged("real numbers are their own real part")
            if plain_name(call) == "real"
            else erases("all that is left is the sign")
        )
    return erases("of two parts, one is left", per_element(call, 0.5), confidence=REFINED)


@labels(*spellings("conj conj_physical resolve_conj resolve_neg"), atens="_conj _conj_physical _neg_view")
def conjugate(call: Call) -> Verdict:
    """Its own inverse."""
    name = plain_name(call)
    inverse = {"neg_view": torch.neg}.get(name, identity if name.startswith("resolve") else torch.conj_physical)
    return preserves("doing it twice changes nothing", undo=undo_by(inverse))


@labels(*spellings("view_as_real view_as_complex"))
def reinterpreted(call: Call) -> Verdict:
    """Reads the same memory as pairs of real numbers, or as complex ones."""
    inverse = torch.view_as_complex if plain_name(call) == "view_as_real" else torch.view_as_real
    return preserves("the same memory is read as another dtype", undo=undo_by(inverse))


@labels(torch.complex, atens="complex")
@broadcasts
def assembled(call: Call) -> Verdict:
    """Puts two real parts together, and both can be taken out again."""
    if call.argument(0, "real") is call.argument(1, "imag"):
        return from_result("both parts are the operand", _real_part)
    return preserves("both parts can be taken out again", undo=Undo(_parts, every(call)))


def _real_part(run: Run) -> Tensor:
    return run.output.real


def _parts(run: Run) -> Sequence[Tensor]:
    real = run.argument(0, "real")
    return [
        unbroadcast(run.output.real if operand is real else run.output.imag, operand.shape) for operand in run.operands
    ]


@labels(torch.polar, atens="polar")
@broadcasts
def polar(call: Call) -> Verdict:
    """Size and angle to a complex number: the size comes back, the angle up to full turns."""
    size, angle = call.argument(0, "abs"), call.argument(1, "angle")
    if size is not call.operands[0] or size is angle:
        return erases("angles that are a full turn apart give one result")
    witness = witness_of(call, angle)
    return from_result("turning the result back leaves its size", _turned_back, witness)


def _turned_back(run: Run) -> Tensor:
    angle = run.argument(1, "angle").to(torch.float64)
    return (widened(run.output) * torch.polar(torch.ones_like(angle), -angle)).real
