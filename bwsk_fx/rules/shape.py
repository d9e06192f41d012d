"""Operators that move elements or make copies of them: all of the operand is in the result."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from bwsk_fx import _torch_private as private
from bwsk_fx.rules.axis import AxisCall, Behaviour, Effect, aligned, axis_rule, claims, mapped, opaque, renumbered
from bwsk_fx.rules.axis_table import Axis, Layout
from bwsk_fx.rules.axis_view import reshape
from bwsk_fx.rules.moving import counted, is_plain, moves, moves_back
from bwsk_fx.rules.registry import (
    Call,
    erases,
    every,
    fewer_elements,
    labels,
    other_operand,
    preserves,
    target_name,
    unproven,
)
from bwsk_fx.rules.sizes import short, widens
from bwsk_fx.rules.targets import operator_name
from bwsk_fx.rules.undo import Run, Undo
from bwsk_fx.verdict import REFINED, Verdict


@labels(nn.Identity, nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle)
@labels(F.pixel_shuffle, F.pixel_unshuffle, F.channel_shuffle, torch.channel_shuffle, torch.native_channel_shuffle)
@labels(
    ops="reshape flatten unflatten transpose permute movedim moveaxis swapaxes swapdims t adjoint squeeze unsqueeze"
)
@labels(ops="flip fliplr flipud roll rot90 clone detach ravel diag_embed diagflat")
@labels(methods="contiguous requires_grad_", atens="_unsafe_view _reshape_alias _reshape_copy alias")
@labels(atens="lift lift_fresh contiguous _lazy_clone _pin_memory pin_memory", methods="pin_memory")
@labels(atens="pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle")
@labels(atens="numpy_T matrix_H mT mH")
def rearrange(_: Call) -> Verdict:
    """Moves elements and loses none."""
    return preserves("it moves elements, and moving them back rebuilds the operand", undo=moves_back())


@labels(methods="view_as reshape_as expand_as resize_as_", atens="view_as reshape_as expand_as resize_as")
def like_another(call: Call) -> Verdict:
    """Takes the shape of another operand, and nothing else of it."""
    if not call.is_dynamic(call.argument(0, "input")):
        return erases("only the operand's shape is used", call.elements())
    return (resize if "resize_as" in target_name(call) else copies)(call)


@labels(methods="view", atens="view")
def view(call: Call) -> Verdict:
    """A view with another shape, or of the same bits in another dtype."""
    if not isinstance(call.argument(1, "dtype"), torch.dtype):
        return rearrange(call)
    return preserves("the same bits in another dtype", confidence=REFINED, undo=Undo(_same_bits))


def _same_bits(run: Run) -> torch.Tensor:
    return run.output.contiguous().view(run.before.dtype).view(run.before.shape)


@labels(getattr)
def attribute(call: Call) -> Verdict:
    """Tensor attributes that are views: `x.T`, `x.mT`, `x.data`; `x.real` and `x.imag` are halves."""
    name = call.argument(1, "name")
    if name in ("T", "mT", "H", "mH", "data") or (name == "real" and not call.before.is_complex()):
        return rearrange(call)
    if name in ("real", "imag"):
        total = call.elements()
        return erases("one of two parts of a complex number goes", None if total is None else total / 2)
    return unproven(f"the attribute '{name}' is covered by no rule")


@labels(ops="broadcast_to tile", methods="expand repeat", atens="expand repeat")
@labels(torch.broadcast_tensors, torch.meshgrid, torch.cartesian_prod, atens="broadcast_tensors meshgrid")
def copies(call: Call) -> Verdict:
    """Repeats elements; any copy rebuilds the operand."""
    # A dimension repeated zero times leaves nothing, which counting sees.
    missing = call.erased()
    if missing is not None and missing > 0:
        return fewer_elements(call, "it repeats elements zero times")
    return preserves("it copies elements, and any copy rebuilds the operand", undo=moves_back())


@labels(ops="repeat_interleave")
def repeat_interleave(call: Call) -> Verdict:
    """Repeats each element some number of times, which may be zero where the numbers differ."""
    if len(call.args) == 1 and "repeats" not in call.kwargs:
        return preserves("each position occurs as often as its number says", undo=Undo(_counts))
    repeats = call.argument(1, "repeats")
    if not call.is_dynamic(call.argument(0, "input")):
        return unproven("the numbers are the operand, and what is repeated need not differ")
    if isinstance(repeats, fx.Node) and isinstance(repeats.meta["val"], torch.Tensor):
        numbers = call.static(repeats)
        if numbers is None or bool((numbers == 0).any()):
            return moves(call, "an element that is repeated zero times goes")
    return copies(call)


def _counts(run: Run) -> torch.Tensor:
    return torch.bincount(run.output.flatten(), minlength=run.before.numel()).view(run.before.shape)


@labels(torch.combinations)
def combinations(call: Call) -> Verdict:
    """Tuples of elements; each element is in one unless there are fewer than a tuple takes."""
    return moves(call, "it lists tuples of elements")


@labels(torch.cat, torch.concat, torch.concatenate, torch.stack, torch.hstack, torch.vstack, torch.dstack)
@labels(
    torch.row_stack,
    torch.column_stack,
    *private.operators("_chunk_cat"),
    atens="cat stack hstack vstack dstack column_stack",
)
@labels(torch.block_diag, torch.atleast_1d, torch.atleast_2d, torch.atleast_3d)
@labels(atens="concat concatenate row_stack _chunk_cat _stack block_diag atleast_1d atleast_2d atleast_3d")
def join(call: Call) -> Verdict:
    """Puts operands side by side, in the dtype that they promote to."""
    dtype = call.value.dtype
    if not all(widens(node.meta["val"].dtype, dtype) for node in call.operands):
        return erases(f"it rounds an operand to {short(dtype)}")
    return preserves("every operand is a slice of the result", undo=moves_back(*every(call)))


@labels(ops="chunk split tensor_split unbind unsafe_chunk unsafe_split split_with_sizes unsafe_split_with_sizes")
@labels(ops="hsplit vsplit dsplit")
def cut(call: Call) -> Verdict:
    """Cuts the operand into pieces that cover it."""
    if not call.is_dynamic(call.argument(0, "input")):
        return unproven("only the places of the cuts are dynamic")
    if len(call.operands) == 1:
        return preserves("its pieces, put side by side, are the operand", undo=moves_back())
    others = other_operand(*call.operands[1:])
    return preserves("its pieces, put side by side, are the operand", others, undo=moves_back())


@labels(methods="resize_", atens="resize")
def resize(call: Call) -> Verdict:
    """Takes the first elements of the operand's memory; the rest of a longer result is undefined."""
    missing = call.erased()
    if missing is None or not is_plain(call.before):
        return unproven("which elements come first depends on the operand's layout, and how many on its size")
    if missing > 0:
        return fewer_elements(call, "it keeps the first elements")
    return preserves("the operand's elements are the first ones", confidence=REFINED, undo=Undo(_first_elements))


