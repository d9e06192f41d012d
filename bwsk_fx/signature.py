"""What makes two regions equal, so that one plan serves both: structure, and the settings of their modules."""

from __future__ import annotations

import enum
import operator
from collections.abc import Hashable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, enum.Enum)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Parameters, buffers, children and hooks; everything else that a module holds may decide what it computes.
_OWN = frozenset(vars(nn.Module())) - {"training"}


def structure_of(subgraph: fx.GraphModule) -> Hashable:
    """Return what a subgraph computes, without the names of its nodes and modules.

    Leaf modules count by the order in which they first run. Their classes and settings are not part of it, see
    `Settings`.
    """
    order: dict[fx.Node, int] = {}
    targets: dict[str, int] = {}
    rows = []
    for node in subgraph.graph.nodes:
        rows.append((node.op, _target(node, targets), _arguments(node, order)))
        order[node] = len(order)
    return tuple(rows)


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers under all of their names; a tied one has several."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    return parameters | dict(module.named_buffers(remove_duplicate=False))


@dataclass(frozen=True)
class Settings:
    """The leaf modules of a subgraph, and which of their attributes decide what they compute.

    It is asked in every step, and most often nothing has changed: answers are kept with the very objects that they
    were read from.

    Attributes:
        leaves: (path, module), in order of first use.
    """

    leaves: tuple[tuple[str, nn.Module], ...]
    _known: dict[nn.Module, _Known] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, subgraph: fx.GraphModule) -> Settings:
        """Find the leaf modules of a subgraph."""
        paths = dict.fromkeys(str(node.target) for node in subgraph.graph.nodes if node.op == "call_module")
        return cls(tuple((path, subgraph.get_submodule(path)) for path in paths))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the parameters and buffers as they are now, in order of first use, tied ones under every name."""
        for path, module in self.modules():
            for members in (module._parameters, module._buffers):
                yield from ((f"{path}.{name}", tensor) for name, tensor in members.items() if tensor is not None)

    def current(self) -> Hashable:
        """Return classes and settings as they are now, train and eval mode included."""
        return tuple(self._setting(module) for _, module in self.modules())

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield the leaves and what is in them."""
        for path, leaf in self.leaves:
            if leaf._modules:
                yield from leaf.named_modules(prefix=path, remove_duplicate=False)
            else:
                yield path, leaf

    def _setting(self, module: nn.Module) -> Hashable:
        known = self._known.get(module)
        if known is None or not known.holds(module):
            known = self._known[module] = _Known.of(module)
        return known.setting


@dataclass(frozen=True)
class _Known:
    """The settings of a module, and the objects that they were read from.

    Attributes:
        sources: Values of its attributes and names of its members; none where a value could change in place.
        setting: What `settings_of` made of them.
    """

    sources: tuple[object, ...] | None
    setting: Hashable

    @classmethod
    def of(cls, module: nn.Module) -> _Known:
        own = (value for name, value in vars(module).items() if name not in _OWN)
        return cls(_sources(module) if all(map(_is_fixed, own)) else None, settings_of(module))

    def holds(self, module: nn.Module) -> bool:
        if self.sources is None:
            return False
        now = _sources(module)
        return len(now) == len(self.sources) and all(map(operator.is_, now, self.sources))


def _sources(module: nn.Module) -> tuple[object, ...]:
    held = vars(module)
    return (*held, *held.values(), *module._modules, *module._parameters, *module._buffers)


def _is_fixed(value: object) -> bool:
    """Whether `frozen` goes by what an object is, or by what cannot change in it."""
    if isinstance(value, tuple):
        return all(map(_is_fixed, value))
    return not isinstance(value, (list, Mapping, Set))


@dataclass(frozen=True, eq=False)
class _Same:
    """An object that equals itself alone, kept alive so that no other takes its place."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def _target(node: fx.Node, targets: dict[str, int]) -> Hashable:
    if node.op in ("call_module", "get_attr"):
        return targets.setdefault(str(node.target), len(targets))
    return None if node.op == "placeholder" else node.target


def _arguments(node: fx.Node, order: dict[fx.Node, int]) -> Hashable:
    leaves, spec = pytree.tree_flatten((node.args, dict(node.kwargs)))
    # The type tells a node's number from a constant of the same value.
    return str(spec), tuple(("node", order[leaf]) if isinstance(leaf, fx.Node) else frozen(leaf) for leaf in leaves)


def settings_of(module: nn.Module) -> Hashable:
    """Return the class of a module, the names of its tensors and children, and every other attribute."""
    attributes = tuple((name, frozen(value)) for name, value in vars(module).items() if name not in _OWN)
    return type(module), tuple(module._modules), tuple(module._parameters), tuple(module._buffers), attributes


def frozen(value: Any) -> Hashable:
    """Return a stand-in that equals another one only where nothing can tell the values apart.

    Containers compare by content, objects that are not plain by identity.
    """
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, slice):
        return slice, frozen((value.start, value.stop, value.step))
    if isinstance(value, (tuple, list)):
        return type(value), tuple(map(frozen, value))
    if isinstance(value, Mapping):
        return type(value), tuple((frozen(key), frozen(entry)) for key, entry in value.items())
    if isinstance(value, Set):
        return type(value), frozenset(map(frozen, value))
    return _Same(value)
