"""How near is the modelled overhead of a plan to the measured one?

For each cost model, each plan is made with it, and its overhead is what the model says of all regions together. The
measured overhead is that of forward and backward pass over eager's, without an optimizer: every variant has its turn in
each round, so that a busy machine slows all of them alike, and the figure is the median over rounds of the ratio to
eager in the same round. A turn is two steps, of which the second is timed: in training, a model follows on itself. Two
overheads agree when they are less than a quarter, or less than 0.02, apart.

A model of operators does not know what Python takes to run a region. `calls` is that time, as a fraction of eager's
step: what a model of as many regions, but of tiny tensors, takes beyond eager at the least. `with calls` says whether
the overheads agree when it is added to the modelled one.

Nothing is read from the user's cache of measured times unless BWSK_FX_CACHE names one.

With --retain-heap, freed memory stays with the process, as it does on an accelerator. Without it, glibc gives memory
back to the system and takes it anew in every step, the more the more a step keeps: eager execution pays most for it,
and no model of single operators knows. With --clock cpu, the time is what the thread has had of the processor, which
leaves out when others had it; right for one thread on a busy machine.

    python benchmarks/predicted_time.py
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from common import Shape, parser, report, shape_of

import bwsk_fx
from bwsk_fx.modes import applied
from bwsk_fx.reversible import ReversibleRegion

QUESTION = "predicted-time"
COSTS = ("builtin", "roofline", "measured")
CLOCKS = {"wall": time.perf_counter, "cpu": time.thread_time}
WARM_UP = 2
NEAR_RELATIVE, NEAR_ABSOLUTE = 0.25, 0.02
# glibc's names for its settings.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


@dataclass(frozen=True)
class Variant:
    """A model with plans of its own.

    Attributes:
        faith: as for `apply`.
        budget: as for `apply`.
        costs: the cost model that plans and predicts.
        model: the model, in reversible mode.
    """

    faith: str
    budget: float
    costs: str
    model: torch.nn.Module

    def seconds(self) -> tuple[float, float]:
        """Return the modelled seconds of all regions, run conventionally and as planned; after a first step only."""
        regions = (module for module in applied(self.model).rewritten.modules() if isinstance(module, ReversibleRegion))
        plans = [region.program.plan for region in regions]
        return sum(plan.conventional_seconds for plan in plans), sum(plan.planned_seconds for plan in plans)


def main() -> None:
    arguments = parser(__doc__, Shape(layers=6, hidden=192, batch=4, image=224, precision="bf16"))
    arguments.set_defaults(budgets=[0.0, 0.1, 0.25, float("inf")])
    arguments.add_argument("--costs", choices=COSTS, nargs="+", default=list(COSTS))
    arguments.add_argument("--rounds", type=int, default=20)
    arguments.add_argument("--clock", choices=list(CLOCKS), default="wall")
    arguments.add_argument("--retain-heap", action="store_true", help="keep freed memory in the process (glibc)")
    options = arguments.parse_args()
    if options.retain_heap:
        retain_heap()
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("BWSK_FX_CACHE", folder)
        rows = compared(shape_of(options), options)
    percent, ms = "{:+.1%}".format, "{:.1f}".format
    columns = {"variant": str, "costs": str, "eager ms": ms, "ms": ms}
    columns |= dict.fromkeys(("predicted", "calls", "measured", "at least"), percent)
    columns |= dict.fromkeys(("agree", "with calls"), lambda same: "yes" if same else "no")
    report(QUESTION, options, rows, columns)


def compared(shape: Shape, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one row per plan and cost model."""
    tiny = replace(shape, hidden=64, batch=1, image=32)
    least, *others = map(min, timed(tiny, variants(tiny.model(options.device), options.budgets, "builtin"), options))
    calls = [own - least for own in others]
    planned = [
        variant for costs in options.costs for variant in variants(shape.model(options.device), options.budgets, costs)
    ]
    eager, *others = timed(shape, planned, options)
    print(f"eager: {1000 * median(eager):.1f} ms, {1000 * min(eager):.1f} ms at least")
    return [row(variant, eager, own, extra) for variant, own, extra in zip(planned, others, itertools.cycle(calls))]


def timed(shape: Shape, planned: Iterable[Variant], options: argparse.Namespace) -> list[list[float]]:
    """Return the seconds of eager's steps and of every variant's, round by round."""
    models, inputs = (
        [shape.model(options.device), *(variant.model for variant in planned)],
        shape.inputs(options.device),
    )
    times: list[list[float]] = [[] for _ in models]
    for number in range(WARM_UP + options.rounds):
        for own, model in zip(times, models, strict=True):
            _, seconds = (step_seconds(model, inputs, shape.dtype, CLOCKS[options.clock]) for _ in range(2))
            if number >= WARM_UP:
                own.append(seconds)
    return times


def variants(model: torch.nn.Module, budgets: list[float], costs: str) -> Iterator[Variant]:
    """Yield the plans that are compared: rounded at each budget, and exact at 0."""
    for faith, budget in (*(("rounded", budget) for budget in budgets), ("exact", 0.0)):
        own = bwsk_fx.apply(copy.deepcopy(model), "reversible", budget=budget, faith=faith, costs=costs)
        yield Variant(faith, budget, costs, own)


def step_seconds(
    model: torch.nn.Module, inputs: dict[str, torch.Tensor], dtype: torch.dtype | None, clock: Callable[[], float]
) -> float:
    """Return the seconds of one forward and backward pass, kernels included."""
    device = inputs["labels"].device
    wait: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    began = clock()
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        loss = model(**inputs).loss
    loss.backward()
    wait()
    seconds = clock() - began
    model.zero_grad(set_to_none=True)
    return seconds


def row(variant: Variant, eager: list[float], own: list[float], calls: float) -> dict[str, Any]:
    """Put the overheads of a variant side by side; `calls` is in seconds."""
    conventional, planned = variant.seconds()
    predicted = planned / conventional - 1.0
    measured = median(mine / theirs for mine, theirs in zip(own, eager, strict=True)) - 1.0
    share = calls / median(eager)
    return {
        "variant": f"{variant.faith}, budget {variant.budget:g}",
        "costs": variant.costs,
        "eager ms": 1000 * conventional,
        "ms": 1000 * planned,
        "predicted": predicted,
        "calls": share,
        "measured": measured,
        "at least": min(own) / min(eager) - 1.0,
        "agree": near(predicted, measured),
        "with calls": near(predicted + share, measured),
    }


def near(one: float, other: float) -> bool:
    """Whether two overheads agree."""
    return abs(one - other) <= max(NEAR_ABSOLUTE, NEAR_RELATIVE * max(abs(one), abs(other)))


def retain_heap() -> None:
    """Have glibc keep what is freed, and take large blocks from its heap as well.

    Raises:
        OSError: The C library is not glibc.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt") or not (libc.mallopt(M_TRIM_THRESHOLD, -1) and libc.mallopt(M_MMAP_MAX, 0)):
        raise OSError("--retain-heap needs glibc, which has mallopt()")


if __name__ == "__main__":
    main()
