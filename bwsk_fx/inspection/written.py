"""The files that `bwsk-fx inspect` writes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import fx

import bwsk_fx
from bwsk_fx.planning.options import PlanOptions
from bwsk_fx.report.export.svg import DEPTH
from bwsk_fx.report.files import write_text
from bwsk_fx.report.html.command import write_page


@dataclass(frozen=True)
class Subject:
    """What files are written about.

    Attributes:
        graph: A typed graph.
        inputs: Of the model; None where there are none.
        title: The name of the model.
        depth: To how many parts of a module's path drawings are folded; None for their own choice.
        plan: What the plans of the HTML page are asked for.
    """

    graph: fx.GraphModule
    inputs: Any
    title: str
    depth: int | None = None
    plan: PlanOptions = field(default_factory=PlanOptions)


Writer = Callable[[Subject, Path], Iterable[str]]


def write(subject: Subject, files: Mapping[str, Path]) -> list[str]:
    """Write files of a typed graph, and return what there is to say about them.

    Args:
        subject: What they are about.
        files: Where each kind of file goes; kinds are the keys of `WRITERS`.

    Raises:
        BwskError: A file cannot be written.
    """
    return [remark for kind, path in files.items() for remark in WRITERS[kind](subject, path)]


def _html(subject: Subject, path: Path) -> Iterable[str]:
    return write_page(subject.graph, subject.inputs, path, subject.title, subject.plan)


def _svg(subject: Subject, path: Path) -> Iterable[str]:
    bwsk_fx.save_svg(subject.graph, path, DEPTH if subject.depth is None else subject.depth)
    return ()


def _dot(subject: Subject, path: Path) -> Iterable[str]:
    write_text(path, bwsk_fx.to_dot(subject.graph, subject.depth))
    return ()


def _graphml(subject: Subject, path: Path) -> Iterable[str]:
    bwsk_fx.save_graphml(subject.graph, path)
    return ()


def _model_explorer(subject: Subject, path: Path) -> Iterable[str]:
    write_text(path, json.dumps(bwsk_fx.model_explorer_data(subject.graph), indent=1))
    return ()


# A further kind of file is a further entry here, and an option of the command.
WRITERS: Mapping[str, Writer] = {
    "html": _html,
    "svg": _svg,
    "dot": _dot,
    "graphml": _graphml,
    "model_explorer": _model_explorer,
}
