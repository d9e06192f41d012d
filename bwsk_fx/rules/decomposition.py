"""A torch-level call as the ATen operators that it dispatches to, for operators without a rule of their own."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from bwsk_fx import _torch_private as private
from bwsk_fx._side_effects import emptied_caches, kept_attributes, kept_buffers
from bwsk_fx._state_watch import kept_python_states
from bwsk_fx.errors import first_line
from bwsk_fx.rules.random import is_random
from bwsk_fx.rules.registry import Call
from bwsk_fx.rules.single import Target, run_target
from bwsk_fx.signature import frozen, settings_of, tensors_of


class UndecomposableError(Exception):
    """A call has no decomposition that rules could read; the message says why."""


@dataclass(frozen=True)
class Decomposition:
    """The ATen operators of one call as an fx graph.

    Attributes:
        graph: Placeholders for operands and static tensors, then one node per operator; every node has `meta["val"]`.
        operands: The placeholders of the dynamic operands, in the order of `Call.operands`.
        statics: The tensors behind the other placeholders.
        dynamic: All nodes whose values are dynamic.
        outputs: The nodes that hold the call's results.
    """

    graph: fx.Graph
    operands: tuple[fx.Node, ...]
    statics: Mapping[fx.Node, Tensor]
    dynamic: frozenset[fx.Node]
    outputs: tuple[fx.Node, ...]

    def steps(self) -> Iterator[fx.Node]:
        """Yield the operators in order, without the parts of operators with several results."""
        return (node for node in self.graph.nodes if node.op == "call_function")

    def call(self, step: fx.Node) -> Call:
        """Return a step as rules see it."""
        return Call(step, None, self.dynamic)


def decompose(
    target: Target, args: Sequence[Any], kwargs: Mapping[str, Any], operands: Sequence[Tensor]
) -> Decomposition:
    """Run a call on the values at hand and record the ATen operators underneath.

    Args:
        target: A module, a function, or the name of a method.
        args: Positional arguments. Fake tensors stay fake, and nothing is computed then.
        kwargs: Keyword arguments.
        operands: The dynamic operands, as they stand among the arguments.

    Raises:
        UndecomposableError: The call cannot be run on these values, or writes to a tensor that has views.
    """
    recorder = _Steps(operands)
    with _undisturbed(target, operands), recorder:
        try:
            result = run_target(target, args, kwargs)
        except UndecomposableError:
            raise
        except Exception as error:
            raise UndecomposableError(
                f"it cannot be decomposed: {type(error).__name__}: {first_line(error)}"
            ) from error
    return recorder.finish(result)


@dataclass(frozen=True)
class Template:
    """The decomposition of a module, for all modules that differ from it in nothing but their tensors' values.

    Attributes:
        parts: The decomposition.
        names: The placeholders that stand for the module's own parameters and buffers, with their names.
    """

    parts: Decomposition
    names: Mapping[fx.Node, str]

    @classmethod
    def of(cls, parts: Decomposition, module: nn.Module) -> Template:
        """Find the module's own tensors among the static ones of its decomposition."""
        own = {id(tensor): name for name, tensor in tensors_of(module).items()}
        return cls(parts, {node: own[id(tensor)] for node, tensor in parts.statics.items() if id(tensor) in own})

    def of_module(self, module: nn.Module) -> Decomposition:
        """Return the decomposition with the tensors of `module`; what was returned before has them as well."""
        tensors = tensors_of(module)
        for node, name in self.names.items():
            node.meta["val"] = tensors[name]
        statics = {**self.parts.statics, **{node: node.meta["val"] for node in self.names}}
        return replace(self.parts, statics=statics)


def module_key(module: nn.Module) -> Hashable:
    """Return what decides how a module computes: classes, settings, and the kinds of its parameters and buffers."""
    own = {name: _kind(tensor) for name, tensor in tensors_of(module).items()}
    return tuple(settings_of(part) for part in module.modules()), tuple(own.items())


def argument_key(values: Any) -> Hashable:
    """Return what decides how a call computes: shapes, dtypes and strides of tensors, and all other values."""
    leaves, spec = pytree.tree_flatten(values)
    return str(spec), tuple(_kind(leaf) if isinstance(leaf, Tensor) else frozen(leaf) for leaf in leaves)


