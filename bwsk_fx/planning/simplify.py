"""Three rewritings of a joint graph before it is planned, bit for bit the same.

`compute_marked_views` lets conjugates and negatives be computed where PyTorch would only mark them. `drop_no_ops` takes
out calls that change nothing, since each costs a launch and a value. `read_less` makes backward operators that use
little of a tensor read just that little: a shape, or one bit per element.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.utils import _pytree as pytree

from bwsk_fx.planning.views import base_of, is_view

aten = torch.ops.aten

# They return their operand, where sizes and strides are the same. All of a tensor is a slice of it.
_UNCHANGED = (
    *(aten.clone.default, aten.view.default, aten.detach.default, aten.alias.default),
    *(aten.slice.Tensor, aten.expand.default),
)

# Backward operators that use nothing of one operand but its shape, dtype and strides: its place.
_SHAPE_ONLY: Mapping[Any, int] = {
    aten.max_pool2d_with_indices_backward.default: 1,
    aten.max_pool3d_with_indices_backward.default: 1,
    aten.adaptive_max_pool2d_backward.default: 1,
    aten.adaptive_max_pool3d_backward.default: 1,
    aten.avg_pool2d_backward.default: 1,
    aten.avg_pool3d_backward.default: 1,
    aten._adaptive_avg_pool2d_backward.default: 1,
    aten._adaptive_avg_pool3d_backward.default: 1,
}
# Input and weight of a convolution each serve the gradient of the other alone: the place of a gradient, and that of the
# operand of which no more than its shape is used where nobody wants the gradient.
_SERVES_ONLY = ((0, 2), (1, 1))
# Backward operators that use nothing of one operand but which of their branches each element takes: its place.
_BRANCH_ONLY: Mapping[Any, int] = {
    aten.threshold_backward.default: 1,
    aten.leaky_relu_backward.default: 1,
    aten.hardtanh_backward.default: 1,
}
# Backward operators that do not use some operands in train mode: whether they are in it, and the operands' places.
_UNREAD_IN_TRAINING: Mapping[Any, tuple[Callable[[fx.Node], Any], tuple[int, ...]]] = {
    aten.native_batch_norm_backward.default: (lambda node: node.args[7], (3, 4)),
    aten.cudnn_batch_norm_backward.default: (lambda node: True, (3, 4)),
}
# Whose kernels are known to read no more than that.
_DEVICES = ("cpu", "cuda")


# Views that PyTorch marks, for later kernels to conjugate or to negate, and what computes the same numbers.
_MARKED: Mapping[Any, Any] = {
    aten._conj.default: aten._conj_physical.default,
    aten._neg_view.default: aten.neg.default,
}


def compute_marked_views(graph: fx.Graph) -> None:
    """Compute conjugates and negatives that are views with a mark.

    Tracing loses the marks of some views of them, and takes no heed of those of inputs; `view_as_real` and others need
    numbers in memory.
    """
    for node in graph.nodes:
        node.target = _MARKED.get(node.target, node.target) if node.op == "call_function" else node.target


def drop_no_ops(graph: fx.Graph) -> None:
    """Let the users of a copy, a detour or a view that changes nothing read the original.

    Nothing in a joint graph writes into a tensor, so that a copy is as good as the original. What the graph returns
    stays as it is, since the caller may write into it.
    """
    for node in graph.find_nodes(op="call_function", target=aten._assert_tensor_metadata.default):
        # Said what it had to while the graph was traced.
        graph.erase_node(node)
    for node in graph.nodes:
        original = _original(node) if node.op == "call_function" else None
        if original is not None and not _is_returned(node):
            node.replace_all_uses_with(original)
    graph.eliminate_dead_code()


def _original(node: fx.Node) -> fx.Node | None:
    """Return an earlier node with the value, sizes and strides of `node`."""
    operand = node.args[0] if node.args else None
    if not isinstance(operand, fx.Node):
        return None
    if node.target is aten.t.default and operand.target is aten.t.default:
        return operand.args[0]  # type: ignore[return-value]
    if node.target is aten.view.default and operand.target is aten.view.default:
        _shorten(node, operand)
    unchanged = node.target in _UNCHANGED or (node.target is aten.pow.Tensor_Scalar and node.args[1] == 1)
    return node.args[0] if unchanged and _looks_alike(node, node.args[0]) else None  # type: ignore[return-value, arg-type]


def _shorten(outer: fx.Node, inner: fx.Node) -> None:
    """View the original instead of a view of it; only contiguous tensors take every view."""
    original = inner.args[0]
    if isinstance(original, fx.Node) and original.meta["val"].is_contiguous():
        outer.update_arg(0, original)


def _looks_alike(node: fx.Node, other: fx.Node) -> bool:
    one, another = node.meta["val"], other.meta["val"]
    return (one.shape, one.stride(), one.dtype) == (another.shape, another.stride(), another.dtype)


def _is_returned(node: fx.Node) -> bool:
    """Whether the node, or a view of it, is an output of the graph."""
    return any(user.op == "output" or (is_view(user) and _is_returned(user)) for user in node.users)


class _Read(NamedTuple):
    """A forward value that a backward call reads: the call, and the value's place among its positional arguments."""

    reader: fx.Node
    place: int | None

    @property
    def operand(self) -> fx.Node:
        return self.reader.args[self.place]  # type: ignore[return-value, index]

    def of_shape(self) -> bool:
        if self.reader.target is aten.convolution_backward.default:
            wanted: Any = self.reader.args[-1]
            return any(self.place == place and not wanted[gradient] for gradient, place in _SERVES_ONLY)
        return self.place is not None and _SHAPE_ONLY.get(self.reader.target) == self.place

    def of_branch(self) -> bool:
        return self.place is not None and _BRANCH_ONLY.get(self.reader.target) == self.place


