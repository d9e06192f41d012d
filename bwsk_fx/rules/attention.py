"""Attention as one operator; eager attention is made of products, softmax and dropout."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from bwsk_fx.rules.axis import AxisCall, Behaviour, Claim, Effect, Value, aligned, axis_rule, claims, opaque
from bwsk_fx.rules.axis_table import Axis, per_sample
from bwsk_fx.rules.registry import Call, erases, labels, unproven
from bwsk_fx.rules.sizes import as_int, elements
from bwsk_fx.verdict import OPERATOR, REFINED, Verdict


@labels(F.scaled_dot_product_attention, atens="scaled_dot_product_attention _scaled_dot_product_attention_math")
@labels(atens="_scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_for_cpu")
@labels(atens="_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention")
@labels(atens="_scaled_dot_product_fused_attention_overrideable _flash_attention_forward _efficient_attention_forward")
def scaled_dot_product(call: Call) -> Verdict:
    """Three operands become one result; with fixed keys and values the number of keys bounds what a query leaves."""
    query, key = call.argument(0, "query"), call.argument(1, "key")
    missing = _missing(call, call.value)
    if missing is None or missing > 0:
        why = "softmax mixes the tokens, and the result has less elements than query, key and value together"
        return erases(why, missing, confidence=REFINED if missing else OPERATOR)
    if call.operands == (query,) and query is not key:
        return _of_query(call, query.meta["val"], _value(key))
    return unproven("softmax mixes the tokens, but the result has as many elements as what goes in")


def _of_query(call: Call, query: torch.Tensor, key: torch.Tensor) -> Verdict:
    """A query becomes a weighted mean of values: at most one degree of freedom less than there are keys."""
    width, keys, features = (as_int(size) for size in (query.shape[-1], key.shape[-2], call.value.shape[-1]))
    rows = as_int(query.shape[-2])
    if width is None or keys is None or features is None or rows is None or query.shape[:-1] != call.value.shape[:-1]:
        return unproven("softmax mixes the tokens")
    causal = call.node.target is F.scaled_dot_product_attention and call.argument(5, "is_causal", False) is True
    seen = [min(row + 1, keys) if causal else keys for row in range(rows)]
    lost = sum(max(width - min(count - 1, features), 0) for count in seen)
    total = call.elements()
    if lost == 0:
        return unproven("a query becomes a mean of enough values to hold it")
    share = None if total is None else total // (rows * width) * lost
    return erases("a mean of fewer values than a query has features cannot hold it", share, confidence=REFINED)


@labels(nn.MultiheadAttention, F.multi_head_attention_forward)
@labels(nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, nn.TransformerEncoder, nn.TransformerDecoder)
@labels(nn.Transformer, atens="_native_multi_head_attention _transformer_encoder_layer_fwd")
def multi_head(call: Call) -> Verdict:
    """Attention with projections around it: K where less comes out than goes in."""
    missing = _missing(call, call.node.meta["val"])
    if missing is not None and missing > 0:
        return erases("attention is inside, and the result has less elements than what goes in", missing)
    return unproven("attention is inside, and as many elements come out as go in")


def _missing(call: Call, results: Any) -> int | None:
    """Return how many elements per sample the results have less than the dynamic operands; None where unknown."""
    given = [elements(operand.meta["val"]) for operand in call.operands]
    kept = [elements(leaf) for leaf in pytree.tree_leaves(results) if isinstance(leaf, torch.Tensor)]
    if None in given or None in kept:
        return None
    return sum(count for count in given if count is not None) - sum(count for count in kept if count is not None)


def _value(operand: Any) -> torch.Tensor:
    return operand.meta["val"] if hasattr(operand, "meta") else operand


@axis_rule(F.scaled_dot_product_attention)
def scaled_dot_product_axes(call: AxisCall) -> Effect:
    """Maps samples, heads and queries; waits for all keys; sums over the features of queries and keys."""
    query, key, value = (call.option(name, place) for place, name in enumerate(("query", "key", "value")))
    mask = call.option("attn_mask", 3)
    leading = [operand.layout[:-2] for operand in (query, key, value)]
    # Grouped queries have more heads than keys: sharded by groups, which are not one axis of this graph.
    grouped = query.shape[:-2] != key.shape[:-2]
    masks = [mask.layout[:-2]] if isinstance(mask, Value) else []
    batch, clashes = aligned(call.axes, [*(leading[:1] if grouped else leading), *masks], query.rank - 2)
    rows, features = query.layout[-2], value.layout[-1]
    keys = _same(call, key.layout[-2], value.layout[-2])
    inner = _same(call, query.layout[-1], key.layout[-1])
    _name_scores(call, keys)
    said = claims(batch, Behaviour.MAP, "each sample and head attends on its own")
    said += claims([rows], Behaviour.MAP, "each query meets all keys on its own", role="query")
    said += _key_claims(keys, key.bytes_per_sample + value.bytes_per_sample)
    said += _inner_claims(inner, query, key)
    why = "each shard of the values' features yields features of its own"
    said += claims([features], Behaviour.MAP, why, role="value")
    return Effect((*said, *clashes), ((*batch, rows, features),))


def _same(call: AxisCall, one: Axis | None, other: Axis | None) -> Axis | None:
    return one if one is None or other is None else call.axes.unify(one, other)


def _name_scores(call: AxisCall, keys: Axis | None) -> None:
    mask = call.option("attn_mask", 3)
    if isinstance(mask, Value) and keys is not None and mask.layout[-1] is not None:
        call.axes.unify(keys, mask.layout[-1])


def _key_claims(keys: Axis | None, moved: int) -> list[Claim]:
    why = "softmax needs all keys of a query; merging the logsumexp of each shard would make it a REDUCE"
    return claims([keys], Behaviour.BARRIER, why, role="key", produced=False, moved=moved)


def _inner_claims(inner: Axis | None, query: Value, key: Value) -> list[Claim]:
    """Scores are summed over features, so what a REDUCE moves is a score for each query and key."""
    scores = query.bytes_per_sample // query.shape[-1] * per_sample(key.shape[-2])
    why = "each shard of the features yields a partial sum of the scores, which softmax needs complete"
    return claims([inner], Behaviour.REDUCE, why, role="query and key", produced=False, moved=scores)


@axis_rule(nn.MultiheadAttention)
def multihead_axes(call: AxisCall) -> Effect:
    """Maps samples; tokens and features meet in attention and in the projections."""
    query = call.operand
    place = 0 if call.target.batch_first else 1
    if query.rank != 3:
        return opaque(call, "without a batch it has no axis rule")
    batch = query.layout[place]
    inputs = [axis for value in call.inputs[:3] for dim, axis in enumerate(value.layout) if dim != place]
    for value in call.inputs[1:3]:
        _same(call, batch, value.layout[place])
    said = claims([batch], Behaviour.MAP, "each sample attends on its own")
    why = "keys of all tokens, and all features, meet in it; take it apart to shard them"
    said += claims(dict.fromkeys(axis for axis in inputs if axis is not None), Behaviour.BARRIER, why, produced=False)
    layouts = [call.axes.fresh(shape) for shape in call.shapes]
    for number, layout in enumerate(layouts):
        own = place if number == 0 else 0
        layouts[number] = (*layout[:own], batch, *layout[own + 1 :])
    return Effect(tuple(said), tuple(layouts))
