"""Configuration files of a run: `bwsk-fx train --config FILE`, and the `config.yaml` that a run leaves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from bwsk_fx.errors import TrainingError
from bwsk_fx.training.values import closest, mismatch, problem_of, read_yaml

FILE = "config.yaml"


def read(path: Path, options: Mapping[str, Any], lists: frozenset[str]) -> dict[str, Any]:
    """The options that a YAML file sets, by name with underscores.

    Args:
        path: the file, a mapping from names of options, with dashes or underscores, to values.
        options: the type of each option by its name with underscores; `trainer` takes a mapping.
        lists: options that take a comma-separated list as a flag, and a list or such a text here.

    Returns:
        What the file sets, lists as comma-separated text; options that are null are left out.

    Raises:
        TrainingError: the file cannot be read or is no mapping, or an option is unknown, named twice or mistyped.
    """
    found: dict[str, Any] = {}
    for key, value in _mapping(path).items():
        name = str(key).replace("-", "_")
        if name not in options:
            raise TrainingError(f"'{path}': unknown option '{key}'; {closest(name, list(options))}")
        if name in found:
            raise TrainingError(f"'{path}': '{name}' is there twice, with dashes and with underscores")
        found[name] = _checked(path, name, value, options[name], name in lists)
    return {name: value for name, value in found.items() if value is not None}


def write(path: Path, options: Mapping[str, Any]) -> None:
    """Writes a file that `read` reads, one option a line."""
    text = yaml.safe_dump(dict(options), sort_keys=False, allow_unicode=True)
    path.write_text(f"# The same run again: bwsk-fx train --config with this file\n{text}", encoding="utf-8")


def _mapping(path: Path) -> dict[Any, Any]:
    try:
        contents = read_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingError(
            f"--config '{path}' cannot be read ({getattr(error, 'strerror', None) or error})"
        ) from error
    except RecursionError as error:
        raise TrainingError(f"--config '{path}' is nested too deeply; it takes one option a line") from error
    except yaml.YAMLError as error:
        raise TrainingError(f"--config '{path}' is not YAML ({problem_of(error)})") from error
    if not isinstance(contents, dict):
        raise TrainingError(f"--config '{path}' must hold a mapping such as 'epochs: 3', one option a line")
    return contents


def _checked(path: Path, name: str, value: Any, hint: Any, is_list: bool) -> Any:
    if value is None:
        return None
    if is_list and isinstance(value, list) and all(isinstance(entry, str) for entry in value):
        return ",".join(value)
    if words := mismatch(value, hint):
        words = f"a list or comma-separated {words}" if is_list else words
        raise TrainingError(f"'{path}': {name} must be {words}, not {value!r}")
    return value
