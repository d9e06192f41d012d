"""Random operators: dropout, and sources of random values."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx, nn
from torch.nn import functional as F

from bwsk_fx.rules.axis import AxisCall, Effect, axis_rule, mapped
from bwsk_fx.rules.bits import pack_bits, unpack_bits
from bwsk_fx.rules.inverse import Inverse, WitnessWriter, calls, inverts
from bwsk_fx.rules.registry import Call, erases, labels, preserves, rule_of
from bwsk_fx.verdict import REFINED, Verdict

aten = torch.ops.aten


@labels(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
@labels(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, torch.dropout)
def dropout(call: Call) -> Verdict:
    """S when it does nothing; otherwise K by the share that it drops."""
    training, rate = call.option(2, "training", True), call.option(1, "p", 0.5)
    if drops(call):
        total = call.elements()
        lost = None if total is None else rate * total
        return erases(f"it drops each element with probability {rate}", lost, confidence=REFINED)
    why = "its probability is 0" if training else "the model is in eval mode"
    return preserves(f"{why}, so it changes nothing", confidence=REFINED)


@labels(ops="bernoulli multinomial", methods="bernoulli_ uniform_ normal_")
@labels(torch.rand_like, torch.randn_like, torch.randint_like, torch.normal)
def draw(call: Call) -> Verdict:
    """A draw says little about its parameters."""
    return erases("a random draw does not determine what it was drawn from", call.elements())


_SOURCES = frozenset({torch.rand, torch.randn, torch.randint, torch.randperm})


def is_random(call: Call) -> bool:
    """Whether a node's value differs from run to run even if its operands do not."""
    rule = rule_of(call)
    return call.node.target in _SOURCES or rule is draw or (rule is dropout and drops(call))


def drops(call: Call) -> bool:
    """Whether a dropout node drops anything."""
    return bool(call.option(2, "training", True)) and call.option(1, "p", 0.5) > 0


@axis_rule(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
@axis_rule(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, torch.dropout)
def dropout_axes(call: AxisCall) -> Effect:
    """Maps every axis."""
    if call.option("training", 2, True) and call.option("p", 1, 0.5) > 0:
        return mapped(call.operand.layout, "shards draw masks of their own, element by element")
    return mapped(call.operand.layout, "it changes nothing")


@axis_rule(torch.rand_like, torch.randn_like, torch.randint_like)
def draw_axes(call: AxisCall) -> Effect:
    """Maps every axis."""
    return mapped(call.operand.layout, "each element is drawn on its own")


@inverts(aten.native_dropout.default, aten.bernoulli.p)
def mask_inverse(node: fx.Node, witnesses: WitnessWriter) -> Iterator[Inverse]:
    """A dropout mask from one bit per element: forward and backward see the very same mask."""
    mask = node
    if node.target is aten.native_dropout.default:
        masks = [user for user in node.users if user.args[1] == 1]
        if not masks:
            return
        mask = masks[0]
    value = mask.meta["val"]
    bits = witnesses.call(mask, pack_bits, mask)
    yield Inverse(mask, (bits,), calls(unpack_bits, tuple(value.shape), value.dtype), True, rule="packed mask")
