"""Softmax and its relatives: each row is normalised by its logsumexp, which every kernel computes anyway."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bwsk_fx.rules.axis import AxisCall, Behaviour, Effect, along, axis_rule
from bwsk_fx.rules.bijections import widened
from bwsk_fx.rules.registry import Call, by_products, erases, labels, preserves
from bwsk_fx.rules.sizes import as_int
from bwsk_fx.rules.spelling import spellings
from bwsk_fx.rules.undo import Run, Undo
from bwsk_fx.verdict import Verdict


@labels(nn.Softmax, nn.Softmax2d, *spellings("softmax"), atens="_softmax _safe_softmax")
def softmax(call: Call) -> Verdict:
    """The logarithm of a probability plus the logsumexp of its row is the logit."""
    return _normalised(call, 1.0, "the logarithm of the result plus", True)


@labels(nn.LogSoftmax, *spellings("log_softmax"), atens="_log_softmax")
def log_softmax(call: Call) -> Verdict:
    """A log-probability plus the logsumexp of its row is the logit."""
    return _normalised(call, 1.0, "the result plus", False)


@labels(nn.Softmin, F.softmin)
def softmin(call: Call) -> Verdict:
    """The softmax of the negative."""
    return _normalised(call, -1.0, "the negative of the logarithm of the result plus", True)


def _normalised(call: Call, sign: float, what: str, takes_log: bool) -> Verdict:
    if not call.before.is_floating_point():
        return erases("probabilities underflow, so that several integers give one result")
    dim = _dim(call, call.before.dim())
    total, width = call.elements(), as_int(call.before.shape[dim]) if call.before.dim() else 1
    rows = None if total is None or not width else total // width
    witness = by_products("logsumexp", elements=rows)
    undo = Undo(partial(_logits, sign, takes_log), by_products=partial(_normaliser, sign))
    why = f"{what} the logsumexp of each row is the operand"
    return preserves(why, witness, undo=undo, domain="the result does not underflow" if takes_log else None)


def _logits(sign: float, takes_log: bool, run: Run) -> Tensor:
    result = widened(run.output)
    return sign * ((result.log() if takes_log else result) + run.by_products["logsumexp"])


def _normaliser(sign: float, run: Run) -> Mapping[str, Tensor]:
    operand = sign * run.before.to(torch.promote_types(run.output.dtype, torch.float32))
    return {"logsumexp": torch.logsumexp(operand, _dim(run, operand.dim()), keepdim=True)}


def _dim(call: Call | Run, rank: int) -> int:
    """Return the dimension that is normalised, given explicitly or by the rank as in `torch.nn`."""
    if isinstance(call.module, nn.Softmax2d):
        return -3
    dim: Any = call.option(1, "dim")
    return dim if isinstance(dim, int) else 0 if rank in (0, 1, 3) else 1


@labels(atens="_softmax_backward_data _log_softmax_backward_data")
def softmax_backward(call: Call) -> Verdict:
    """A linear map of each row that sends one direction to zero."""
    dim, total = call.argument(2, "dim"), call.elements()
    width = as_int(call.value.shape[dim]) if call.value.dim() else 1
    rows = None if total is None or not width else total // width
    return erases("gradients that differ by a constant, or by a multiple of the result, become one", elements=rows)


@axis_rule(nn.Softmax, nn.LogSoftmax, nn.Softmin, F.softmax, F.log_softmax, F.softmin, ops="softmax log_softmax")
@axis_rule(atens="_softmax _log_softmax _safe_softmax")
def softmax_axes(call: AxisCall) -> Effect:
    """Waits for the axis that is normalised."""
    why = "the normaliser needs the whole axis; merging the logsumexp of each shard would make it a REDUCE"
    return along(call, call.dims(), Behaviour.BARRIER, why, "each row is on its own", keeps=True)
