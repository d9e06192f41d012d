"""Inverses of values that are wider than what they say: masks, signs and indices, kept in fewer bits. All exact."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, fx

from bwsk_fx.rules.bits import pack_bits, unpack_bits
from bwsk_fx.rules.inverse import (
    Inverse,
    WitnessWriter,
    calls,
    inverts,
    is_dense,
    memory_order,
)

aten = torch.ops.aten

_INDEX_DTYPES = (torch.uint8, torch.int16, torch.int32)


@inverts(*(getattr(aten, name).Scalar for name in ("eq", "ne", "lt", "le", "gt", "ge")))
@inverts(*(getattr(aten, name).Tensor for name in ("eq", "ne", "lt", "le", "gt", "ge")))
@inverts(*(getattr(aten, f"logical_{name}").default for name in ("and", "or", "xor", "not")))
@inverts(aten.bitwise_and.Tensor, aten.bitwise_or.Tensor, aten.bitwise_xor.Tensor, aten.bitwise_not.default)
@inverts(aten.isnan.default)
def condition_inverse(node: fx.Node, witnesses: WitnessWriter) -> Iterator[Inverse]:
    """A boolean mask that the backward pass reads, from one bit per element."""
    if node.meta["val"].dtype is torch.bool and witnesses.is_read_backwards(node):
        yield from packed(node, witnesses, pack_bits, unpack_bits, "packed mask")


@inverts(aten.sgn.default, aten.sign.default)
def sign_inverse(node: fx.Node, witnesses: WitnessWriter) -> Iterator[Inverse]:
    """Signs from two bits per element, which tell -1, 0 and 1 apart; 0 stands for NaN too, as in the operator."""
    if node.meta["val"].dtype.is_floating_point:
        yield from packed(node, witnesses, pack_signs, unpack_signs, "packed signs")


def pack_signs(signs: Tensor) -> Tensor:
    """Return two bits per element, flat: first which are above zero, then which are below."""
    return pack_bits(torch.stack([signs > 0, signs < 0]))


def unpack_signs(bits: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return the signs of `shape` that `pack_signs` packed."""
    above, below = unpack_bits(bits, (2, *shape), dtype)
    return above - below


def packed(
    node: fx.Node,
    witnesses: WitnessWriter,
    pack: Callable[[Tensor], Tensor],
    unpack: Callable[[Tensor, tuple[int, ...], torch.dtype], Tensor],
    rule: str,
) -> Iterator[Inverse]:
    """Yield the inverse of a node by bits in the order in which its elements lie in memory; none unless dense."""
    value = node.meta["val"]
    if not is_dense(value):
        return
    if value.is_contiguous():
        bits = witnesses.call(node, pack, node)
        yield Inverse(node, (bits,), calls(unpack, tuple(value.shape), value.dtype), True, rule=rule)
        return
    order = memory_order(value.stride())
    inner = witnesses.call(node, aten.permute.default, node, order)
    bits = witnesses.call(inner, pack, inner)
    back = [order.index(dim) for dim in range(value.dim())]
    shape = tuple(inner.meta["val"].shape)

    def emit(graph: fx.Graph, tails: Sequence[fx.Node]) -> fx.Node:
        return graph.call_function(aten.permute.default, (calls(unpack, shape, value.dtype)(graph, tails), back))

    yield Inverse(node, (bits,), emit, True, rule=rule)


@inverts(aten.max_pool2d_with_indices.default, aten.adaptive_max_pool2d.default)
@inverts(aten.max_pool3d_with_indices.default, aten.adaptive_max_pool3d.default)
def pooling_indices_inverse(node: fx.Node, witnesses: WitnessWriter) -> Iterator[Inverse]:
    """Indices into a pooled plane or volume, in the narrowest dtype that holds its size."""
    dims = 3 if "3d" in str(node.target) else 2
    sizes = node.args[0].meta["val"].shape[-dims:]  # type: ignore[union-attr]
    yield from _narrow_indices(node, witnesses, math.prod(sizes))


@inverts(aten.max.dim, aten.min.dim)
def extreme_indices_inverse(node: fx.Node, witnesses: WitnessWriter) -> Iterator[Inverse]:
    """Indices along a dimension, in the narrowest dtype that holds its size."""
    value = node.args[0].meta["val"]  # type: ignore[union-attr]
    yield from _narrow_indices(node, witnesses, value.shape[node.args[1]] if value.dim() else 1)


def _narrow_indices(node: fx.Node, witnesses: WitnessWriter, count: int) -> Iterator[Inverse]:
    narrow = next((dtype for dtype in _INDEX_DTYPES if count - 1 <= torch.iinfo(dtype).max), None)
    indices = next((user for user in node.users if user.target is operator.getitem and user.args[1] == 1), None)
    if narrow is None or indices is None or not witnesses.is_read_backwards(indices):
        return
    small = witnesses.call(indices, aten._to_copy.default, indices, dtype=narrow)
    wide = calls(aten._to_copy.default, dtype=indices.meta["val"].dtype)
    yield Inverse(indices, (small,), wide, True, rule="narrow indices")
