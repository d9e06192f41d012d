"""Operators that write into a tensor: what they write over goes, what they add can be subtracted.

A tensor that was only made to be written to (`torch.zeros_like(x)`) has nothing to lose. There, and where the written
tensor is static, the question is whether the source can be read back.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from bwsk_fx.rules.factories import is_made
from bwsk_fx.rules.moving import axis_size, is_plain, lost, moves_back
from bwsk_fx.rules.registry import Call, erases, labels, others, preserves, unproven
from bwsk_fx.rules.single import run_target
from bwsk_fx.rules.sizes import elements, widens
from bwsk_fx.rules.sorting import same_element
from bwsk_fx.rules.spelling import function_name
from bwsk_fx.rules.undo import Run, Undo, unbroadcast
from bwsk_fx.verdict import REFINED, Verdict

Read = Callable[[Run], Tensor]


@labels(ops="scatter")
def scatter(call: Call) -> Verdict:
    """Writes elements of the source where an index says."""
    source = call.argument(3, "src", call.kwargs.get("value"))
    reduce = call.kwargs.get("reduce")
    if reduce is not None:
        return _reduced(call, source, {"add": "sum", "multiply": "prod"}[reduce], _gathered)
    return _overwrites(call, source, _gathered)


@labels(ops="scatter_add")
def scatter_add(call: Call) -> Verdict:
    """Adds elements of the source where an index says."""
    return _adds(call, call.argument(3, "src"), _gathered)


@labels(ops="scatter_reduce")
def scatter_reduce(call: Call) -> Verdict:
    """Merges elements of the source in where an index says."""
    return _reduced(call, call.argument(3, "src"), call.argument(4, "reduce"), _gathered)


@labels(ops="index_add")
def index_add(call: Call) -> Verdict:
    """Adds slices."""
    return _adds(call, call.argument(3, "source"), _index_selected)


@labels(ops="index_reduce")
def index_reduce(call: Call) -> Verdict:
    """Merges slices in."""
    return _reduced(call, call.argument(3, "source"), call.argument(4, "reduce"), _index_selected)


@labels(ops="index_copy")
def index_copy(call: Call) -> Verdict:
    """Writes slices."""
    return _overwrites(call, call.argument(3, "source"), _index_selected)


@labels(ops="index_fill")
def index_fill(call: Call) -> Verdict:
    """Writes one value over slices."""
    return _overwrites(call, call.argument(3, "value"), None)


@labels(ops="index_put", atens="_index_put_impl _unsafe_index_put")
def index_put(call: Call) -> Verdict:
    """Writes or adds elements where index tensors say."""
    values = call.argument(2, "values")
    if call.argument(3, "accumulate", False):
        return _adds(call, values, _indexed)
    return _overwrites(call, values, _indexed)


@labels(methods="put", atens="put")
def put(call: Call) -> Verdict:
    """Writes or adds elements where an index into the flat tensor says."""
    source = call.argument(2, "source")
    if call.argument(3, "accumulate", False):
        return _adds(call, source, _taken)
    return _overwrites(call, source, _taken)


@labels(atens="_unsafe_masked_index_put_accumulate")
def masked_index_put(call: Call) -> Verdict:
    """Adds elements where index tensors say and a mask allows."""
    return _adds(call, call.argument(3, "values"), None)


@labels(ops="masked_scatter")
def masked_scatter(call: Call) -> Verdict:
    """Writes the source's first elements where a mask is true."""
    return _overwrites(call, call.argument(2, "source"), _masked)


@labels(ops="select_scatter slice_scatter diagonal_scatter as_strided_scatter")
def part(call: Call) -> Verdict:
    """Writes a part of a tensor; each element of the source has a place of its own."""
    strided = "as_strided" in function_name(call)
    if strided and not is_plain(call.node.args[0].meta["val"]):  # type: ignore[union-attr]
        return erases("what it writes over is gone") if call.is_dynamic(call.node.args[0]) else unproven("its strides")
    return _overwrites(call, call.argument(1, "src"), _read_part, apart=not strided)


@labels(methods="copy_", atens="copy")
def copy(call: Call) -> Verdict:
    """Writes over everything."""
    return _overwrites(call, call.argument(1, "src"), _copied, apart=True)


