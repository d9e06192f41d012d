"""How long do capture, typing and planning of a ViT take before the first step, and how does it grow with depth?

Planning is the first forward pass of the rewritten graph less the third one, which finds plans made and layouts
checked. A budget between none and all of the time has the regions planned together.

    python benchmarks/planning_time.py
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from common import Shape, parser, report, shape_of

import bwsk_fx

QUESTION = "planning-time"


def main() -> None:
    arguments = parser(__doc__, Shape(layers=12, hidden=768, batch=1, image=224, precision="bf16"))
    arguments.add_argument("--depths", type=int, nargs="+", default=[12, 48], help="numbers of layers")
    options = arguments.parse_args()
    rows = [row for depth in options.depths for row in _rows(options, depth)]
    columns = ("capture", "typing", "planning", "sum")
    report(QUESTION, options, rows, {"variant": str} | dict.fromkeys(columns, "{:.2f}".format))


def _rows(options: Any, depth: int) -> Iterator[dict[str, Any]]:
    options.layers = depth
    shape = shape_of(options)
    model, inputs = shape.model(options.device), shape.inputs(options.device)
    clock = [time.perf_counter()]
    graph = bwsk_fx.capture(model, inputs)
    clock.append(time.perf_counter())
    bwsk_fx.type_nodes(graph)
    clock.append(time.perf_counter())
    capture, typing = (after - before for before, after in pairwise(clock))
    for budget in options.budgets:
        planning = _planning(graph, inputs, budget, shape.dtype, options.device)
        steps = {"capture": capture, "typing": typing, "planning": planning}
        yield {"variant": f"{depth} layers, budget {budget:g}", **steps, "sum": sum(steps.values())}


def _planning(
    graph: torch.fx.GraphModule, inputs: dict[str, Any], budget: float, dtype: torch.dtype | None, device: str
) -> float:
    clock = [time.perf_counter()]
    reversible = bwsk_fx.fuse_regions(graph, budget)
    for _ in range(3):
        with torch.autocast(device.split(":")[0], dtype=dtype, enabled=dtype is not None):
            reversible(**inputs)
        clock.append(time.perf_counter())
    first, _, third = (after - before for before, after in pairwise(clock))
    return first - third


if __name__ == "__main__":
    main()
