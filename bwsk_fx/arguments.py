"""Checks of what public functions are given: models, graphs, example inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from bwsk_fx.errors import BwskError, CaptureError, PassError

APPLIED = "rewritten_by_apply"
"""The attribute of a forward method that `apply` has put on a class."""


def require_model(model: object, error: type[BwskError]) -> None:
    """Check that something is a model whose Python code can be recorded.

    Raises:
        BwskError: It is not; the class is `error`.
    """
    if isinstance(model, torch.export.ExportedProgram):
        raise error("this is an exported program: bwsk_fx.inspection.exported.from_program makes it a graph")
    if not isinstance(model, nn.Module):
        what = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise error(f"the model is {what}: expected an nn.Module, such as nn.Linear(4, 4)")
    if isinstance(model, torch.jit.ScriptModule):
        raise error(
            f"this {type(model).__name__} has no Python code to record: take the model as it was before torch.jit"
        )
    if hasattr(model, "_orig_mod"):
        raise error(
            "this model has been through torch.compile, which would run it past the recorded code: take the model that "
            "torch.compile was given (model._orig_mod)"
        )


def require_not_applied(model: nn.Module) -> None:
    """Check that no part of a model is in a mode already.

    Raises:
        CaptureError: One is.
    """
    for path, module in model.named_modules():
        if hasattr(type(module).forward, APPLIED):
            what = f"submodule '{path}'" if path else f"this {type(module).__name__}"
            raise CaptureError(
                f"{what} is in a mode of apply: take it back with bwsk_fx.restore, then capture the model"
            )


def require_graph(graph: object) -> None:
    """Check that something is a graph module.

    Raises:
        PassError: It is not.
    """
    if isinstance(graph, fx.GraphModule):
        return
    if isinstance(graph, torch.export.ExportedProgram):
        raise PassError("this is an exported program: bwsk_fx.inspection.exported.from_program makes it a graph")
    raise PassError(
        f"the graph is a {type(graph).__name__}: expected what bwsk_fx.capture(model, example_inputs) returns"
    )


def require_examples(example_inputs: object) -> None:
    """Check that example inputs are a tensor, positional inputs or keyword inputs.

    Raises:
        CaptureError: They are something else.
    """
    if isinstance(example_inputs, (str, bytes)) or not isinstance(example_inputs, (torch.Tensor, Sequence, Mapping)):
        raise CaptureError(
            f"the example inputs are a {type(example_inputs).__name__}: expected a tensor, a sequence of positional "
            "inputs, or a mapping of keyword inputs"
        )


def require_named(inputs: Any) -> None:
    """Check that the arguments of a step are given by name.

    Raises:
        CaptureError: They are not.
    """
    if not isinstance(inputs, Mapping):
        raise CaptureError(
            f"the inputs are a {type(inputs).__name__}: expected the step's arguments by name, as a mapping"
        )
