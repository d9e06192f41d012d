"""Values that are read from YAML: what they are, and whether they are what an option takes."""

from __future__ import annotations

import re
from collections.abc import Hashable
from difflib import get_close_matches
from enum import StrEnum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

import yaml

from bwsk_fx.errors import TrainingError

_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    list: "a list",
    dict: "a mapping",
    NoneType: "null",
}


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the numbers of YAML 1.2, without dates, and with every key given once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise yaml.constructor.ConstructorError(None, None, f"'{twice}' is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


# YAML 1.1 takes 1e-4 for text, and a run's name such as 2026-01-01 for a date, which JSON cannot hold.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def read_yaml(text: str) -> Any:
    """A value from YAML text; raises `yaml.YAMLError`."""
    # A subclass of the safe loader makes plain values only.
    return yaml.load(text, _Loader)


def mismatch(value: Any, hint: Any) -> str | None:
    """What a type hint takes, in words, or None when the value is of that type; a whole number is a number too."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if any(_fits(value, kind) for kind in kinds):
        return None
    return " or ".join(dict.fromkeys(word for kind in kinds if (word := _words(kind))))


def closest(name: str, known: list[str]) -> str:
    """The known name that an unknown one was meant to be, as an end of a message; otherwise all that are known."""
    found = get_close_matches(name, known, n=1)
    return f"did you mean '{found[0]}'?" if found else f"known are {', '.join(known)}"


def parse_setting(text: str) -> tuple[str, Any]:
    """The two halves of KEY=VALUE, the value read as YAML; raises a TrainingError."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise TrainingError(f"--trainer takes KEY=VALUE, such as optim=adafactor, not '{text}'")
    try:
        return name.strip(), read_yaml(value)
    except RecursionError as error:
        raise TrainingError(f"--trainer {name.strip()}: its value is nested too deeply") from error
    except yaml.YAMLError as error:
        raise TrainingError(f"--trainer {name.strip()}: '{value}' is not YAML ({problem_of(error)})") from error


def problem_of(error: yaml.YAMLError) -> str:
    """What is wrong with YAML text, and in which line."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error)
    return f"line {mark.line + 1}: {problem}" if mark else problem


def _fits(value: Any, kind: Any) -> bool:
    kind = get_origin(kind) or kind
    if not isinstance(kind, type):
        return False
    if issubclass(kind, StrEnum):
        return value in list(kind)
    if isinstance(value, bool):
        return kind is bool
    accepted = {float: (int, float), Path: (str,)}.get(kind, (kind,))
    return isinstance(value, accepted)


def _words(kind: Any) -> str:
    kind = get_origin(kind) or kind
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return f"one of {', '.join(kind)}"
    return _WORDS.get(kind, "")
