"""Timing with a clock that the tests turn, real tensors in the image of fake ones, and costs that are measured once."""

import itertools
import warnings

import pytest
import torch
from torch import fx

from bwsk_fx import _torch_private as private
from bwsk_fx.planning import timing
from bwsk_fx.planning.cost import Roofline, profile_of
from bwsk_fx.planning.kernels import KernelCall
from bwsk_fx.planning.timing import (
    MeasuredCosts,
    Stopwatch,
    call_key,
    call_seconds,
    clock_of,
    real_arguments,
    undisturbed,
)

aten = torch.ops.aten
CPU = torch.device("cpu")


class Clock:
    """Stands still until it is told how long something takes."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def work(self, *seconds: float):
        """Return a function that takes these times in turn, then the last of them."""
        times = itertools.chain(seconds, itertools.repeat(seconds[-1]))

        def run() -> None:
            run.calls += 1
            self.now += next(times)

        run.calls = 0
        return run


@pytest.fixture
def clock() -> Clock:
    return Clock()


def _watch(clock: Clock, device: str = "cpu", limit: float = 1.0) -> Stopwatch:
    return Stopwatch(torch.device(device), clock, limit, wall=clock)


def _call(target, *args, **kwargs) -> KernelCall:
    """Return a call on fake tensors; operands are made from shapes and (shape, stride, dtype)."""

    def fake(arg):
        return torch.empty_strided(*arg[:2], dtype=arg[2]) if isinstance(arg, tuple) else arg

    with private.fake_mode():
        operands = tuple(map(fake, args))
        return KernelCall(target, operands, kwargs, target(*operands, **kwargs))


def _tensor(*shape: int, stride=None, dtype=torch.float32):
    return shape, stride or torch.empty(shape, device="meta").stride(), dtype


# ------------------------------------------------------------------------------------------------------ the stopwatch


def test_the_least_run_counts_and_the_first_does_not(clock):
    run = clock.work(0.01, 0.3, 0.2, 0.4)
    assert _watch(clock).seconds(run) == pytest.approx(0.2)
    assert run.calls == 5


def test_runs_end_at_the_limit_but_not_before_three(clock):
    long, short = clock.work(5.0), clock.work(0.25)
    assert (_watch(clock).seconds(long), _watch(clock).seconds(short)) == (5.0, 0.25)
    assert (long.calls, short.calls) == (1 + 3, 1 + 4)


def test_short_runs_end_after_a_hundred(clock):
    run = clock.work(1e-6)
    assert _watch(clock).seconds(run) == pytest.approx(1e-6)
    assert run.calls == 101


def test_a_rough_time_is_the_least_of_three(clock):
    run = clock.work(0.1, 0.5, 0.3, 0.4)
    assert _watch(clock).roughly(run) == pytest.approx(0.3)
    assert run.calls == 4


def test_an_accelerator_is_timed_in_batches_between_waits(clock, monkeypatch):
    waits = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waits.append)
    run = clock.work(1e-4)
    assert _watch(clock, "cuda", limit=4.5e-3).seconds(run) == pytest.approx(1e-4)
    # A first call, one that sizes the batches, and two batches of two milliseconds.
    assert run.calls == 1 + 1 + 3 * 20
    assert waits == [torch.device("cuda")] * 2 * 5


def test_the_time_of_a_cpu_is_the_thread_s_own_unless_it_is_coarse(monkeypatch):
    assert clock_of(torch.device("cuda")) is timing.time.perf_counter
    own = Stopwatch.of(CPU)
    assert own.clock is timing.time.thread_time and own.wall is timing.time.perf_counter
    monkeypatch.setattr(timing.time, "get_clock_info", lambda name: type("Info", (), {"resolution": 0.0156}))
    assert clock_of(CPU) is timing.time.perf_counter


# ----------------------------------------------------------------------------------------------------- real arguments


def test_tensors_have_recorded_shapes_strides_and_dtypes():
    call = _call(
        aten.add.Tensor, _tensor(4, 3, stride=(1, 4)), _tensor(4, 3, stride=(3, 0), dtype=torch.bfloat16), alpha=2
    )
    (left, right), kwargs = real_arguments(call)
    assert (left.shape, left.stride(), left.dtype) == ((4, 3), (1, 4), torch.float32)
    assert (right.shape, right.stride(), right.dtype) == ((4, 3), (3, 0), torch.bfloat16)
    assert kwargs == {"alpha": 2}
    assert not hasattr(left, "fake_mode")
    assert left.min() >= 0.25 and left.max() < 1.25 and left.unique().numel() > 6


def test_a_tensor_that_is_given_twice_is_one():
    with private.fake_mode():
        operand = torch.empty(3)
    (left, right), _ = real_arguments(KernelCall(aten.mul.Tensor, (operand, operand), {}, operand))
    assert left is right


def test_masks_have_both_values_and_integers_are_zero():
    (mask, operand, _), _ = real_arguments(
        _call(aten.where.self, _tensor(64, dtype=torch.bool), _tensor(64, dtype=torch.int64), _tensor(64))
    )
    assert 0 < mask.sum() < 64
    assert not operand.any()


@pytest.mark.parametrize(
    ("call", "place", "bound"),
    [
        (_call(aten.embedding.default, _tensor(7, 2), _tensor(400, dtype=torch.int64)), 1, 7),
        (
            _call(
                aten.embedding_dense_backward.default, _tensor(400, 2), _tensor(400, dtype=torch.int64), 7, -1, False
            ),
            1,
            7,
        ),
        (_call(aten.gather.default, _tensor(400, 5), 1, _tensor(400, 5, dtype=torch.int64)), 2, 5),
        (_call(aten.index_select.default, _tensor(3, 5), 0, _tensor(400, dtype=torch.int64)), 2, 3),
        (_call(aten.nll_loss_forward.default, _tensor(400, 6), _tensor(400, dtype=torch.int64), None, 1, -100), 1, 6),
    ],
    ids=lambda value: str(value.target) if isinstance(value, KernelCall) else None,
)
def test_indices_are_in_range(call, place, bound):
    args, kwargs = real_arguments(call)
    assert args[place].unique().tolist() == list(range(bound))
    call.target(*args, **kwargs)


def test_empty_tensors_stay_empty():
    (operand,), _ = real_arguments(_call(aten.neg.default, _tensor(0, 3, stride=(9, 1))))
    assert (operand.shape, operand.stride()) == ((0, 3), (9, 1))


# ------------------------------------------------------------------------------------------------- leaving no trace


def test_timing_runs_the_operator_and_leaves_states_as_they_are(clock):
    seen = []

    def target(operand):
        seen.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), hasattr(operand, "fake_mode")))
        clock.now += 0.5
        return torch.rand_like(operand)

    call = KernelCall(target, _call(aten.neg.default, _tensor(3)).args, {}, None)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16), private.fake_mode():
        assert call_seconds(call, _watch(clock, limit=0.0)) == 0.5
        assert torch.is_grad_enabled() and torch.is_autocast_enabled("cpu") and hasattr(torch.ones(1), "fake_mode")
    assert seen == [(False, False, False)] * 4
    assert torch.equal(torch.rand(2), expected)


def test_states_are_put_back_after_an_error():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with pytest.raises(ZeroDivisionError), undisturbed(CPU):
        torch.rand(5)
        raise ZeroDivisionError
    assert torch.is_grad_enabled()
    assert torch.equal(torch.rand(2), expected)


# ------------------------------------------------------------------------------------------------------ measured costs


@pytest.fixture
def costs(monkeypatch) -> MeasuredCosts:
    """Costs that take one second more for each distinct call, and fail for `exp`."""

    def measured(call, watch):
        if call.target is aten.exp.default:
            raise RuntimeError("no exp here\nand more of it")
        measured.calls.append(call)
        return float(len(measured.calls))

    measured.calls = []
    monkeypatch.setattr(timing, "call_seconds", measured)
    result = MeasuredCosts(Roofline(profile_of(CPU)), Stopwatch.of(CPU), {})
    result.timed = measured.calls
    return result


def test_equal_calls_are_timed_once(costs):
    first = costs.call_seconds(_call(aten.neg.default, _tensor(3)))
    assert costs.call_seconds(_call(aten.neg.default, _tensor(3))) == first == 1.0
    assert len(costs.timed) == 1
    assert costs.figures == {call_key(costs.timed[0]): 1.0}


def test_known_figures_are_not_timed(costs):
    call = _call(aten.neg.default, _tensor(3))
    costs.figures[call_key(call)] = 7.0
    assert costs.call_seconds(call) == 7.0
    assert not costs.timed


def test_a_node_takes_the_sum_of_its_calls_and_a_view_nothing(costs):
    graph = fx.Graph()
    operand = graph.placeholder("x")
    operand.meta["val"] = _call(aten.neg.default, _tensor(3, 2)).args[0]
    both = graph.call_function(lambda x: (x.sin() + 1.0).t(), (operand,))
    view = graph.call_function(aten.t.default, (operand,))
    view.meta["val"] = None
    assert [costs.seconds(node) for node in (operand, both, view)] == [0.0, 1.0 + 2.0, 0.0]


def test_what_takes_no_time_is_still_no_view(costs, monkeypatch):
    monkeypatch.setattr(timing, "call_seconds", lambda call, watch: 0.0)
    assert costs.call_seconds(_call(aten.neg.default, _tensor(3))) > 0.0


def test_a_call_that_fails_has_the_roofline_s_time_and_one_warning(costs):
    small, large = _call(aten.exp.default, _tensor(3)), _call(aten.exp.default, _tensor(300))
    with pytest.warns(UserWarning, match=r"aten\.exp\.default cannot be timed.*RuntimeError: no exp here\)") as warned:
        seconds = [costs.call_seconds(call) for call in (small, large, small)]
    assert len(warned) == 1
    assert seconds == [costs.roofline.call_seconds(call) for call in (small, large, small)]
    assert costs.failures == {"aten.exp.default": "RuntimeError: no exp here"}
    assert costs.modelled_calls == 2
    assert not costs.figures


def test_a_call_that_succeeds_warns_of_nothing(costs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        costs.call_seconds(_call(aten.neg.default, _tensor(3)))
    assert costs.modelled_calls == 0


BASE = _call(aten.add.Tensor, _tensor(4, 4), _tensor(4, 4), alpha=2)


@pytest.mark.parametrize(
    "other",
    [
        _call(aten.sub.Tensor, _tensor(4, 4), _tensor(4, 4), alpha=2),
        _call(aten.add.Tensor, _tensor(4, 4), _tensor(4, 4), alpha=3),
        _call(aten.add.Tensor, _tensor(4, 4), _tensor(4, 4)),
        _call(aten.add.Tensor, _tensor(4, 4), _tensor(4, 1), alpha=2),
        _call(aten.add.Tensor, _tensor(4, 4), _tensor(4, 4, stride=(1, 4)), alpha=2),
        _call(aten.add.Tensor, _tensor(4, 4), _tensor(4, 4, dtype=torch.float16), alpha=2),
        _call(aten.add.Tensor, _tensor(4, 4), 1.0, alpha=2),
    ],
)
def test_calls_that_differ_have_other_keys(other):
    assert call_key(other) != call_key(BASE)
    assert call_key(BASE) == call_key(_call(aten.add.Tensor, _tensor(4, 4), _tensor(4, 4), alpha=2))


def test_a_key_can_be_read():
    call = _call(aten.sum.dim_IntList, _tensor(4, 2, dtype=torch.bfloat16), [0], True, dtype=torch.float32)
    assert call_key(call) == "aten.sum.dim_IntList(bfloat16[4,2](2,1)cpu, [0], True, dtype, torch.float32)"
