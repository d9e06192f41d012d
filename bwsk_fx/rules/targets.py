"""Registries of rules, and the keys under which they find the operators of a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn

from bwsk_fx.errors import RuleError

Rule = TypeVar("Rule", bound=Callable[..., Any])


class Registry(dict[Any, Rule]):
    """Rules by target, filled while the family files are imported and never after.

    Attributes:
        kind: What the rules are called in errors.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def register(self, *targets: Any, ops: str = "", methods: str = "", atens: str = "") -> Callable[[Rule], Rule]:
        """Register the decorated function as the rule of operators.

        Args:
            *targets: Module classes, functions, or the full names of module classes that are not imported here.
            ops: Space-separated names that are functions of `torch`, methods of `Tensor` and, where it has them, ATen
                operators alike.
            methods: Space-separated names of `Tensor` methods.
            atens: Space-separated names of ATen operators, for all of their overloads.

        Raises:
            RuleError: A target has a rule already.
        """
        keys = [*targets, *map(method, methods.split()), *map(aten_name, atens.split())]
        for name in ops.split():
            keys += [getattr(torch, name), method(name)]
            keys += [aten_name(name)] if hasattr(torch.ops.aten, name) else []

        def add(rule: Rule) -> Rule:
            for key in keys:
                if key in self:
                    raise RuleError(f"{key} already has the {self.kind} '{rule_name(self[key])}'")
            self.update(dict.fromkeys(keys, rule))
            return rule

        return add

    def of(self, target: Any) -> Rule | None:
        """Return the rule of a module, a function or a method's name; None where there is none."""
        return next((self[key] for key in _keys(target) if key in self), None)


def method(name: str) -> str:
    """Return the registries' key of a `Tensor` method."""
    return f"Tensor.{name}"


def aten_name(name: str) -> str:
    """Return the registries' key of an ATen operator, whatever its overload."""
    return f"aten.{name}"


def operator_name(target: Any) -> str:
    """Return the name of a function, a method (a text) or an ATen operator, for all of its overloads; else nothing."""
    packet = getattr(target, "overloadpacket", target)
    return packet if isinstance(packet, str) else getattr(packet, "__name__", "")


def rule_name(rule: Callable[..., Any]) -> str:
    """Return a rule's name: its family and its function."""
    return f"{rule.__module__.rpartition('.')[2]}.{rule.__name__}"


def _keys(target: Any) -> Iterator[Any]:
    if isinstance(target, str):
        # An in-place method computes the value of its plain twin.
        yield from (method(target), method(target.removesuffix("_")))
    elif isinstance(target, torch._ops.OpOverload):
        name = target.overloadpacket.__name__
        yield from (target, aten_name(name), aten_name(name.removesuffix("_")), aten_name(name.removesuffix("_copy")))
    elif not isinstance(target, nn.Module):
        yield target
        yield from _aliases(target)
    else:
        for base in type(target).__mro__:
            # A subclass shares its base's rule as long as it shares its forward.
            if getattr(base, "forward", None) is type(target).forward:
                yield from (base, f"{base.__module__}.{base.__qualname__}")


def _aliases(function: Any) -> Iterator[Any]:
    """Yield the keys of a method that is called as a function, and of the plain twin of an in-place function."""
    name = getattr(function, "__name__", "")
    if getattr(torch.Tensor, name, None) is function:
        yield from _keys(name)
    twin = getattr(torch, name.removesuffix("_"), None)
    if name.endswith("_") and getattr(torch, name, None) is function and twin is not None:
        yield twin
