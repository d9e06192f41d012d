"""The `published` ruleset: the label table of the BWSK study.

In a graph it counts leaf-module calls; `bwsk_fx.report.modules` counts the leaf modules of a module tree, as the study
did. Nodes that are no `call_module` carry the table's label for functions where it has one, and are not counted. The
table names no inverses, so the witness of its S labels is unstated.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from importlib import resources
from typing import Any

from torch import nn
from torch.nn import functional as F

from bwsk_fx.rules.registry import Call, target_name
from bwsk_fx.rules.sound import uncounted
from bwsk_fx.verdict import OPERATOR, REFINED, UNKNOWN, Label, Verdict, Witness, WitnessKind

_UNSTATED = Witness(WitnessKind.UNSTATED)
_SYNONYMS = {"truediv": "div", "view": "reshape"}


def verdict(call: Call) -> Verdict:
    """Return the table's verdict of one node."""
    if call.module is not None:
        return module_verdict(call.module)
    outside = uncounted(call)
    if outside is not None:
        return replace(outside, ruleset="published")
    name = _function_name(call)
    return _from_table(name, published_table()["functions"].get(name), counted=False)


@cache
def published_table() -> Mapping[str, Any]:
    """Return the label table as it was published."""
    return json.loads(resources.files("bwsk_fx.rules").joinpath("labels.json").read_text())


def module_verdict(module: nn.Module) -> Verdict:
    """Return the table's verdict of a leaf module, which goes by the name of its class alone, subclasses included.

    Args:
        module: A leaf module; strides of convolutions and the mode of batch norms decide theirs.
    """
    name = type(module).__name__
    if name in ("Conv1d", "Conv2d", "Conv3d"):
        stride: tuple[int, ...] = module.stride  # type: ignore[assignment]
        ones = all(step == 1 for step in stride)
        return _from_attribute(name, Label.S if ones else Label.K, f"its stride is {stride}")
    if name in ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d"):
        mode = "train" if module.training else "eval"
        return _from_attribute(name, Label.K if module.training else Label.S, f"it is in {mode} mode")
    return _from_table(name, _labels_of_modules().get(name), counted=True)


@cache
def _labels_of_modules() -> Mapping[str, str]:
    specific = published_table()["model_specific_modules"].values()
    merged = {name: label for family in specific for name, label in family.items()}
    return merged | published_table()["modules"]


def _from_table(name: str, label: str | None, counted: bool) -> Verdict:
    if label is None:
        return _verdict(Label.GRAY, UNKNOWN, f"{name} is not in the published table", name, counted)
    return _verdict(Label(label), OPERATOR, f"the published table calls {name} {label}", name, counted)


def _from_attribute(name: str, label: Label, why: str) -> Verdict:
    return _verdict(label, REFINED, f"the published attribute rule calls {name} {label}, since {why}", name, True)


def _verdict(label: Label, confidence: float, why: str, name: str, counted: bool) -> Verdict:
    witness = _UNSTATED if label is Label.S else None
    return Verdict(
        label, witness, None, confidence, f"published.{name}: {why}", f"published.{name}", counted, "published"
    )


def _function_name(call: Call) -> str:
    """Name a function as the table does; operators and methods go by the name of the torch function."""
    name = target_name(call).removeprefix("Tensor.")
    if getattr(F, name, None) is call.node.target:
        return f"torch.nn.functional.{name}"
    return "torch." + _SYNONYMS.get(name, name)