def _first_elements(run: Run) -> torch.Tensor:
    return run.output.flatten()[: run.before.numel()].view(run.before.shape)


@labels(ops="as_strided")
def as_strided(call: Call) -> Verdict:
    """Reads memory at regular steps; the addresses tell which elements are read."""
    return (moves if is_plain(call.before) else counted)(call, "it reads memory at regular steps")


axis_rule(nn.Flatten, nn.Unflatten, ops="reshape flatten unflatten ravel", methods="view reshape_as view_as")(reshape)


@axis_rule(ops="squeeze unsqueeze")
def squeeze_axes(call: AxisCall) -> Effect:
    """Adds or drops a dimension of size one; the axes stay."""
    return reshape(call)


@axis_rule(nn.Identity, ops="clone detach", methods="contiguous requires_grad_")
def copy_axes(call: AxisCall) -> Effect:
    """Maps every axis."""
    return mapped(call.operand.layout, "it changes no element")


@axis_rule(ops="transpose swapaxes swapdims")
def transpose_axes(call: AxisCall) -> Effect:
    """Maps every axis."""
    one, other = (call.option(name, place) for place, name in ((1, "dim0"), (2, "dim1")))
    layout = list(call.operand.layout)
    layout[one], layout[other] = layout[other], layout[one]
    return _reordered(tuple(layout))


