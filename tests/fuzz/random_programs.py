"""Random straight-line programs over tensors: what chains of layers do not do.

A `Program` is a list of operations on numbered values, like the code of a forward method: each reads earlier values,
and adds what it returns to them. It prints as the expression that makes it. Among the operations are some with several
inputs and outputs, gathers, in-place writes, views, casts, integers and booleans, reductions, products, one dropout
mask on two values, and modules that are called as often as it happens. Programs are drawn by running them, so that
every operation fits what is there.

`pick` is `random.Random(seed).choice`, or hypothesis' `draw` of `sampled_from`: the same generator serves both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from program_operations import IDS, OPERATIONS, TOKENS, WIDTH, WRITES, Pool, kind_of
from torch import Tensor, nn

Pick = Callable[[Sequence[Any]], Any]
BATCH = 5  # While a program is drawn: no other size is 5, so that no operation takes it for one.
_INPUTS = 4
_LARGEST, _MOST_ELEMENTS = 1e3, 3000


@dataclass(frozen=True)
class Op:
    """One operation: its name, the values that it reads, and its options."""

    name: str
    reads: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)

    def run(self, pool: Pool, values: list[Any]) -> list[Any]:
        result = OPERATIONS[self.name].run(pool, *(values[place] for place in self.reads), **self.options)
        return list(result) if isinstance(result, (tuple, list)) else [result]


@dataclass(frozen=True)
class Program:
    """Operations on `x`, `y`, `ids` and `mask`, and the places of the values that come out."""

    ops: tuple[Op, ...]
    outputs: tuple[int, ...]

    def run(self, pool: Pool, values: list[Any]) -> list[Any]:
        for op in self.ops:
            values = values + op.run(pool, values)
        return [values[place] for place in self.outputs]


class ProgramModule(nn.Module):
    """The module whose forward method is a program."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        self.pool = Pool()

    def forward(self, x: Tensor, y: Tensor, ids: Tensor, mask: Tensor) -> tuple[Any, ...]:
        return tuple(self.program.run(self.pool, [x, y, ids, mask]))


def build(program: Program, seed: int = 0) -> ProgramModule:
    """Return the module in train mode and float64, with weights from a seed."""
    torch.manual_seed(seed)
    model = ProgramModule(program).double().train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) / 2)
    return model


def inputs_of(batch: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Return `x` and `y` with gradients, integers below `IDS`, and booleans."""
    generator = torch.Generator().manual_seed(100 * batch + seed)
    shape = (batch, TOKENS, WIDTH)
    x, y = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in "xy")
    ids = torch.randint(IDS, shape[:2], generator=generator)
    return {"x": x.requires_grad_(), "y": y.requires_grad_(), "ids": ids, "mask": ids > 1}


def draw_program(pick: Pick, most: int = 8) -> Program:
    """Draw a program of up to that many operations."""
    pool = build(Program((), ())).pool
    values: list[Any] = [value.detach() for value in inputs_of(BATCH).values()]
    ops: list[Op] = []
    with torch.no_grad():
        for _ in range(pick(range(2, most + 1))):
            op = _draw_op(pick, values)
            if op is not None and (made := _result(op, pool, values)) is not None:
                ops.append(op)
                values += made
    places = range(len(values))
    fresh = places[_INPUTS:] or places
    outputs = [fresh[-1], *(pick(places if pick(range(4)) == 0 else fresh) for _ in range(pick(range(4))))]
    return Program(tuple(ops), tuple(outputs))


def _draw_op(pick: Pick, values: list[Any]) -> Op | None:
    name = pick(list(OPERATIONS))
    operation = OPERATIONS[name]
    reads: list[int] = []
    for kind in operation.kinds:
        # A leaf with a gradient cannot be written into.
        first = _INPUTS if name in WRITES and not reads else 0
        fitting = [place for place, value in enumerate(values) if kind_of(value) == kind and place >= first]
        if not fitting:
            return None
        # Later values more often: a program is more than many short ones side by side.
        reads.append(pick(fitting[-3:] if pick(range(2)) else fitting))
    options = operation.options(pick, *(values[place] for place in reads))
    return None if options is None else Op(name, tuple(reads), options)


def _result(op: Op, pool: Pool, values: list[Any]) -> list[Any] | None:
    """Run an operation on copies first: one that does not fit is none, and must not have written anything."""
    try:
        made = op.run(pool, [value.clone() for value in values])
        return op.run(pool, values) if all(map(_is_tame, made)) else None
    except (RuntimeError, IndexError, ValueError):
        return None


def _is_tame(value: Any) -> bool:
    if not isinstance(value, Tensor) or value.numel() == 0:
        return False
    return value.numel() <= _MOST_ELEMENTS and bool((value.double().abs() <= _LARGEST).all())


def loss_of(outputs: Sequence[Any]) -> Tensor:
    """Return a scalar that depends on every output with a gradient but the second."""
    used = [value for place, value in enumerate(outputs) if isinstance(value, Tensor) and place != 1]
    grown = [value for value in used if value.requires_grad]
    return sum((value.double().sin().sum() * (place + 1) for place, value in enumerate(grown)), torch.zeros(()))


def simpler(program: Program) -> list[Program]:
    """Return programs with one output or one operation less, for finding a small one that still fails."""
    fewer = [
        Program(program.ops, program.outputs[:place] + program.outputs[place + 1 :])
        for place in range(len(program.outputs))
        if len(program.outputs) > 1
    ]
    return fewer + [shorter for place in range(len(program.ops)) if (shorter := _without(program, place)) is not None]


def _without(program: Program, place: int) -> Program | None:
    """Leave an operation out; what read its results reads its first operand instead."""
    pool, values = build(Program((), ())).pool, list(inputs_of(BATCH).values())
    moved: dict[int, int] = {number: number for number in range(_INPUTS)}
    ops: list[Op] = []
    old, new = _INPUTS, _INPUTS
    try:
        with torch.no_grad():
            for number, op in enumerate(program.ops):
                reads = tuple(moved[read] for read in op.reads)
                made = Op(op.name, reads, op.options).run(pool, [value.detach().clone() for value in values])
                for part in range(len(made)):
                    moved[old + part] = reads[0] if number == place else new + part
                old += len(made)
                if number != place:
                    ops.append(Op(op.name, reads, op.options))
                    values += made
                    new += len(made)
        return Program(tuple(ops), tuple(moved[output] for output in program.outputs))
    except Exception:
        return None
