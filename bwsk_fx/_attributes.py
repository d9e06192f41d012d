"""Attributes of modules that recorded Python code reads: a graph holds what they were."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass

from torch import nn

from bwsk_fx.signature import frozen

_OWN = frozenset(vars(nn.Module()))


@dataclass(frozen=True)
class ReadAttributes:
    """Attributes of a model's modules, parameters and buffers apart, and what they were.

    Attributes:
        values: Module, full name, name and value of each.
    """

    values: tuple[tuple[nn.Module, str, str, Hashable], ...] = ()

    @classmethod
    def of(cls, model: nn.Module, names: Iterable[tuple[str, str]]) -> ReadAttributes:
        """Read attributes, by the paths of their modules and their names."""
        found = ((model.get_submodule(path), path, name) for path, name in names if name not in _OWN)
        return cls(
            tuple((module, f"{path}.{name}".lstrip("."), name, _value(module, name)) for module, path, name in found)
        )

    def still(self) -> ReadAttributes:
        """Return those that are what they were."""
        return ReadAttributes(tuple(each for each in self.values if _value(each[0], each[2]) == each[3]))

    def changed(self) -> str | None:
        """Name the first that is not what it was."""
        changed = (full for module, full, name, value in self.values if _value(module, name) != value)
        return next(changed, None)


def _value(module: nn.Module, name: str) -> Hashable:
    held = vars(module)
    return (True, frozen(held[name])) if name in held else (False,)
