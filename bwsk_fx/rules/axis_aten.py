"""Axis rules of ATen operators as exported programs have them: those of the torch functions that they come from.

Where the arguments that a rule reads have the same places, the rule is used as it is; otherwise the call is first
written as the call of the function. Names alone would not do: `aten.embedding` takes the table first.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

from torch.nn import functional as F

from bwsk_fx.rules.activation import activation_axes, glu_axes, prelu_axes
from bwsk_fx.rules.affine import linear_axes
from bwsk_fx.rules.attention import scaled_dot_product_axes
from bwsk_fx.rules.axis import AxisCall, Effect, axis_rule
from bwsk_fx.rules.axis_view import reshape
from bwsk_fx.rules.convolution import convolution_axes
from bwsk_fx.rules.elementwise import unary_axes
from bwsk_fx.rules.indexing import embedding_axes, getitem_axes
from bwsk_fx.rules.loss import cross_entropy_axes, elementwise_loss_axes
from bwsk_fx.rules.normalization import batch_norm_function_axes, group_norm_axes, last_dims_axes
from bwsk_fx.rules.pooling import average_axes, largest_axes
from bwsk_fx.rules.random import dropout_axes
from bwsk_fx.rules.reduction import global_pool_axes
from bwsk_fx.rules.shape import copy_axes, expand_axes, repeat_axes, split_axes, stack_axes

axis_rule(atens="linear")(linear_axes)
axis_rule(atens="scaled_dot_product_attention")(scaled_dot_product_axes)
axis_rule(atens="conv1d conv2d conv3d")(convolution_axes)
axis_rule(atens="gelu silu mish relu6 leaky_relu softplus elu celu selu log_sigmoid")(activation_axes)
axis_rule(atens="hardtanh hardsigmoid hardswish threshold softshrink")(activation_axes)
axis_rule(atens="prelu")(prelu_axes)
axis_rule(atens="glu")(glu_axes)
axis_rule(atens="layer_norm rms_norm")(last_dims_axes)
axis_rule(atens="group_norm")(group_norm_axes)
axis_rule(atens="batch_norm")(batch_norm_function_axes)
axis_rule(atens="dropout alpha_dropout feature_dropout feature_alpha_dropout")(dropout_axes)
axis_rule(atens="max_pool1d max_pool2d max_pool3d")(largest_axes)
axis_rule(atens="avg_pool1d avg_pool2d avg_pool3d")(average_axes)
axis_rule(atens="adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d")(global_pool_axes)
axis_rule(atens="view _unsafe_view reshape_as view_as")(reshape)
axis_rule(atens="contiguous alias lift_fresh_copy")(copy_axes)
axis_rule(atens="to type_as zeros_like ones_like empty_like full_like")(unary_axes)
axis_rule(atens="expand expand_as")(expand_axes)
axis_rule(atens="repeat")(repeat_axes)
axis_rule(atens="stack")(stack_axes)
axis_rule(atens="split_with_sizes")(split_axes)

_REDUCTIONS = ("none", "mean", "sum")


@axis_rule(atens="embedding")
def aten_embedding_axes(call: AxisCall) -> Effect:
    """As `embedding`, which takes the indices first."""
    table, indices = call.args[:2]
    return embedding_axes(replace(call, target=F.embedding, args=(indices, table), kwargs={}))


@axis_rule(atens="slice")
def slice_axes(call: AxisCall) -> Effect:
    """As `x[:, start:end:step]`."""
    return _indexed(call, slice(_argument(call, "start"), _argument(call, "end"), _argument(call, "step", 1)))


@axis_rule(atens="select")
def select_axes(call: AxisCall) -> Effect:
    """As `x[:, index]`."""
    return _indexed(call, _argument(call, "index"))


def _indexed(call: AxisCall, item: Any) -> Effect:
    place = _argument(call, "dim", 0) % call.operand.rank
    index = (*(slice(None),) * place, item)
    return getitem_axes(replace(call, target=operator.getitem, args=(call.operand, index), kwargs={}))


@axis_rule(atens="cross_entropy_loss nll_loss nll_loss_nd nll_loss2d")
def aten_cross_entropy_axes(call: AxisCall) -> Effect:
    """As `cross_entropy`; ATen counts the kinds of reduction."""
    return cross_entropy_axes(_with_reduction(call))


@axis_rule(
    atens="mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy binary_cross_entropy_with_logits kl_div"
)
def aten_loss_axes(call: AxisCall) -> Effect:
    """As the loss of this name; ATen counts the kinds of reduction."""
    return elementwise_loss_axes(_with_reduction(call))


def _with_reduction(call: AxisCall) -> AxisCall:
    return replace(call, kwargs={**call.kwargs, "reduction": _REDUCTIONS[_argument(call, "reduction", 1)]})


def _argument(call: AxisCall, name: str, default: Any = None) -> Any:
    """Return an argument by the name that it has in the operator's schema."""
    names = [argument.name for argument in call.target._schema.arguments]
    given = call.option(name, names.index(name))
    return default if given is None else given
