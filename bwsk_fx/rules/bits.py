"""Packed masks: eight booleans in a byte."""

from __future__ import annotations

import math

import torch


def pack_bits(mask: torch.Tensor) -> torch.Tensor:
    """Return the bits `mask != 0` as a flat uint8 tensor of ⌈numel / 8⌉ bytes, lowest bit first."""
    flat = (mask != 0).reshape(-1)
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8))
    return (flat.view(-1, 8).to(torch.uint8) << _shifts(mask.device)).sum(dim=1, dtype=torch.uint8)


def unpack_bits(bits: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return the mask of `shape` that `pack_bits` packed, as zeros and ones of `dtype`."""
    flat = (bits.unsqueeze(1) >> _shifts(bits.device)) & 1
    return flat.view(-1)[: math.prod(shape)].view(shape).to(dtype)


def _shifts(device: torch.device) -> torch.Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)