@labels(methods="fill_ zero_ fill_diagonal_", atens="fill zero fill_diagonal")
@labels(torch.fill)
def fill(call: Call) -> Verdict:
    """Writes one value over everything."""
    return _overwrites(call, call.argument(1, "value"), _copied, apart=True)


@labels(operator.setitem, methods="__setitem__")
def setitem(call: Call) -> Verdict:
    """Writes over a part; the node has no result of its own, so nothing is rebuilt from it."""
    target, index = call.node.args[0], call.argument(1, "index")
    if not call.is_dynamic(target):
        return unproven("its result is the tensor that it writes to, and the node does not return that")
    return erases("what it writes over is gone", None if is_made(target) else _part_size(target, index))


def _part_size(target: Any, index: Any) -> int | None:
    """Return how many elements per sample an index without tensors selects."""
    leaves = index if isinstance(index, tuple) else (index,)
    if any(isinstance(leaf, (fx.Node, list, Tensor)) for leaf in leaves):
        return None
    return elements(target.meta["val"][index])


# -- verdicts ---------------------------------------------------------------------------------------------------------


def _overwrites(call: Call, source: Any, read: Read | None, apart: bool = False) -> Verdict:
    """Return the verdict of a write; `apart` says that each element of the source is written to a place of its own."""
    written = call.argument(0, "input")
    if not call.is_dynamic(written) or is_made(written):
        return _source(call, written, source, read, apart)
    missing = lost(call, written, zeroed=[source], per_sample=_keeps_samples_apart(call))
    if isinstance(source, fx.Node) and any(isinstance(size, int) and size == 0 for size in source.meta["val"].shape):
        missing = 0
    if missing == 0:
        grows = call.value.dim() > written.meta["val"].dim()
        if grows and call.value.dtype is torch.bool:
            return unproven("which of the copies it writes over is not followed through booleans")
        undo = moves_back() if grows else Undo(same_element)
        return preserves("it writes over nothing", confidence=REFINED, undo=undo)
    if missing is None and apart:
        missing = _all_elements(call, source)
    return erases("what it writes over is gone", missing, confidence=REFINED)


def _source(call: Call, written: Any, source: Any, read: Read | None, apart: bool) -> Verdict:
    if not call.is_dynamic(source) or read is None:
        return unproven("what it writes need not tell where")
    if not widens(source.meta["val"].dtype, call.value.dtype):
        return erases("it rounds what it writes to the dtype of what it writes to")
    missing = 0 if apart else lost(call, source, zeroed=[written], per_sample=_keeps_samples_apart(call))
    if missing is None:
        return unproven("whether it writes two elements to one place depends on its indices")
    if missing > 0:
        return erases(f"it leaves out {missing} elements of its source", missing, confidence=REFINED)
    undo = Undo(read, (call.operands.index(source),))
    return preserves("what it writes is read back", confidence=REFINED, undo=undo)


def _adds(call: Call, source: Any, read: Read | None) -> Verdict:
    written = call.argument(0, "input")
    if call.value.dtype is torch.bool:
        return erases("a sum of booleans is True however many are")
    if call.is_dynamic(written):
        if source is written:
            return unproven("what is added to itself cannot be subtracted without it")
        return preserves("subtracting what it adds", others(call), undo=Undo(_without_sum))
    if not call.is_dynamic(source) or read is None or is_made(written) or call.kwargs.get("alpha", 1) == 0:
        return unproven("what it adds need not tell where")
    alpha = call.kwargs.get("alpha", 1)
    missing = lost(call, source, zeroed=[written], per_sample=_keeps_samples_apart(call), scale=alpha)
    if missing is None:
        return unproven("whether it adds two elements to one place depends on its indices")
    if missing > 0:
        return erases("it adds elements of its source to each other")
    undo = Undo(partial(_added_at, read), (call.operands.index(source),))
    return preserves("each place has one summand beside the static one", confidence=REFINED, undo=undo)


