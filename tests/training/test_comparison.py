"""The statistics against closed forms: Student's t has one for 1 and for 2 degrees of freedom."""

import json
import math

import pytest

from bwsk_fx.training.comparison import (
    EQUAL_DIFFERENCES,
    FEW_SEEDS,
    METRICS,
    NOT_FINITE,
    Paired,
    Spread,
    compare,
    paired,
    spread,
)


def _by_seed(*values: float) -> dict[int, float]:
    return dict(enumerate(values))


def _result(mode: str, accuracy: float, experiment: str = "scratch", loss: float = 1.0) -> dict:
    return {
        "experiment": experiment,
        "mode": mode,
        "test_metric": accuracy,
        "best_val_metric": accuracy / 2,
        "final_train_loss": loss,
        "step_time_s": 0.25,
        "saved_for_backward_bytes": 1024,
        "peak_memory_mb": 1.5,
    }


def test_the_spread_is_that_of_a_sample():
    assert spread(_by_seed(2, 4, 9)) == Spread(_by_seed(2, 4, 9), 5, math.sqrt((9 + 1 + 16) / 2))
    assert spread(_by_seed(2)) == Spread(_by_seed(2), 2, None, FEW_SEEDS)
    assert spread(_by_seed(2, math.nan)) == Spread({0: 2, 1: None}, None, None, NOT_FINITE)


def test_three_seeds_by_hand():
    found = paired(_by_seed(11, 22, 33), _by_seed(10, 20, 30))
    # Differences 1, 2, 3: their standard deviation is 1. With 2 degrees of freedom P(|T| < t) = t / sqrt(2 + t²).
    t = 2 / (1 / math.sqrt(3))
    critical = math.sqrt(2 * 0.95**2 / (1 - 0.95**2))
    assert critical == pytest.approx(4.302652729911)
    assert found.mean_difference == pytest.approx(2)
    assert found.t == pytest.approx(t)
    assert found.p == pytest.approx(1 - t / math.sqrt(2 + t**2))
    assert found.confidence_interval == pytest.approx((2 - critical / math.sqrt(3), 2 + critical / math.sqrt(3)))
    assert found.d_z == pytest.approx(2)
    assert found.undefined is None


def test_two_seeds_by_hand_and_with_the_other_sign():
    found = paired(_by_seed(1, 1), _by_seed(2, 4))
    # Differences -1 and -3. With 1 degree of freedom, Cauchy's distribution: P(|T| < t) = 2/pi atan(t).
    deviation = math.sqrt(2)
    assert found.t == pytest.approx(-2)
    assert found.p == pytest.approx(1 - 2 / math.pi * math.atan(2))
    reach = math.tan(0.95 * math.pi / 2) * deviation / math.sqrt(2)
    assert found.confidence_interval == pytest.approx((-2 - reach, -2 + reach))
    assert found.d_z == pytest.approx(-2 / deviation)


def test_values_are_paired_by_seed_not_by_place():
    # Seed by seed 7 is ahead by 1 and 8 by 2; by place the differences would be 10 and -7.
    found = paired({7: 11, 8: 3}, {8: 1, 7: 10})
    assert found.mean_difference == 1.5
    assert found.t == pytest.approx(1.5 / (math.sqrt(0.5) / math.sqrt(2)))


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ((5.0,), (3.0,), Paired(2.0, undefined=FEW_SEEDS)),
        ((5.0, 6.0), (3.0, 4.0), Paired(2.0, undefined=EQUAL_DIFFERENCES)),
        ((0.5, 0.25), (0.5, 0.25), Paired(0.0, undefined=EQUAL_DIFFERENCES)),
        ((1.0, math.inf), (1.0, 2.0), Paired(undefined=NOT_FINITE)),
        ((1.0, math.inf), (1.0, math.inf), Paired(undefined=NOT_FINITE)),
    ],
)
def test_what_is_undefined_says_why(ours, theirs, expected):
    assert paired(_by_seed(*ours), _by_seed(*theirs)) == expected


def test_rounding_errors_of_equal_differences_are_no_spread():
    ours, theirs = _by_seed(0.9, 0.8, 0.7), _by_seed(0.8, 0.7, 0.6)
    assert len({ours[seed] - theirs[seed] for seed in ours}) > 1
    found = paired(ours, theirs)
    assert (found.undefined, found.t, found.p) == (EQUAL_DIFFERENCES, None, None)
    assert found.mean_difference == pytest.approx(0.1)


