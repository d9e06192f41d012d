"""What the nodes of a torch-level graph cost, and the weights that they use.

Nodes are run on fake tensors, so nothing is computed. FLOPs are those of `torch.utils.flop_counter`: two for each
multiplication and addition of a product, none for elementwise work.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import torch
from torch import fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from bwsk_fx import _torch_private as private
from bwsk_fx.axes import Step
from bwsk_fx.rules.axis import Value
from bwsk_fx.rules.axis_table import Axis, AxisTable, Extent, Layout, extent

_BATCHES = (2, 3, 4)  # three points fix a quadratic; a batch of one has special cases (BatchNorm)


@dataclass(frozen=True)
class Weight:
    """A trainable parameter as a node uses it.

    Attributes:
        name: Its name in the model.
        shape: Its sizes.
        bytes: Its size in bytes, which is its gradient's, too.
        layout: Its axes, where the node sees it as an operand; empty for parameters of a module.
    """

    name: str
    shape: tuple[int, ...]
    bytes: int
    layout: Layout = ()


@dataclass(frozen=True)
class Growth:
    """A quantity that is a quadratic polynomial of the batch size.

    Attributes:
        values: The quantity at batch sizes of 2, 3 and 4.
    """

    values: tuple[int, int, int]

    def at(self, batch: int) -> int:
        """Return the quantity at a batch size, by Newton's forward differences."""
        first, second, third = self.values
        step, bend = second - first, third - 2 * second + first
        place = batch - _BATCHES[0]
        return first + place * step + place * (place - 1) // 2 * bend


@dataclass(frozen=True)
class Cost:
    """What one run of a node takes.

    Attributes:
        flops: Floating-point operations of products.
        bytes: What it reads and writes, weights included; views move nothing.
        known: Whether the node could be run on fake tensors; if not, `flops` is 0.
    """

    flops: Growth
    bytes: Growth
    known: bool = True


@dataclass(frozen=True)
class Operation:
    """One step with where its operands come from.

    Attributes:
        index: Its place among the steps.
        step: The step.
        sources: For each operand that a step computes, the index of that step, and the operand.
        weights: The trainable parameters that it uses.
        static: Whether it follows from parameters and constants alone.
        learns: Whether a gradient flows back through it.
    """

    index: int
    step: Step
    sources: tuple[tuple[int, Value], ...]
    weights: tuple[Weight, ...]
    static: bool
    learns: bool

    @property
    def name(self) -> str:
        """The node's name."""
        return self.step.node.name

    @property
    def is_input(self) -> bool:
        """Whether it is an input of the graph."""
        return self.step.node.op == "placeholder"


def operations(graph: fx.GraphModule, steps: Sequence[Step]) -> tuple[Operation, ...]:
    """Return the steps of a graph with their operands' origins and their weights."""
    names = {id(parameter): name for name, parameter in graph.named_parameters()}
    found: list[Operation] = []
    places: dict[fx.Node, int] = {}
    for index, step in enumerate(steps):
        sources = tuple((places[value.node], value) for value in step.inputs if value.node in places)
        weights = tuple(_weights(step, names))
        origins = [found[source] for source, _ in sources]
        is_input = step.node.op == "placeholder"
        learns = bool(weights) or any(origin.learns for origin in origins)
        static = not is_input and all(origin.static for origin in origins)
        found.append(Operation(index, step, sources, weights, static, learns and _is_differentiable(step)))
        places[step.node] = index
    return tuple(found)


def _weights(step: Step, names: Mapping[int, str]) -> Iterator[Weight]:
    if step.node.op == "call_module":
        module = _owner(step.node).get_submodule(str(step.node.target))
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                yield _weight(names.get(id(parameter), f"{step.node.target}.{name}"), parameter)
    for value in step.inputs:
        if value.node.op == "get_attr":
            parameter = pytree.tree_leaves(_attribute(value.node))[0]
            if isinstance(parameter, torch.Tensor) and parameter.requires_grad:
                yield _weight(names.get(id(parameter), str(value.node.target)), parameter, value.layout)


def _weight(name: str, parameter: torch.Tensor, layout: Layout = ()) -> Weight:
    return Weight(name, tuple(parameter.shape), parameter.numel() * parameter.element_size(), layout)