def read_less(graph: fx.Graph) -> None:
    """Let backward operators that use little of a forward value read no more than they use; all bits stay.

    The backward passes of pooling use the shape of their operand alone: an empty tensor does. Those of ReLU and leaky
    ReLU use which elements pass: a boolean mask does, of which a plan may keep one bit per element. Those of hardtanh
    (ReLU6) and leaky ReLU may as well read the result, where the backward pass needs it anyway. What something else
    reads in full stays as it is, since it has to be at hand. A convolution whose input needs no gradient uses the shape
    of its weight, and one with a frozen weight that of its input. Batch norm's running statistics are not read in train
    mode, and will have changed by then.
    """
    _forget_running_statistics(graph)
    reads = _reads(graph)
    whole = {base for base, found in reads.items() if not all(read.of_shape() or read.of_branch() for read in found)}
    for base, found in reads.items():
        if base in whole or base.meta["val"].device.type not in _DEVICES:
            continue
        for read in found:
            if read.of_shape():
                _read_shape(read)
            else:
                _read_branch(read, whole)
    graph.eliminate_dead_code()


def updates_state(node: fx.Node) -> bool:
    """Whether a call is a batch norm in train mode, which returns its next running statistics behind the rest."""
    return node.target is aten._native_batch_norm_legit_functional.default and bool(node.args[5])


def operands_again(node: fx.Node) -> tuple[fx.Node, ...]:
    """Return what a call reads when it runs again, where `forget_state_updates` sees to batch norms."""
    if not updates_state(node):
        return tuple(node.all_input_nodes)
    return tuple(dict.fromkeys(operand for operand in node.args[:3] if isinstance(operand, fx.Node)))


def forget_state_updates(graph: fx.Graph) -> None:
    """Let batch norms that run again, in train mode, leave the running statistics alone; all bits stay.

    They were updated when the norm ran first, and are not what they were then.
    """
    for node in graph.nodes:
        if updates_state(node):
            operand, weight, bias, _, _, _, momentum, eps = node.args
            node.target = aten._native_batch_norm_legit.no_stats
            node.args = (operand, weight, bias, True, momentum, eps)
            node.meta["val"] = node.meta["val"][:3]


def _forget_running_statistics(graph: fx.Graph) -> None:
    for target, (trains, places) in _UNREAD_IN_TRAINING.items():
        for node in graph.find_nodes(op="call_function", target=target):
            for place in places if trains(node) else ():
                node.update_arg(place, None)


def _reads(graph: fx.Graph) -> dict[fx.Node, list[_Read]]:
    """Return what the backward pass reads of each forward tensor, views of it included."""
    backward = {node for node in graph.nodes if node.op == "placeholder" and "tangents" in str(node.target)}
    found: dict[fx.Node, list[_Read]] = {}
    for node in graph.nodes:
        if node.op == "call_function" and not backward.isdisjoint(node.all_input_nodes):
            backward.add(node)
            for place, operand in _operands(node):
                if operand not in backward:
                    found.setdefault(base_of(operand), []).append(_Read(node, place))
    return found