@axis_rule(ops="permute")
def permute_axes(call: AxisCall) -> Effect:
    """Maps every axis."""
    dims = call.kwargs.get("dims", call.args[1:])
    dims = dims[0] if isinstance(dims[0], (tuple, list)) else dims
    return _reordered(tuple(call.operand.layout[dim] for dim in dims))


@axis_rule(getattr, ops="t adjoint")
def mirror_axes(call: AxisCall) -> Effect:
    """Maps every axis: `x.T`, `x.mT`, `x.data`."""
    layout = call.operand.layout
    if call.target is getattr and call.args[1] == "data":
        return _reordered(layout)
    swaps_last = call.target in (torch.adjoint, "adjoint") or (call.target is getattr and call.args[1] in ("mT", "mH"))
    return _reordered((*layout[:-2], layout[-1], layout[-2]) if swaps_last else layout[::-1])


def _reordered(layout: Layout) -> Effect:
    return mapped(layout, "only the order of dimensions changes")


@axis_rule(ops="broadcast_to", methods="expand expand_as")
def expand_axes(call: AxisCall) -> Effect:
    """Maps every axis; each shard makes copies of its own."""
    inside = (None,) * (len(call.shape) - call.operand.rank) + call.operand.layout
    new = call.axes.fresh(call.shape)
    made = tuple(axis if there is None else None for axis, there in zip(new, inside, strict=True))
    said = claims(inside, Behaviour.MAP, "the copies change no element")
    said += claims(made, Behaviour.MAP, "each shard makes copies of its own", consumed=False)
    return Effect(tuple(said), (tuple(axis or there for axis, there in zip(made, inside, strict=True)),))


_ENTERS = "its facts enter the union under new indices"


@axis_rule(torch.cat, torch.concat, torch.concatenate, atens="cat")
def cat_axes(call: AxisCall) -> Effect:
    """Maps every axis; along the joined one the result is the disjoint union of the operands' facts."""
    values = [value for value in call.inputs if value.rank == len(call.shape)]
    place = call.option("dim", 1, 0) % len(call.shape)
    layouts = [(*value.layout[:place], None, *value.layout[place + 1 :]) for value in values]
    layout, clashes = aligned(call.axes, layouts, len(call.shape))
    joined = [axis for value in values if (axis := value.layout[place]) is not None]
    union = call.axes.derived("", list(dict.fromkeys(joined)))
    words = " ⊎ ".join(str(value.shape[place]) for value in values)
    said = claims(layout, Behaviour.MAP, "operands are joined along another axis")
    said += claims(dict.fromkeys(joined), Behaviour.MAP, _ENTERS, role="operand", produced=False)
    why = f"the disjoint union of the operands' facts: {words}"
    said += claims([union], Behaviour.MAP, why, role="result", consumed=False)
    return Effect((*said, *clashes), ((*layout[:place], union, *layout[place + 1 :]),))


@axis_rule(ops="roll flip")
def moved_axes(call: AxisCall) -> Effect:
    """Maps every axis; along those that are rolled or flipped the facts get other indices."""
    rolls = "roll" in operator_name(call.target)
    if rolls and call.option("dims", 2) in (None, (), []):
        return opaque(call, "it rolls all elements as one row")
    dims = call.dims("dims", 2 if rolls else 1)
    layout = list(call.operand.layout)
    said = claims((axis for dim, axis in enumerate(layout) if dim not in dims), Behaviour.MAP, "it moves other axes")
    for dim in dims:
        if (axis := layout[dim]) is not None:
            layout[dim] = call.axes.derived("", [axis])
            said += renumbered(axis, layout[dim], _MOVED)
    return Effect(tuple(said), (tuple(layout),))


