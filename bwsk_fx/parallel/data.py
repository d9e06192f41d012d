"""Data parallelism with sharded parameters: reversible regions inside each block that FSDP2 gathers and frees."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar, Unpack

from torch import nn
from torch.distributed.fsdp import fully_shard

from bwsk_fx.blocks import blocks
from bwsk_fx.capture import ExampleInputs, capture
from bwsk_fx.errors import PlanError
from bwsk_fx.modes import applied, apply
from bwsk_fx.planning.options import PlanKeywords

Model = TypeVar("Model", bound=nn.Module)


def apply_to_blocks(
    model: Model,
    example_inputs: ExampleInputs,
    mode: str = "reversible",
    *,
    budget: float | None = None,
    **options: Unpack[PlanKeywords],
) -> Model:
    """Put each repeated block of a model into a mode of its own, in place, for FSDP2 to shard block by block.

    FSDP2 gathers a block's parameters in the block's forward pre-hook and frees them in its forward hook, so that a
    region must not reach across blocks. Each block is captured by itself, in its first step, with its parameters
    gathered; it has to take and return tensors, numbers and None. What lies outside of blocks runs as it is.

    Args:
        model: With whole parameters; `fully_shard` comes later.
        example_inputs: What `capture` takes; they tell what the blocks are.
        mode: As for `bwsk_fx.apply`.
        budget: For `reversible`, see `fuse_regions`; for each block by itself, as are bounds on memory.
        options: For `reversible`, see `fuse_regions`.

    Returns:
        The model.

    Raises:
        CaptureError: The model cannot be captured.
        PlanError: The model has no repeated block, or an option is out of range.
    """
    for block in _blocks(model, example_inputs):
        apply(block, mode, budget=budget, granularity="whole", **options)
    return model


def fully_shard_blocks(
    model: Model,
    example_inputs: ExampleInputs,
    mode: str = "reversible",
    *,
    fsdp: Mapping[str, Any] | None = None,
    budget: float | None = None,
    **options: Unpack[PlanKeywords],
) -> Model:
    """Shard a model with FSDP2 block by block, each block in a mode of its own, in place; see `apply_to_blocks`.

    Args:
        model: On its device, with whole parameters.
        example_inputs: What `capture` takes; they tell what the blocks are.
        mode: As for `bwsk_fx.apply`; `conventional` shards and leaves the blocks as they are.
        fsdp: Keyword arguments of `fully_shard`: mesh, mp_policy, reshard_after_forward and so on.
        budget: As for `apply_to_blocks`.
        options: As for `apply_to_blocks`.

    Returns:
        The model.

    Raises:
        CaptureError: The model cannot be captured.
        PlanError: The model has no repeated block, or an option is out of range.
    """
    for block in _blocks(model, example_inputs):
        apply(block, mode, budget=budget, granularity="whole", **options)
        fully_shard(block, **(fsdp or {}))
    fully_shard(model, **(fsdp or {}))
    return model


def _blocks(model: nn.Module, example_inputs: ExampleInputs) -> list[nn.Module]:
    """Return a model's repeated blocks, in the order in which they run; earlier modes are taken back."""
    for module in model.modules():
        if applied(module) is not None:
            apply(module, "conventional")
    paths = [path for path, _ in blocks(capture(model, example_inputs).graph)]
    if not paths:
        raise PlanError(f"{type(model).__name__} has no repeated block: use apply and fully_shard on the whole model")
    return [model.get_submodule(path) for path in paths]
