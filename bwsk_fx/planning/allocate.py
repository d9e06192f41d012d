"""Which of its plans each region of a model follows, so that the whole step holds little or takes little time.

Regions run one after the other, and backwards in the reverse order. While region i runs, the regions before it hold
what they keep; in the backward pass, the ones after it have left the gradients of their parameters. With kept bytes k,
peaks f and b of a region's own forward and backward pass, and gradients g, a step holds at its peak

    P = max over i of  max(f_i, b_i + Σ_{j>i} g_j) + Σ_{j<i} k_j.

Choosing one plan per region is a multiple-choice knapsack with P as one more variable; HiGHS solves it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from scipy.optimize import Bounds

from bwsk_fx.errors import PlanError
from bwsk_fx.planning.highs import Row, constraint, minimize
from bwsk_fx.planning.options import show_bytes
from bwsk_fx.planning.plan import Plan

_RELATIVE_GAP = 1e-3
_SECONDS_LIMIT = 10.0
# What decides between plans of one peak: a hundredth of the kept bytes, then a thousandth of the time.
_KEPT_WEIGHT, _TIME_WEIGHT = 1e-2, 1e-3

Choices = Sequence[Sequence[Plan]]


@dataclass(frozen=True)
class Totals:
    """What a choice of plans takes over a whole step.

    Attributes:
        peak_bytes: The most bytes held at a time, beyond parameters, buffers and optimizer state.
        kept_bytes: Bytes kept for the backward pass.
        extra_seconds: Modelled time of what is run again, inverted, or computed only to be kept.
        intensive_seconds: The part of it for matrix products, convolutions and attention.
        planned_seconds: Modelled time of all regions, forward and backward.
        conventional_seconds: The same of eager execution.
        conventional_bytes: What eager execution keeps.
    """

    peak_bytes: int
    kept_bytes: int
    extra_seconds: float
    intensive_seconds: float
    planned_seconds: float
    conventional_seconds: float
    conventional_bytes: int

    @classmethod
    def of(cls, plans: Sequence[Plan], outside: int = 0) -> Totals:
        """Add up one plan per region, in the order of execution; `outside` bytes are kept between regions."""
        kept_before = [0, *accumulate(plan.kept_bytes for plan in plans)]
        after = [*accumulate(plan.gradient_bytes for plan in reversed(plans))][::-1]
        gradients_after = [*after[1:], 0]
        held = [
            max(plan.forward_peak, plan.backward_peak + gradients) + kept
            for plan, kept, gradients in zip(plans, kept_before, gradients_after, strict=False)
        ]
        return cls(
            outside + max(held, default=0),
            outside + sum(plan.kept_bytes for plan in plans),
            sum(plan.extra_seconds for plan in plans),
            sum(plan.intensive_seconds for plan in plans),
            sum(plan.planned_seconds for plan in plans),
            sum(plan.conventional_seconds for plan in plans),
            outside + sum(plan.conventional_bytes for plan in plans),
        )


def least_memory(choices: Choices, budget: float, outside: int = 0) -> list[int]:
    """Return, per region, which plan makes the peak smallest within a budget of time.

    Args:
        choices: Each region's plans, in the order of execution.
        budget: Extra time as a fraction of the conventional step. Cheap work that spares products from being kept may
            take more than a small budget: it is allowed what it takes where no product runs again.
        outside: Bytes that are kept between regions whatever they do.
    """
    step = sum(plans[0].conventional_seconds for plans in choices)
    cheap = sum(
        min((plan for plan in plans if plan.intensive_seconds == 0.0), key=lambda plan: plan.kept_bytes).extra_seconds
        for plans in choices
    )
    program = _Knapsack(choices, outside)
    program.limit("extra_seconds", max(budget * step, cheap))
    program.limit("intensive_seconds", budget * step)
    program.minimize_peak()
    return program.solve(f"a budget of {budget:g}")


def least_time(choices: Choices, *, peak: int | None = None, kept: int | None = None, outside: int = 0) -> list[int]:
    """Return, per region, which plan takes the least time within a bound on the peak or on the kept bytes.

    Raises:
        PlanError: No choice fits; the message says how many bytes the smallest needs.
    """
    program = _Knapsack(choices, outside)
    if peak is not None:
        program.limit_peak(peak)
    if kept is not None:
        program.limit("kept_bytes", kept - outside)
    program.minimize_time()
    return program.solve(f"{show_bytes(peak or kept or 0)}", least=lambda: _needs(choices, outside, peak is not None))


def _needs(choices: Choices, outside: int, is_peak: bool) -> str:
    if not is_peak:
        return show_bytes(outside + sum(min(plan.kept_bytes for plan in plans) for plans in choices))
    program = _Knapsack(choices, outside)
    program.minimize_peak()
    found = program.solve("any memory")
    smallest = [plans[index] for plans, index in zip(choices, found, strict=True)]
    return show_bytes(Totals.of(smallest, outside).peak_bytes)


class _Knapsack:
    """One binary per region and plan, and the peak as a share of the largest that any choice can have."""

    def __init__(self, choices: Choices, outside: int) -> None:
        self._choices = choices
        self._outside = outside
        self._starts = [0, *accumulate(map(len, choices))]
        self._peak = self._starts[-1]
        worst = Totals.of([max(plans, key=lambda plan: plan.kept_bytes) for plans in choices], outside)
        self._scale = float(2 * worst.peak_bytes or 1)
        self._step = worst.conventional_seconds or 1.0
        self._objective = np.zeros(self._peak + 1)
        self._upper = np.ones(self._peak + 1)
        self._upper[self._peak] = np.inf
        self._rows: list[Row] = []
        for region, plans in enumerate(choices):
            self._rows.append(({self._column(region, index): 1.0 for index in range(len(plans))}, 1.0, 1.0))
        self._bound_peak_from_below()

    def limit(self, figure: str, most: float) -> None:
        """Let the sum of a figure of all plans be at most this."""
        scale = self._scale if figure.endswith("bytes") else self._step
        self._rows.append((self._sum(figure, scale), -np.inf, most / scale))

    def limit_peak(self, most: int) -> None:
        """Let the step hold at most this many bytes."""
        self._upper[self._peak] = most / self._scale

    def minimize_peak(self) -> None:
        """Look for the smallest peak; of equal ones, for the fewest kept bytes, then the least time."""
        self._objective[self._peak] = 1.0
        self._weigh("kept_bytes", _KEPT_WEIGHT / self._scale)
        self._weigh("extra_seconds", _KEPT_WEIGHT * _TIME_WEIGHT / self._step)

    def minimize_time(self) -> None:
        """Look for the least time; of equal ones, for the smallest peak."""
        self._weigh("extra_seconds", 1.0 / self._step)
        self._objective[self._peak] = _TIME_WEIGHT

    def solve(self, bound: str, least: Callable[[], str] | None = None) -> list[int]:
        """Return the chosen plan of each region.

        Raises:
            PlanError: No choice is within `bound`; `least` says what is needed.
        """
        integrality = np.ones(self._peak + 1)
        integrality[self._peak] = 0
        outcome = minimize(
            self._objective,
            constraint(self._rows, self._peak + 1),
            integrality,
            Bounds(np.zeros(self._peak + 1), self._upper),
            relative_gap=_RELATIVE_GAP,
            time_limit=_SECONDS_LIMIT,
        )
        if outcome.solution is None:
            needs = f"; the smallest plan needs at least {least()}" if outcome.infeasible and least else ""
            raise PlanError(f"no choice of plans stays within {bound} ({outcome.message}){needs}")
        parts = (outcome.solution[start:end] for start, end in zip(self._starts, self._starts[1:], strict=False))
        return [int(np.argmax(part)) for part in parts]

    def _column(self, region: int, index: int) -> int:
        return self._starts[region] + index

    def _sum(self, figure: str, scale: float, regions: Sequence[int] | None = None) -> dict[int, float]:
        return {
            self._column(region, index): getattr(plan, figure) / scale
            for region in (range(len(self._choices)) if regions is None else regions)
            for index, plan in enumerate(self._choices[region])
        }

    def _weigh(self, figure: str, weight: float) -> None:
        for column, value in self._sum(figure, 1.0).items():
            self._objective[column] += weight * value

    def _bound_peak_from_below(self) -> None:
        gradients = [plans[0].gradient_bytes for plans in self._choices]
        for region in range(len(self._choices)):
            before = self._sum("kept_bytes", self._scale, range(region))
            for figure, others in (("forward_peak", 0), ("backward_peak", sum(gradients[region + 1 :]))):
                terms = before | self._sum(figure, self._scale, [region]) | {self._peak: -1.0}
                self._rows.append((terms, -np.inf, -(others + self._outside) / self._scale))
