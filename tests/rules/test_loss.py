"""Losses erase the predictions."""

import torch
from torch import nn
from torch.nn import functional as F

from bwsk_fx.verdict import Label

LOGITS, LABELS = torch.randn(2, 10), torch.tensor([3, 4])


def test_cross_entropy_over_the_batch_erases_all_logits(verdict_of):
    verdict = verdict_of(lambda x, y: F.cross_entropy(x, y), LOGITS, LABELS)
    assert (verdict.label, verdict.erasure.elements) == (Label.K, 10)


def test_a_loss_per_sample_keeps_one_number(verdict_of):
    verdict = verdict_of(lambda x, y: F.cross_entropy(x, y, reduction="none"), LOGITS, LABELS)
    assert (verdict.label, verdict.erasure.elements) == (Label.K, 9)


def test_a_loss_per_element_has_no_known_amount(verdict_of):
    verdict = verdict_of(lambda x, y: F.mse_loss(x, y, reduction="none"), LOGITS, LOGITS + 1)
    assert (verdict.label, verdict.erasure) == (Label.K, None)


def test_loss_modules(verdict_of):
    criterion = nn.MSELoss()
    assert verdict_of(lambda x, y: criterion(x, y), LOGITS, LOGITS + 1).erasure.elements == 10
