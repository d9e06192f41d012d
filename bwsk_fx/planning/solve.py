"""The integer program: keep the fewest bytes such that everything needed is available within the budget.

Variables per class of values: keep, available; per derivation: use; an order forbids that values derive each other in
a circle (Miller, Tucker, Zemlin 1960). Solved with HiGHS through SciPy.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import networkx as nx
import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array
from torch import fx

from bwsk_fx.errors import PlanError
from bwsk_fx.planning.cost import DeviceProfile, node_seconds
from bwsk_fx.planning.derivations import Derivation, Hypergraph, keepable
from bwsk_fx.planning.joint import JointGraph, is_constant, nbytes

# A tenth of the step spent on cheap recomputation has to save at least this share of the bytes.
_BYTES_PER_TENTH_OF_STEP = 0.002
_RELATIVE_GAP = 0.01
_SECONDS_LIMIT = 60.0


@dataclass(frozen=True)
class Solution:
    """What the program chose.

    Attributes:
        kept: Values that the forward pass saves.
        used: Derivations that the backward pass runs, without the free views.
        kept_bytes: Sum over `kept`.
        extra_seconds: Modelled time of `used`.
        intensive_seconds: The part of it that the budget bounds: products run again.
        step_seconds: Modelled time of the conventional forward and backward pass.
        gap: Relative optimality gap that the solver proved.
    """

    kept: tuple[fx.Node, ...]
    used: tuple[Derivation, ...]
    kept_bytes: int
    extra_seconds: float
    intensive_seconds: float
    step_seconds: float
    gap: float


def solve(joint: JointGraph, hypergraph: Hypergraph, profile: DeviceProfile, budget: float) -> Solution:
    """Choose what to keep.

    Args:
        joint: The graph whose backward pass is served.
        hypergraph: Its values and derivations.
        profile: Device figures, for the time of the conventional step.
        budget: Extra time for running matrix products, convolutions and attention again, as a fraction of the
            conventional step. 0.0 runs none of them twice; elementwise work is weighed against the bytes it saves.

    Raises:
        PlanError: A value that the backward pass needs can neither be kept nor derived, or the solver failed.
    """
    step = sum(node_seconds(node, profile) for node in joint.graph.nodes if "witness_of" not in node.meta)
    program = _Program(joint, hypergraph, step, budget)
    result = milp(
        program.objective,
        constraints=program.constraints(),
        integrality=program.integrality,
        bounds=Bounds(np.zeros_like(program.upper), program.upper),
        options={"mip_rel_gap": _RELATIVE_GAP, "time_limit": _SECONDS_LIMIT},
    )
    if result.x is None:
        needs = program.describe_needs()
        raise PlanError(f"no plan for budget {budget}: {result.message}; the backward pass needs {needs}")
    return program.read(result.x, float(result.mip_gap or 0.0))


class _Program:
    """Builds the arrays of the integer program and reads its solution."""

    def __init__(self, joint: JointGraph, hypergraph: Hypergraph, step: float, budget: float) -> None:
        self._graph = hypergraph
        self._step = step
        self._needs = self._needed_classes(joint)
        self._classes = list(dict.fromkeys(hypergraph.class_of.values()))
        self._given = {hypergraph.class_of[primal] for primal in joint.static_primals}
        self._given |= {cls for cls in self._classes if is_constant(cls)}
        self._derivations = self._useful(hypergraph.derivations)
        self._rows: list[tuple[dict[int, float], float, float]] = []
        classes, uses = len(self._classes), len(self._derivations)
        self._keep = {cls: index for index, cls in enumerate(self._classes)}
        self._available = {cls: classes + index for index, cls in enumerate(self._classes)}
        self._use = range(2 * classes, 2 * classes + uses)
        self._order = {cls: 2 * classes + uses + index for index, cls in enumerate(self._classes)}
        self._make_columns(2 * classes + uses, classes)
        self._make_rows(budget)

    def constraints(self) -> LinearConstraint:
        """Return the rows as one sparse constraint."""
        entries = [
            (row, column, value) for row, (terms, _, _) in enumerate(self._rows) for column, value in terms.items()
        ]
        rows, columns, values = zip(*entries, strict=True)
        matrix = coo_array((values, (rows, columns)), shape=(len(self._rows), len(self.upper)))
        lower, upper = zip(*((low, high) for _, low, high in self._rows), strict=True)
        return LinearConstraint(matrix.tocsr(), lower, upper)

    def read(self, solution: np.ndarray, gap: float) -> Solution:
        """Translate the solver's numbers into values and derivations."""
        kept = tuple(cls for cls, column in self._keep.items() if solution[column] > 0.5)
        chosen = [one for one, column in zip(self._derivations, self._use, strict=True) if solution[column] > 0.5]
        used = self._reachable(chosen, set(kept))
        return Solution(
            kept,
            tuple(used),
            sum(map(nbytes, kept)),
            sum(one.seconds for one in used),
            sum(one.seconds for one in used if one.intensive),
            self._step,
            gap,
        )

    def describe_needs(self) -> str:
        """Name the values that have to be available."""
        return ", ".join(sorted(cls.name for cls in self._needs))

    def _needed_classes(self, joint: JointGraph) -> set[fx.Node]:
        return {self._graph.class_of[node] for node in joint.needed()}

    def _useful(self, derivations: Iterable[Derivation]) -> list[Derivation]:
        """Drop derivations within a class and those of values that are given anyway."""
        class_of = self._graph.class_of
        return [
            one
            for one in derivations
            if class_of[one.head] not in self._given
            and class_of[one.head] not in {class_of[tail] for tail in one.tails}
        ]

    def _make_columns(self, binaries: int, classes: int) -> None:
        total = sum(nbytes(cls) for cls in self._classes if keepable(cls)) or 1
        weight = _BYTES_PER_TENTH_OF_STEP * 10 / (self._step or 1.0)
        self.objective = np.zeros(binaries + classes)
        self.upper = np.ones(binaries + classes)
        self.integrality = np.concatenate([np.ones(binaries), np.zeros(classes)])
        for cls, column in self._keep.items():
            self.objective[column] = nbytes(cls) / total
            self.upper[column] = float(keepable(cls) and cls not in self._given)
            self.upper[self._order[cls]] = classes
        for one, column in zip(self._derivations, self._use, strict=True):
            self.objective[column] = weight * one.seconds

    def _make_rows(self, budget: float) -> None:
        class_of = self._graph.class_of
        ways: dict[fx.Node, list[int]] = {cls: [] for cls in self._classes}
        for one, use in zip(self._derivations, self._use, strict=True):
            ways[class_of[one.head]].append(use)
            for tail in {class_of[tail] for tail in one.tails} - self._given:
                self._rows.append(({use: 1.0, self._available[tail]: -1.0}, -np.inf, 0.0))
        for cls in self._classes:
            if cls not in self._given:
                terms = {self._available[cls]: 1.0, self._keep[cls]: -1.0} | dict.fromkeys(ways[cls], -1.0)
                self._rows.append((terms, -np.inf, 0.0))
        for cls in self._needs - self._given:
            self._rows.append(({self._available[cls]: 1.0}, 1.0, 1.0))
        self._forbid_circles()
        intensive = {use: one.seconds for one, use in zip(self._derivations, self._use, strict=True) if one.intensive}
        if intensive:
            # In units of the step, so that HiGHS' absolute tolerance cannot let a product through.
            scaled = {use: seconds / self._step for use, seconds in intensive.items()}
            self._rows.append((scaled, 0.0, budget))
        if budget == 0.0:
            for use in intensive:
                self.upper[use] = 0.0

    def _forbid_circles(self) -> None:
        class_of = self._graph.class_of
        edges = nx.DiGraph()
        for one in self._derivations:
            edges.add_edges_from((class_of[tail], class_of[one.head]) for tail in one.tails)
        component = {cls: index for index, part in enumerate(nx.strongly_connected_components(edges)) for cls in part}
        sizes = np.bincount(list(component.values())) if component else np.zeros(0)
        for one, use in zip(self._derivations, self._use, strict=True):
            head = class_of[one.head]
            for tail in {class_of[tail] for tail in one.tails}:
                if component[tail] == component[head]:
                    length = float(sizes[component[head]])
                    terms = {self._order[tail]: 1.0, self._order[head]: -1.0, use: length + 1.0}
                    self._rows.append((terms, -np.inf, length))

    def _reachable(self, chosen: list[Derivation], kept: set[fx.Node]) -> list[Derivation]:
        """Walk back from the needs along one derivation per class; the solver may switch on more than it needs."""
        class_of = self._graph.class_of
        by_head: dict[fx.Node, Derivation] = {}
        for one in sorted(chosen, key=lambda one: one.seconds, reverse=True):
            by_head[class_of[one.head]] = one
        used: dict[fx.Node, Derivation] = {}
        pending = list(self._needs)
        while pending:
            cls = pending.pop()
            if cls in kept or cls in self._given or cls in used:
                continue
            used[cls] = by_head[cls]
            pending += [class_of[tail] for tail in by_head[cls].tails]
        return list(used.values())
