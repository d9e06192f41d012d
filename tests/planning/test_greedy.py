"""The plan without a solver: it is valid, nothing in it is in vain, and it steps in when HiGHS runs out of time."""

from unittest.mock import patch

import numpy as np
import pytest
import torch

from bwsk_fx.planning import solve as solver
from bwsk_fx.planning.greedy import greedy
from bwsk_fx.planning.highs import Outcome
from bwsk_fx.planning.integer_program import IntegerProgram, Limits
from bwsk_fx.planning.solve import solve

NAMES = ["mlp", "residual", "attention", "dropout", "chain", "views"]
LIMITS = [Limits(products=0.0), Limits()]


def _follows(problem, kept, used) -> set:
    known = set(kept) | problem.given
    while new := {problem.head(one) for one in used if known.issuperset(problem.tails(one))} - known:
        known |= new
    return known


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("limits", LIMITS)
def test_everything_needed_follows_from_what_is_kept(planning, functions, name, limits):
    problem = planning(getattr(functions, name), exact=False, dtype=torch.bfloat16).problem
    kept, used = greedy(problem, limits)
    assert set(problem.needs) <= _follows(problem, kept, used)
    assert limits.products > 0.0 or not any(one.intensive for one in used)
    for value in kept:
        ways = [one for one in problem.derivations if limits.products > 0.0 or not one.intensive]
        assert not set(problem.needs) <= _follows(problem, kept - {value}, ways), f"{value} is kept in vain"


def test_a_limit_on_time_is_kept(planning, functions):
    problem = planning(functions.mlp, exact=True).problem
    _, free = greedy(problem, Limits())
    most = sum(one.seconds for one in free) / 2
    kept, used = greedy(problem, Limits(extra=most))
    assert most > 0.0 and sum(one.seconds for one in used) <= most
    assert set(problem.needs) <= _follows(problem, kept, used)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("limits", LIMITS)
def test_it_takes_over_when_time_runs_out_and_its_quality_is_told(planning, functions, name, limits):
    problem = planning(getattr(functions, name), exact=False, dtype=torch.bfloat16).problem
    best = solve(problem, limits, "small")
    bound = _objective(problem, limits, best) * 0.5
    nothing = Outcome(None, bound, False, "Time limit reached")
    with patch.object(solver, "minimize", return_value=nothing):
        found = solve(problem, limits, "small")
    assert (found.solver, best.solver) == ("greedy", "highs")
    assert found.kept_bytes >= best.kept_bytes
    assert found.gap == pytest.approx(1.0 - bound / _objective(problem, limits, found))


def test_the_better_of_the_two_is_taken(planning, functions):
    problem = planning(functions.mlp, exact=True).problem
    program = IntegerProgram(problem, LIMITS[0])
    everything = np.zeros(len(program.objective))
    for index, cls in enumerate(problem.classes):
        everything[index] = float(problem.can_keep(cls))
    poor = Outcome(everything, 0.0, False, "Time limit reached")
    with patch.object(solver, "minimize", return_value=poor):
        found = solve(problem, LIMITS[0], "small")
    assert (found.solver, found.kept_bytes) == ("greedy", solve(problem, LIMITS[0], "small").kept_bytes)


def _objective(problem, limits, solution) -> float:
    return IntegerProgram(problem, limits).value_of(solution.kept, solution.used)
