"""Region to joint graph: forward and backward traced once, with the operators that eager execution would run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bwsk_fx import _torch_private as private
from bwsk_fx.errors import PlanError, place_of
from bwsk_fx.planning.joint import JointGraph, read_joint, wrap_output

aten = torch.ops.aten
Outputs = Sequence[Tensor]


@dataclass(frozen=True)
class Traced:
    """A traced region.

    Attributes:
        joint: Forward and backward in one graph.
        differentiable: Per forward output, whether it has a gradient; those have one tangent each, in order.
    """

    joint: JointGraph
    differentiable: tuple[bool, ...]


def trace(function: Callable[..., Outputs], inputs: Mapping[str, Tensor], static: Sequence[int], region: str) -> Traced:
    """Trace `function(*inputs)` and its backward pass under the autocast state of the caller.

    Args:
        function: Returns a sequence of tensors and writes into none of its inputs.
        inputs: Real tensors by name, read for shapes, strides, dtypes, devices and `requires_grad` only.
        static: Which inputs are parameters or buffers.
        region: The region's name, for errors.

    Raises:
        PlanError: The region cannot be traced, or holds something other than ATen operators.
    """
    differentiable: list[bool] = []

    def wrapped(*primals: Tensor) -> list[Tensor]:
        outputs = function(*primals)
        differentiable[:] = [output.requires_grad for output in outputs]
        return [wrap_output(output) for output in outputs]

    leaves = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in inputs.values()]
    try:
        joint = private.trace_joint(wrapped, leaves, decompositions_on(leaves))
    except Exception as error:
        # PyTorch may append pages of its own state to the first sentence.
        cause = str(error).strip().split("\n")[0].split(". ")[0] or "no message"
        raise PlanError(
            f"region {region} cannot be traced with its backward pass ({place_of(error)}{type(error).__name__}: {cause}"
            "); leave it out with granularity='s-run', or keep modules that write into buffers or inputs out of the "
            "model's blocks"
        ) from error
    try:
        read = read_joint(joint, len(differentiable), static)
    except PlanError as error:
        raise PlanError(f"region {region}: {error}") from error
    for primal, name in zip(read.primals, inputs, strict=True):
        primal.meta["input_name"] = name
    return Traced(read, tuple(differentiable))


def decompositions_on(inputs: Sequence[Tensor]) -> dict[object, Callable]:
    """Return what replaces ATen operators that eager execution does not run on the device of the inputs."""
    # PyTorch traces dropout as the fused operator, which eager execution runs on accelerators only.
    if any(tensor.device.type != "cpu" for tensor in inputs):
        return {}
    return {
        aten.native_dropout.default: cpu_dropout,
        aten.native_dropout_backward.default: cpu_dropout_backward,
    }


def cpu_dropout(operand: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor]:
    """Dropout as eager execution computes it on a CPU: a product with Bernoulli noise in the operand's dtype.

    Returns the result and the boolean mask of what was kept, bit for bit as `torch.nn.functional.dropout` draws it.
    """
    if train is False or p == 0.0:
        return operand.clone(), torch.ones_like(operand, dtype=torch.bool)
    if p == 1.0:
        zeros = torch.zeros_like(operand)
        return operand * zeros, zeros.bool()
    drawn = _bernoulli(torch.empty_like(operand), 1.0 - p)
    return operand * drawn.div(1.0 - p), drawn.bool()


def _bernoulli(like: Tensor, p: float) -> Tensor:
    """Draw in the order in which `like` lies in memory, as its own in-place `bernoulli_` does."""
    if like.is_contiguous():
        return aten.bernoulli.p(like, p)
    order = sorted(range(like.dim()), key=like.stride, reverse=True)
    return aten.bernoulli.p(like.permute(order), p).permute([order.index(dim) for dim in range(like.dim())])


def cpu_dropout_backward(gradient: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Gradient of `cpu_dropout`; `scale` is 1 / (1 - p), and 0 for p = 1."""
    noise = mask.to(gradient.dtype)
    return gradient * (noise.div(1.0 / scale) if scale else noise)