def _kind(tensor: Tensor) -> Hashable:
    return str(tensor.shape), tensor.dtype, str(tensor.stride()), tensor.device, tensor.requires_grad


class _Steps(TorchDispatchMode):
    """Records every ATen operator that is dispatched as a node of `graph`."""

    def __init__(self, operands: Sequence[Tensor]) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.statics: dict[fx.Node, Tensor] = {}
        self.dynamic: set[fx.Node] = set()
        self._nodes: dict[int, fx.Node] = {}
        self._alive: list[Tensor] = []
        self.operands = tuple(self._placeholder(f"operand_{index}", tensor) for index, tensor in enumerate(operands))
        self.dynamic.update(self.operands)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Run `func` and append it to the graph."""
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            self._before_write(func, args, kwargs)
        arguments = pytree.tree_map_only(Tensor, self._node_of, (args, kwargs))
        result = func(*args, **kwargs)
        self._bind(self.graph.call_function(func, *arguments), result)
        return result

    def finish(self, result: Any) -> Decomposition:
        """Return what was recorded, given what the call returned."""
        leaves = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        outputs = tuple(dict.fromkeys(self._node_of(leaf) for leaf in leaves))
        return Decomposition(self.graph, self.operands, self.statics, frozenset(self.dynamic), outputs)

    def _bind(self, node: fx.Node, result: Any) -> None:
        node.meta["val"] = result
        if any(operand in self.dynamic for operand in node.all_input_nodes) or is_random(
            Call(node, None, self.dynamic)
        ):
            self.dynamic.add(node)
        if isinstance(result, Tensor):
            self._remember(result, node)
        elif isinstance(result, (tuple, list)):
            for index, item in enumerate(result):
                if isinstance(item, (Tensor, tuple, list)):
                    self._bind(self.graph.call_function(operator.getitem, (node, index)), item)

    def _node_of(self, tensor: Tensor) -> fx.Node:
        if id(tensor) not in self._nodes:
            node = self._placeholder(f"static_{len(self.statics)}", tensor)
            self.statics[node] = tensor
        return self._nodes[id(tensor)]

    def _placeholder(self, name: str, tensor: Tensor) -> fx.Node:
        node = self.graph.placeholder(name)
        node.meta["val"] = tensor
        self._remember(tensor, node)
        return node

    def _remember(self, tensor: Tensor, node: fx.Node) -> None:
        self._nodes[id(tensor)] = node
        self._alive.append(tensor)  # an id stays ours only as long as its tensor lives

    def _before_write(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        """Keep the values that a write replaces; a write to a tensor that others share cannot be followed."""
        values = (*args, *kwargs.values())
        for argument, value in zip(func._schema.arguments, values, strict=False):
            if argument.alias_info is None or not argument.alias_info.is_write or not isinstance(value, Tensor):
                continue
            if any(other is not value and private.shares_storage(other, value) for other in self._alive):
                raise UndecomposableError(f"its decomposition writes to a tensor that has views ({func})")
            self._node_of(value).meta["val"] = value.clone()


@contextmanager
def _undisturbed(target: Target, operands: Sequence[Tensor]) -> Iterator[None]:
    """Run under the operands' fake mode, if any, and give a module its attributes and buffers back."""
    mode = next((operand.fake_mode for operand in operands if hasattr(operand, "fake_mode")), nullcontext())
    module = target if isinstance(target, nn.Module) else None
    caches = nullcontext() if module is None else emptied_caches(module)
    with torch.no_grad(), torch.random.fork_rng(devices=()), untouched(module), caches, mode, warnings.catch_warnings():
        # Sizes that vary with the batch are numbers here; nobody runs this graph.
        warnings.filterwarnings("ignore", message="Raw SymInt value")
        yield


@contextmanager
def untouched(module: nn.Module | None) -> Iterator[None]:
    """Give a module and its children their attributes and the values of their buffers back at the end."""
    if module is None:
        yield
        return
    # Attributes come back first, so that values go into the buffers that were there before.
    with kept_buffers(module), kept_attributes(module), kept_python_states():
        yield
