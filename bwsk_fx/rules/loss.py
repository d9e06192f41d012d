"""Losses: predictions become a number."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from bwsk_fx.rules.axis import AxisCall, Behaviour, Effect, aligned, axis_rule, claims
from bwsk_fx.rules.axis_table import Layout, Strength
from bwsk_fx.rules.registry import Call, erases, labels, preserves, unproven, witness_of
from bwsk_fx.rules.sizes import elements
from bwsk_fx.rules.undo import Run, Undo
from bwsk_fx.verdict import REFINED, Verdict

# Not in every release.
_LINEAR = [
    getattr(holder, name)
    for holder, name in ((F, "linear_cross_entropy"), (nn, "LinearCrossEntropyLoss"))
    if hasattr(holder, name)
]


@labels(nn.CrossEntropyLoss, nn.NLLLoss, nn.CTCLoss, nn.TripletMarginLoss, nn.TripletMarginWithDistanceLoss)
@labels(nn.AdaptiveLogSoftmaxWithLoss)
@labels(nn.CosineEmbeddingLoss, nn.MultiLabelSoftMarginLoss, F.cosine_embedding_loss, F.multilabel_soft_margin_loss)
@labels(F.cross_entropy, F.nll_loss, F.ctc_loss, F.triplet_margin_loss, F.triplet_margin_with_distance_loss)
@labels(torch.ctc_loss, torch.triplet_margin_loss, torch.cosine_embedding_loss, *_LINEAR)
@labels(atens="cross_entropy_loss nll_loss nll_loss_nd nll_loss_forward nll_loss2d nll_loss2d_forward")
@labels(atens="ctc_loss _ctc_loss triplet_margin_loss cosine_embedding_loss")
@labels(atens="_linear_cross_entropy_batch_chunked_no_reduction")
def row_loss(call: Call) -> Verdict:
    """One loss for each row of predictions, at most."""
    return _counted(call) or unproven("each prediction has one class, and nothing is merged")


@labels(nn.MultiMarginLoss, nn.MultiLabelMarginLoss, F.multi_margin_loss, F.multilabel_margin_loss)
@labels(atens="multi_margin_loss multilabel_margin_loss multilabel_margin_loss_forward")
def margin_loss(call: Call) -> Verdict:
    """One loss for each row of scores, by which rivals come too close to the target."""
    return _counted(call) or erases("one class has no rival, so the loss is zero", call.elements(), confidence=REFINED)


@labels(nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.GaussianNLLLoss)
@labels(F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.gaussian_nll_loss)
@labels(atens="mse_loss l1_loss smooth_l1_loss huber_loss")
def even_loss(call: Call) -> Verdict:
    """The same on both sides of the target."""
    return _counted(call) or _one_bit(call, "predictions on both sides of a target have one loss")


@labels(nn.BCELoss, nn.BCEWithLogitsLoss, F.binary_cross_entropy, F.binary_cross_entropy_with_logits)
@labels(torch.binary_cross_entropy_with_logits, atens="binary_cross_entropy binary_cross_entropy_with_logits")
def binary_loss(call: Call) -> Verdict:
    """Smallest at the target, which lies between zero and one; at those two it is monotone."""
    targets = call.static(call.argument(1, "target"))
    if targets is not None and bool(((targets == 0) | (targets == 1)).all()):
        return _counted(call) or unproven("with targets of zero and one alone it is monotone, up to its clamps")
    return _counted(call) or _one_bit(call, "two predictions, below and above a target between zero and one, are equal")


@labels(nn.PoissonNLLLoss, F.poisson_nll_loss, torch.poisson_nll_loss, atens="poisson_nll_loss")
def poisson_loss(call: Call) -> Verdict:
    """Smallest at the target, where that is positive."""
    targets = call.static(call.argument(1, "target"))
    if targets is not None and bool((targets <= 0).all()):
        return _counted(call) or unproven("with targets of zero alone it is monotone")
    return _counted(call) or _one_bit(call, "two predictions, below and above a positive target, have one loss")


@labels(nn.HingeEmbeddingLoss, nn.MarginRankingLoss, F.hinge_embedding_loss, F.margin_ranking_loss)
@labels(torch.hinge_embedding_loss, torch.margin_ranking_loss, atens="hinge_embedding_loss margin_ranking_loss")
def hinge_loss(call: Call) -> Verdict:
    """Zero for every prediction on the right side of the margin."""
    return _counted(call) or erases("predictions beyond the margin have no loss")


@labels(nn.KLDivLoss, F.kl_div, torch.kl_div, atens="kl_div")
def kl_divergence(call: Call) -> Verdict:
    """T (log t - x), linear in the prediction."""
    if _counted(call) is not None:
        return _counted(call) or unproven("")
    target = call.argument(1, "target")
    known = call.static(target)
    if known is not None and not call.option(5, "log_target", False) and bool((known <= 0).any()):
        zeros = int((known <= 0).sum())
        return erases(f"{zeros} targets are zero, and so are their losses", zeros, confidence=REFINED)
    return _given_target(call, Undo(_from_divergence), "no target is zero")


def _from_divergence(run: Run) -> Tensor:
    target = run.argument(1, "target")
    logs, factors = (target, target.exp()) if run.option(5, "log_target", False) else (target.log(), target)
    return logs - _unreduced(run) / factors


@labels(nn.SoftMarginLoss, F.soft_margin_loss, atens="soft_margin_loss")
def soft_margin(call: Call) -> Verdict:
    """log(1 + exp(-t x)), strictly monotone in the prediction."""
    return _counted(call) or _given_target(call, Undo(_from_soft_margin), "no target is zero, short of underflow")


def _from_soft_margin(run: Run) -> Tensor:
    value = _unreduced(run)
    return (value + torch.log(-torch.expm1(-value))) / -run.argument(1, "target")


def _unreduced(run: Run) -> Tensor:
    """Return one loss per prediction, which a reduction over a single one is, too."""
    return run.output.view(run.before.shape)


def _given_target(call: Call, undo: Undo, domain: str) -> Verdict:
    """Return S with the target as the witness."""
    prediction, target = call.argument(0, "input"), call.argument(1, "target")
    if call.operands[0] is not prediction or prediction is target or elements(call.value) != call.elements():
        return unproven("the predictions are static, or spread over several targets")
    witness = witness_of(call, target)
    return preserves("given the target it is strictly monotone", witness, undo=undo, domain=domain)


def _counted(call: Call) -> Verdict | None:
    """Return K where there are fewer losses than predictions; a mean over the batch keeps nothing of one sample."""
    missing = call.erased()
    if missing is None:
        return erases("the predictions become a loss")
    return erases("the predictions become a loss", missing, confidence=REFINED) if missing > 0 else None


def _one_bit(call: Call, why: str) -> Verdict:
    if _size(call.argument(0, "input")) not in (None, call.elements()) or call.erased() != 0:
        return unproven("predictions are spread over several targets")
    return erases(f"{why}: one bit per element", bits=call.elements())


def _size(value: Any) -> int | None:
    value = value.meta["val"] if isinstance(value, fx.Node) else value
    return elements(value) if isinstance(value, Tensor) else None


@axis_rule(nn.CrossEntropyLoss, F.cross_entropy)
def cross_entropy_axes(call: AxisCall) -> Effect:
    """Waits for all classes of a prediction and sums over predictions."""
    logits, target = call.inputs[:2]
    place = 1 if logits.rank > 1 else 0
    classes = logits.layout[place]
    call.axes.call(classes, "class", Strength.CONTEXT)
    others = tuple(axis for dim, axis in enumerate(logits.layout) if dim != place)
    if target.rank == len(others):
        others, _ = aligned(call.axes, [others, target.layout], len(others))
    why = "the normaliser needs the scores of all classes; merging the logsumexp of each shard would make it a REDUCE"
    said = claims([classes], Behaviour.BARRIER, why, produced=False, moved=logits.bytes_per_sample)
    return _reduced(call, others, Effect(tuple(said), ()))


@axis_rule(nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.BCELoss, nn.BCEWithLogitsLoss)
@axis_rule(F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.binary_cross_entropy)
@axis_rule(F.binary_cross_entropy_with_logits, nn.KLDivLoss, F.kl_div)
def elementwise_loss_axes(call: AxisCall) -> Effect:
    """Sums over every axis."""
    layouts = [value.layout for value in call.inputs]
    layout, clashes = aligned(call.axes, layouts, max(map(len, layouts)))
    return _reduced(call, layout, Effect(tuple(clashes), ()))


def _reduced(call: AxisCall, layout: Layout, before: Effect) -> Effect:
    if call.kwargs.get("reduction", getattr(call.target, "reduction", "mean")) == "none":
        said = claims(layout, Behaviour.MAP, "each prediction has a loss of its own")
        return Effect((*before.claims, *said), (layout,))
    why = "each shard yields the sum and the number of its losses"
    return Effect((*before.claims, *claims(layout, Behaviour.REDUCE, why, produced=False)), ((),))


@axis_rule(nn.NLLLoss, F.nll_loss)
def picked_loss_axes(call: AxisCall) -> Effect:
    """Waits for the class that is picked and sums over predictions."""
    return cross_entropy_axes(call)
