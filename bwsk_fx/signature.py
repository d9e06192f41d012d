"""What makes two regions equal, so that one plan serves both: structure, and the settings of their modules."""

from __future__ import annotations

import enum
import types
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, enum.Enum, types.FunctionType)
_PLAIN += (types.BuiltinFunctionType,)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def structure_of(subgraph: fx.GraphModule) -> Hashable:
    """Return what a subgraph computes, without the names of its nodes and modules.

    Leaf modules count by class and by the order in which they first run. Their settings are not part of it, see
    `Settings`.
    """
    order: dict[fx.Node, int] = {}
    targets: dict[str, int] = {}
    rows = []
    for node in subgraph.graph.nodes:
        rows.append((node.op, _target(node, subgraph, targets), _arguments(node, order)))
        order[node] = len(order)
    return tuple(rows)


@dataclass(frozen=True)
class Settings:
    """The leaf modules of a subgraph, and which of their attributes decide what they compute.

    Attributes:
        modules: (path, module), in order of first use.
        names: Per module, its attributes with plain values.
        identities: The modules that have other attributes too: nothing shows that two of them are equal.
    """

    modules: tuple[tuple[str, nn.Module], ...]
    names: tuple[tuple[str, ...], ...]
    identities: tuple[int, ...]

    @classmethod
    def of(cls, subgraph: fx.GraphModule) -> Settings:
        """Read the leaf modules of a subgraph."""
        paths = dict.fromkeys(node.target for node in subgraph.graph.nodes if node.op == "call_module")
        modules = tuple((path, subgraph.get_submodule(path)) for path in paths)
        names = tuple(_plain_attributes(module) for _, module in modules)
        identities = tuple(id(module) for _, module in modules if not _is_plain(module))
        return cls(modules, names, identities)

    def current(self) -> Hashable:
        """Return the settings as they are now, train and eval mode included."""
        values = (
            tuple(module.__dict__[name] for name in names)
            for (_, module), names in zip(self.modules, self.names, strict=True)
        )
        return tuple(values), self.identities

    def hooked_module(self) -> str | None:
        """Return the path of a module with hooks, which a fused region would not run."""
        return next((path for path, module in self.modules if any(getattr(module, hooks) for hooks in _HOOKS)), None)


def _target(node: fx.Node, subgraph: fx.GraphModule, targets: dict[str, int]) -> Hashable:
    if node.op == "call_module":
        index = targets.setdefault(str(node.target), len(targets))
        return index, type(subgraph.get_submodule(str(node.target)))
    if node.op == "get_attr":
        return targets.setdefault(str(node.target), len(targets))
    return None if node.op == "placeholder" else node.target


def _arguments(node: fx.Node, order: dict[fx.Node, int]) -> Hashable:
    leaves, spec = pytree.tree_flatten((node.args, dict(node.kwargs)))
    # The type tells a node's number from a constant of the same value.
    return str(spec), tuple(("node", order[leaf]) if isinstance(leaf, fx.Node) else _constant(leaf) for leaf in leaves)


def _constant(leaf: Any) -> Hashable:
    if isinstance(leaf, slice):
        return "slice", repr(leaf)
    return type(leaf), leaf if isinstance(leaf, Hashable) else id(leaf)


def _plain_attributes(module: nn.Module) -> tuple[str, ...]:
    return tuple(name for name, value in module.__dict__.items() if _is_setting(name) and _is_plain_value(value))


def _is_plain(module: nn.Module) -> bool:
    return all(_is_plain_value(value) for name, value in module.__dict__.items() if _is_setting(name))


def _is_setting(name: str) -> bool:
    # Names with an underscore are nn.Module's own dictionaries, or private to the module's class and read anew.
    return not name.startswith("_")


def _is_plain_value(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain_value, value))
    return isinstance(value, _PLAIN)
