"""The command line: `bwsk-fx inspect`, `bwsk-fx calm` and `bwsk-fx train`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from bwsk_fx.console import errors_as_lines, make_console, quiet, status
from bwsk_fx.inspect_command import inspect
from bwsk_fx.train_command import train

# Everything heavy (torch, transformers, rich tables) is imported inside the commands, so that --help is quick.

app = typer.Typer(
    name="bwsk-fx",
    help="See what every operator of a model preserves or erases, and train with activations rebuilt, not stored.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


ModelName = Annotated[
    str, typer.Argument(help="A model on the Hub, a local folder, or [b]vit-base[/b] or [b]vit-tiny-digits[/b].")
]
AsJson = Annotated[bool, typer.Option("--json", metavar="", help="Print JSON instead of tables.")]
ImageSize = Annotated[
    int | None,
    typer.Option(min=1, metavar="<int>", show_default="the model's", help="Height and width of the images."),
]
Layers = Annotated[
    int | None,
    typer.Option(min=1, metavar="<int>", show_default="the model's", help="Number of transformer blocks."),
]


def main() -> None:
    """Entry point of the `bwsk-fx` command."""
    app()


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"bwsk-fx {version('bwsk-fx')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", metavar="", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    pass


app.command()(inspect)


@app.command()
def calm(
    model: ModelName,
    axis: Annotated[
        str | None, typer.Option(metavar="<name>", show_default=False, help="Only this axis, in detail.")
    ] = None,
    devices: Annotated[
        int | None,
        typer.Option(
            min=2, metavar="<int>", show_default=False, help="Also choose axes for a training step on so many devices."
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="<int>", show_default="one per device", help="Images per step, on all devices together."
        ),
    ] = None,
    bandwidth: Annotated[
        float | None,
        typer.Option(
            min=1e-9, metavar="<GB/s>", show_default=False, help="What a device sends, to tell how long sending takes."
        ),
    ] = None,
    speed: Annotated[
        float | None,
        typer.Option(
            min=1e-9,
            metavar="<TFLOP/s>",
            show_default=False,
            help="What a device computes, to tell how long that takes.",
        ),
    ] = None,
    svg: Annotated[
        Path | None, typer.Option(metavar="<file>", show_default=False, help="Also write a picture of the partitions.")
    ] = None,
    certify: Annotated[
        bool, typer.Option("--certify", metavar="", help="Also run every claim on shards, with random weights.")
    ] = False,
    as_json: AsJson = False,
    image_size: ImageSize = None,
    layers: Layers = None,
) -> None:
    """Show which parts of an image classifier run without coordination, axis by axis.

    Only the architecture is read, not the weights.

    Example: [b]bwsk-fx calm vit-base --devices 4 --batch-size 8 --bandwidth 25[/b]
    """
    overrides = {"image_size": image_size, "num_hidden_layers": layers}
    with errors_as_lines(), quiet():
        from bwsk_fx.report import calm_command

        calm_command.check(devices, batch_size=batch_size, bandwidth=bandwidth, speed=speed)
        with status(f"capturing {model}"):
            graph, inputs = _captured(model, 2, {key: value for key, value in overrides.items() if value})
            reports = calm_command.reports(graph, axis, devices, batch_size, inputs if certify else None)
            if svg is not None:
                calm_command.save_picture(reports["calm"], svg)
        contents, seconds = calm_command.shown(reports, bandwidth, speed)
        if as_json:
            documents = {name: report.to_json() for name, report in contents.items()}
            typer.echo(json.dumps({"model": model, **documents, **seconds}, indent=1))
            return
        console = make_console()
        for place, report in enumerate(contents.values()):
            console.print(*([""] if place else []), report)
        for name, value in seconds.items():
            console.print(f"{name.replace('_', ' ')}: {value:.3g}")


app.command()(train)


def _captured(name: str, batch_size: int, overrides: dict[str, int]) -> tuple[Any, dict[str, Any]]:
    """The graph of a model, and random inputs of it."""
    import torch

    import bwsk_fx
    from bwsk_fx.training import models

    model = models.from_config(name, **overrides).train()
    size, channels = model.config.image_size, model.config.num_channels
    pixels = torch.randn(batch_size, channels, *((size, size) if isinstance(size, int) else size))
    inputs = {"pixel_values": pixels, "labels": torch.zeros(batch_size, dtype=torch.long)}
    return bwsk_fx.capture(model, inputs), inputs


if __name__ == "__main__":
    main()
