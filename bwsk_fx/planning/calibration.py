"""Cost models by name."""

from __future__ import annotations

import torch

from bwsk_fx.planning.cost import CostModel, Roofline, profile_of


def cost_model(device: torch.device, kind: str) -> CostModel:
    return Roofline(profile_of(device))
