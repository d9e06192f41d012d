"""The command line: `bwsk-fx inspect`, `bwsk-fx calm` and `bwsk-fx train`."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from bwsk_fx.console import errors_as_lines, make_console, quiet, status
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


class Ruleset(StrEnum):
    """Which rules label the operators."""

    SOUND = "sound"
    PUBLISHED = "published"


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


@app.command()
def inspect(
    model: ModelName,
    ruleset: Annotated[Ruleset, typer.Option(help="Which rules label the operators.")] = Ruleset.SOUND,
    calm: Annotated[
        bool, typer.Option("--calm", metavar="", help="Also show which axes can be split, and where not.")
    ] = False,
    compare: Annotated[
        bool, typer.Option("--compare", metavar="", help="Also set both rulesets side by side.")
    ] = False,
    certify: Annotated[
        bool,
        typer.Option("--certify", metavar="", help="Also run the inverse of every S operator, on random weights."),
    ] = False,
    erasure: Annotated[
        bool, typer.Option("--erasure", metavar="", help="Also show what is erased, layer by layer.")
    ] = False,
    node: Annotated[
        str | None,
        typer.Option(
            metavar="<name>",
            show_default=False,
            help="Also follow this node of the graph back to the inputs, or to what erases them.",
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="<file>", show_default=False, help="Also write one HTML page: graph, plans, memory, axes."
        ),
    ] = None,
    as_json: AsJson = False,
    image_size: ImageSize = None,
    layers: Layers = None,
    batch_size: Annotated[int, typer.Option(min=1, metavar="<int>", help="Images per batch while capturing.")] = 2,
) -> None:
    """Label every operator of an image classifier: preserved (S), erased (K) or unknown (GRAY).

    Only the architecture is read, not the weights.

    Example: [b]bwsk-fx inspect vit-base --ruleset published --calm[/b]
    """
    overrides = {"image_size": image_size, "num_hidden_layers": layers}
    with errors_as_lines(), quiet():
        with status(f"capturing {model}"):
            graph, inputs = _captured(model, batch_size, {key: value for key, value in overrides.items() if value})
            wanted = {"calm": calm, "compare": compare, "certify": certify, "erasure": erasure}
            reports = _reports(graph, inputs, ruleset, {name for name, asked in wanted.items() if asked}, node)
            remarks = _page(graph, inputs, html, model) if html else []
        _show_reports(model, ruleset, reports, as_json)
        for remark in remarks:
            typer.echo(remark, err=True)


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


def _reports(
    graph: Any, inputs: dict[str, Any], ruleset: Ruleset, wanted: set[str], node: str | None
) -> dict[str, Any]:
    """Each report that was asked for, under its key in the JSON."""
    import bwsk_fx

    bwsk_fx.type_nodes(graph, ruleset=ruleset.value)
    # Certification corrects verdicts, which the other reports then show.
    certificates = bwsk_fx.certify(graph, inputs) if "certify" in wanted else None
    reports: dict[str, Any] = {"summary": bwsk_fx.summarize(graph)}
    if certificates is not None:
        reports["certificates"] = certificates
    if "compare" in wanted:
        reports["comparison"] = bwsk_fx.compare_rulesets(graph)
    if "calm" in wanted:
        reports["calm"] = bwsk_fx.analyze_calm(graph)
    if "erasure" in wanted:
        reports["erasure"] = bwsk_fx.erasure_budget(graph)
    if node is not None:
        reports["provenance"] = bwsk_fx.trace_back(graph, node)
    return reports


def _page(graph: Any, inputs: dict[str, Any], path: Path, model: str) -> list[str]:
    from bwsk_fx.report.html.command import write_page

    return list(write_page(graph, inputs, path, model))


def _show_reports(model: str, ruleset: Ruleset, reports: dict[str, Any], as_json: bool) -> None:
    if as_json:
        contents = {name: report.to_json() for name, report in reports.items()}
        typer.echo(json.dumps({"model": model, "ruleset": ruleset.value, **contents}, indent=1))
        return
    console = make_console()
    console.print(f"[b]{model}[/b] under the [b]{ruleset.value}[/b] ruleset")
    for place, report in enumerate(reports.values()):
        console.print(*([""] if place else []), report)


if __name__ == "__main__":
    main()