def _run(conventional: float, reversible: float) -> dict:
    return {
        "scratch-conventional": _result("conventional", conventional),
        "scratch-bwsk-reversible": _result("bwsk_reversible", reversible),
    }


def test_every_metric_of_every_experiment_is_compared():
    tuned = {"finetune-conventional": _result("conventional", 0.5, "finetune")}
    comparison = compare({seed: _run(0.5, 0.5 + 0.1 * seed) | tuned for seed in (1, 2, 3)})
    assert comparison.seeds == (1, 2, 3)
    assert list(comparison.experiments) == ["scratch", "finetune"]
    assert all(list(metrics) == [metric.name for metric in METRICS] for metrics in comparison.experiments.values())
    accuracy = comparison.experiments["scratch"]["test_accuracy"]
    assert accuracy.modes["bwsk_reversible"].mean == pytest.approx(0.7)
    assert list(accuracy.against_conventional) == ["bwsk_reversible"]
    assert accuracy.against_conventional["bwsk_reversible"].mean_difference == pytest.approx(0.2)
    assert accuracy.against_conventional["bwsk_reversible"].t == pytest.approx(2 * math.sqrt(3))
    means = {name: metric.modes["conventional"].mean for name, metric in comparison.experiments["finetune"].items()}
    assert means == {
        "test_accuracy": 0.5,
        "best_validation_accuracy": 0.25,
        "final_train_loss": 1.0,
        "median_step_time_s": 0.25,
        "saved_bytes": 1024,
        "peak_bytes": 1.5 * 2**20,
    }
    assert comparison.experiments["finetune"]["test_accuracy"].against_conventional == {}
    assert comparison.unpaired == {"finetune": "has only the conventional mode"}


def test_without_the_conventional_mode_there_are_only_means():
    runs = {seed: {"scratch-bwsk-reversible": _result("bwsk_reversible", 0.1 * seed)} for seed in (1, 2)}
    comparison = compare(runs)
    accuracy = comparison.experiments["scratch"]["test_accuracy"]
    assert accuracy.modes["bwsk_reversible"].mean == pytest.approx(0.15)
    assert accuracy.against_conventional == {}
    assert comparison.unpaired == {"scratch": "has no conventional mode"}


def test_a_seed_without_every_variant_is_left_out():
    half = {"scratch-conventional": _result("conventional", 0.9)}
    comparison = compare({5: _run(0.1, 0.2), 6: half, 4: _run(0.3, 0.5)})
    assert (comparison.seeds, comparison.left_out) == ((4, 5), (6,))
    assert comparison.experiments["scratch"]["test_accuracy"].modes["conventional"].by_seed == {4: 0.3, 5: 0.1}
    other = {"scratch-bwsk-reversible": _result("bwsk_reversible", 0.9)}
    assert compare({0: half, 1: other}).seeds == ()


def test_the_json_has_no_numbers_that_json_does_not_have():
    runs = {
        0: _run(0.5, 0.5),
        1: {folder: result | {"final_train_loss": math.inf} for folder, result in _run(0.5, 0.5).items()},
    }
    text = json.dumps(compare(runs).to_json(), allow_nan=False)
    loss = json.loads(text)["experiments"]["scratch"]["final_train_loss"]
    assert loss["modes"]["conventional"]["by_seed"] == {"0": 1.0, "1": None}
    assert loss["against_conventional"]["bwsk_reversible"]["undefined"] == NOT_FINITE


def test_values_are_shown_in_units_for_people():
    shown = {
        metric.name: (metric.heading, metric.shown(0.25 if metric.scale >= 1 else 2**19, "+")) for metric in METRICS
    }
    assert shown == {
        "test_accuracy": ("test accuracy (%)", "+25.00"),
        "best_validation_accuracy": ("validation accuracy (%)", "+25.00"),
        "final_train_loss": ("training loss", "+0.2500"),
        "median_step_time_s": ("step time (ms)", "+250.0"),
        "saved_bytes": ("kept (MiB)", "+0.50"),
        "peak_bytes": ("peak (MiB)", "+0.50"),
    }
    assert METRICS[0].shown(-1e-9, "+") == "+0.00"
