"""Round trips tell what came back, what the bits of the output do not determine, and what is wrong."""

import math

import pytest
import torch
from torch import nn

from bwsk_fx.rules import Undo, by_products, other_operand, preserves
from bwsk_fx.rules.round_trip import execute, merged, round_trip
from bwsk_fx.rules.undo import Factors, unbroadcast

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def _trip(target, rebuild, *args, witness=None, made=None, dynamic=None, **kwargs):
    executed = execute(target, args, kwargs, dynamic)
    given = {} if witness is None else {"witness": witness(executed.call)}
    return round_trip(executed, preserves("claim", undo=Undo(rebuild, by_products=made), **given))


def test_an_exact_inverse_has_no_error():
    trip = _trip(torch.neg, lambda run: -run.output, X)
    assert (trip.elements, trip.lost, trip.wrong, trip.error) == (32, 0, 0, 0.0)
    assert trip.complete
    assert trip.tolerance == math.sqrt(torch.finfo(torch.float32).eps)


def test_saturated_elements_are_lost_and_not_wrong():
    x = torch.cat([X, torch.full((1, 8), 20.0)])
    trip = _trip(torch.tanh, lambda run: run.output.atanh(), x)
    assert (trip.lost, trip.wrong) == (8, 0)
    assert trip.holds and not trip.complete
    assert _trip(torch.tanh, lambda run: run.output.atanh(), x.double() / 2).complete


def test_absorbed_summands_are_lost():
    trip = _trip(torch.add, lambda run: run.output - run.other, X * 1e-6, torch.full((8,), 1e4), dynamic=())
    assert trip.elements == 0 or trip.note  # nothing is dynamic: there is no operand to rebuild
    small, large = X * 1e-6, torch.full((8,), 1e4)
    trip = _trip(torch.add, lambda run: run.output - run.other, small, large, dynamic={id(small)})
    assert trip.lost > 25 and trip.wrong == 0


def test_overflow_underflow_and_nan_are_lost():
    large = torch.full((4,), 100.0)
    assert _trip(torch.exp, lambda run: run.output.log(), large).lost == 4
    assert _trip(torch.exp, lambda run: run.output.log(), -2 * large).lost == 4
    assert _trip(torch.log, lambda run: run.output.exp(), -large).lost == 4


def test_a_wrong_inverse_is_wrong_even_where_it_yields_nan():
    assert _trip(torch.square, lambda run: run.output.sqrt(), X).wrong == int((X < 0).sum())
    assert _trip(torch.neg, lambda run: run.output * math.nan, X).wrong == 32


def test_integers_come_back_exactly_or_are_wrong():
    numbers = torch.arange(10)
    assert _trip(torch.add, lambda run: run.output - 3, numbers, 3).complete
    assert _trip(torch.floor_divide, lambda run: run.output * 2, numbers, 2).wrong == 5


def test_a_dynamic_operand_outside_the_witness_cannot_be_used():
    def subtract(run):
        return run.output - run.other

    hidden = _trip(torch.add, subtract, X, X + 1)
    assert (not hidden.holds and "meta" in hidden.note) or "witness does not name" in hidden.note
    assert _trip(torch.add, subtract, X, X + 1, witness=lambda call: other_operand(call.operands[1])).complete


def test_by_products_are_computed_forward_and_handed_back():
    def made(run):
        return {"mean": run.before.mean(-1, keepdim=True)}

    def centre(x):
        return x - x.mean(-1, keepdim=True)

    trip = _trip(
        centre, lambda run: run.output + run.by_products["mean"], X, made=made, witness=lambda _: by_products("mean")
    )
    assert trip.complete


def test_the_call_does_not_touch_its_arguments():
    x, module = X.clone(), nn.BatchNorm1d(8).train()
    _trip(torch.Tensor.mul_, lambda run: run.output / 3, x, 3)
    execute(module, (x,), {})
    assert torch.equal(x, X)
    assert module.num_batches_tracked == 0


def test_failures_name_their_cause():
    assert "rebuilt the shape (4,)" in _trip(torch.neg, lambda run: run.output[:, 0], X).note
    assert "ZeroDivisionError" in _trip(torch.neg, lambda run: 1 / 0, X).note
    assert "rebuilt 2 operands instead of 1" in _trip(torch.neg, lambda run: (run.output, run.output), X).note


def test_round_trips_add_up():
    whole = merged(
        [_trip(torch.neg, lambda run: -run.output, X), _trip(torch.square, lambda run: run.output.sqrt(), X)]
    )
    assert whole.elements == 64
    assert whole.error == pytest.approx(2)


def test_factors_solve_and_know_their_condition():
    matrix, x = torch.randn(6, 4), torch.randn(4, 3)
    factors = Factors.of(matrix)
    assert torch.allclose(factors.solve(matrix @ x), x, atol=1e-4)
    values = torch.linalg.svdvals(matrix.double())
    assert factors.condition() == pytest.approx(float(values[0] / values[-1]))
    assert Factors.of(torch.zeros(3, 2)).condition() == math.inf


def test_conditions_of_many_columns_are_estimated_from_below():
    matrix = torch.randn(2, 640, 600, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = torch.linalg.svdvals(matrix)
    exact = float((values[:, 0] / values[:, -1]).amax())
    assert 0.9 * exact < Factors.of(matrix).condition() <= exact
    assert Factors.of(torch.zeros(600, 600)).condition() == math.inf


def test_unbroadcast_takes_the_first_copy():
    x = torch.randn(3, 1)
    assert torch.equal(unbroadcast(x.expand(2, 3, 4), (3, 1)), x)
    assert unbroadcast(torch.ones(2, 2), ()).shape == ()


def test_an_overflow_of_both_signs_is_lost():
    # A row with many infinite elements of both signs gives NaN, whichever way its finite elements move.
    operand = torch.randn(16, 8, generator=torch.Generator().manual_seed(0)).mul(3e4).half()
    weight = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(1)))[0].mul(100).half()
    trip = _trip(torch.matmul, lambda run: Factors.of(weight.mT).solve(run.output.mT).mT, operand, weight)
    assert trip.lost > 100
    assert trip.wrong == 0


@pytest.mark.parametrize(("condition", "lost", "wrong"), [(1e9, 32, 0), (1e6, 0, 32)])
def test_a_singular_system_leaves_its_operand_open(condition, lost, wrong):
    executed = execute(torch.neg, (X,), {})
    undo = Undo(lambda run: -run.output + 0.1, condition=lambda run: condition)
    trip = round_trip(executed, preserves("claim", undo=undo))
    assert (trip.lost, trip.wrong) == (lost, wrong)
