"""The HTML document: template, style sheet, script and data in one text, and that text on disk."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Mapping
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any

from bwsk_fx.errors import BwskError
from bwsk_fx.report.files import replace_text

# In a script element a browser looks for nothing but "<"; the others end a line of JavaScript.
_UNSAFE = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


def rendered(title: str, data: Mapping[str, Any], charts: Mapping[str, str]) -> str:
    """Return the document.

    Args:
        title: The model's name.
        data: What the script shows.
        charts: SVG by name, escaped by who drew it.
    """
    from importlib.metadata import version

    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    folder = files("bwsk_fx.report.html")
    style, script = (folder.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    environment = Environment(
        loader=PackageLoader("bwsk_fx.report.html", "."), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template("page.html.jinja").render(
        title=title,
        version=version("bwsk-fx"),
        style=Markup(style),
        script=Markup(script),
        policy=_policy(style, script),
        data=Markup(as_json(data)),
        charts={name: Markup(chart) for name, chart in charts.items()},
    )


def as_json(data: Mapping[str, Any]) -> str:
    """Return data as JSON that can stand in a script element: nothing in it can end the element."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character, escaped in _UNSAFE.items():
        text = text.replace(character, escaped)
    return text


def write(path: Path, text: str) -> None:
    """Write a page, whole or not at all.

    Raises:
        BwskError: The file cannot be written.
    """
    try:
        replace_text(path, text)
    except OSError as error:
        raise BwskError(
            f"the page cannot be written to {path}: {error.strerror}; name a file in a folder that is there"
        ) from error


def _policy(style: str, script: str) -> str:
    """Return a Content-Security-Policy under which nothing runs or loads but this style sheet and this script."""
    return (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"
