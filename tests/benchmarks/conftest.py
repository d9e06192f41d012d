"""The benchmarks are scripts, not a package; and a ViT that is small enough to count its bytes by hand."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from common import Shape


@pytest.fixture(scope="session")
def shape() -> Shape:
    return Shape(layers=1, hidden=64, batch=2, image=32, precision="bf16")


@pytest.fixture(scope="session")
def reseeded():
    """Draw every parameter anew, so that no γ is one and no β is zero."""

    def draw(model: torch.nn.Module) -> torch.nn.Module:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
                if "layernorm" in name and name.endswith("weight"):
                    parameter.add_(1.0)
        return model

    return draw
