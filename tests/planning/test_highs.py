"""HiGHS behind a thread: what it finds, and that Ctrl-C is heard while it works."""

import signal
import threading
import time

import numpy as np
import pytest
from scipy.optimize import Bounds

from bwsk_fx.planning import highs
from bwsk_fx.planning.highs import constraint, minimize


def _knapsack(most: float, variables: int = 3, time_limit: float = 10.0):
    """Take as much worth as weighs at most this; variable i is worth i + 1 and weighs as much."""
    worth = np.arange(1.0, variables + 1)
    rows = [(dict(enumerate(worth)), -np.inf, most)]
    bounds = Bounds(np.zeros(variables), np.ones(variables))
    ones = np.ones(variables)
    return minimize(-worth, constraint(rows, variables), ones, bounds, relative_gap=0.0, time_limit=time_limit)


def test_a_small_program():
    found = _knapsack(4.0)
    assert found.solution is not None and not found.infeasible
    assert found.solution.round().tolist() == [1, 0, 1]
    assert found.bound == pytest.approx(-4.0)


def test_what_has_no_solution_is_proved():
    found = _knapsack(-1.0)
    assert found.solution is None and found.infeasible


def test_a_failure_in_the_thread_is_raised_here(monkeypatch):
    monkeypatch.setattr(highs, "milp", _fail)
    with pytest.raises(ValueError, match="no such program"):
        _knapsack(1.0)


def _fail(*_, **__):
    raise ValueError("no such program")


def test_an_interruption_is_heard_while_it_works(monkeypatch):
    finished = threading.Event()

    def slow(*_, **__):
        finished.wait(30.0)

    monkeypatch.setattr(highs, "milp", slow)
    threading.Timer(0.3, lambda: signal.raise_signal(signal.SIGINT)).start()
    began = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            _knapsack(1.0)
        assert time.monotonic() - began < 10.0
    finally:
        finished.set()
