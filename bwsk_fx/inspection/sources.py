"""From what a user names to a captured graph, with inputs to run it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

import bwsk_fx
from bwsk_fx.errors import InspectError

BATCH = 2


@dataclass(frozen=True)
class Request:
    """How a model is to be made.

    Attributes:
        batch_size: Samples per batch of the inputs that are made; None where the user has not said.
        overrides: Fields of the configuration to set.
        inputs: Inputs in the user's words, as `factories.parse_input` reads them.
    """

    batch_size: int | None = None
    overrides: Mapping[str, int] = field(default_factory=dict)
    inputs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """A graph, not typed yet.

    Attributes:
        graph: What `capture` returns, or an exported program in the same form.
        inputs: Inputs of it; None where there are none.
    """

    graph: fx.GraphModule
    inputs: Any = None

    def inputs_for(self, option: str, name: str) -> Any:
        """Return the inputs, which an option of the command line needs.

        Raises:
            InspectError: There are none.
        """
        if self.inputs is None:
            raise InspectError(f"{option} needs inputs, and '{name}' has none: export it with its example inputs")
        return self.inputs


def load(name: str, request: Request) -> Source:
    """Make the graph of a model.

    Args:
        name: A `.pt2` file of `torch.export`, `module:factory`, a built-in architecture, a folder with a `config.json`,
            or a model on the Hub.
        request: How it is to be made.

    Raises:
        BwskError: There is no such model, nothing is known of its inputs, or it cannot be captured.
    """
    if name.endswith(".pt2"):
        return _exported(name, request)
    if ":" in name:
        return _made(name, request)
    from bwsk_fx.inspection import architectures

    model = architectures.build(name, request.overrides)
    inputs = architectures.inputs_of(name, model, request.batch_size or BATCH)
    return _captured(model, inputs | _named(name, request.inputs))


def _captured(model: nn.Module, inputs: Any) -> Source:
    return Source(bwsk_fx.capture(model, inputs), inputs)


def _named(name: str, texts: tuple[str, ...]) -> dict[str, Any]:
    from bwsk_fx.inspection.factories import inputs_from

    found = inputs_from(texts) if texts else {}
    if not isinstance(found, dict):
        raise InspectError(f"--input of '{name}' needs names, as in --input pixel_values=2,3,224,224")
    return found


def _made(name: str, request: Request) -> Source:
    from bwsk_fx.inspection import factories

    _refuse(name, request, "made by a factory")
    return _captured(*factories.make(name, request.inputs))


def _exported(name: str, request: Request) -> Source:
    from bwsk_fx.inspection import exported

    _refuse(name, request, "exported")
    if request.inputs:
        raise InspectError(f"--input is not for '{name}': an exported program has its inputs")
    return exported.load(name)


def _refuse(name: str, request: Request, what: str) -> None:
    """Refuse options that only models with a configuration take."""
    options = {"image_size": "--image-size", "num_hidden_layers": "--layers"}
    given = [options[field] for field in request.overrides]
    given += [] if request.batch_size is None else ["--batch-size"]
    if given:
        raise InspectError(f"{given[0]} is not for '{name}', which is {what}: it is for models with a config.json")
