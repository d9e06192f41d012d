"""Shards that others have put on the modules of a rewritten model, where its graph would not gather them."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cache

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from bwsk_fx import _torch_private as private
from bwsk_fx.errors import RegionError


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


def require_no_fsdp1(model: nn.Module) -> None:
    """Raise where FSDP1 has put views in place of parameters.

    Raises:
        RegionError: Which module's.
    """
    for path, module in model.named_modules():
        if private.is_managed_by_fsdp1(module):
            raise RegionError(
                f"the parameters of '{path or _name(model)}' are in the hands of FullyShardedDataParallel (FSDP1), "
                "which puts views in their place; use FSDP2: bwsk_fx.parallel.fully_shard_blocks, or fsdp_version=2 "
                "in accelerate"
            )


def unseen_by_hooks() -> AbstractContextManager[None]:
    """Return a context in which what autograd saves is not shown to the caller's saved-tensor hooks.

    A checkpoint around a model counts what is saved in both of its runs, and only the first one captures and plans.
    """
    return saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)  # type: ignore[no-any-return]


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
