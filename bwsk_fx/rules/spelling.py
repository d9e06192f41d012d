"""The ways in which one operator is spelled: as a function, a method, a special function, an ATen operator."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from bwsk_fx.rules.arguments import Arguments
from bwsk_fx.rules.registry import Call, target_name
from bwsk_fx.rules.targets import aten_name, method, operator_name

_HOLDERS = (torch, torch.special, F)


def spellings(names: str) -> list[Any]:
    """Return the registries' keys of operators, for every way in which PyTorch spells them.

    Args:
        names: Space-separated names (`"exp expm1"`), without `special.` and without the underscore of in-place twins.
    """
    return [key for name in names.split() for key in _spellings(name)]


def plain_name(call: Call) -> str:
    """Return the operator's name as tables have it: in lower case, without holder, overload and underscores."""
    name = target_name(call).removeprefix("Tensor.").partition(".")[0]
    return name.removeprefix("special_").strip("_").lower()


def function_name(arguments: Arguments) -> str:
    """Return the name of the function, method or ATen operator that is called; in-place ones go by their twins."""
    return operator_name(arguments.target).removesuffix("_")


def _spellings(name: str) -> list[Any]:
    functions = [getattr(holder, twin, None) for holder in _HOLDERS for twin in (name, f"{name}_")]
    keys = [function for function in functions if function is not None]
    keys += [method(name)] if hasattr(torch.Tensor, name) else []
    return keys + [aten_name(twin) for twin in (name, f"special_{name}") if hasattr(torch.ops.aten, twin)]
