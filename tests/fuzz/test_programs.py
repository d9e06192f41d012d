"""Random programs train with regions as they do without, in float64, and their S labels hold.

By default a few for each tier; `pytest -m slow` tries 2,000, or BWSK_RANDOM_PROGRAMS.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from unittest.mock import patch

import program_checks
import pytest
import random_programs
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from program_checks import TIERS, check, false_labels, runs_in_eager
from program_operations import OPERATIONS
from random_programs import Op, Program

import bwsk_fx
from bwsk_fx.errors import CaptureError

SAMPLE, MOST = 2, 10
THOROUGH = int(os.environ.get("BWSK_RANDOM_PROGRAMS", "2000")) // (len(TIERS) + 1)


@st.composite
def programs(draw, most: int = MOST) -> Program:
    return random_programs.draw_program(lambda choices: draw(st.sampled_from(choices)), most)


def _try(trial, count: int, key: int) -> Counter[str]:
    """Try programs that PyTorch itself trains; return what became of how many."""
    found: Counter[str] = Counter()

    @seed(key)
    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(programs())
    def holds(program: Program) -> None:
        found[trial(program).split(":")[0] if runs_in_eager(program) else "eager refuses"] += 1

    holds()
    return found


def _require_labels(program: Program) -> str:
    assert false_labels(program) == []
    return "agrees"


@pytest.mark.parametrize(("faith", "budget"), TIERS)
def test_a_sample_agrees(faith, budget):
    found = _try(lambda program: check(program, faith, budget), SAMPLE, TIERS.index((faith, budget)))
    assert sum(found.values()) >= SAMPLE


def test_labels_of_a_sample_hold():
    assert _try(_require_labels, SAMPLE, 50)["agrees"]


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize(("faith", "budget"), TIERS)
def test_many_agree(faith, budget):
    found = _try(lambda program: check(program, faith, budget), THOROUGH, 100 + TIERS.index((faith, budget)))
    assert found["agrees"] >= THOROUGH / 2


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_many_labels_hold():
    assert _try(_require_labels, THOROUGH, 150)["agrees"] >= THOROUGH / 2


# -- what the programs are, and that the trial would notice ------------------------------------------------------------

GATED = Program((Op("softplus", (0,)), Op("gate", (4, 1)), Op("norm", (5,))), (6,))


def test_a_program_agrees_and_its_regions_have_plans():
    assert runs_in_eager(GATED)
    assert check(GATED, "rounded", 0.0) == "agrees"


def test_a_wrong_gradient_is_found():
    original = program_checks.loss_of

    def steeper(outputs):
        loss = original(outputs)
        return loss * (1 + 1e-5) if "RegionFunction" in type(outputs[0].grad_fn).__name__ else loss

    with patch.object(program_checks, "loss_of", steeper), pytest.raises(AssertionError, match="off, of a norm"):
        check(GATED, "rounded", 0.0)


def test_most_operations_are_drawn():
    drawn = Counter(
        op.name for key in range(120) for op in random_programs.draw_program(random.Random(key).choice, 12).ops
    )
    assert len(drawn) > 0.8 * len(OPERATIONS)
    assert {"split", "gather", "clamp_", "expand", "to_long", "dropout_twice", "second"} <= set(drawn)


# -- programs that once failed ----------------------------------------------------------------------------------------

FOUND = {
    "the angle of a point beside the origin": Program((Op("atan2", (1, 1)),), (4,)),
    "a tensor that is added to itself": Program((Op("index_add", (0, 0)),), (4,)),
    "a size that an operator fixes": Program((Op("take_along", (1,)), Op("by_batch", (4,))), (5,)),
    "a power by the operator": Program((Op("pow", (0, 1)), Op("norm", (4,))), (5,)),
}


@pytest.mark.parametrize("program", FOUND.values(), ids=FOUND)
def test_what_once_failed_holds(program):
    assert false_labels(program) == []
    for granularity in ("whole", "s-run"):
        assert check(program, "rounded", 0.1, granularity).split(":")[0] in ("agrees", "refused")


def test_another_batch_than_an_operator_fixed_is_refused():
    graph = bwsk_fx.capture(random_programs.build(FOUND["a size that an operator fixes"]), random_programs.inputs_of(5))
    graph(**random_programs.inputs_of(5))
    with pytest.raises(CaptureError, match="the captured graph requires Eq"):
        graph(**random_programs.inputs_of(2))
