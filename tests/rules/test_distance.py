"""Distances to enough points determine a point; everything else is lost by counting."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bwsk_fx.verdict import Label

X, Y = torch.randn(5, 3, dtype=torch.double), torch.randn(6, 3, dtype=torch.double)


def test_distances_to_more_points_than_dimensions_determine_a_point(certified):
    assert certified(torch.cdist, X, Y).undo.operands == (0,)
    assert certified(torch.cdist, X, Y, dynamic={id(Y)}).undo.operands == (0,)
    assert certified(torch.cdist, X, Y.expand(2, 6, 3), dynamic={id(X)}).label is Label.S


@pytest.mark.parametrize(
    ("others", "power", "elements", "bits"),
    [(2, 2.0, 5, None), (3, 2.0, None, 5), (6, 1.0, None, None), (6, 0, None, None)],
)
def test_what_distances_lose(certified, others, power, elements, bits):
    verdict = certified(torch.cdist, X, Y[:others], power)
    assert verdict.label is Label.K
    amounts = (None, None) if verdict.erasure is None else (verdict.erasure.elements, verdict.erasure.bits)
    assert amounts == (elements, bits)


def test_other_distances_are_gray(certified):
    assert certified(torch.cdist, X, Y, 3.0).label is Label.GRAY


def test_distances_within_a_set_lose_its_place(certified):
    assert certified(torch.pdist, X).erasure.elements == max(3, 15 - 10)
    assert certified(F.pdist, torch.randn(9, 3)).erasure.elements == 3
    assert certified(torch.cdist, X, X).label is Label.K


@pytest.mark.parametrize("layer", [nn.PairwiseDistance(), F.pairwise_distance])
def test_distances_of_pairs(certified, layer):
    assert certified(layer, X, X + 1).erasure.elements == 5 * 2
    assert certified(layer, X, X).erasure.elements == 15
    assert certified(layer, X[:, :1].clone(), Y[:5, :1].clone()).erasure.bits == 5


@pytest.mark.parametrize("layer", [nn.CosineSimilarity(), F.cosine_similarity])
def test_similarities_lose_lengths(certified, layer):
    assert certified(layer, X, X + 1).erasure.elements == 5 * 2
    # One vector that meets five others loses its length alone.
    assert certified(F.cosine_similarity, X[:1], X, dynamic={id(X)}).erasure.elements == 10
    alone = X[:1].clone()
    assert certified(F.cosine_similarity, alone, X, dynamic={id(alone)}).erasure.elements == 1