_MOVED = "its facts are the same, under new indices"


@axis_rule(torch.stack)
def stack_axes(call: AxisCall) -> Effect:
    """Maps every axis; the new one counts the operands."""
    place = call.option("dim", 1, 0) % len(call.shape)
    layout, clashes = aligned(call.axes, [value.layout for value in call.inputs], len(call.shape) - 1)
    (new,) = call.axes.fresh([call.shape[place]])
    said = claims(layout, Behaviour.MAP, "operands are joined along a new axis")
    said += claims([new], Behaviour.MAP, "each operand is one index of the new axis", consumed=False)
    return Effect((*said, *clashes), ((*layout[:place], new, *layout[place:]),))


@axis_rule(ops="chunk split tensor_split", methods="split_with_sizes")
def split_axes(call: AxisCall) -> Effect:
    """Maps every axis; along the cut one each piece has a part of the facts."""
    place = call.option("dim", 2, 0) % call.operand.rank
    axis = call.operand.layout[place]
    pieces = _pieces(call, axis, [shape[place] for shape in call.shapes])
    rest = tuple(None if dim == place else kept for dim, kept in enumerate(call.operand.layout))
    said = claims(rest, Behaviour.MAP, "the cut is along another axis")
    why = "its facts are dealt out to the pieces, under new indices"
    said += claims([axis], Behaviour.MAP, why, role="operand", produced=False)
    why = "a piece of the operand's facts"
    said += claims(dict.fromkeys(pieces), Behaviour.MAP, why, role="result", consumed=False)
    return Effect(tuple(said), tuple((*rest[:place], piece, *rest[place + 1 :]) for piece in pieces))


def _pieces(call: AxisCall, axis: Axis | None, sizes: list[Any]) -> list[Axis | None]:
    """Return an axis per piece; pieces of one size meet index by index, as gates and queries do."""
    made: dict[Any, Axis] = {}
    for size in sizes:
        if axis is not None and size not in made:
            made[size] = call.axes.derived(call.axes.name(axis), [axis])
    return [None if size == 1 else made.get(size) for size in sizes]


@axis_rule(ops="unbind")
def unbind_axes(call: AxisCall) -> Effect:
    """Maps every axis but deals the indices of one out."""
    place = call.option("dim", 1, 0) % call.operand.rank
    rest = tuple(axis for dim, axis in enumerate(call.operand.layout) if dim != place)
    said = claims(rest, Behaviour.MAP, "another axis is taken apart")
    why = "each result has the facts of one index"
    said += claims([call.operand.layout[place]], Behaviour.MAP, why, role="selected", produced=False)
    return Effect(tuple(said), (rest,) * len(call.shapes))


@axis_rule(ops="tile", methods="repeat")
def repeat_axes(call: AxisCall) -> Effect:
    """Maps every axis; a repeated one has its facts several times, under new indices."""
    new = len(call.shape) - call.operand.rank
    made = list(call.axes.fresh(call.shape[:new]))
    said = claims(made, Behaviour.MAP, "each shard makes copies of its own", consumed=False)
    for axis, before, after in zip(call.operand.layout, call.operand.shape, call.shape[new:], strict=True):
        if before == after:
            said += claims([axis], Behaviour.MAP, "it repeats other axes")
            made.append(axis)
            continue
        repeated = call.axes.new(origins=[] if axis is None else [axis])
        said += renumbered(axis, repeated, "its facts are there several times")
        made.append(repeated)
    return Effect(tuple(said), (tuple(made),))