def _reduced(call: Call, source: Any, kind: str, read: Read) -> Verdict:
    """Return the verdict of merging a source in by a sum, mean, product or extreme."""
    written = call.argument(0, "input")
    if not call.is_dynamic(written):
        return _adds(call, source, read) if kind == "sum" else _merged(call, written, source)
    if not call.kwargs.get("include_self", True):
        return _overwrites(call, source, None)
    if kind == "sum":
        return _adds(call, source, read)
    whole = not call.value.dtype.is_floating_point and not call.value.dtype.is_complex
    if kind in ("amin", "amax", "amax_", "amin_") or whole:
        return erases("what is beyond an extreme (or a rounded mean) goes")
    if kind == "mean":
        return preserves("a sum of means, and what was added", others(call), undo=Undo(_without_mean))
    return _times(call, source)


def _times(call: Call, source: Any) -> Verdict:
    factors = source if not isinstance(source, fx.Node) else call.static(source)
    zero = factors is not None and bool((torch.as_tensor(factors) == 0).any())
    if zero:
        return erases("a factor is zero")
    undo = Undo(_without_product)
    return preserves("dividing by what it multiplies with", others(call), undo=undo, domain="no factor is zero")


def _merged(call: Call, written: Any, source: Any) -> Verdict:
    missing = lost(call, source, zeroed=[written]) if call.is_dynamic(source) else None
    if missing is not None and missing > 0:
        return erases("it merges elements of its source")
    return unproven("whether it merges two elements depends on its indices")


def _all_elements(call: Call, source: Any) -> int | None:
    value = source.meta.get("val") if isinstance(source, fx.Node) else None
    everything = function_name(call) in ("copy", "fill", "zero")
    return call.elements() if everything else elements(value) if isinstance(value, Tensor) else None


def _keeps_samples_apart(call: Call) -> bool:
    """Whether it writes along one dimension whose size is no batch."""
    dim = call.argument(1, "dim")
    return (
        function_name(call).startswith("index_")
        and isinstance(dim, int)
        and isinstance(axis_size(call.value, dim), int)
    )


# -- inverses ---------------------------------------------------------------------------------------------------------


def _gathered(run: Run) -> Tensor:
    return run.output.gather(run.argument(1, "dim"), run.argument(2, "index"))


def _index_selected(run: Run) -> Tensor:
    found = run.output.index_select(run.argument(1, "dim"), run.argument(2, "index"))
    return found.view(run.argument(3, "source").shape)


def _indexed(run: Run) -> Tensor:
    indices = tuple(slice(None) if index is None else index for index in run.argument(1, "indices"))
    return unbroadcast(run.output[indices], run.argument(2, "values").shape)


def _taken(run: Run) -> Tensor:
    return run.output.take(run.argument(1, "index")).view(run.argument(2, "source").shape)


def _masked(run: Run) -> Tensor:
    found = run.output[run.argument(1, "mask").expand(run.output.shape)]
    return found.view(run.argument(2, "source").shape)


def _read_part(run: Run) -> Tensor:
    read = getattr(torch, function_name(run).removesuffix("_scatter"), torch.ops.aten.slice)
    options = {name: value for name, value in run.kwargs.items() if name not in ("input", "src")}
    return read(run.output, *run.args[2:], **options)  # type: ignore[no-any-return]


def _copied(run: Run) -> Tensor:
    return unbroadcast(run.output, run.argument(1, "src", run.kwargs.get("value")).shape)


def _again(run: Run, value: float, args: tuple[Any, ...] | None = None) -> Tensor:
    """Run the call on a tensor that is `value` everywhere."""
    base = torch.full_like(run.output, value)
    return run_target(run.target, (base, *(run.args[1:] if args is None else args)), run.kwargs)  # type: ignore[no-any-return]


def _without_sum(run: Run) -> Tensor:
    return run.output - _again(run, 0)


def _without_product(run: Run) -> Tensor:
    return run.output / _again(run, 1)


def _without_mean(run: Run) -> Tensor:
    """Undo (operand + sum of the source) / (1 + count), place by place."""
    add = torch.scatter_add if "scatter" in function_name(run) else torch.index_add
    where = (run.argument(1, "dim"), run.argument(2, "index"))
    source = run.argument(3, "src", run.kwargs.get("source"))
    zeros = torch.zeros_like(run.output)
    total, count = (add(zeros, *where, summand) for summand in (source, torch.ones_like(source)))
    return run.output * (count + 1) - total


def _added_at(read: Read, run: Run) -> Tensor:
    added = read(replace(run, output=run.output - run.args[0]))
    return added / run.kwargs.get("alpha", 1)
