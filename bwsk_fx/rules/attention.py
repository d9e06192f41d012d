"""Attention as one operator; eager attention is made of products, softmax and dropout."""

from __future__ import annotations

from torch import nn
from torch.nn import functional as F

from bwsk_fx.rules.axis import AxisCall, Behaviour, Claim, Effect, Value, aligned, axis_rule, claims
from bwsk_fx.rules.axis_table import Axis, per_sample
from bwsk_fx.rules.registry import Call, erases, labels
from bwsk_fx.rules.sizes import elements
from bwsk_fx.verdict import Verdict


@labels(F.scaled_dot_product_attention)
def scaled_dot_product(call: Call) -> Verdict:
    """Three operands become one result."""
    operands = [call.argument(index, name) for index, name in enumerate(("query", "key", "value"))]
    sizes = [elements(operand.meta["val"]) for operand in operands if call.is_dynamic(operand)]
    kept = elements(call.value)
    why = "softmax mixes the tokens, and the result with its logsumexp determines none of query, key and value"
    if kept is None or None in sizes:
        return erases(why)
    return erases(why, max(sum(size for size in sizes if size is not None) - kept, 0))


@labels(nn.MultiheadAttention, F.multi_head_attention_forward)
def multi_head(_: Call) -> Verdict:
    """Projections around attention, which erases."""
    return erases("attention is inside, and what it erases stays erased")


@axis_rule(F.scaled_dot_product_attention)
def scaled_dot_product_axes(call: AxisCall) -> Effect:
    """Maps samples, heads and queries; waits for all keys; sums over the features of queries and keys."""
    query, key, value = (call.option(name, place) for place, name in enumerate(("query", "key", "value")))
    leading = [operand.layout[:-2] for operand in (query, key, value)]
    # Grouped queries have more heads than keys: sharded by groups, which are not one axis of this graph.
    grouped = query.shape[:-2] != key.shape[:-2]
    batch, clashes = aligned(call.axes, leading[:1] if grouped else leading, query.rank - 2)
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
