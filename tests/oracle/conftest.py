"""Gradients against the same model in float64."""

import copy
from collections import defaultdict
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn


def _kind(name: str) -> str:
    """Equal parameters of all layers are one kind."""
    return ".".join(part for part in name.split(".") if not part.isdecimal())


def _gradients(model: nn.Module, inputs: dict[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    model.zero_grad()
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        loss = model(**inputs)["loss"]
    # As a gradient scaler does, so that half precision does not underflow.
    (loss * 1024.0).backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: parameter.grad.double() / 1024.0 for name, parameter in trained.items()}


def _in_float64(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    wide = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    return _gradients(copy.deepcopy(model).double(), wide)


def _errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sum of squared errors, pooled by kind of parameter, and in total under the empty name."""
    sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64))
    for name, gradient in found.items():
        error = (gradient - exact[name]).square().sum()
        sums[_kind(name)] += error
        sums[""] += error
    return sums


@pytest.fixture(scope="session")
def gradients() -> Callable[..., dict[str, Tensor]]:
    return _gradients


@pytest.fixture(scope="session")
def in_float64() -> Callable[..., dict[str, Tensor]]:
    return _in_float64


@pytest.fixture(scope="session")
def squared_errors() -> Callable[..., dict[str, Tensor]]:
    return _errors
