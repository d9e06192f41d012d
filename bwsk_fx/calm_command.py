"""`bwsk-fx calm`: its options, what it shows, and what it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from bwsk_fx.console import errors_as_lines, make_console, quiet, status
from bwsk_fx.inspect_command import ImageSize, Inputs, Layers, Model, given

# Everything heavy (torch, transformers, rich tables) is imported inside the command, so that --help is quick.


def _rate(unit: str, words: str) -> Any:
    return typer.Option(min=1e-9, metavar=f"<{unit}>", show_default=False, help=words)


AxisName = Annotated[str | None, typer.Option(metavar="<name>", show_default=False, help="Only this axis, in detail.")]
Devices = Annotated[
    int | None,
    typer.Option(
        min=2, metavar="<int>", show_default=False, help="Also choose axes for a training step on so many devices."
    ),
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="<int>", show_default="one per device", help="Samples per step, on all devices together."
    ),
]
Bandwidth = Annotated[float | None, _rate("GB/s", "What a device sends, to tell how long sending takes.")]
Speed = Annotated[float | None, _rate("TFLOP/s", "What a device computes, to tell how long that takes.")]
Svg = Annotated[
    Path | None, typer.Option(metavar="<file>", show_default=False, help="Also write a picture of the partitions.")
]
Certify = Annotated[
    bool, typer.Option("--certify", metavar="", help="Also run every claim on shards, with random weights.")
]
AsJson = Annotated[bool, typer.Option("--json", metavar="", help="Print JSON instead of tables.")]


def calm(
    model: Model,
    inputs: Inputs = None,
    image_size: ImageSize = None,
    layers: Layers = None,
    axis: AxisName = None,
    devices: Devices = None,
    batch_size: BatchSize = None,
    bandwidth: Bandwidth = None,
    speed: Speed = None,
    svg: Svg = None,
    certify: Certify = False,
    as_json: AsJson = False,
) -> None:
    """Show which parts of a model run without coordination, axis by axis.

    Only the architecture is read, not the weights, unless the model is a .pt2 file.

    Example: [b]bwsk-fx calm vit-base --devices 4 --batch-size 8 --bandwidth 25[/b]
    """
    with errors_as_lines(), quiet():
        from bwsk_fx.inspection import coordination
        from bwsk_fx.inspection.sources import Request

        coordination.check(devices, batch_size=batch_size, bandwidth=bandwidth, speed=speed)
        overrides = given(image_size=image_size, num_hidden_layers=layers)
        wanted = coordination.Wanted(model, axis, devices, batch_size, certify, svg)
        with status(f"capturing {model}"):
            reports = coordination.reports(wanted, Request(overrides=overrides, inputs=tuple(inputs or ())))
        _show(model, *coordination.shown(reports, bandwidth, speed), as_json)


def _show(model: str, reports: dict[str, Any], seconds: dict[str, float], as_json: bool) -> None:
    if as_json:
        documents = {name: report.to_json() for name, report in reports.items()}
        typer.echo(json.dumps({"model": model, **documents, **seconds}, indent=1))
        return
    console = make_console()
    for place, report in enumerate(reports.values()):
        console.print(*([""] if place else []), report)
    for name, value in seconds.items():
        console.print(f"{name.replace('_', ' ')}: {value:.3g}")