def _operands(node: fx.Node) -> Iterator[tuple[int | None, fx.Node]]:
    """Yield the nodes among a call's arguments with their places; None for those in lists and for keywords."""
    for place, argument in enumerate(node.args):
        if isinstance(argument, fx.Node):
            yield place, argument
        else:
            yield from ((None, leaf) for leaf in pytree.tree_leaves(argument) if isinstance(leaf, fx.Node))
    yield from ((None, leaf) for leaf in pytree.tree_leaves(dict(node.kwargs)) if isinstance(leaf, fx.Node))


def _read_shape(read: _Read) -> None:
    value, graph = read.operand.meta["val"], read.reader.graph
    layout = {"dtype": value.dtype, "device": value.device}
    with graph.inserting_before(read.reader):
        empty = _call(read, aten.empty_strided.default, list(value.shape), list(value.stride()), **layout)
    read.reader.update_arg(read.place, empty)  # type: ignore[arg-type]


def _read_branch(read: _Read, whole: set[fx.Node]) -> None:
    if read.reader.target is aten.threshold_backward.default:
        _read_threshold(read)
    elif (result := _result_with_its_branches(read)) is not None and base_of(result) in whole:
        _replace(read, result)
    elif read.reader.target is aten.leaky_relu_backward.default:
        with read.reader.graph.inserting_after(read.operand):
            passes = _call(read, aten.gt.Scalar, read.operand, 0)
        _replace(read, passes)


def _read_threshold(read: _Read) -> None:
    """Read what the kernel asks, `not operand <= threshold`, which lets NaN pass."""
    operand, threshold = read.operand, read.reader.args[2]
    if not _representable(threshold, operand.meta["val"].dtype):
        # The comparison might round the threshold in another way than the kernel does.
        return
    with read.reader.graph.inserting_after(operand):
        stops = _call(read, aten.le.Scalar, operand, threshold)
    with read.reader.graph.inserting_after(stops):
        passes = _call(read, aten.logical_not.default, stops)
    _replace(read, passes, 0)


def _result_with_its_branches(read: _Read) -> fx.Node | None:
    """Return the forward call whose result lies in the same branch as the operand, element by element, if there is."""
    operand, numbers = read.operand, list(read.reader.args[2:])
    if read.reader.target is aten.hardtanh_backward.default:
        exact = all(_representable(number, operand.meta["val"].dtype) for number in numbers)
        return _user(operand, aten.hardtanh.default, lambda low=-1, high=1: exact and [low, high] == numbers)
    return _user(operand, aten.leaky_relu.default, lambda slope=0.01: slope >= 0)


def _user(operand: Any, target: Any, accepts: Callable[..., bool]) -> fx.Node | None:
    return next((user for user in operand.users if user.target is target and accepts(*user.args[1:])), None)


def _representable(number: Any, dtype: torch.dtype) -> bool:
    """Whether a dtype has this very number."""
    if not dtype.is_floating_point or not number:
        return not number
    info, significand = torch.finfo(dtype), 2 * math.frexp(number)[0]
    return info.tiny <= abs(number) <= info.max and (significand / info.eps).is_integer()


def _call(read: _Read, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """Add a call that stands for what is read, with its fake value and the origin of the reader."""
    node = read.reader.graph.call_function(target, args, kwargs)
    node.meta = {**read.reader.meta, "val": _fake(read, target, args, kwargs)}
    return node


def _fake(read: _Read, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    fake_args, fake_kwargs = fx.node.map_arg((args, kwargs), lambda operand: operand.meta["val"])
    with read.operand.meta["val"].fake_mode:
        return target(*fake_args, **fake_kwargs)


def _replace(read: _Read, operand: fx.Node, *changed: Any) -> None:
    """Let the reader read `operand`, and `changed` behind it, provided that its result looks the same."""
    reader, place = read.reader, read.place or 0
    args = (*reader.args[:place], operand, *changed, *reader.args[place + 1 + len(changed) :])
    value, before = _fake(read, reader.target, args, reader.kwargs), reader.meta["val"]
    if (value.stride(), value.dtype) == (before.stride(), before.dtype):
        reader.args = args
