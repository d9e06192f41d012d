"""The integer program: keep the fewest bytes such that everything needed is available within the limits.

Variables per class of values: keep, available; per derivation: use; an order forbids that values derive each other in
a circle (Miller, Tucker, Zemlin 1960); where something takes branches by values, whether they are the originals.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import networkx as nx
import numpy as np
from scipy.optimize import Bounds, LinearConstraint
from torch import fx

from bwsk_fx.planning.derivations import Derivation, Hypergraph, Kind, keepable
from bwsk_fx.planning.highs import Row, constraint
from bwsk_fx.planning.joint import JointGraph, is_constant, nbytes
from bwsk_fx.planning.jumps import jumps

# A tenth of the step spent on cheap recomputation has to save at least this share of the bytes.
BYTES_PER_TENTH_OF_STEP = 0.002


@dataclass(frozen=True)
class Limits:
    """What a plan may spend beside the conventional step, in modelled seconds.

    Attributes:
        products: On matrix products, convolutions and attention that run again.
        extra: On everything that is run again, inverted, or computed to be kept.
    """

    products: float = np.inf
    extra: float = np.inf


@dataclass(frozen=True)
class Problem:
    """A joint graph and the ways to its values, as the program and the greedy search see them.

    Attributes:
        classes: Each class of values that are views of each other, by its first value, in graph order.
        needs: The classes that the backward pass reads and that are not given.
        given: Those that are at hand anyway: numbers, parameters, and buffers that keep their values.
        derivations: The ways from class to class that may be of use.
        hypergraph: Where they come from.
        step: Modelled seconds of the conventional step.
        stages: The number of the repeated block that a class belongs to, or comes after.
        exact_needs: Those of the needs by which the backward pass takes branches: they have to be the originals.
    """

    classes: tuple[fx.Node, ...]
    needs: tuple[fx.Node, ...]
    given: frozenset[fx.Node]
    derivations: tuple[Derivation, ...]
    hypergraph: Hypergraph
    step: float
    stages: Mapping[fx.Node, int]
    exact_needs: frozenset[fx.Node] = frozenset()

    @classmethod
    def of(cls, joint: JointGraph, hypergraph: Hypergraph, step: float) -> Problem:
        """Read the problem off a joint graph and its hypergraph."""
        class_of = hypergraph.class_of
        classes = tuple(dict.fromkeys(class_of.values()))
        given = {class_of[primal] for primal in joint.at_hand}
        given |= {value for value in classes if is_constant(value)}
        needed = dict.fromkeys(class_of[node] for node in joint.needed())
        needs = tuple(cls for cls in needed if cls not in given)
        useful = _useful(hypergraph.derivations, class_of, given)
        branches = (operand for node in joint.backward if jumps(node) for operand in node.all_input_nodes)
        exact = frozenset(class_of[value] for value in branches if value in class_of) & frozenset(needs)
        return cls(classes, needs, frozenset(given), tuple(useful), hypergraph, step, _stages(classes), exact)

    def can_keep(self, value: fx.Node) -> bool:
        """Whether a class can be kept, and is not there without."""
        return keepable(value) and value not in self.given

    def keep_seconds(self, value: fx.Node) -> float:
        """Return what the forward pass computes for the sake of a kept value alone."""
        return self.hypergraph.witness_seconds.get(value, 0.0)

    def head(self, one: Derivation) -> fx.Node:
        """Return the class that a derivation gives."""
        return self.hypergraph.class_of[one.head]

    def tails(self, one: Derivation) -> list[fx.Node]:
        """Return the classes that a derivation reads, each once, given ones left out."""
        distinct = dict.fromkeys(self.hypergraph.class_of[tail] for tail in one.tails)
        return [tail for tail in distinct if tail not in self.given]

    @cached_property
    def watched(self) -> frozenset[fx.Node]:
        """The classes of which it matters whether they are the originals; none where all of them are in any case."""
        ways: dict[fx.Node, list[Derivation]] = {}
        for one in self.derivations:
            ways.setdefault(self.head(one), []).append(one)
        found: set[fx.Node] = set()
        pending = [*self.exact_needs, *(tail for one in self.derivations if one.originals for tail in self.tails(one))]
        while pending:
            cls = pending.pop()
            if cls not in found:
                found.add(cls)
                pending += [tail for one in ways.get(cls, ()) if one.exact for tail in self.tails(one)]
        inexact = any(not one.exact for cls in found for one in ways.get(cls, ()))
        return frozenset(found) if inexact else frozenset()

    def reaches_back(self, one: Derivation, tail: fx.Node) -> bool:
        """Whether a derivation recomputes a value from one of an earlier block."""
        return one.kind is Kind.RECOMPUTE and self.stages[tail] < self.stages[self.head(one)]


def _stages(classes: Sequence[fx.Node]) -> dict[fx.Node, int]:
    """Number the blocks in the order in which they first appear; what is outside any stays where it was reached."""
    blocks: dict[str, int] = {}
    stages: dict[fx.Node, int] = {}
    for value in classes:
        block = _block_of(value)
        before = max((stages.get(operand, 0) for operand in value.all_input_nodes), default=0)
        stages[value] = before if block is None else blocks.setdefault(block, len(blocks) + 1)
    return stages


def _block_of(value: fx.Node) -> str | None:
    """Return the path of the outermost numbered module around a value that is no single operator of PyTorch's."""
    for path, (_, kind) in (value.meta.get("nn_module_stack") or {}).items():
        if path.rpartition(".")[2].isdecimal() and not kind.__module__.startswith("torch.nn"):
            return path
    return None


