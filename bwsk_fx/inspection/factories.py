"""Models that a function of the user's makes."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bwsk_fx.errors import InspectError, first_line

_INPUT = re.compile(r"(?:(?P<name>\w+)=)?(?P<shape>\d+(?:,\d+)*)(?::(?P<dtype>\w+))?")


def make(name: str, texts: Sequence[str]) -> tuple[nn.Module, Any]:
    """Call a factory.

    Args:
        name: `module:factory`, or `path/to/file.py:factory`; modules are looked for in the current directory first.
        texts: Inputs in the user's words, for a factory that returns a module alone.

    Returns:
        The module, and its inputs as `capture` takes them.

    Raises:
        InspectError: There is no such module or factory, the factory fails or returns something else, or there are
            no inputs, or two kinds of them.
    """
    made = _called(name, _found(name))
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise InspectError(f"'{name}' returns {type(made).__name__}; a factory returns a module, or (module, inputs)")
    if (inputs is None) == (not texts):
        raise InspectError(
            f"'{name}' returns its inputs itself, so that --input has nothing to say"
            if texts
            else f"'{name}' returns no inputs: return (module, inputs), or give shapes, as in --input 2,3,224,224"
        )
    return model, inputs_from(texts) if texts else inputs


def inputs_from(texts: Sequence[str]) -> list[Tensor] | dict[str, Tensor]:
    """Return the inputs that texts describe: by name if they have names, else by position.

    Raises:
        InspectError: A text is not read, or some have names and others none.
    """
    found = [parse_input(text) for text in texts]
    named = {name: value for name, value in found if name is not None}
    if named and len(named) < len(found):
        raise InspectError(f"--input {' --input '.join(texts)}: give all inputs different names, or none a name")
    return named or [value for _, value in found]


def parse_input(text: str) -> tuple[str | None, Tensor]:
    """Return the name, if there is one, and a tensor for `2,3,224,224` or `x=2,3,224,224:float32`.

    Floating-point tensors are random, others are zero, which every embedding takes.

    Raises:
        InspectError: The text is not of this form, or there is no such dtype.
    """
    match = _INPUT.fullmatch(text)
    if match is None:
        raise InspectError(f"--input '{text}' is not read: it is a shape, as in 2,3,224,224 or x=2,3,224,224:float32")
    dtype = getattr(torch, match["dtype"] or "float32", None)
    if not isinstance(dtype, torch.dtype):
        raise InspectError(f"--input '{text}': torch has no dtype '{match['dtype']}'; it has float32, int64, bool, …")
    shape = [int(size) for size in match["shape"].split(",")]
    drawn = dtype.is_floating_point or dtype.is_complex
    try:
        return match["name"], torch.randn(shape).to(dtype) if drawn else torch.zeros(shape, dtype=dtype)
    except RuntimeError as error:  # a size past what fits an integer, or the memory
        raise InspectError(f"--input '{text}' cannot be made ({first_line(error)}); give a smaller shape") from error


def _found(name: str) -> Callable[[], Any]:
    place, _, path = name.rpartition(":")
    with _current_directory_first():
        try:
            module = _from_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
            return reduce(getattr, path.split("."), module)  # type: ignore[arg-type,return-value]
        except AttributeError as error:
            raise InspectError(f"'{name}': module '{place}' has no '{path}' ({first_line(error)})") from error
        except Exception as error:
            why = f"{type(error).__name__}: {first_line(error)}"
            raise InspectError(
                f"'{name}': '{place}' cannot be imported ({why}); name a module in the current directory or on the "
                "path of Python, or a file"
            ) from error


def _from_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a file of Python")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _called(name: str, factory: Callable[[], Any]) -> Any:
    with _current_directory_first():
        try:
            return factory()
        except Exception as error:
            raise InspectError(f"'{name}' failed: {type(error).__name__}: {first_line(error)}") from error


@contextmanager
def _current_directory_first() -> Iterator[None]:
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        if here in sys.path:
            sys.path.remove(here)
