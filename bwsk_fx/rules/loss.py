"""Losses: predictions become a number."""

from __future__ import annotations

from torch import nn
from torch.nn import functional as F

from bwsk_fx.rules.axis import AxisCall, Behaviour, Effect, aligned, axis_rule, claims
from bwsk_fx.rules.axis_table import Layout, Strength
from bwsk_fx.rules.registry import Call, fewer_elements, labels
from bwsk_fx.verdict import Verdict


@labels(nn.CrossEntropyLoss, nn.NLLLoss, nn.KLDivLoss, nn.CTCLoss, F.cross_entropy, F.nll_loss, F.kl_div, F.ctc_loss)
@labels(nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss)
@labels(nn.BCELoss, nn.BCEWithLogitsLoss, F.binary_cross_entropy, F.binary_cross_entropy_with_logits)
@labels(nn.PoissonNLLLoss, nn.GaussianNLLLoss, nn.CosineEmbeddingLoss, nn.TripletMarginLoss, nn.MarginRankingLoss)
@labels(nn.HingeEmbeddingLoss, nn.MultiMarginLoss, nn.MultiLabelMarginLoss, nn.MultiLabelSoftMarginLoss)
def loss(call: Call) -> Verdict:
    """Counts the predictions, its first operand; a mean over the batch keeps nothing of one sample."""
    return fewer_elements(call, "the predictions become a loss")


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
@axis_rule(F.binary_cross_entropy_with_logits)
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
