"""A small ViT and one training step, for every test that compares a rewritten model with the model itself."""

import os
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn


def pytest_configure() -> None:
    """Share the cores between the workers of pytest-xdist; two threads on one core wait for each other."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0"))
    if workers:
        threads = max(1, (os.cpu_count() or 1) // workers)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # for the processes that tests start
        torch.set_num_threads(threads)


def _make_vit(attention: str = "sdpa", **changes: Any) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    sizes = {"image_size": 16, "patch_size": 4, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    config = ViTConfig(**({"num_hidden_layers": 2, "num_labels": 5} | sizes | changes))
    config._attn_implementation = attention
    return ViTForImageClassification(config).train()


def _make_images(batch: int = 3, size: int = 16) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    return {
        "pixel_values": torch.randn(batch, 3, size, size, generator=generator),
        "labels": torch.arange(batch) % 5,
    }


def _train_step(
    model: nn.Module, inputs: Any, dtype: torch.dtype | None = None, loss_of: Callable[[Any], Tensor] | None = None
) -> dict[str, Tensor | None]:
    """Run a forward and a backward pass from seed 0 and return outputs and gradients by name."""
    model.zero_grad()
    torch.manual_seed(0)
    with nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype):
        output = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    results = dict(output) if hasattr(output, "keys") else {"output": output}
    loss = results["loss"] if "loss" in results else (loss_of or _sum_of_sines)(output)
    loss.backward()
    results["loss"] = loss
    found = {name: value.detach().clone() for name, value in results.items() if isinstance(value, Tensor)}
    return found | {name: _copy(parameter.grad) for name, parameter in model.named_parameters()}


def _sum_of_sines(output: Tensor) -> Tensor:
    return output.float().sin().sum()


def _copy(gradient: Tensor | None) -> Tensor | None:
    return None if gradient is None else gradient.clone()


def _assert_same_bits(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    assert found.keys() == expected.keys()
    missing = {name for name in found if (found[name] is None) != (expected[name] is None)}
    assert not missing, "gradients are missing on one side"
    pairs = {name: (found[name], expected[name]) for name in found if found[name] is not None}
    assert {name for name, (one, other) in pairs.items() if not torch.equal(one, other)} == set()


@pytest.fixture(scope="session")
def make_vit() -> Callable[..., nn.Module]:
    return _make_vit


@pytest.fixture(scope="session")
def make_images() -> Callable[..., dict[str, Tensor]]:
    return _make_images


@pytest.fixture(scope="session")
def train_step() -> Callable[..., dict[str, Tensor | None]]:
    return _train_step


@pytest.fixture(scope="session")
def assert_same_bits() -> Callable[..., None]:
    return _assert_same_bits
