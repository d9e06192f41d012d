"""Hooks on modules: which of them a graph goes on calling, and which it would lose."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from bwsk_fx import _torch_private as private
from bwsk_fx.signature import HOOKS

_TABLES = tuple(name for name, value in vars(nn.Module()).items() if isinstance(value, OrderedDict))
# They collect what `output_hidden_states=True` and its like return, which is recorded, and do nothing at other times.
_RECORDED = "transformers.utils.output_capturing"


def is_hooked(module: nn.Module) -> bool:
    """Whether a module itself carries hooks that run around its calls."""
    held = vars(module)
    return any(_counts(hook) for name in HOOKS if held[name] for hook in held[name].values())


def hooked_inside(module: nn.Module) -> bool:
    """Whether a module or anything in it carries hooks."""
    return any(map(is_hooked, module.modules()))


def lost_hook(modules: Iterable[tuple[str, nn.Module]]) -> str | None:
    """Name the first hook that a graph would lose: one on these modules, or on all modules of the process.

    Args:
        modules: Paths and modules whose Python code is recorded, so that nothing calls them.

    Returns:
        What carries it and which function it is; None where no hook would be lost.
    """
    for path, module in modules:
        for name in HOOKS:
            for hook in filter(_counts, vars(module)[name].values()):
                what = f"module '{path}' ({type(module).__name__})" if path else f"the {type(module).__name__} itself"
                return f"{what} carries the hook {_named(hook)}"
    for hook in private.global_module_hooks():
        # PyTorch's own tools, such as the counter of FLOPs, look on.
        if not _home(hook).startswith("torch."):
            return f"a hook on all modules of this process is registered, {_named(hook)}"
    return None


@contextmanager
def without_hooks(model: nn.Module) -> Iterator[None]:
    """Let no hook see a run that is no step of training; hooks that the run itself registers are taken off again."""
    tables = [vars(module)[name] for module in model.modules() for name in _TABLES]
    before = [(table, table.copy()) for table in tables]
    for module in model.modules():
        for name in HOOKS:
            for key in [key for key, hook in vars(module)[name].items() if _counts(hook)]:
                del vars(module)[name][key]
    try:
        yield
    finally:
        # In place: handles find their tables by weak references.
        for table, entries in before:
            table.clear()
            table.update(entries)


def _counts(hook: Any) -> bool:
    return _home(hook) != _RECORDED


def _home(hook: Callable[..., Any]) -> str:
    return getattr(hook, "__module__", None) or ""


def _named(hook: Callable[..., Any]) -> str:
    name = getattr(hook, "__qualname__", type(hook).__name__)
    code = getattr(hook, "__code__", None)
    return f'{name} (File "{code.co_filename}", line {code.co_firstlineno})' if code else name
