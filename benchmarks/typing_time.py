"""How long does typing take per node, and does it grow linearly with the depth of the model?

A ViT, whose operators all have rules, and a DINOv2, whose LayerScale modules are typed by their decomposition.

    python benchmarks/typing_time.py
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from common import Shape, parser, report, shape_of
from transformers import Dinov2Config, Dinov2ForImageClassification

import bwsk_fx

QUESTION = "typing-time"
DEPTHS = (12, 24, 48, 96)
ROUNDS = 5


def main() -> None:
    options = parser(__doc__, Shape(layers=12, hidden=192, batch=2, image=64, precision="fp32")).parse_args()
    rows = [row for depth in DEPTHS for row in _rows(options, depth)]
    report(
        QUESTION, options, rows, {"variant": str, "nodes": str, "ms": "{:.1f}".format, "ms per node": "{:.3f}".format}
    )


def _rows(options: Any, depth: int) -> Iterator[dict[str, Any]]:
    options.layers = depth
    shape = shape_of(options)
    pixels = {"pixel_values": shape.inputs(options.device)["pixel_values"]}
    models = {"ViT": shape.model(options.device), "DINOv2": _dinov2(shape).to(options.device)}
    for name, model in models.items():
        graph = bwsk_fx.capture(model.train(), pixels)
        nodes = len(graph.graph.nodes)
        milliseconds = 1000 * min(_seconds(graph) for _ in range(ROUNDS))
        yield {
            "variant": f"{name}, {depth} layers",
            "nodes": nodes,
            "ms": milliseconds,
            "ms per node": milliseconds / nodes,
        }


def _seconds(graph: torch.fx.GraphModule) -> float:
    start = time.perf_counter()
    bwsk_fx.type_nodes(graph)
    return time.perf_counter() - start


def _dinov2(shape: Shape) -> torch.nn.Module:
    config = Dinov2Config(
        num_hidden_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.hidden // 64,
        image_size=shape.image,
        patch_size=16,
        drop_path_rate=0.1,
    )
    return Dinov2ForImageClassification(config)


if __name__ == "__main__":
    main()
