"""A plan without a solver: drop the largest values first, as long as everything needed can still be had."""

from __future__ import annotations

import heapq
from collections.abc import Collection
from itertools import count

from torch import fx

from bwsk_fx.planning.derivations import Derivation, Kind
from bwsk_fx.planning.integer_program import Limits, Problem
from bwsk_fx.planning.joint import nbytes


def greedy(problem: Problem, limits: Limits) -> tuple[set[fx.Node], list[Derivation]] | None:
    """Return classes to keep and derivations to use; None where some need can neither be kept nor derived.

    Everything is kept at first. Then each value, the largest first, is let go where what is left still gives all that
    the backward pass needs, within the limits. No value of the result can be let go without breaking them.
    """
    derivations = [one for one in problem.derivations if limits.products > 0.0 or not one.intensive]
    ways = _Ways(problem, derivations)
    kept = {cls for cls in problem.classes if problem.can_keep(cls)}
    best = ways.within(kept, limits)
    for cls in sorted(kept, key=nbytes, reverse=True):
        found = ways.within(kept - {cls}, limits)
        if found is not None:
            kept, best = kept - {cls}, found
    return None if best is None else (kept, best)


class _Ways:
    """Cheapest ways from a set of kept values to the others."""

    def __init__(self, problem: Problem, derivations: Collection[Derivation]) -> None:
        self._problem = problem
        self._readers: dict[fx.Node, list[Derivation]] = {}
        self._free = [one for one in derivations if not problem.tails(one)]
        for one in derivations:
            for tail in problem.tails(one):
                self._readers.setdefault(tail, []).append(one)

    def within(self, kept: set[fx.Node], limits: Limits) -> list[Derivation] | None:
        """Return derivations that give all needs from `kept`, or None where they would exceed the limits."""
        used = self._used(kept, self._cheapest(kept))
        if used is None:
            return None
        products = sum(one.seconds for one in used if one.intensive)
        extra = sum(one.seconds for one in used) + sum(map(self._problem.keep_seconds, kept))
        return used if products <= limits.products and extra <= limits.extra else None

    def _cheapest(self, kept: set[fx.Node]) -> dict[fx.Node, Derivation]:
        """Knuth's generalisation of Dijkstra's algorithm to hypergraphs: a head costs its derivation and its tails."""
        cost = dict.fromkeys(kept, 0.0)
        chosen: dict[fx.Node, Derivation] = {}
        missing = {id(one): len(self._problem.tails(one)) for ones in self._readers.values() for one in ones}
        serial = count()
        heap = [(0.0, next(serial), cls, None) for cls in kept]
        heap += [(one.seconds, next(serial), self._problem.head(one), one) for one in self._free]  # type: ignore[misc]
        heapq.heapify(heap)
        settled: set[fx.Node] = set()
        originals = {*kept, *self._problem.given}
        while heap:
            price, _, cls, way = heapq.heappop(heap)
            original = way is None or (way.exact and originals.issuperset(self._problem.tails(way)))
            if cls in settled or not (original or cls not in self._problem.exact_needs):
                continue
            settled.add(cls)
            cost[cls] = price
            if original:
                originals.add(cls)
            if way is not None:
                chosen[cls] = way
            for one in self._readers.get(cls, ()):
                missing[id(one)] -= 1
                strays = one.originals and not originals.issuperset(self._problem.tails(one))
                if not missing[id(one)] and not strays and self._stays_near(one, kept, chosen):
                    total = one.seconds + sum(cost[tail] for tail in self._problem.tails(one))
                    heapq.heappush(heap, (total, next(serial), self._problem.head(one), one))  # type: ignore[misc]
        return chosen

    def _stays_near(self, one: Derivation, kept: set[fx.Node], chosen: dict[fx.Node, Derivation]) -> bool:
        """Whether what a derivation reads of earlier blocks is kept, or inverted."""
        back = (tail for tail in self._problem.tails(one) if self._problem.reaches_back(one, tail))
        return all(tail in kept or chosen[tail].kind is Kind.INVERT for tail in back)

    def _used(self, kept: set[fx.Node], chosen: dict[fx.Node, Derivation]) -> list[Derivation] | None:
        used: dict[fx.Node, Derivation] = {}
        pending = list(self._problem.needs)
        while pending:
            cls = pending.pop()
            if cls in kept or cls in self._problem.given or cls in used:
                continue
            if cls not in chosen:
                return None
            used[cls] = chosen[cls]
            pending += self._problem.tails(chosen[cls])
        return list(used.values())
