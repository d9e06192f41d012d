"""What several seeds say about the modes: mean, spread, and the paired comparison with the conventional mode."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any

import numpy as np
from scipy import stats

from bwsk_fx.training.config import Mode

Results = Mapping[str, Mapping[str, Any]]

CONFIDENCE = 0.95
BASELINE = Mode.CONVENTIONAL.published_name

FEW_SEEDS = "fewer than 2 seeds"
EQUAL_DIFFERENCES = "equal differences"
NOT_FINITE = "a value is not a finite number"


@dataclass(frozen=True)
class Metric:
    """A figure of a variant that seeds are compared by.

    Attributes:
        name: its key in `comparison.json`.
        label: what tables and plots call it, without the unit.
        unit: in which people read it; empty for a number without one.
        scale: from the unit in the file to the one that people read.
        digits: behind the point, for people.
        read: takes it from the contents of a `training_results.json`.
    """

    name: str
    label: str
    unit: str
    scale: float
    digits: int
    read: Callable[[Mapping[str, Any]], float]

    @property
    def heading(self) -> str:
        """Label and unit."""
        return f"{self.label} ({self.unit})" if self.unit else self.label

    def shown(self, value: float, sign: str = "") -> str:
        """A value as people read it, without the unit; `sign="+"` shows the sign of positive ones too."""
        # z: what rounds to nothing has no sign of its own.
        return f"{value * self.scale:{sign}z.{self.digits}f}"


METRICS = (
    Metric("test_accuracy", "test accuracy", "%", 100, 2, lambda result: result["test_metric"]),
    Metric("best_validation_accuracy", "validation accuracy", "%", 100, 2, lambda result: result["best_val_metric"]),
    Metric("final_train_loss", "training loss", "", 1, 4, lambda result: result["final_train_loss"]),
    Metric("median_step_time_s", "step time", "ms", 1000, 1, lambda result: result["step_time_s"]),
    Metric("saved_bytes", "kept", "MiB", 2**-20, 2, lambda result: result["saved_for_backward_bytes"]),
    Metric("peak_bytes", "peak", "MiB", 2**-20, 2, lambda result: round(result["peak_memory_mb"] * 2**20)),
)


@dataclass(frozen=True)
class Spread:
    """The values of one metric in one mode.

    Attributes:
        by_seed: the value of each seed; None where it is not a finite number.
        mean: of all seeds.
        standard_deviation: of the sample, with n - 1.
        undefined: why something is None, or None.
    """

    by_seed: dict[int, float | None]
    mean: float | None = None
    standard_deviation: float | None = None
    undefined: str | None = None


@dataclass(frozen=True)
class Paired:
    """A mode against the conventional mode, seed by seed; differences are the mode's value minus the conventional one.

    Attributes:
        mean_difference: over all seeds.
        confidence_interval: of the mean difference, at `CONFIDENCE`, from Student's t distribution.
        t: statistic of the paired t-test.
        p: its two-sided p value.
        d_z: Cohen's d of paired samples, the mean difference over the standard deviation of the differences.
        undefined: why something is None, or None.
    """

    mean_difference: float | None = None
    confidence_interval: tuple[float, float] | None = None
    t: float | None = None
    p: float | None = None
    d_z: float | None = None
    undefined: str | None = None


@dataclass(frozen=True)
class MetricComparison:
    """One metric of one experiment: every mode, and those that have a conventional mode beside them, by their names."""

    modes: dict[str, Spread]
    against_conventional: dict[str, Paired]


@dataclass(frozen=True)
class Comparison:
    """What the seeds of a run say.

    Attributes:
        seeds: that every figure is made of.
        left_out: seeds that are there and do not hold every variant.
        experiments: by experiment and by `Metric.name`.
    """

    seeds: tuple[int, ...]
    left_out: tuple[int, ...]
    experiments: dict[str, dict[str, MetricComparison]]

    @property
    def unpaired(self) -> dict[str, str]:
        """The experiments in which nothing is compared with a conventional mode, with the reason."""
        modes = {name: metrics[METRICS[0].name].modes for name, metrics in self.experiments.items()}
        reasons = {name: _why_unpaired(set(found)) for name, found in modes.items()}
        return {name: reason for name, reason in reasons.items() if reason is not None}

    def to_json(self) -> dict[str, Any]:
        """The object that `comparison.json` holds."""
        head = {"generator": "bwsk-fx", "baseline": BASELINE, "confidence": CONFIDENCE}
        return head | asdict(self)


def compare(runs: Mapping[int, Results]) -> Comparison:
    """Compares the modes over the seeds that hold every variant that any seed holds.

    Args:
        runs: for each seed, the contents of every `training_results.json` by folder.

    Returns:
        The comparison; its `seeds` are empty when no seed holds every variant.
    """
    variants = {folder for results in runs.values() for folder in results}
    complete = {seed: runs[seed] for seed in sorted(runs) if runs[seed].keys() == variants}
    first = next(iter(complete.values()), {})
    experiments = dict.fromkeys(result["experiment"] for result in first.values())
    return Comparison(
        seeds=tuple(complete),
        left_out=tuple(sorted(runs.keys() - complete.keys())),
        experiments={
            name: {metric.name: _compare_metric(metric, complete, name) for metric in METRICS} for name in experiments
        },
    )


def spread(by_seed: Mapping[int, float]) -> Spread:
    """Mean and standard deviation of one value per seed."""
    values = list(by_seed.values())
    if not all(map(math.isfinite, values)):
        finite = {seed: value if math.isfinite(value) else None for seed, value in by_seed.items()}
        return Spread(finite, undefined=NOT_FINITE)
    if len(values) < 2:
        return Spread(dict(by_seed), fmean(values), undefined=FEW_SEEDS)
    return Spread(dict(by_seed), fmean(values), stdev(values))


def paired(values: Mapping[int, float], baseline: Mapping[int, float]) -> Paired:
    """Compares two modes seed by seed; both have the same seeds."""
    ours, theirs = (np.array([side[seed] for seed in values], dtype=float) for side in (values, baseline))
    if not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        return Paired(undefined=NOT_FINITE)
    differences = ours - theirs
    mean = float(differences.mean())
    if len(differences) < 2:
        return Paired(mean, undefined=FEW_SEEDS)
    # Quotients such as accuracies leave rounding errors in equal differences, of which a t-test would make much.
    rounding = 8 * np.finfo(float).eps * max(np.abs(ours).max(), np.abs(theirs).max())
    if np.ptp(differences) <= rounding:
        return Paired(mean, undefined=EQUAL_DIFFERENCES)
    test = stats.ttest_rel(ours, theirs)
    low, high = test.confidence_interval(CONFIDENCE)
    d_z = mean / float(differences.std(ddof=1))
    return Paired(mean, (float(low), float(high)), float(test.statistic), float(test.pvalue), d_z)


def _why_unpaired(modes: set[str]) -> str | None:
    if BASELINE not in modes:
        return "has no conventional mode"
    return "has only the conventional mode" if modes == {BASELINE} else None


def _compare_metric(metric: Metric, runs: Mapping[int, Results], experiment: str) -> MetricComparison:
    by_mode: dict[str, dict[int, float]] = {}
    for seed, results in runs.items():
        for result in results.values():
            if result["experiment"] == experiment:
                by_mode.setdefault(result["mode"], {})[seed] = metric.read(result)
    baseline = by_mode.get(BASELINE)
    others = {} if baseline is None else {mode: values for mode, values in by_mode.items() if mode != BASELINE}
    return MetricComparison(
        modes={mode: spread(values) for mode, values in by_mode.items()},
        against_conventional={mode: paired(values, baseline or {}) for mode, values in others.items()},
    )
