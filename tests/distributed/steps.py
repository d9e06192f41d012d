"""Ten steps of a small ViT, and how far those of several processes are from those of one."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from bwsk_fx.errors import BwskError

STEPS = 10
BATCH = 8
DEVICE = os.environ.get("BWSK_FX_TEST_DEVICE", "cpu")
Step = tuple[Tensor, dict[str, Tensor]]
Named = dict[str, Tensor]


def vit(dtype: torch.dtype = torch.float64, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"image_size": 12, "patch_size": 4, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    config = ViTConfig(**(sizes | {"num_hidden_layers": 2, "num_labels": 5} | changes))
    config._attn_implementation = "sdpa"
    return ViTForImageClassification(config).train().to(DEVICE, dtype)


def batch(step: int, dtype: torch.dtype = torch.float64) -> Named:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(BATCH, 3, 12, 12, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 5, (BATCH,), generator=generator)
    return {"pixel_values": images.to(DEVICE, dtype), "labels": labels.to(DEVICE)}


def optimizer_of(model: nn.Module, dtype: torch.dtype) -> torch.optim.Optimizer:
    # Adam turns the rounding of a gradient that ought to be zero into a whole step.
    if dtype is torch.float64:
        return torch.optim.AdamW(model.parameters(), lr=1e-3)
    return torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)


def train(
    model: nn.Module,
    run: Callable[[Named], Tensor],
    whole: Callable[[str, Tensor], Tensor] = lambda name, gradient: gradient,
    dtype: torch.dtype = torch.float64,
) -> list[Step]:
    """Take steps and return the loss and the whole gradients of each; `run` does forward and backward passes."""
    optimizer, steps = optimizer_of(model, dtype), []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = run(batch(step, dtype))
        gradients = {name: whole(name, one.grad) for name, one in model.named_parameters() if one.grad is not None}
        steps.append((loss.detach().clone(), {name: gradient.clone() for name, gradient in gradients.items()}))
        optimizer.step()
    return steps


def backward(model: nn.Module, inputs: Named) -> Tensor:
    output = model(**inputs)
    loss = output["loss"]
    loss.backward()
    return loss


@cache
def reference(dtype: torch.dtype) -> list[Step]:
    model = vit(dtype)
    return train(model, partial(backward, model), dtype=dtype)


def errors(steps: list[Step], dtype: torch.dtype) -> dict[str, float]:
    return compared(steps, reference(dtype))


def compared(steps: list[Step], reference: list[Step]) -> dict[str, float]:
    """Return the largest errors of losses and gradients, relative to the largest gradient of the parameter."""
    loss_error = gradient_error = 0.0
    for (loss, gradients), (wanted_loss, wanted) in zip(steps, reference, strict=True):
        found = {name.removeprefix("module."): gradient for name, gradient in gradients.items()}
        assert found.keys() == wanted.keys(), sorted(found.keys() ^ wanted.keys())
        # Softmax makes the gradient of a key's bias zero but for rounding.
        floor = 1e-4 * max(gradient.abs().max().item() for gradient in wanted.values())
        loss_error = largest(loss_error, (loss - wanted_loss).abs().item() / wanted_loss.abs().item())
        for name, gradient in wanted.items():
            difference = (found[name] - gradient).abs().max().item()
            gradient_error = largest(gradient_error, difference / max(gradient.abs().max().item(), floor))
    return {"loss_error": over_ranks(loss_error), "gradient_error": over_ranks(gradient_error)}


def largest(one: float, other: float) -> float:
    """Return the larger one; NaN, which `max` would drop, is an error of its own."""
    assert other == other, "NaN"
    return max(one, other)


def over_ranks(error: float) -> float:
    worst = torch.tensor(error, dtype=torch.float64, device=DEVICE)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return worst.item()


def full(name: str, gradient: Any) -> Tensor:
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


def refusal(call: Callable[[], Any]) -> dict[str, Any]:
    try:
        call()
    except BwskError as error:
        return {"refusal": f"{type(error).__name__}: {error}"}
    return {"refusal": ""}


def program_ran(graph: nn.Module) -> int:
    return sum(getattr(module, "program", None) is not None for module in graph.modules())
