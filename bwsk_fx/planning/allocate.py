"""Which of its plans each region of a model follows, so that the whole step holds little or takes little time.

Regions run one after the other, and backwards in the reverse order. While region i runs, the regions before it hold
what they keep; in the backward pass, the ones after it have left the gradients of their parameters. With kept bytes k,
peaks f and b of a region's own forward and backward pass, and gradients g, a step holds at its peak

    P = max over i of  max(f_i, b_i + Σ_{j>i} g_j) + Σ_{j<i} k_j.

Choosing one plan per region is a multiple-choice knapsack with P as one more variable; HiGHS solves it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from scipy.optimize import Bounds

from bwsk_fx.errors import PlanError
from bwsk_fx.planning.highs import Row, constraint, minimize
from bwsk_fx.planning.options import show_bytes
from bwsk_fx.planning.plan import Plan

_RELATIVE_GAP = 1e-4
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

    @property
    def overhead(self) -> float:
        """Modelled time beyond eager execution's, as a fraction of it."""
        return self.planned_seconds / self.conventional_seconds - 1.0 if self.conventional_seconds else 0.0

    def __str__(self) -> str:
        """Compare with eager execution, in a few words."""
        share = self.kept_bytes / self.conventional_bytes if self.conventional_bytes else 1.0
        return f"{share:.0%} of eager's, modelled time {self.overhead:+.1%}, peak {show_bytes(self.peak_bytes)}"

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


def fewest_kept(choices: Choices, budget: float) -> list[int]:
    """Return, per region, which plan keeps the fewest bytes; with a budget of 0, of those that run no product again."""
    return [
        min(
            (index for index, plan in enumerate(plans) if budget > 0.0 or plan.intensive_seconds == 0.0),
            key=lambda index: plans[index].kept_bytes,
        )
        for plans in choices
    ]


def least_memory(choices: Choices, budget: float, outside: int = 0) -> list[int]:
    """Return, per region, which plan makes the peak smallest within a budget of time.

    Args:
        choices: Each region's plans, in the order of execution.
        budget: Extra time as a fraction of the conventional step. Cheap work that spares products from being kept may
            take more than a small budget: it is allowed what it takes where no product runs again.
        outside: Bytes that are kept between regions whatever they do.
    """
    program = _Knapsack(choices, outside)
    program.limit_time(budget)
    program.minimize_peak()
    return program.solve(f"a budget of {budget:g}")


def least_time(
    choices: Choices, budget: float = math.inf, *, peak: int | None = None, kept: int | None = None, outside: int = 0
) -> list[int]:
    """Return, per region, which plan takes the least time within a bound on the peak or on the kept bytes.

    Args:
        choices: Each region's plans, in the order of execution.
        budget: The most extra time, as for `least_memory`.
        peak: Bytes that may be held at a time.
        kept: Bytes that may be kept for the backward pass.
        outside: Bytes that are kept between regions whatever they do.

    Raises:
        PlanError: No choice fits; the message says how many bytes the smallest needs.
    """
    program = _Knapsack(choices, outside)
    program.limit_time(budget)
    if peak is not None:
        program.limit_peak(peak)
    if kept is not None:
        program.limit("kept_bytes", kept - outside)
    program.minimize_time()
    try:
        return program.solve(show_bytes(peak or kept or 0))
    except PlanError as error:
        smallest = _Knapsack(choices, outside)
        smallest.limit_time(budget)
        smallest.minimize_peak() if kept is None else smallest.minimize_kept()
        found = smallest.solve(f"a budget of {budget:g}")
        totals = Totals.of([plans[index] for plans, index in zip(choices, found, strict=True)], outside)
        needed = show_bytes(totals.peak_bytes if kept is None else totals.kept_bytes)
        within = "" if math.isinf(budget) else f" within a budget of {budget:g}"
        raise PlanError(f"{error}: a training step{within} needs at least {needed}") from None


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

    def limit_time(self, budget: float) -> None:
        """Let the extra time be at most this fraction of the conventional step."""
        if math.isinf(budget):
            return
        cheap = fewest_kept(self._choices, 0.0)
        least = sum(plans[index].extra_seconds for plans, index in zip(self._choices, cheap, strict=True))
        self.limit("extra_seconds", max(budget * self._step, least))
        self.limit("intensive_seconds", budget * self._step)

    def limit_peak(self, most: int) -> None:
        """Let the step hold at most this many bytes."""
        self._upper[self._peak] = most / self._scale

    def minimize_peak(self) -> None:
        """Look for the smallest peak; of equal ones, for the fewest kept bytes, then the least time."""
        self._objective[self._peak] = 1.0
        self._weigh("kept_bytes", _KEPT_WEIGHT / self._scale)
        self._weigh("extra_seconds", _KEPT_WEIGHT * _TIME_WEIGHT / self._step)

    def minimize_kept(self) -> None:
        """Look for the fewest kept bytes."""
        self._weigh("kept_bytes", 1.0 / self._scale)

    def minimize_time(self) -> None:
        """Look for the least time; of equal ones, for the smallest peak."""
        self._weigh("extra_seconds", 1.0 / self._step)
        self._objective[self._peak] = _TIME_WEIGHT

    def solve(self, bound: str) -> list[int]:
        """Return the chosen plan of each region.

        Raises:
            PlanError: No choice is within `bound`.
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
            why = "" if outcome.infeasible else f" was found ({outcome.message})"
            raise PlanError(f"no choice of plans within {bound}{why}")
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
