"""Random operators: dropout, and sources of random values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from bwsk_fx import _torch_private as private
from bwsk_fx.rules.axis import AxisCall, Effect, axis_rule, mapped
from bwsk_fx.rules.bits import pack_bits, unpack_bits
from bwsk_fx.rules.inverse import Inverse, WitnessWriter, inverts
from bwsk_fx.rules.inverse_masks import packed
from bwsk_fx.rules.registry import Call, erases, labels, preserves, rule_of, target_name
from bwsk_fx.rules.replay import replayed_draw
from bwsk_fx.rules.undo import Undo, as_it_is
from bwsk_fx.verdict import REFINED, Verdict

aten = torch.ops.aten


@labels(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
@labels(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)
@labels(torch.dropout, torch.alpha_dropout, torch.feature_dropout, torch.feature_alpha_dropout, torch.native_dropout)
@labels(atens="dropout alpha_dropout feature_dropout feature_alpha_dropout native_dropout")
def dropout(call: Call) -> Verdict:
    """S when it does nothing; otherwise K by the share that it drops."""
    training, rate = _training(call), call.option(1, "p", 0.5)
    if drops(call):
        total = call.elements()
        lost = None if total is None else rate * total
        return erases(f"it drops each element with probability {rate}", lost, confidence=REFINED, expected=True)
    why = "its probability is 0" if training else "the model is in eval mode"
    return preserves(f"{why}, so it changes nothing", confidence=REFINED, undo=Undo(as_it_is))


@labels(atens="native_dropout_backward")
def dropout_backward(_: Call) -> Verdict:
    """The gradient of what was dropped goes."""
    return erases("a mask of zeros and ones erases what it zeroes")


_SOURCES = (torch.rand, torch.randn, torch.randint, torch.randperm, torch.rand_like, torch.randn_like)


@labels(*_SOURCES, torch.randint_like, torch.normal, torch.poisson, torch.binomial)
@labels(*private.operators("_standard_gamma", "_sample_dirichlet"), ops="bernoulli multinomial")
@labels(methods="bernoulli_ uniform_ normal_ cauchy_ exponential_ geometric_ log_normal_ random_")
@labels(atens="rand randn randint randperm rand_like randn_like randint_like normal normal_functional poisson binomial")
@labels(atens="_standard_gamma _sample_dirichlet cauchy exponential geometric log_normal random uniform")
def draw(call: Call) -> Verdict:
    """A draw says little about its parameters, and nothing about the values that it overwrites."""
    # A real number that was drawn still tells roughly where its distribution lies: a trace of its parameters.
    near = target_name(call).partition(".")[0] in ("normal", "_standard_gamma", "_sample_dirichlet")
    lost = None if near else call.elements()
    return erases("a random draw does not determine what it was drawn from, or what it overwrote", lost)


def is_random(call: Call) -> bool:
    """Whether a node's value differs from run to run even if its operands do not."""
    rule = rule_of(call)
    return rule is draw or (rule is dropout and drops(call))


def drops(call: Call) -> bool:
    """Whether a dropout node drops anything."""
    return bool(_training(call)) and call.option(1, "p", 0.5) > 0


def _training(call: Call) -> Any:
    """Return a dropout's mode, which is called `train` in ATen; None stands for training."""
    given = call.option(2, "training", call.node.kwargs.get("train", True))
    return True if given is None else given


def zero_rate(mask: Any) -> float | None:
    """Return the probability of a zero in a mask that is drawn as dropout and drop-path draw theirs.

    Read off the graph: draws of zeros and ones, `floor(rand() + c)`, and multiples of them. None for anything else.
    """
    mask = _undetached(mask)
    if not isinstance(mask, fx.Node) or not mask.args:
        return None
    name = _operator_name(mask)
    if name == "bernoulli":
        # In place it draws with one half by default; otherwise its operand holds the probabilities.
        default = 0.5 if _raw_name(mask).endswith("_") else None
        kept = mask.args[1] if len(mask.args) > 1 else mask.kwargs.get("p", default)
        return 1 - kept if isinstance(kept, (int, float)) else None
    if name == "floor":
        return _floor_rate(mask.args[0])
    scaled = name in ("div", "truediv", "mul") and len(mask.args) > 1 and isinstance(mask.args[1], (int, float))
    return zero_rate(mask.args[0]) if scaled and mask.args[1] != 0 else None


def _floor_rate(shifted: Any) -> float | None:
    """Return how often a uniform draw plus a constant stays under one."""
    shifted = _undetached(shifted)
    if not isinstance(shifted, fx.Node) or _operator_name(shifted) != "add" or len(shifted.args) < 2:
        return None
    draws = [_undetached(value) for value in shifted.args[:2] if isinstance(value, fx.Node)]
    kept = [value for value in shifted.args[:2] if isinstance(value, (int, float))]
    uniform = draws and kept and _operator_name(draws[0]) in ("rand", "rand_like", "uniform")
    return min(max(1 - kept[0], 0), 1) if uniform else None


def _undetached(value: Any) -> Any:
    """Return the node whose values a chain of `detach` hands on."""
    while isinstance(value, fx.Node) and value.args and _operator_name(value) in ("detach", "alias"):
        value = value.args[0]
    return value


def _operator_name(node: fx.Node) -> str:
    """Return the name of a node's operator, the same for its in-place twin."""
    return _raw_name(node).removesuffix("_")


def _raw_name(node: fx.Node) -> str:
    target: Any = node.target
    packet = getattr(target, "overloadpacket", target)
    return packet if isinstance(packet, str) else getattr(packet, "__name__", "")


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
    """A dropout mask drawn again, or from one bit per element: forward and backward see the very same mask."""
    mask = node
    if node.target is aten.native_dropout.default:
        masks = [user for user in node.users if user.args[1] == 1]
        if not masks:
            return
        mask = masks[0]
    yield replayed_draw(node, mask, witnesses)
    yield from packed(mask, witnesses, pack_bits, unpack_bits, "packed mask")
