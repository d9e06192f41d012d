"""What takes branches by a value, or magnifies its errors, is given the original value."""

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from bwsk_fx.errors import PlanError
from bwsk_fx.planning import integer_program
from bwsk_fx.planning.greedy import greedy
from bwsk_fx.planning.integer_program import Limits
from bwsk_fx.planning.jumps import jumps
from bwsk_fx.planning.options import plan_options
from bwsk_fx.planning.prospect import survey
from bwsk_fx.planning.solve import added_up

aten = torch.ops.aten


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: x > 0, True),
        (lambda x: x.argmax(0), True),
        (lambda x: x.max(0)[0], True),
        (lambda x: x.sort()[0], True),
        (lambda x: x.sign(), True),
        (lambda x: x.round(), True),
        (lambda x: x.div(2, rounding_mode="floor"), True),
        (lambda x: x.long(), True),
        (lambda x: aten.threshold_backward(x.exp(), x, 0), True),
        (lambda x: aten.hardtanh_backward(x.exp(), x, -1, 1), True),
        (lambda x: x.relu(), False),
        (lambda x: x.double(), False),
        (lambda x: x @ x.T, False),
        (lambda x: torch.ones_like(x, dtype=torch.bool), False),
        (lambda x: torch.arange(4).clone() > 2, False),
        (lambda x: aten.gelu_backward(x.exp(), x), False),
    ],
)
def test_jumps_are_told_from_continuous_operators(function, expected):
    graph = make_fx(function, tracing_mode="fake")(torch.randn(4, 4)).graph
    assert any(map(jumps, graph.nodes)) is expected


def _branching(x: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
    """A ReLU whose result can be had back as a difference, with noise in the place of its zeros."""
    step = (x @ weight).relu()
    return [(x - step).sin(), step.sin(), (x + 0.3).sin()]


def _shrinking(x: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
    """A small part of a sum: what the difference is off by, division makes ten thousand times as large."""
    part = x @ weight
    small = part * 0.0001
    return [(x + small).sin(), part.sin()]


def _survey(function=_branching, **options):
    torch.manual_seed(0)
    inputs = {"x": torch.randn(64, 64, requires_grad=True), "weight": torch.randn(64, 64, requires_grad=True)}
    inputs["weight"].data /= 64
    return inputs, survey(function, inputs, (1,), plan_options(**options), "test")


def _error(program, inputs, function=_branching) -> float:
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs.values()]
    expected = torch.autograd.grad([output.sum() for output in function(*wide)], wide)
    narrow = [tensor.detach() for tensor in inputs.values()]
    outputs, kept = program.run_forward(*narrow)
    found = program.run_backward([*kept, *(narrow[place] for place in program.static), *map(torch.ones_like, outputs)])
    return max(float((one - other).abs().max() / other.abs().max()) for one, other in zip(found, expected, strict=True))


def _keeping(*names):
    """Let nothing else be kept."""
    return patch.object(integer_program.Problem, "can_keep", lambda self, value: value.name in names)


@pytest.mark.parametrize("solver", ["highs", "greedy"])
def test_branches_are_taken_by_originals(solver):
    inputs, prospect = _survey()
    problem = prospect.problem
    for limits in (Limits(products=0.0), Limits()):
        solution = prospect.solve(limits)
        if solver == "greedy":
            kept, used = greedy(problem, limits)
            solution = added_up(problem, tuple(cls for cls in problem.classes if cls in kept), tuple(used), 0.0, solver)
        assert _error(prospect.program(solution), inputs) < 1e-6
    with _keeping("add", "sub"):
        assert greedy(problem, Limits(products=0.0)) is None
        with pytest.raises(PlanError, match="no plan within"):
            prospect.solve(Limits(products=0.0))


def test_a_branch_taken_by_a_rebuilt_value_is_wrong():
    never = {"new": lambda node: False}
    with patch.object(integer_program, "jumps", **never), patch("bwsk_fx.planning.derivations.jumps", **never):
        inputs, prospect = _survey()
        with _keeping("add", "sub"):
            solution = prospect.solve(Limits(products=0.0))
    assert "sum" in {one.rule for one in solution.used}
    assert _error(prospect.program(solution), inputs) > 1e-2


@pytest.mark.parametrize("solver", ["highs", "greedy"])
def test_what_is_divided_by_a_small_number_is_no_difference(solver):
    inputs, prospect = _survey(_shrinking)
    with _keeping("primals_1", "add"):
        if solver == "greedy":
            assert greedy(prospect.problem, Limits(products=0.0)) is None
        else:
            with pytest.raises(PlanError, match="no plan within"):
                prospect.solve(Limits(products=0.0))
    with _keeping("primals_1", "mul"):
        solution = prospect.solve(Limits(products=0.0))
    assert "scaling" in {one.rule for one in solution.used}
    assert _error(prospect.program(solution), inputs, _shrinking) < 1e-6


def test_a_divided_difference_is_wrong():
    inputs, prospect = _survey(_shrinking)
    careless = tuple(replace(one, originals=False) for one in prospect.problem.derivations)
    problem = replace(prospect.problem, derivations=careless)
    with _keeping("primals_1", "add"), patch.object(prospect, "problem", problem):
        solution = prospect.solve(Limits(products=0.0))
    assert {one.rule for one in solution.used} >= {"sum", "scaling"}
    assert _error(prospect.program(solution), inputs, _shrinking) > 1e-5


def test_nothing_is_watched_where_all_is_exact():
    assert _survey()[1].problem.watched
    assert not _survey(faith="exact")[1].problem.watched
