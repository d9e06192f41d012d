"""Distances and similarities of vectors: one number is left of each pair."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bwsk_fx.rules.contraction import value_of
from bwsk_fx.rules.registry import Call, erases, labels, others, preserves, unproven
from bwsk_fx.rules.sizes import as_int, elements
from bwsk_fx.rules.undo import Factors, Run, Undo, wide
from bwsk_fx.verdict import REFINED, Verdict


@labels(torch.pdist, F.pdist, atens="_pdist_forward")
def distances_within(call: Call) -> Verdict:
    """Distances of points to each other stay when all points move together."""
    count, width = (as_int(size) for size in call.before.shape)
    if count is None or width is None:
        return erases("moving all points together changes no distance")
    lost = max(min(count, 1) * width, count * width - count * (count - 1) // 2)
    return erases("moving all points together changes no distance", lost, confidence=REFINED)


@labels(torch.cdist, atens="_cdist_forward cdist")
def distances_between(call: Call) -> Verdict:
    """Distances to given points determine a point if there are more of them than dimensions."""
    one, two, power = call.argument(0, "x1"), call.argument(1, "x2"), call.argument(2, "p", 2.0)
    mine, given = (one, two) if call.is_dynamic(one) else (two, one)
    if one is two:
        return erases("moving all points together changes no distance")
    width, count = (as_int(size) for size in (value_of(mine).shape[-1], value_of(given).shape[-2]))
    if width is None or count is None:
        return unproven("its sizes vary with the batch")
    if call.value.shape[:-2] != value_of(mine).shape[:-2]:
        # One set of points meets several sets of others: if it is a single set, all of them are equations.
        sets = as_int(math.prod(call.value.shape[:-2]))
        if sets is None or math.prod(value_of(mine).shape[:-2]) != 1:
            return unproven("sets of points meet several sets of others")
        count *= sets
    total = elements(value_of(mine))
    if power == 0 or (width > 0 and count == 0):
        return erases("it counts which elements differ", total if count == 0 else None, confidence=REFINED)
    if count < width:
        lost = None if total is None else total // width * (width - count)
        return erases(f"{count} distances do not determine {width} elements", lost, confidence=REFINED)
    if width > 1 and power in (1, math.inf):
        return erases("far away, points with equal sums or equal largest elements have the same distances")
    if width > 1 and power != 2:
        return unproven("whether such distances determine a point depends on the other points")
    if count == width:
        bits = None if total is None else total // max(width, 1)
        return erases("a point and its mirror image have the same distances", bits=bits, confidence=REFINED)
    number = call.operands.index(mine)
    undo, domain = Undo(_trilaterate if mine is one else _trilaterate_other, (number,)), "the others span space"
    why = f"{count} distances determine {width} elements"
    return preserves(why, others(call, number), REFINED, undo=undo, domain=domain)


def _trilaterate(run: Run) -> Tensor:
    return _all_sets(run.output, run.argument(0, "x1"), run.argument(1, "x2"))


def _trilaterate_other(run: Run) -> Tensor:
    return _all_sets(run.output.mT, run.argument(1, "x2"), run.argument(0, "x1"))


def _all_sets(distances: Tensor, points: Tensor, given: Tensor) -> Tensor:
    if distances.shape[:-2] != points.shape[:-2]:
        given = given.expand(*distances.shape[:-2], *given.shape[-2:]).flatten(0, -2)
        distances = distances.movedim(-2, 0).flatten(1)
    return _solved(distances, given).reshape(points.shape)


def _solved(distances: Tensor, given: Tensor) -> Tensor:
    """Return points from their distances (points, given) to `given`: differences of squares are linear equations."""
    distances, given = (value.to(wide(value.dtype)) for value in (distances, given))
    apart = given[..., 1:, :] - given[..., :1, :]
    squares = given.square().sum(-1)
    right = distances[..., :1].square() - distances[..., 1:].square()
    right = right + (squares[..., 1:] - squares[..., :1]).unsqueeze(-2)
    return Factors.of(2 * apart).solve(right.mT).mT


@labels(nn.PairwiseDistance, F.pairwise_distance, torch.pairwise_distance)
def pairwise_distance(call: Call) -> Verdict:
    """One number is left of each pair of vectors."""
    one, two = call.argument(0, "x1"), call.argument(1, "x2")
    if one is two:
        return erases("the distance of a vector to itself is zero", call.elements(), confidence=REFINED)
    return _pairs(call, value_of(one).shape[-1], "vectors on a sphere have the same distance to its centre")


@labels(nn.CosineSimilarity, F.cosine_similarity, torch.cosine_similarity)
def cosine_similarity(call: Call) -> Verdict:
    """One number is left of each pair of vectors, and lengths are lost."""
    dim = call.option(2, "dim", 1)
    operand = call.before
    length = as_int(operand.shape[dim]) if operand.dim() else 1
    total = elements(operand)
    missing = call.erased() or 0
    lost = None if total is None or length is None else max(missing, total // max(length, 1))
    return erases("vectors of different lengths have the same direction", lost, confidence=REFINED)


def _pairs(call: Call, width: Any, why: str) -> Verdict:
    missing = call.erased()
    if missing is not None and missing > 0:
        return erases(why, missing, confidence=REFINED)
    if width == 1 and missing == 0:
        return erases("the sign of the difference is lost", bits=call.elements(), confidence=REFINED)
    return unproven("one vector meets several others")
