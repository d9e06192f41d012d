"""How long do capture, typing and planning of ViT-base take, before the first step can run?

Planning is the first forward pass of the rewritten graph less a second one, which finds its plans made.

    python benchmarks/planning_time.py
"""

from __future__ import annotations

import time
from itertools import pairwise

import torch
from common import Shape, parser, report, shape_of

import bwsk_fx

QUESTION = "planning-time"


def main() -> None:
    options = parser(__doc__, Shape(layers=12, hidden=768, batch=1, image=224, precision="bf16")).parse_args()
    shape = shape_of(options)
    model, inputs = shape.model(options.device), shape.inputs(options.device)
    clock = [time.perf_counter()]
    graph = bwsk_fx.capture(model, inputs)
    clock.append(time.perf_counter())
    bwsk_fx.type_nodes(graph)
    clock.append(time.perf_counter())
    reversible = bwsk_fx.fuse_regions(graph, options.budgets[0])
    for _ in range(2):
        with torch.autocast(options.device.split(":")[0], dtype=shape.dtype, enabled=shape.dtype is not None):
            reversible(**inputs)
        clock.append(time.perf_counter())
    capture, typing, first, second = (after - before for before, after in pairwise(clock))
    steps = {"capture": capture, "typing": typing, "fusing and planning": first - second}
    rows = [{"variant": name, "seconds": seconds} for name, seconds in (*steps.items(), ("sum", sum(steps.values())))]
    report(QUESTION, options, rows, {"variant": str, "seconds": "{:.2f}".format})


if __name__ == "__main__":
    main()