def _owner(node: fx.Node) -> fx.GraphModule:
    owner = node.graph.owning_module
    assert owner is not None
    return owner


def _attribute(node: fx.Node) -> Any:
    path, _, name = str(node.target).rpartition(".")
    return getattr(_owner(node).get_submodule(path), name)


def _is_differentiable(step: Step) -> bool:
    values = [leaf for leaf in pytree.tree_leaves(step.node.meta["val"]) if isinstance(leaf, torch.Tensor)]
    return step.target != "detach" and any(value.is_floating_point() or value.is_complex() for value in values)


@lru_cache(maxsize=4096)
def size_at(size: Extent, batch: int) -> int:
    """Return a size at a batch size."""
    return size if isinstance(size, int) else int(size.subs(dict.fromkeys(size.free_symbols, batch)))


def bytes_at(value: Value, batch: int) -> int:
    """Return the bytes of a tensor at a batch size."""
    return math.prod(size_at(size, batch) for size in value.shape) * value.itemsize


def closure(axis: Axis, axes: AxisTable) -> Iterator[Axis]:
    """Yield an axis with all that it is made of."""
    yield axes.find(axis)
    for part, _ in axes.parts(axis):
        yield from closure(part, axes)


def has(layout: Iterable[Axis | None], axis: Axis, axes: AxisTable) -> bool:
    """Whether a dimension is an axis, or is made of it and others."""
    return any(axis in closure(place, axes) for place in layout if place is not None)


def axis_size(value: Value, axis: Axis, axes: AxisTable) -> Extent | None:
    """Return the size of an axis in a tensor; None where the tensor does not have it.

    In a dimension that is made of several axes it is the size of the part.
    """
    for place, size in zip(value.layout, value.shape, strict=True):
        if has([place], axis, axes):
            assert place is not None
            return _part_size(place, size, axis, axes)
    return None


def _part_size(place: Axis, size: Extent, axis: Axis, axes: AxisTable) -> Extent:
    if axes.find(place) == axis:
        return size
    return next(_part_size(part, inner, axis, axes) for part, inner in axes.parts(place) if has([part], axis, axes))


class Trials:
    """Runs single nodes on fake tensors of chosen sizes; what equal calls cost is found once."""

    def __init__(self, axes: AxisTable) -> None:
        self._axes = axes
        self._mode = private.fake_mode()
        self._costs: dict[Any, Cost] = {}
        self._stretched: dict[Any, bool] = {}

    def cost(self, operation: Operation) -> Cost:
        """Return what a node costs."""
        key = _key(operation.step)
        if key not in self._costs:
            self._costs[key] = self._measured(operation)
        return self._costs[key]

    def stretches(self, operation: Operation, axis: Axis) -> bool:
        """Whether a node still runs when an axis of its operands is twice as long and its weights are as they are.

        Weights that carry an axis fix its size, and weights that lack it serve any.
        """
        step = operation.step
        doubled = tuple(
            tuple(value.node.op != "get_attr" and has([place], axis, self._axes) for place in value.layout)
            for value in step.inputs
        )
        key = (_key(step), doubled)
        if key not in self._stretched:
            self._stretched[key] = self._runs(step, doubled)
        return self._stretched[key]

    def _runs(self, step: Step, doubled: Sequence[Sequence[bool]]) -> bool:
        given = [node for node in _nodes(step) if isinstance(node.meta["val"], torch.Tensor)]
        if len(given) != len(doubled):
            return False
        sizes: dict[fx.Node, list[int]] = {}
        for node, dims in zip(given, doubled, strict=True):
            whole = [size_at(extent(size), _BATCHES[0]) for size in node.meta["val"].shape]
            sizes[node] = [size * 2 if double else size for size, double in zip(whole, dims, strict=True)]
        try:
            with torch.no_grad():
                _Run(
                    step,
                    _BATCHES[0],
                    lambda tensor, shape: torch.empty(shape, dtype=tensor.dtype, device="meta"),
                    sizes,
                )
        except Exception:
            # Whatever the operator raises, it does not run on another size.
            return False
        return True

    def _measured(self, operation: Operation) -> Cost:
        step = operation.step
        sizes = [[bytes_at(value, batch) for value in {*step.inputs, *step.results}] for batch in _BATCHES]
        weights = sum(weight.bytes for weight in operation.weights if not weight.layout)
        traffic = Growth(*[tuple(sum(found) + weights for found in sizes)])  # type: ignore[arg-type]
        if operation.is_input:
            return Cost(Growth((0, 0, 0)), Growth((0, 0, 0)))
        try:
            flops, views = zip(*(self._counted(step, batch) for batch in _BATCHES), strict=True)
        except Exception:
            # A leaf whose result depends on data cannot run on fakes; the report says which.
            return Cost(Growth((0, 0, 0)), traffic, known=False)
        return Cost(Growth(flops), Growth((0, 0, 0)) if all(views) else traffic)

    def _counted(self, step: Step, batch: int) -> tuple[int, bool]:
        with self._mode, torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            run = _Run(step, batch, _on_device)
        return counter.get_total_flops(), _is_view(run.given, run.result)


