"""What `bwsk-fx inspect --html` does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import fx

from bwsk_fx.errors import RegionError
from bwsk_fx.passes.fuse_regions import fuse_regions
from bwsk_fx.planning.options import PlanOptions
from bwsk_fx.report.html.page import save_html


def write_page(
    graph: fx.GraphModule, inputs: Mapping[str, Any], path: Path, title: str, plan: PlanOptions
) -> Iterator[str]:
    """Write the page of a typed graph and of its rewrite by blocks; yield lines to tell the user.

    Args:
        graph: A typed graph.
        inputs: Of the model.
        path: Where the page goes.
        title: The name of the model.
        plan: What its plans are asked for.

    Raises:
        BwskError: The file cannot be written.
    """
    try:
        shown = fuse_regions(graph, plan.budget, faith=plan.faith)
    except RegionError as error:
        shown = graph
        yield f"not rewritten: {error}"
    yield from save_html(shown, path, inputs, title=title)
    yield f"written to {path}"
