"""Leaf modules that cannot run on fake tensors, because what they do depends on data.

Only the shape of such a leaf's result has to be known. It is found by running the leaf on random data at several batch
sizes: a size that stays is a constant, one that grows evenly is a multiple of the batch size plus a constant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import sympy
import torch
from torch import nn
from torch.utils import _pytree as pytree

from bwsk_fx import _torch_private as private
from bwsk_fx.errors import CaptureError

_FIRST, _SECOND, _THIRD = 5, 7, 11  # batch sizes; two determine a straight line, the third confirms it

Trial = dict[sympy.Symbol, int]


def run_leaf(
    original: Callable,
    module: nn.Module,
    path: str,
    tensors: Mapping[str, torch.Tensor],
    args: tuple,
    kwargs: dict[str, Any],
    size: Callable,
) -> tuple[Any, bool]:
    """Run a leaf on fakes or, where it cannot, on random data for fake tensors of the shapes that its result has.

    Args:
        original: The original `nn.Module.__call__`.
        module: The leaf.
        path: Its path in the model.
        tensors: The model's real parameters and buffers, tied ones under every name.
        args: The fake positional arguments of the call.
        kwargs: The fake keyword arguments.
        size: Makes a symbolic size of an expression.

    Returns:
        The result, and whether it comes from data: nothing can trace such a leaf.

    Raises:
        CaptureError: A size of the result does not follow from batch sizes.
        Exception: What the leaf raised on fakes, if it fails on real data, too.
    """
    try:
        return original(module, *args, **kwargs), False
    except Exception as error:
        inside = f"{path}."
        own = {name.removeprefix(inside): tensor for name, tensor in tensors.items() if name.startswith(inside)}
        try:
            return _result_on_data(module, own, args, kwargs, size), True
        except CaptureError as reason:
            kind = type(module).__name__
            raise CaptureError(f"the leaf '{path}' ({kind}) cannot run on fake tensors, and {reason}") from error
        except Exception:
            raise error from None


def _result_on_data(
    module: nn.Module, own: Mapping[str, torch.Tensor], args: tuple, kwargs: Mapping[str, Any], size: Callable
) -> Any:
    leaves = pytree.tree_leaves((args, kwargs))
    symbols = sorted({symbol for leaf in leaves for symbol in _symbols(leaf)}, key=str)
    base = dict.fromkeys(symbols, _FIRST)
    trials = [base, *({**base, symbol: batch} for symbol in symbols for batch in (_SECOND, _THIRD))]
    devices = {tensor.device for tensor in own.values() if tensor.is_cuda}
    with private.without_fake_mode(), torch.no_grad(), torch.random.fork_rng(list(devices)):
        results = [_run(module, own, args, kwargs, trial) for trial in trials]
    flat, structures = zip(*map(pytree.tree_flatten, results), strict=True)
    if any(structure != structures[0] for structure in structures):
        raise CaptureError("the structure of its result depends on the batch size or on data")
    return pytree.tree_unflatten([_fake(found, symbols, size) for found in zip(*flat, strict=True)], structures[0])


def _symbols(value: Any) -> Iterable[sympy.Symbol]:
    sizes = value.shape if isinstance(value, torch.Tensor) else (value,)
    return [symbol for size in sizes if isinstance(size, torch.SymInt) for symbol in size.node.expr.free_symbols]


def _run(module: nn.Module, own: Mapping[str, torch.Tensor], args: tuple, kwargs: Any, trial: Trial) -> Any:
    real_args, real_kwargs = pytree.tree_map(lambda value: _real(value, trial), (args, kwargs))
    tensors = {name: tensor if isinstance(tensor, nn.Parameter) else tensor.clone() for name, tensor in own.items()}
    return torch.func.functional_call(module, tensors, real_args, real_kwargs, tie_weights=False)


def _real(value: Any, trial: Trial) -> Any:
    """Return random numbers in place of a fake tensor; zeros in place of integers, which may be indices."""
    if isinstance(value, torch.SymInt):
        return int(value.node.expr.subs(trial))
    if not isinstance(value, torch.Tensor):
        return value
    shape = [_real(size, trial) for size in value.shape]
    numbers = value.is_floating_point() or value.is_complex()
    return (torch.randn if numbers else torch.zeros)(shape, dtype=value.dtype, device=value.device)


def _fake(found: tuple, symbols: list[sympy.Symbol], size: Callable) -> Any:
    """Return the fake twin of one part of the result, given that part of every trial."""
    first = found[0]
    if not isinstance(first, torch.Tensor):
        if any(other != first for other in found):
            raise CaptureError(f"its result holds a number that depends on the batch size or on data: {first}")
        return first
    if any(other.dim() != first.dim() for other in found):
        raise CaptureError("the number of dimensions of its result depends on the batch size or on data")
    sizes = [size(_expression([other.shape[dim] for other in found], symbols)) for dim in range(first.dim())]
    return torch.empty(sizes, dtype=first.dtype, device=first.device)


def _expression(sizes: list[int], symbols: list[sympy.Symbol]) -> sympy.Expr:
    """Return the straight line through the sizes that the trials gave, one symbol after the other."""
    first, *others = sizes
    line = sympy.Integer(first)
    for symbol, second, third in zip(symbols, others[::2], others[1::2], strict=True):
        slope, rest = divmod(second - first, _SECOND - _FIRST)
        if rest or third - first != slope * (_THIRD - _FIRST):
            raise CaptureError(
                f"a size of its result is {first}, {second} and {third} for batch sizes {_FIRST}, {_SECOND} and "
                f"{_THIRD}, which is no multiple of the batch size plus a constant"
            )
        line += slope * (symbol - _FIRST)
    return sympy.expand(line)
