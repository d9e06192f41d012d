"""HiGHS through SciPy, with a time limit, and able to be interrupted."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

# A row of a program: the factor of each variable, and the least and the most that their sum may be.
Row = tuple[dict[int, float], float, float]

# How often the waiting thread wakes up, seconds: a signal that another thread receives does not wake it.
_PATIENCE = 0.1
_INFEASIBLE = 2


@dataclass(frozen=True)
class Outcome:
    """What HiGHS found.

    Attributes:
        solution: The variables; None where it found none.
        bound: No solution has a smaller objective than this.
        infeasible: Whether it proved that there is no solution.
        message: Its own words.
    """

    solution: np.ndarray | None
    bound: float
    infeasible: bool
    message: str


def constraint(rows: Sequence[Row], variables: int) -> LinearConstraint:
    """Return rows as one sparse constraint on a number of variables."""
    entries = [(row, column, value) for row, (terms, _, _) in enumerate(rows) for column, value in terms.items()]
    places, columns, values = zip(*entries, strict=True)
    matrix = coo_array((values, (places, columns)), shape=(len(rows), variables))
    return LinearConstraint(matrix.tocsr(), [low for _, low, _ in rows], [high for *_, high in rows])


def minimize(
    objective: np.ndarray,
    constraints: LinearConstraint,
    integrality: np.ndarray,
    bounds: Bounds,
    *,
    relative_gap: float,
    time_limit: float,
) -> Outcome:
    """Solve a mixed-integer linear program.

    HiGHS runs in a thread of its own, since it does not look at signals: Ctrl-C is raised here at once, and the thread
    ends at its time limit.

    Args:
        objective: Cost of each variable.
        constraints: The rows.
        integrality: 1 for integer variables.
        bounds: Of each variable.
        relative_gap: HiGHS stops when it has proved that its solution is this close to the best.
        time_limit: Seconds after which it returns what it has.
    """
    found: Future[Any] = Future()
    options = {"mip_rel_gap": relative_gap, "time_limit": time_limit}

    def run() -> None:
        try:
            found.set_result(
                milp(objective, integrality=integrality, bounds=bounds, constraints=constraints, options=options)
            )
        except Exception as error:
            found.set_exception(error)

    threading.Thread(target=run, name="highs", daemon=True).start()
    while not found.done():
        wait([found], _PATIENCE)
    result = found.result()
    # None, or not there at all, where HiGHS had no time to find one.
    bound = getattr(result, "mip_dual_bound", None)
    bound = float(bound) if bound is not None and np.isfinite(bound) else -np.inf
    return Outcome(result.x, bound, result.status == _INFEASIBLE, str(result.message))
