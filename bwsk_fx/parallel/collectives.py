"""What the graphs of one device call: sums over devices and their like, as functions and modules.

`fan_out` and `add_up` are each other's backward pass (Shoeybi et al., "Megatron-LM", 2019, figure 3: f and g), and so
are `gather_parts` and `add_up_parts` (Korthikanti et al., "Reducing activation recomputation", 2022, figure 5).
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bwsk_fx import _torch_private as private

Link = tuple[str, int, int]
"""A process group by name, how many devices it has, and which of them this one is."""


def fan_out(operand: Tensor, link: Link) -> Tensor:
    """Hand a tensor that all devices have to operators that see a shard each; the backward pass sums its gradients."""
    return _FanOut.apply(operand, link)


def add_up(partial: Tensor, link: Link) -> Tensor:
    """Sum the devices' partial results; the backward pass hands the gradient to each."""
    return _AddUp.apply(partial, link)


def add_up_parts(partial: Tensor, dim: int, link: Link) -> Tensor:
    """Sum the devices' partial results and keep this device's part along a dimension; the gradient is gathered."""
    return _AddUpParts.apply(partial, dim, link)


def gather_parts(part: Tensor, dim: int, link: Link, shards: bool) -> Tensor:
    """Join the devices' parts along a dimension.

    Args:
        part: This device's part.
        dim: The dimension.
        link: The devices.
        shards: Whether operators that see a shard each go on with the result: the backward pass then sums the devices'
            gradients. Otherwise all devices have the same gradient, and each takes its part.
    """
    return _GatherParts.apply(part, dim, link, shards)


def take_part(whole: Tensor, dim: int, link: Link) -> Tensor:
    """Take this device's part, along a dimension, of a tensor that all devices have; the gradient is gathered."""
    return _TakePart.apply(whole, dim, link)


def contiguous_gradient(operand: Tensor) -> Tensor:
    """Return a tensor as it is; its gradient will be contiguous, as processes can send it."""
    return _ContiguousGradient.apply(operand)


class RowLinear(nn.Linear):
    """A Linear that holds a share of its inputs, and sums the partial results of all devices before it adds its bias.

    Attributes:
        link: The devices.
        parts: The dimension along which each device goes on with a part of the result; None where with all of it.
    """

    link: Link
    parts: int | None

    def forward(self, input: Tensor) -> Tensor:
        """Return the result, or this device's part of it."""
        partial = F.linear(input, self.weight)
        bias: Tensor | None = self.bias
        if self.parts is None:
            total = add_up(partial, self.link)
        else:
            total = add_up_parts(partial, self.parts, self.link)
            bias = None if bias is None else fan_out(bias, self.link)
        # Under autocast the sum has the lower precision, and so has the result of a whole Linear.
        return total if bias is None else total + bias.to(total.dtype)


def summing_gradients(module: nn.Module, link: Link) -> nn.Module:
    """Return a twin of a module, with its very parameters, each of whose gradients is summed over devices.

    It runs on a part of its operand on each device.
    """
    twin = copy.copy(module)
    twin.__dict__["_parameters"] = dict(module._parameters)
    twin.__dict__["link"] = link
    twin.__class__ = _summing_class(type(module))  # type: ignore[assignment, arg-type]
    return twin


@functools.cache
def _summing_class(original: type[nn.Module]) -> type[nn.Module]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        names, parameters = zip(*self.named_parameters(), strict=True)
        # One sum for all of them.
        flat = fan_out(torch.cat([parameter.reshape(-1) for parameter in parameters]), self.link)
        pieces = flat.split([parameter.numel() for parameter in parameters])
        summed = {
            name: piece.view_as(parameters[place])
            for place, (name, piece) in enumerate(zip(names, pieces, strict=True))
        }
        with private.swapped_parameters(self, summed):
            return original.forward(self, *args, **kwargs)

    return type(original.__name__, (original,), {"forward": forward, "__module__": original.__module__})


def _part(tensor: Tensor, dim: int, link: Link) -> Tensor:
    _, size, rank = link
    length = tensor.shape[dim] // size
    return tensor.narrow(dim, rank * length, length).clone()


class _FanOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, operand: Tensor, link: Link) -> Tensor:
        ctx.link = link
        return operand.view_as(operand)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return private.all_reduce_sum(gradient, ctx.link[0]), None


class _AddUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, link: Link) -> Tensor:
        return private.all_reduce_sum(partial, link[0])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _AddUpParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, dim: int, link: Link) -> Tensor:
        ctx.dim, ctx.link = dim, link
        return private.reduce_scatter_sum(partial, dim, *link[:2])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return private.all_gather(gradient, ctx.dim, *ctx.link[:2]), None, None


class _GatherParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, dim: int, link: Link, shards: bool) -> Tensor:
        ctx.dim, ctx.link, ctx.shards = dim, link, shards
        return private.all_gather(part, dim, *link[:2])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        if ctx.shards:
            return private.reduce_scatter_sum(gradient, ctx.dim, *ctx.link[:2]), None, None, None
        return _part(gradient, ctx.dim, ctx.link), None, None, None


class _TakePart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor, dim: int, link: Link) -> Tensor:
        ctx.dim, ctx.link = dim, link
        return _part(whole, dim, link)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return private.all_gather(gradient, ctx.dim, *ctx.link[:2]), None, None


class _ContiguousGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, operand: Tensor) -> Tensor:
        return operand.view_as(operand)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.contiguous()