def _useful(
    derivations: Iterable[Derivation], class_of: Mapping[fx.Node, fx.Node], given: set[fx.Node]
) -> list[Derivation]:
    """Drop derivations within a class and those of values that are given anyway."""
    return [
        one
        for one in derivations
        if class_of[one.head] not in given and class_of[one.head] not in {class_of[tail] for tail in one.tails}
    ]


class IntegerProgram:
    """The arrays of the program, and how its solution is read.

    Attributes:
        objective: Bytes kept, as a share of all, and a little for the time of cheap work.
        bounds: Of each variable.
        integrality: 1 for the variables that are 0 or 1.
    """

    def __init__(self, problem: Problem, limits: Limits) -> None:
        self._problem = problem
        classes, uses = len(problem.classes), len(problem.derivations)
        self._keep = {cls: index for index, cls in enumerate(problem.classes)}
        self._available = {cls: classes + index for index, cls in enumerate(problem.classes)}
        self._use = range(2 * classes, 2 * classes + uses)
        self._order = {cls: 2 * classes + uses + index for index, cls in enumerate(problem.classes)}
        self._exact = {cls: 3 * classes + uses + index for index, cls in enumerate(problem.watched)}
        self._upper = np.ones(3 * classes + uses + len(self._exact))
        self.objective = np.zeros_like(self._upper)
        self.integrality = np.ones_like(self._upper)
        self.integrality[list(self._order.values())] = 0
        self._rows: list[Row] = []
        self._weigh()
        self._require_what_is_needed()
        self._forbid_circles()
        self._bound_transients()
        self._require_originals()
        self._limit(limits)

    @property
    def bounds(self) -> Bounds:
        """Bounds of each variable."""
        return Bounds(np.zeros_like(self._upper), self._upper)

    def constraints(self) -> LinearConstraint:
        """Return the rows as one sparse constraint."""
        return constraint(self._rows, len(self._upper))

    def read(self, solution: np.ndarray) -> tuple[set[fx.Node], list[Derivation]]:
        """Return the classes that are kept, and the derivations that are switched on."""
        kept = {cls for cls, column in self._keep.items() if solution[column] > 0.5}
        chosen = zip(self._problem.derivations, self._use, strict=True)
        return kept, [one for one, column in chosen if solution[column] > 0.5]

    def value_of(self, kept: Iterable[fx.Node], used: Iterable[Derivation]) -> float:
        """Return the objective of a choice."""
        weight = self._seconds_weight()
        seconds = sum(one.seconds for one in used)
        return float(sum(self.objective[self._keep[cls]] for cls in kept) + weight * seconds)

    def _seconds_weight(self) -> float:
        return BYTES_PER_TENTH_OF_STEP * 10 / (self._problem.step or 1.0)

    def _weigh(self) -> None:
        problem, weight = self._problem, self._seconds_weight()
        total = sum(nbytes(cls) for cls in problem.classes if keepable(cls)) or 1
        for cls, column in self._keep.items():
            self.objective[column] = nbytes(cls) / total + weight * problem.keep_seconds(cls)
            self._upper[column] = float(problem.can_keep(cls))
            self._upper[self._order[cls]] = len(problem.classes)
        for one, column in zip(problem.derivations, self._use, strict=True):
            self.objective[column] = weight * one.seconds

    def _require_what_is_needed(self) -> None:
        problem = self._problem
        ways: dict[fx.Node, list[int]] = {cls: [] for cls in problem.classes}
        for one, use in zip(problem.derivations, self._use, strict=True):
            ways[problem.head(one)].append(use)
            for tail in problem.tails(one):
                self._rows.append(({use: 1.0, self._available[tail]: -1.0}, -np.inf, 0.0))
        for cls in problem.classes:
            if cls not in problem.given:
                terms = {self._available[cls]: 1.0, self._keep[cls]: -1.0} | dict.fromkeys(ways[cls], -1.0)
                self._rows.append((terms, -np.inf, 0.0))
        for cls in problem.needs:
            self._rows.append(({self._available[cls]: 1.0}, 1.0, 1.0))

    def _bound_transients(self) -> None:
        """Let a block be recomputed only from what is kept, or inverted, of the blocks before it.

        Otherwise the fewest bytes are kept by running the whole model again, with every block's values alive at once.
        """
        problem = self._problem
        inverted: dict[fx.Node, list[int]] = {}
        for one, use in zip(problem.derivations, self._use, strict=True):
            if one.kind is Kind.INVERT:
                inverted.setdefault(problem.head(one), []).append(use)
        for one, use in zip(problem.derivations, self._use, strict=True):
            for tail in problem.tails(one):
                if problem.reaches_back(one, tail):
                    ways = dict.fromkeys(inverted.get(tail, ()), -1.0)
                    self._rows.append(({use: 1.0, self._keep[tail]: -1.0} | ways, -np.inf, 0.0))

    def _require_originals(self) -> None:
        """Let what jumps or magnifies read originals: kept values, and what exact derivations make of originals."""
        problem, exact = self._problem, self._exact
        for cls in problem.exact_needs & exact.keys():
            self._rows.append(({exact[cls]: 1.0}, 1.0, 1.0))
        for one, use in zip(problem.derivations, self._use, strict=True):
            head = problem.head(one)
            if head in exact and not one.exact:
                self._rows.append(({use: 1.0, exact[head]: 1.0}, -np.inf, 1.0))
            for tail in problem.tails(one):
                if head in exact and one.exact:
                    self._rows.append(({use: 1.0, exact[head]: 1.0, exact[tail]: -1.0}, -np.inf, 1.0))
                if one.originals and tail in exact:
                    self._rows.append(({use: 1.0, exact[tail]: -1.0}, -np.inf, 0.0))

    def _limit(self, limits: Limits) -> None:
        # In units of the step, so that HiGHS' absolute tolerance cannot let a product through.
        step = self._problem.step or 1.0
        uses = list(zip(self._problem.derivations, self._use, strict=True))
        products = {use: one.seconds / step for one, use in uses if one.intensive}
        if products and np.isfinite(limits.products):
            self._rows.append((products, 0.0, limits.products / step))
        if limits.products == 0.0:
            self._upper[list(products)] = 0.0
        if np.isfinite(limits.extra):
            extra = {use: one.seconds / step for one, use in uses if one.seconds}
            kept = ((cls, self._problem.keep_seconds(cls) / step) for cls in self._keep)
            extra |= {self._keep[cls]: share for cls, share in kept if share}
            if extra:
                self._rows.append((extra, 0.0, limits.extra / step))

    def _forbid_circles(self) -> None:
        problem = self._problem
        edges = nx.DiGraph()
        for one in problem.derivations:
            edges.add_edges_from((tail, problem.head(one)) for tail in problem.tails(one))
        component = {cls: index for index, part in enumerate(nx.strongly_connected_components(edges)) for cls in part}
        sizes = np.bincount(list(component.values())) if component else np.zeros(0)
        for one, use in zip(problem.derivations, self._use, strict=True):
            head = problem.head(one)
            for tail in problem.tails(one):
                if component[tail] == component[head]:
                    length = float(sizes[component[head]])
                    terms = {self._order[tail]: 1.0, self._order[head]: -1.0, use: length + 1.0}
                    self._rows.append((terms, -np.inf, length))
