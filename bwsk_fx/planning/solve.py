"""Which values to keep: the integer program solved by HiGHS, with a greedy plan where time runs out."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from bwsk_fx.errors import PlanError
from bwsk_fx.planning.derivations import Derivation
from bwsk_fx.planning.greedy import greedy
from bwsk_fx.planning.highs import Outcome, minimize
from bwsk_fx.planning.integer_program import IntegerProgram, Limits, Problem
from bwsk_fx.planning.joint import nbytes

_RELATIVE_GAP = 0.01
_SECONDS_LIMIT = 20.0


@dataclass(frozen=True)
class Solution:
    """What was chosen.

    Attributes:
        kept: Values that the forward pass saves, in graph order.
        used: Derivations that the backward pass runs, without the free views.
        kept_bytes: Sum over `kept`.
        extra_seconds: Modelled time of `used`, and of what the forward pass computes only to keep it.
        intensive_seconds: The part of it for matrix products, convolutions and attention.
        gap: How much smaller the objective of the best plan may be, as a fraction; what the solver proved.
        solver: `highs`, or `greedy` where HiGHS found nothing better in time.
    """

    kept: tuple[fx.Node, ...]
    used: tuple[Derivation, ...]
    kept_bytes: int
    extra_seconds: float
    intensive_seconds: float
    gap: float
    solver: str


def solve(problem: Problem, limits: Limits, region: str, *, time_limit: float = _SECONDS_LIMIT) -> Solution:
    """Choose what to keep: the fewest bytes within the limits.

    Args:
        problem: The values, and the ways to them.
        limits: What the plan may spend.
        region: The region's name, for errors.
        time_limit: Seconds for HiGHS. A greedy plan takes over where it is better than what HiGHS has by then.

    Raises:
        PlanError: A value that the backward pass needs can neither be kept nor derived.
        KeyboardInterrupt: Ctrl-C was pressed; nothing has been changed.
    """
    program = IntegerProgram(problem, limits)
    outcome = _run(program, region, time_limit)
    found = [] if outcome.solution is None else [("highs", *program.read(outcome.solution))]
    proved = outcome.infeasible or any(
        _gap(program, outcome.bound, kept, used) <= _RELATIVE_GAP for _, kept, used in found
    )
    if not proved and (simple := greedy(problem, limits)):
        found.append(("greedy", *simple))
    if not found:
        needs = ", ".join(sorted(cls.name for cls in problem.needs))
        within = _describe(problem, limits)
        raise PlanError(f"region {region}: no plan within {within}: {outcome.message}; the backward pass needs {needs}")
    solver, kept, chosen = min(found, key=lambda one: program.value_of(*one[1:]))
    return _solution(problem, kept, chosen, _gap(program, outcome.bound, kept, chosen), solver)


def _run(program: IntegerProgram, region: str, time_limit: float) -> Outcome:
    try:
        return minimize(
            program.objective,
            program.constraints(),
            program.integrality,
            program.bounds,
            relative_gap=_RELATIVE_GAP,
            time_limit=time_limit,
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"while region {region} was planned; the model is as it was, and can be run again"
        ) from None


def _gap(program: IntegerProgram, bound: float, kept: Iterable[fx.Node], used: Iterable[Derivation]) -> float:
    value = program.value_of(kept, used)
    return max(0.0, 1.0 - bound / value) if value > 0.0 else 0.0


def _solution(problem: Problem, kept: set[fx.Node], chosen: Iterable[Derivation], gap: float, solver: str) -> Solution:
    used = _reachable(problem, chosen, kept)
    read = {tail for one in used for tail in problem.tails(one)}.union(problem.needs)
    in_order = tuple(cls for cls in problem.classes if cls in kept and cls in read)
    return added_up(problem, in_order, tuple(used), gap, solver)


def added_up(
    problem: Problem, kept: tuple[fx.Node, ...], used: tuple[Derivation, ...], gap: float, solver: str
) -> Solution:
    """Return a choice as a solution, with what it takes."""
    return Solution(
        kept,
        used,
        sum(map(nbytes, kept)),
        math.fsum([*(one.seconds for one in used), *map(problem.keep_seconds, kept)]),
        math.fsum(one.seconds for one in used if one.intensive),
        gap,
        solver,
    )


def _reachable(problem: Problem, chosen: Iterable[Derivation], kept: set[fx.Node]) -> list[Derivation]:
    """Walk back from the needs along one derivation per class; the solver may switch on more than it needs."""
    by_head: dict[fx.Node, Derivation] = {}
    for one in sorted(chosen, key=lambda one: one.seconds, reverse=True):
        by_head[problem.head(one)] = one
    used: dict[fx.Node, Derivation] = {}
    pending = list(problem.needs)
    while pending:
        cls = pending.pop()
        if cls in kept or cls in problem.given or cls in used:
            continue
        used[cls] = by_head[cls]
        pending += problem.tails(by_head[cls])
    return list(used.values())


def _describe(problem: Problem, limits: Limits) -> str:
    if math.isinf(limits.products) and math.isinf(limits.extra):
        return "any time"
    return f"a budget of {min(limits.products, limits.extra) / (problem.step or 1.0):g} of a step"
