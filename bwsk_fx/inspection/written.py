"""The files that `bwsk-fx inspect` writes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import fx

import bwsk_fx
from bwsk_fx.report.export.svg import DEPTH
from bwsk_fx.report.files import write_text

Writer = Callable[[fx.GraphModule, Path, int | None], None]


def write(graph: fx.GraphModule, files: Mapping[str, Path], depth: int | None) -> None:
    """Write files of a typed graph.

    Args:
        graph: The graph.
        files: Where each kind of file goes; kinds are the keys of `WRITERS`.
        depth: To how many parts of a module's path drawings are folded; None for their own choice.

    Raises:
        BwskError: A file cannot be written.
    """
    for kind, path in files.items():
        WRITERS[kind](graph, path, depth)


def _svg(graph: fx.GraphModule, path: Path, depth: int | None) -> None:
    bwsk_fx.save_svg(graph, path, DEPTH if depth is None else depth)


def _dot(graph: fx.GraphModule, path: Path, depth: int | None) -> None:
    write_text(path, bwsk_fx.to_dot(graph, depth))


def _graphml(graph: fx.GraphModule, path: Path, depth: int | None) -> None:
    bwsk_fx.save_graphml(graph, path)


def _model_explorer(graph: fx.GraphModule, path: Path, depth: int | None) -> None:
    write_text(path, json.dumps(bwsk_fx.model_explorer_data(graph), indent=1))


# A further kind of file is a further entry here, and an option of the command.
WRITERS: Mapping[str, Writer] = {"svg": _svg, "dot": _dot, "graphml": _graphml, "model_explorer": _model_explorer}
