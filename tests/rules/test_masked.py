"""`torch.masked`: without a mask they are plain; with one, what it leaves out goes."""

import torch
from torch import masked

from bwsk_fx.verdict import Label

X, MASK = torch.randn(3, 1, 4), torch.tensor([True, False, True, True])


def test_without_a_mask(certified):
    assert certified(masked.sum, X, 1).label is Label.S
    assert certified(masked.cumsum, X, 2).label is Label.S
    assert certified(masked.amax, X, 2).erasure.elements == 9
    assert certified(masked.cumprod, X, 2).label is Label.K


def test_a_mask_leaves_elements_out(certified):
    for function in (masked.sum, masked.mean, masked.amax):
        assert certified(function, X, 1, mask=MASK, dynamic={id(X)}).erasure.elements == 3
    assert certified(masked.cumsum, X, 2, mask=MASK, dynamic={id(X)}).erasure.elements == 3
    assert certified(masked.sum, X, 2, mask=MASK, dynamic={id(X)}).erasure.elements == 9
    assert certified(masked.sum, X, 1, mask=MASK | True, dynamic={id(X)}).label is Label.S
    assert certified(masked.sum, X, 1, mask=MASK).label is Label.K


def test_moments_and_positions(certified):
    assert certified(masked.norm, X, 2, 2).erasure.elements == 9
    assert certified(masked.argmax, X, 2).erasure.elements == 12
    assert certified(masked.normalize, X, 2, 2).label is Label.K
    assert certified(masked.normalize, X * (X > 0), 0, 2).label is Label.S
