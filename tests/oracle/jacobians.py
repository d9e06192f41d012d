"""Ranks of Jacobians, against the amounts that K labels claim.

A call that erases n elements of an operand maps it into a set of n dimensions less. So its Jacobian, of all
floating-point outputs with respect to that operand, has at least n singular values of zero, wherever it is taken.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import opinfo
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bwsk_fx.rules import sound
from bwsk_fx.rules.round_trip import Executed, execute
from bwsk_fx.rules.single import run_target
from bwsk_fx.verdict import Erasure, Label, Verdict

DTYPES = (torch.float64, torch.complex128)
LARGEST = 100  # Elements of an operand, above which no Jacobian is taken.

# Rules that count the elements of all operands together, not those of one of them.
JOINT = ("attention.scaled_dot_product", "attention.multi_head", "resampling.grid_sample")

# Rules whose amounts are about the second operand where it is dynamic: right-hand sides, given the matrix.
LATER = ("solving.least_squares",)

# Singular values that count as zero, as a share of the largest one or, where that is smaller, of one.
_EXACT, _DIFFERENCES = 1e-9, 1e-6
_STEP = 1e-6


class UndifferentiableError(Exception):
    """No Jacobian is taken of a call, or its entries are not finite."""


@dataclass
class Claims:
    """What the amounts of one operator came to.

    Attributes:
        name: The operator's name in the database, with its variant.
        checked: Amounts that were held against the rank of a Jacobian.
        tight: How many of them are exactly what the rank says.
        false: Descriptions of the amounts that a Jacobian or the operand's size contradicts.
        misled: Descriptions of the amounts that autograd contradicts and finite differences do not.
        skipped: Amounts that no Jacobian was taken for, by reason.
        full: Reasons of K and GRAY labels without an amount, where the Jacobian has full rank.
        deficient: How many K and GRAY labels there are where it has not.
    """

    name: str
    checked: int = 0
    tight: int = 0
    false: list[str] = field(default_factory=list)
    misled: list[str] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    full: Counter[str] = field(default_factory=Counter)
    deficient: int = 0


def survey(op: Any, limit: int | None = None, candidates: bool = False) -> Claims:
    """Hold the amounts of one operator's K labels against sizes and Jacobians, on at most `limit` samples per dtype.

    With `candidates`, the Jacobians of K and GRAY labels without an amount are taken, too.
    """
    result = Claims(opinfo.full_name(op))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for where, sample in opinfo.samples(op, DTYPES, limit):
            for dynamic in opinfo.choices(sample):
                try:
                    executed = execute(op.op, opinfo.arguments(sample), sample.kwargs, dynamic)
                except Exception:
                    break  # The operator refuses the sample.
                verdict = sound.verdict(executed.call)
                if verdict.label is not Label.S and executed.call.operands:
                    examine(executed, verdict, where, result, candidates)
    return result


def examine(executed: Executed, verdict: Verdict, where: str, result: Claims, candidates: bool = False) -> None:
    """Note whether a K verdict's amounts are possible, and what speaks against a K or GRAY label without one."""
    shapes = [tuple(operand.shape) for operand in executed.run.operands]
    what = f"{where} {shapes} {verdict.erasure}, {verdict.rationale}"
    if verdict.erasure is not None and too_large(executed, verdict):
        result.false.append(f"more than there is: {what}")
        return
    try:
        if verdict.erasure is not None and verdict.erasure.elements is not None and not verdict.erasure.expected:
            _hold_against_ranks(executed, verdict, what, result)
        elif candidates and _has_full_rank(executed):
            result.full[f"{verdict.label} {verdict.rationale}"] += 1
        elif candidates:
            result.deficient += 1
    except UndifferentiableError as reason:
        result.skipped[str(reason)] += 1


def _has_full_rank(executed: Executed) -> bool:
    first = executed.run.operands[:1]
    return _rank(executed, first) == _dimensions(first)


def too_large(executed: Executed, verdict: Verdict) -> bool:
    """Whether a verdict erases more elements or bits than there are."""
    erasure = verdict.erasure or Erasure(0)
    gather = sum if verdict.rule in JOINT else max
    operands = executed.run.operands
    elements = gather(operand.numel() for operand in operands)
    bits = gather(operand.numel() * operand.itemsize * 8 for operand in operands)
    return (erasure.elements or 0) > elements or (erasure.bits or 0) > bits


def _hold_against_ranks(executed: Executed, verdict: Verdict, what: str, result: Claims) -> None:
    group = _claimed(executed, verdict)
    kept = _dimensions(group) - _lost(verdict, group)
    rank = _rank(executed, group)
    result.checked += 1
    result.tight += rank == kept
    if rank > kept:
        agrees = matrix_rank(differences(executed, group), _DIFFERENCES) <= kept
        (result.misled if agrees else result.false).append(f"rank {rank} instead of at most {kept:g}: {what}")


def _claimed(executed: Executed, verdict: Verdict) -> Sequence[Tensor]:
    """Return the operands that an amount is about: the first one, given the others, with the exceptions above."""
    operands = executed.run.operands
    first = 1 if verdict.rule in LATER and len(operands) > 1 else 0
    return operands if verdict.rule in JOINT else operands[first : first + 1]


def _lost(verdict: Verdict, group: Sequence[Tensor]) -> float:
    assert verdict.erasure is not None and verdict.erasure.elements is not None
    return verdict.erasure.elements * (2 if group[0].is_complex() else 1)


def _dimensions(group: Sequence[Tensor]) -> int:
    """Return how many real numbers operands hold."""
    return sum(operand.numel() * (2 if operand.is_complex() else 1) for operand in group)


