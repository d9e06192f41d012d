"""The backend's name in Hugging Face's accelerate, and so in transformers' Trainer.

    TrainingArguments(torch_compile=True, torch_compile_backend="bwsk_fx")
    TorchDynamoPlugin(backend="bwsk_fx", options={"budget": 0.1})

accelerate looks names up in an enumeration of its own, `DynamoBackend`, and refuses any other. `import bwsk_fx` adds
ours, before or after accelerate is imported; it imports neither accelerate nor transformers for that. If accelerate
comes later, a finder on `sys.meta_path` sees it being imported. That costs nothing until then; a program without
that path (one frozen into a file, say), or with an accelerate that has no such enumeration, calls `register`, which
says what is wrong. A process that does not import bwsk_fx does not know the name: `accelerate launch` and
`accelerate config` are such processes, so that the script they start has to name the backend.

`TrainingArguments` has no place for options. The Trainer's plugin does, until training starts:

    trainer.accelerator.state.dynamo_plugin.options = {"budget": 0.1}
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from enum import EnumMeta
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from bwsk_fx.errors import TrainingError

_MODULE = "accelerate.utils.dataclasses"
_NAME = "BWSK_FX"


def register() -> None:
    """Let accelerate take `bwsk_fx` as a backend; as often as one likes.

    Raises:
        TrainingError: This release of accelerate does not keep its backends where bwsk-fx looks for them.
    """
    module = import_module(_MODULE)
    if not _is_taken(module):
        _add_to(module)
    if not _is_taken(module):
        raise _unknown_release("its plugin does not pass on the name")


def register_on_import() -> None:
    """Register now if accelerate has been imported, and otherwise as soon as it is; called by `import bwsk_fx`."""
    if _MODULE in sys.modules:
        _add_if_possible(sys.modules[_MODULE])
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _is_taken(module: ModuleType) -> bool:
    try:
        return bool(module.TorchDynamoPlugin(backend=_NAME.lower()).to_kwargs()["backend"] == _NAME.lower())
    except (AttributeError, KeyError, TypeError, ValueError):
        return False


def _add_if_possible(module: ModuleType) -> None:
    # Most of those who import accelerate do not ask for the name; accelerate refuses it where they do.
    with suppress(TrainingError):
        _add_to(module)


def _add_to(module: ModuleType) -> None:
    names = _names_of(module)
    if hasattr(names, _NAME):
        return
    # An enumeration with members cannot be derived from; what it does not know, it asks `_missing_` for.
    member = str.__new__(names, _NAME)
    member._name_ = member._value_ = _NAME
    others = names._missing_

    def missing(_: type, value: object) -> Any:
        return member if value == _NAME else others(value)

    names.BWSK_FX = member
    names._missing_ = classmethod(missing)


def _names_of(module: ModuleType) -> Any:
    names = getattr(module, "DynamoBackend", None)
    if not isinstance(names, EnumMeta) or not issubclass(names, str):
        raise _unknown_release(f"there is no enumeration {_MODULE}.DynamoBackend of strings")
    return names


def _unknown_release(reason: str) -> TrainingError:
    # It may be in the middle of being imported.
    version = getattr(sys.modules.get("accelerate"), "__version__", "(of an unknown version)")
    return TrainingError(
        f"accelerate {version} has no place for another torch.compile backend that bwsk-fx knows: "
        f'{reason}; call model.compile(backend="bwsk_fx") and leave torch_compile out'
    )


class _Finder(MetaPathFinder):
    """Finds nothing but accelerate's module, where Python does, and adds the name once it has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the module's spec, and None for any other."""
        spec = PathFinder.find_spec(fullname, path) if fullname == _MODULE else None
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            _add_if_possible(module)

        # The loader stays the one that it is: others ask it for source and resources.
        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
