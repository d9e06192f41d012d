"""Operators that only move elements, followed by running them on the elements' numbers.

Each element of an operand is numbered, and the operator runs on the numbers: where a number comes out, that element
went. It is done twice with the numbers shifted, which tells them from constants such as padding. So one inverse serves
every operator that moves, copies or drops elements, and what is dropped can be counted.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from bwsk_fx.rules.registry import Call, erases, preserves, unproven
from bwsk_fx.rules.single import Target, run_target
from bwsk_fx.rules.undo import Run, Undo, wide
from bwsk_fx.verdict import REFINED, Verdict

# Typing takes under a millisecond per node; larger operands are counted by their shapes alone.
_TRACED_ELEMENTS = 1 << 12


@dataclass(frozen=True)
class Track:
    """Where the elements of a call's results come from.

    Attributes:
        source: For each element of the results, in order, the number of the operands' element that it is.
        moved: Whether it is one at all; constants are not.
        conjugated: Whether it is that element's conjugate.
    """

    source: Tensor
    moved: Tensor
    conjugated: Tensor


def moves_back(*numbers: int) -> Undo:
    """Return the inverse of a call that moves the operands of these numbers (the first one by default)."""
    numbers = numbers or (0,)
    return Undo(partial(_move_back, numbers), numbers)


def moves(call: Call, why: str) -> Verdict:
    """Return the verdict of a call that picks elements of its first operand: by following them, else by counting."""
    missing = lost(call)
    if missing is None:
        return counted(call, why)
    return by_missing(missing, why)


def counted(call: Call, why: str, conclusive: bool = False) -> Verdict:
    """Return the verdict of counting elements: K where there are fewer than before.

    Args:
        call: A call that picks elements of its first operand.
        why: What it does, for the rationale.
        conclusive: Whether as many elements as before are the same ones, as with slices.
    """
    missing = call.erased()
    if missing is not None and missing > 0:
        return by_missing(missing, why)
    if missing == 0 and conclusive:
        return by_missing(0, why)
    unknown = "how much it drops is not proportional to the batch" if missing is None else "an element may be missing"
    return unproven(f"{why}; {unknown}")


def by_missing(missing: int, why: str) -> Verdict:
    """Return the verdict of a call whose result has all but `missing` elements of its first operand."""
    if missing > 0:
        return erases(f"{why}, and {missing} elements per sample are not among them", missing, confidence=REFINED)
    return preserves(f"{why}, and no element is missing", confidence=REFINED, undo=moves_back())


def axis_size(value: Tensor, dim: int) -> Any:
    """Return the size of a dimension; a scalar has one element along it."""
    return value.shape[dim] if value.dim() else 1


def is_plain(value: Tensor) -> bool:
    """Whether a tensor lies in its memory from the start, in order: addresses and numbers of elements are the same."""
    return value.is_contiguous() and value.storage_offset() == 0


def lost(
    call: Call,
    operand: fx.Node | None = None,
    *,
    zeroed: Sequence[Any] = (),
    per_sample: bool = False,
    scale: float = 1,
) -> int | None:
    """Return how many elements of an operand the result does not have; None where they cannot be followed.

    Args:
        call: A call that moves elements.
        operand: The operand to follow; the first dynamic one by default.
        zeroed: Other operands, whose shapes matter and whose values do not.
        per_sample: Follow one sample of a symbolic batch; right where samples keep apart.
        scale: What the call multiplies the elements by.
    """
    operand = operand or call.operands[0]
    stand_ins = {node: _shape_of(node, per_sample) for node in (operand, *zeroed) if isinstance(node, fx.Node)}
    if any(shape is None or shape.numel() > _TRACED_ELEMENTS for shape in stand_ins.values()):
        return None
    values: dict[fx.Node, Any] = {
        node: torch.zeros(shape, dtype=torch.float64) for node, shape in stand_ins.items() if shape is not None
    }
    for node in call.node.all_input_nodes:
        if node not in values and (value := call.static(node)) is not None:
            values[node] = value
    if any(node not in values for node in call.node.all_input_nodes):
        return None
    return _lost(call, operand, values, scale)


def _lost(call: Call, operand: fx.Node, values: Mapping[fx.Node, Any], scale: float) -> int | None:
    followed = values[operand]

    def run(probe: Tensor) -> Any:
        given = {**values, operand: probe}
        args, kwargs = pytree.tree_map_only(fx.Node, lambda node: given[node], (call.args, dict(call.kwargs)))
        return pytree.tree_map_only(Tensor, lambda result: result / scale, run_target(call.target, args, kwargs))

    try:
        track = _follow(run, followed.shape, torch.float64)
    except (RuntimeError, IndexError, TypeError, ValueError):
        return None
    seen = torch.zeros(followed.numel(), dtype=torch.bool)
    seen[track.source[track.moved]] = True
    return int(followed.numel() - seen.sum())


def _shape_of(node: fx.Node, per_sample: bool) -> torch.Size | None:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return None
    sizes = [size if isinstance(size, int) else 1 if per_sample else None for size in value.shape]
    return None if None in sizes else torch.Size(sizes)  # type: ignore[arg-type]


def _follow(run: Callable[[Tensor], Any], shape: torch.Size, dtype: torch.dtype) -> Track:
    first, second = (_flat(run(_numbers(shape, dtype, start))) for start in (0, shape.numel()))
    moved = (second - first).real == shape.numel() if dtype.is_complex else second - first == shape.numel()
    source = (first.real if dtype.is_complex else first).masked_fill(~moved, 0).long()
    conjugated = first.imag < 0 if dtype.is_complex else torch.zeros_like(moved)
    return Track(source, moved, conjugated)


def _numbers(shape: torch.Size, dtype: torch.dtype, start: int) -> Tensor:
    numbers = torch.arange(start, start + shape.numel(), dtype=torch.float64).view(shape)
    return torch.complex(numbers, torch.ones_like(numbers)) if dtype.is_complex else numbers


def _flat(result: Any) -> Tensor:
    leaves = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
    return torch.cat([leaf.resolve_conj().resolve_neg().flatten() for leaf in leaves])


def _move_back(numbers: tuple[int, ...], run: Run) -> list[Tensor]:
    operands = [run.operands[number] for number in numbers]
    sizes = [operand.numel() for operand in operands]
    dtype = torch.complex128 if any(operand.is_complex() for operand in operands) else torch.float64
    follow = partial(_follow, partial(_run_again, run, operands), torch.Size([sum(sizes)]), dtype)
    track = run.once("track", follow)
    values = _flat(run.output)
    if dtype.is_complex:
        values = torch.where(track.conjugated, values.conj(), values)
    found = values.new_zeros(sum(sizes))
    found[track.source[track.moved]] = values[track.moved]
    parts = zip(found.split(sizes), operands, strict=True)
    return [part.view(operand.shape) for part, operand in parts]


def _run_again(run: Run, operands: Sequence[Tensor], numbers: Tensor) -> Any:
    """Run a call on numbers; other operands become as wide as the numbers, indices and masks stay as they are."""
    parts = zip(operands, numbers.split([operand.numel() for operand in operands]), strict=True)
    probes = {id(operand): part.view(operand.shape) for operand, part in parts}
    try:
        return _run_with(run, probes, {torch.float16, torch.bfloat16, torch.float32, torch.complex64})
    except RuntimeError:
        # Operands of an integer dtype look like indices, which these are not.
        return _run_with(run, probes, {operand.dtype for operand in operands})


def _run_with(run: Run, probes: Mapping[int, Tensor], peers: Collection[torch.dtype]) -> Any:
    target: Target = run.target

    def stand_in(leaf: Tensor) -> Tensor:
        if id(leaf) in probes:
            return probes[id(leaf)].clone()
        value = torch.zeros(leaf.shape, dtype=leaf.dtype) if leaf.is_meta else leaf
        return value.to(wide(leaf.dtype)) if leaf.dtype in peers else value

    args, kwargs = pytree.tree_map_only(Tensor, stand_in, (run.args, dict(run.kwargs)))
    return run_target(target, args, kwargs)
