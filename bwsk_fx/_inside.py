"""What others have put on the modules of a rewritten model, where its graph would not run it: shards and hooks.

The graph calls leaf modules and functions. The modules between the model and its leaves are no part of it, so that
their hooks run once, when they are captured.
"""

from __future__ import annotations

from collections.abc import Hashable
from contextlib import AbstractContextManager
from functools import cache

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from bwsk_fx import _torch_private as private
from bwsk_fx._recorder import default_is_leaf
from bwsk_fx.errors import RegionError
from bwsk_fx.signature import HOOKS


def require_gathered(model: nn.Module) -> None:
    """Raise unless the model's parameters are whole, and are gathered for the model as a whole.

    FSDP2 gathers parameters and sums their gradients in hooks of the module that was sharded. A parameter of a module
    inside may be whole all the same, such as after an evaluation with `reshard_after_forward=False`: its gradient would
    be lost, and what the optimizer changes, not seen.

    Raises:
        RegionError: A module inside the model is sharded by itself, or a parameter is not gathered.
    """
    sharded_module, shard = _sharded()
    for module in model.modules():
        if module is not model and isinstance(module, sharded_module):
            raise RegionError(
                f"'{_path(model, module)}' is sharded by itself (fully_shard) inside the {_name(model)} that was "
                "rewritten as a whole, where the hooks that gather its parameters and reduce its gradients would not "
                "run; put the blocks into modes of their own (bwsk_fx.parallel.fully_shard_blocks or apply_to_blocks), "
                f"or shard the {_name(model)} and nothing inside"
            )
        if any(isinstance(parameter, shard) for parameter in module._parameters.values()):
            raise RegionError(
                f"'{_path(model, module) or _name(model)}' has parameters in shards (DTensors), which a graph cannot "
                "hold; call the model itself and not its forward method, so that FSDP2 gathers them, train with "
                "bwsk_fx.parallel.fully_shard_blocks, or shard the graph with tensor_parallel"
            )


def require_no_lost_hooks(model: nn.Module) -> None:
    """Raise where backward hooks, or FSDP1, of a module inside the model would do nothing.

    Raises:
        RegionError: Which module has them.
    """
    for path, module in model.named_modules():
        if private.is_managed_by_fsdp1(module):
            raise RegionError(
                f"the parameters of '{path or _name(model)}' are in the hands of FullyShardedDataParallel (FSDP1), "
                "which puts views in their place; use FSDP2: bwsk_fx.parallel.fully_shard_blocks, or fsdp_version=2 "
                "in accelerate"
            )
        if module is not model and not default_is_leaf(module) and _has(module, "backward"):
            raise RegionError(
                f"module '{path}' carries backward hooks, which the rewritten {_name(model)} does not run; remove "
                "them, or put them on a tensor or a parameter"
            )


def hooks_inside(model: nn.Module) -> Hashable:
    """Return the hooks on modules inside the model, by the numbers that PyTorch gave them.

    A forward hook is captured with the code around it, so that a graph holds for the hooks that it was captured with.
    """
    return tuple(
        (number, kind, *module.__dict__[kind])
        for number, module in enumerate(model.modules())
        for kind in HOOKS
        if number and module.__dict__[kind]
    )


def unseen_by_hooks() -> AbstractContextManager[None]:
    """Return a context in which what autograd saves is not shown to the caller's saved-tensor hooks.

    A checkpoint around a model counts what is saved in both of its runs, and only the first one captures and plans.
    """
    return saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)  # type: ignore[no-any-return]


def _has(module: nn.Module, which: str) -> bool:
    return any(module.__dict__[kind] for kind in HOOKS if which in kind)


def _path(model: nn.Module, wanted: nn.Module) -> str:
    return next(path for path, module in model.named_modules() if module is wanted)


def _name(model: nn.Module) -> str:
    return type(model).__name__.removeprefix("FSDP")


@cache
def _sharded() -> tuple[tuple[type, ...], tuple[type, ...]]:
    """Return the classes of modules that FSDP2 has sharded and of shards; none without torch.distributed."""
    if not torch.distributed.is_available():
        return (), ()
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    return (FSDPModule,), (DTensor,)
