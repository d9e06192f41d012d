"""Losses erase the predictions, wholly or by one bit each; a few are strictly monotone given their target."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bwsk_fx.verdict import Label, WitnessKind

LOGITS, LABELS = torch.randn(2, 10), torch.tensor([3, 4])
ROWS = torch.randn(2, 4, 8).softmax(1)
SOFT = torch.rand(2, 10) * 0.8 + 0.1
HARD = torch.tensor([[0.0, 1.0] * 5, [1.0, 0.0] * 5])


def test_cross_entropy_over_the_batch_erases_all_logits(verdict_of):
    verdict = verdict_of(lambda x, y: F.cross_entropy(x, y), LOGITS, LABELS)
    assert (verdict.label, verdict.erasure.elements) == (Label.K, 10)


def test_a_loss_per_sample_keeps_one_number(verdict_of):
    verdict = verdict_of(lambda x, y: F.cross_entropy(x, y, reduction="none"), LOGITS, LABELS)
    assert (verdict.label, verdict.erasure.elements) == (Label.K, 9)


@pytest.mark.parametrize(
    ("function", "args"),
    [
        (F.cross_entropy, (LABELS,)),
        (F.multi_margin_loss, (LABELS,)),
        (F.multilabel_margin_loss, (HARD.long(),)),
        (F.multilabel_soft_margin_loss, (HARD,)),
        (F.cosine_embedding_loss, (LOGITS + 1, torch.ones(2))),
        (F.triplet_margin_loss, (LOGITS + 1, LOGITS + 2)),
    ],
)
@pytest.mark.parametrize(("reduction", "kept"), [("mean", 1), ("sum", 1), ("none", 2)])
def test_losses_of_rows_are_counted(certified, function, args, reduction, kept):
    verdict = certified(function, LOGITS, *args, reduction=reduction)
    assert (verdict.label, verdict.erasure.elements, verdict.confidence) == (Label.K, 20 - kept, 0.8)


def test_one_class_has_no_rival(certified):
    verdict = certified(F.multi_margin_loss, LOGITS[:, :1], LABELS * 0, reduction="none")
    assert (verdict.label, verdict.erasure.elements) == (Label.K, 2)
    assert certified(F.nll_loss, LOGITS[:, :1], LABELS * 0, reduction="none").label is Label.GRAY


@pytest.mark.parametrize(
    "module",
    [
        nn.MSELoss(reduction="none"),
        nn.L1Loss(reduction="none"),
        nn.SmoothL1Loss(reduction="none"),
        nn.HuberLoss(reduction="none"),
        nn.BCEWithLogitsLoss(reduction="none"),
        nn.PoissonNLLLoss(reduction="none"),
    ],
)
def test_losses_with_two_sides_erase_a_bit(certified, module):
    verdict = certified(module, LOGITS, SOFT)
    assert (verdict.label, verdict.erasure.elements, verdict.erasure.bits) == (Label.K, None, 20)


def test_gaussian_losses_are_even(certified):
    verdict = certified(F.gaussian_nll_loss, LOGITS, SOFT, torch.ones(2, 10), reduction="none")
    assert verdict.erasure.bits == 20


def test_reduced_losses_erase_all_but_one(certified, verdict_of):
    assert certified(F.mse_loss, LOGITS, SOFT).erasure.elements == 19
    criterion = nn.MSELoss()
    assert verdict_of(lambda x, y: criterion(x, y), LOGITS, LOGITS + 1).erasure.elements == 10


def test_one_prediction_for_several_targets_is_not_claimed(certified):
    with pytest.warns(UserWarning, match="broadcasting"):
        verdict = certified(F.mse_loss, LOGITS[:, :1], SOFT, reduction="none")
    assert verdict.label is Label.GRAY


def test_targets_at_hand_decide(certified):
    probabilities = LOGITS.sigmoid()
    dynamic = {id(probabilities)}
    soft = certified(F.binary_cross_entropy, probabilities, SOFT, reduction="none", dynamic=dynamic)
    hard = certified(F.binary_cross_entropy, probabilities, HARD, reduction="none", dynamic=dynamic)
    assert (soft.label, hard.label) == (Label.K, Label.GRAY)
    counts = certified(F.poisson_nll_loss, LOGITS, LOGITS * 0, reduction="none", dynamic={id(LOGITS)})
    assert counts.label is Label.GRAY


def test_hinges_are_flat(certified):
    signs = HARD * 2 - 1
    assert certified(F.hinge_embedding_loss, LOGITS, signs, reduction="none").label is Label.K
    assert certified(F.margin_ranking_loss, LOGITS, LOGITS + 1, signs, reduction="none").label is Label.K


@pytest.mark.parametrize("log_target", [False, True])
def test_divergence_is_linear_in_the_prediction(certified, log_target):
    target = ROWS.log() if log_target else ROWS
    verdict = certified(F.kl_div, torch.randn(2, 4, 8), target, reduction="none", log_target=log_target)
    assert (verdict.label, verdict.witness.kind) == (Label.S, WitnessKind.OTHER_OPERAND)
    assert certified(nn.KLDivLoss(reduction="batchmean"), torch.randn(2, 4, 8), ROWS).erasure.elements == 63


def test_targets_of_zero_have_no_divergence(certified):
    verdict = certified(F.kl_div, LOGITS, HARD, reduction="none", dynamic={id(LOGITS)})
    assert (verdict.label, verdict.erasure.elements) == (Label.K, 10)


def test_soft_margins_are_monotone(certified):
    verdict = certified(nn.SoftMarginLoss(reduction="none"), LOGITS, HARD * 2 - 1)
    assert (verdict.label, verdict.witness.names) == (Label.S, ("operand_1",))


@pytest.mark.parametrize("name", ["mse_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy"])
def test_aten_forms_do_not_need_the_reduction(certified, name):
    operator = getattr(torch.ops.aten, name).default
    options = {"reduction": 0}
    assert certified(operator, LOGITS.sigmoid(), SOFT, **options).erasure.bits == 20
    assert certified(operator, LOGITS.sigmoid(), SOFT).erasure.elements == 19