def _rank(executed: Executed, group: Sequence[Tensor]) -> int:
    _check(group)
    try:
        matrix, tolerance = jacobian(executed, group), _EXACT
    except (RuntimeError, NotImplementedError):
        # The operator has no derivative, or not here.
        matrix, tolerance = differences(executed, group), _DIFFERENCES
    return matrix_rank(matrix, tolerance)


def _check(group: Sequence[Tensor]) -> None:
    if not all((leaf.is_floating_point() or leaf.is_complex()) and leaf.layout is torch.strided for leaf in group):
        raise UndifferentiableError("an operand is no dense tensor of real or complex numbers")
    if any(leaf.dtype not in DTYPES for leaf in group):
        raise UndifferentiableError("an operand has too few digits")
    if any(operand.numel() > LARGEST for operand in group):
        raise UndifferentiableError("an operand is too large")


def matrix_rank(matrix: Tensor, tolerance: float) -> int:
    """Return how many singular values are larger than `tolerance`, relative to the largest one or to one."""
    if matrix.numel() == 0:
        return 0
    if not bool(matrix.isfinite().all()):
        raise UndifferentiableError("the Jacobian is not finite")
    values = torch.linalg.svdvals(matrix)
    return int((values > tolerance * max(float(values[0]), 1.0)).sum())


def jacobian(executed: Executed, group: Sequence[Tensor]) -> Tensor:
    """Return a matrix with the Jacobian's rank: the Jacobian of all outputs, or of enough random mixtures of them.

    Raises:
        RuntimeError: Autograd has no derivative of the call.
    """
    leaves = [operand.detach().clone().requires_grad_() for operand in group]
    mixed = _mixed(_outputs(executed, group, leaves), _dimensions(group))
    rows = [_gradient(value, leaves) for value in mixed] if mixed.requires_grad else []
    return torch.stack(rows) if rows else torch.zeros(0, _dimensions(group), dtype=torch.float64)


def differences(executed: Executed, group: Sequence[Tensor]) -> Tensor:
    """Return the transpose of the Jacobian from central differences; zero where a result jumps, as counts do."""
    places = [
        (number, place) for number in range(len(group)) for place in range(_dimensions(group[number : number + 1]))
    ]
    rows = [_difference(executed, group, *place) for place in places]
    return torch.stack(rows) if rows else torch.zeros(0, 0, dtype=torch.float64)


def _difference(executed: Executed, group: Sequence[Tensor], number: int, place: int) -> Tensor:
    wide, narrow = (_quotient(executed, group, number, place, step) for step in (_STEP, _STEP / 4))
    # Across a jump, a quotient grows as the step shrinks, or vanishes once the step no longer reaches it.
    least = torch.where(narrow.abs() < wide.abs(), narrow, wide)
    return least.masked_fill(narrow.abs() > 2 * wide.abs() + 1, 0)


def _quotient(executed: Executed, group: Sequence[Tensor], number: int, place: int, step: float) -> Tensor:
    ends = [_outputs(executed, group, _moved(group, number, place, sign * step)).detach() for sign in (1, -1)]
    return (ends[0] - ends[1]) / (2 * step)


def _moved(group: Sequence[Tensor], number: int, place: int, step: float) -> list[Tensor]:
    moved = [operand.detach().clone() for operand in group]
    flat = _real(moved[number]).clone()
    flat[place] += step
    shape = moved[number].shape
    moved[number] = torch.view_as_complex(flat.view(*shape, 2)) if moved[number].is_complex() else flat.view(shape)
    return moved


def _outputs(executed: Executed, group: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    """Run a call with other values of some operands; return its outputs as one vector of real numbers."""
    run = executed.run
    # Copies, because a call may write to its operands.
    given = {id(operand): value.clone() for operand, value in zip(group, values, strict=True)}

    def swapped(leaf: Tensor) -> Tensor:
        return given[id(leaf)] if id(leaf) in given else leaf.detach().clone()

    args, kwargs = pytree.tree_map_only(Tensor, swapped, (run.args, dict(run.kwargs)))
    with torch.random.fork_rng(devices=()), torch.enable_grad():
        output = run_target(run.target, args, kwargs)
    leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
    real = [_real(leaf) for leaf in leaves if leaf.is_floating_point() or leaf.is_complex()]
    return torch.cat(real) if real else torch.zeros(0, dtype=torch.float64)


def _real(value: Tensor) -> Tensor:
    parts = torch.view_as_real(value.resolve_conj()) if value.is_complex() else value
    return parts.reshape(-1).double()


def _mixed(outputs: Tensor, dimensions: int) -> Tensor:
    """Return random sums of outputs where they are many more than the operand has dimensions; the rank stays."""
    enough = dimensions + 8
    if outputs.numel() <= enough:
        return outputs
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(enough, outputs.numel(), generator=generator, dtype=torch.float64)
    return (weights / math.sqrt(outputs.numel())) @ outputs


def _gradient(value: Tensor, leaves: Sequence[Tensor]) -> Tensor:
    found = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True)
    pairs = zip(found, leaves, strict=True)
    return torch.cat([_real(torch.zeros_like(leaf) if gradient is None else gradient) for gradient, leaf in pairs])


def main() -> None:
    """Print the amounts that are false, and K and GRAY labels of operators whose Jacobians all have full rank.

    `python tests/oracle/jacobians.py` for all operators, or with their names as arguments.
    """
    import sys

    for op in opinfo.operators(" ".join(sys.argv[1:])):
        found = survey(op, candidates=True)
        for title in ("false", "misled"):
            for line in getattr(found, title)[:3]:
                print(found.name, title, line)
        if found.full and not found.deficient and not found.checked:
            for reason, count in found.full.items():
                print(found.name, f"has full rank on all samples, {count} of them with", reason)


if __name__ == "__main__":
    main()
