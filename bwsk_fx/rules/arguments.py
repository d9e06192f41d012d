"""What a node is called with, whether its arguments are nodes or values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree


class Arguments:
    """Access to the arguments of a call and the attributes of its module.

    Attributes:
        target: The function, the method's name, or the module itself.
        module: The leaf module of a `call_module` node, else None.
        args: Positional arguments.
        kwargs: Keyword arguments.
    """

    target: Any
    module: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def argument(self, index: int, name: str, default: Any = None) -> Any:
        """Return a function's argument, given by position or by name."""
        return self.args[index] if index < len(self.args) else self.kwargs.get(name, default)

    def option(self, index: int, name: str, default: Any = None) -> Any:
        """Return a module's attribute, or a function's argument."""
        return self.argument(index, name, default) if self.module is None else getattr(self.module, name, default)

    def tensors(self) -> Iterator[torch.Tensor]:
        """Yield the tensors among the arguments."""
        leaves = pytree.tree_leaves((self.args, dict(self.kwargs)))
        return (leaf for leaf in leaves if isinstance(leaf, torch.Tensor))