class _Run:
    """Runs one node on tensors without numbers.

    Attributes:
        given: The operands.
        result: What it returned.
    """

    def __init__(
        self,
        step: Step,
        batch: int,
        make: Callable[[torch.Tensor, Sequence[int]], torch.Tensor],
        sizes: Mapping[fx.Node, Sequence[int]] = MappingProxyType({}),
    ) -> None:
        self._batch, self._make = batch, make
        operands = {node: self._twin(node.meta["val"], sizes.get(node)) for node in _nodes(step)}
        self.given = [leaf for leaf in pytree.tree_leaves(operands) if isinstance(leaf, torch.Tensor)]
        node = step.node
        args, kwargs = (fx.node.map_arg(part, operands.__getitem__) for part in (node.args, node.kwargs))
        self.result = self._call(node, args, kwargs)

    def _twin(self, value: Any, sizes: Sequence[int] | None = None) -> Any:
        def twin(leaf: Any) -> Any:
            if isinstance(leaf, torch.Tensor):
                return self._make(leaf, sizes or [size_at(extent(size), self._batch) for size in leaf.shape])
            return size_at(extent(leaf), self._batch) if isinstance(leaf, torch.SymInt) else leaf

        return pytree.tree_map(twin, value)

    def _call(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        if node.op == "call_module":
            module = _owner(node).get_submodule(str(node.target))
            twins = self._twin({**dict(module.named_parameters()), **dict(module.named_buffers())})
            return torch.func.functional_call(module, twins, args, kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)


def _on_meta(tensor: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    return torch.empty(shape, dtype=tensor.dtype, device="meta")


def _on_device(tensor: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    return torch.empty(shape, dtype=tensor.dtype, device=tensor.device)


def _nodes(step: Step) -> list[fx.Node]:
    leaves = pytree.tree_leaves((step.node.args, dict(step.node.kwargs)))
    return [leaf for leaf in leaves if isinstance(leaf, fx.Node)]


def _is_view(given: Sequence[torch.Tensor], result: Any) -> bool:
    made = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
    if any(tensor._version for tensor in given):
        return False
    return all(any(private.shares_storage(tensor, operand) for operand in given) for tensor in made)


def _key(step: Step) -> Any:
    """Return what tells a call from one that may cost otherwise."""
    node = step.node
    target = _settings(_owner(node).get_submodule(str(node.target))) if node.op == "call_module" else node.target
    leaves, structure = pytree.tree_flatten((node.args, dict(node.kwargs)))
    return target, node.op, str(structure), tuple(map(_leaf_key, leaves))


def _leaf_key(leaf: Any) -> Any:
    if not isinstance(leaf, fx.Node):
        return repr(leaf)
    values = pytree.tree_leaves(leaf.meta["val"])
    return tuple((str(value.shape), value.dtype) if isinstance(value, torch.Tensor) else str(value) for value in values)


def _settings(module: nn.Module) -> Any:
    tensors = tuple((name, tuple(tensor.shape)) for name, tensor in module.state_dict(keep_vars=True).items())
    kinds = tuple((type(child), *map(_setting, _public(child))) for child in module.modules())
    return kinds, tensors


def _public(module: nn.Module) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in vars(module).items() if not name.startswith("_")]


def _setting(item: tuple[str, Any]) -> tuple[str, Any]:
    name, value = item
    plain = isinstance(value, (bool, int, float, str, type(None), torch.dtype))
    return name, (repr(value) if plain or isinstance(value, tuple) else id(value))
