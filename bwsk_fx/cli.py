"""The command line: `bwsk-fx inspect`, `bwsk-fx calm` and `bwsk-fx train`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from bwsk_fx.errors import BwskError, TrainingError

# Everything heavy (torch, transformers, rich tables) is imported inside the commands, so that --help is quick.
if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from bwsk_fx.training.config import RunConfig
    from bwsk_fx.training.experiments import RunReport

Choice = TypeVar("Choice", bound=StrEnum)

_FILE_WIDTH = 120

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


class Faith(StrEnum):
    """How exact gradients have to be."""

    ROUNDED = "rounded"
    EXACT = "exact"


class Granularity(StrEnum):
    """What becomes one reversible region."""

    BLOCK = "block"
    S_RUN = "s-run"
    WHOLE = "whole"


class PrecisionChoice(StrEnum):
    """Number format of the forward pass."""

    AUTO = "auto"
    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"


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
    with _errors_as_lines(), _quiet():
        with _status(f"capturing {model}"):
            graph, inputs = _captured(model, batch_size, {key: value for key, value in overrides.items() if value})
            wanted = {"calm": calm, "compare": compare, "certify": certify, "erasure": erasure}
            reports = _reports(graph, inputs, ruleset, {name for name, asked in wanted.items() if asked}, node)
        _show_reports(model, ruleset, reports, as_json)


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
    with _errors_as_lines(), _quiet():
        from bwsk_fx.report import calm_command

        calm_command.check(devices, batch_size=batch_size, bandwidth=bandwidth, speed=speed)
        with _status(f"capturing {model}"):
            graph, inputs = _captured(model, 2, {key: value for key, value in overrides.items() if value})
            reports = calm_command.reports(graph, axis, devices, batch_size, inputs if certify else None)
            if svg is not None:
                calm_command.save_picture(reports["calm"], svg)
        contents, seconds = calm_command.shown(reports, bandwidth, speed)
        if as_json:
            documents = {name: report.to_json() for name, report in contents.items()}
            typer.echo(json.dumps({"model": model, **documents, **seconds}, indent=1))
            return
        console = _console()
        for place, report in enumerate(contents.values()):
            console.print(*([""] if place else []), report)
        for name, value in seconds.items():
            console.print(f"{name.replace('_', ' ')}: {value:.3g}")


@app.command()
def train(
    output: Annotated[Path, typer.Option(help="Folder that receives the variants.")] = Path("runs/digits"),
    data: Annotated[
        str, typer.Option(help="[b]digits[/b], [b]cifar10[/b], a folder with a sub-folder per class, or a Hub id.")
    ] = "digits",
    model: Annotated[
        str | None,
        typer.Option(
            show_default="a small ViT for the digits, else ViT-base",
            help="Checkpoint to fine-tune, and architecture to train from scratch.",
        ),
    ] = None,
    experiments: Annotated[
        str, typer.Option(show_default="both", help="From which start: [b]finetune[/b], [b]scratch[/b].")
    ] = "finetune,scratch",
    modes: Annotated[
        str,
        typer.Option(
            show_default="all three", help="Which step: [b]conventional[/b], [b]analyzed[/b], [b]reversible[/b]."
        ),
    ] = "conventional,analyzed,reversible",
    budget: Annotated[
        float, typer.Option(help="Extra time that the reversible mode may spend, as a fraction of a step.")
    ] = 0.0,
    faith: Annotated[Faith, typer.Option(help="Bit-identical gradients, or equal up to rounding.")] = Faith.ROUNDED,
    granularity: Annotated[Granularity, typer.Option(help="What becomes one region.")] = Granularity.BLOCK,
    epochs: Annotated[int | None, typer.Option(show_default="per experiment", help="At most this many.")] = None,
    batch_size: Annotated[int | None, typer.Option(show_default="per experiment", help="Samples per step.")] = None,
    seed: Annotated[int, typer.Option(help="Of weights, data order and splits; the same for all modes.")] = 0,
    seeds: Annotated[int, typer.Option(help="Train this many seeds, each in a folder of its own, and compare.")] = 1,
    precision: Annotated[
        PrecisionChoice,
        typer.Option(
            metavar="<format>",
            help="[b]fp32[/b], [b]bf16[/b], [b]fp16[/b], or [b]auto[/b]: fp16 on CUDA, as published, fp32 on a CPU.",
        ),
    ] = PrecisionChoice.AUTO,
    train_limit: Annotated[
        int | None, typer.Option(show_default="all", help="Train on at most this many samples.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", metavar="", help="Train finished variants again.")] = False,
) -> None:
    """Train variants of a ViT and compare accuracy, time and memory.

    Without options: six variants on scikit-learn's handwritten digits, in a few minutes on a CPU.

    Variants that the output folder already holds are skipped, and an unfinished one goes on from its newest checkpoint.

    Example: [b]bwsk-fx train --modes conventional,reversible --budget 0.1[/b]
    """
    with _errors_as_lines():
        from bwsk_fx.training.config import Experiment, Mode, Precision, ReversibleOptions, RunConfig

        config = RunConfig(
            output=output,
            data=data,
            model=model,
            experiments=_choices("--experiments", experiments, Experiment),
            modes=_choices("--modes", modes, Mode),
            plan=ReversibleOptions(budget, faith.value, granularity.value),
            epochs=epochs,
            batch_size=batch_size,
            seed=seed,
            seeds=seeds,
            precision=Precision(precision.value),
            train_limit=train_limit,
            overwrite=overwrite,
        )
        _show_run(_trained(config))


def _choices(option: str, text: str, kind: type[Choice]) -> tuple[Choice, ...]:
    """The members of an enumeration that a comma-separated list names, in the enumeration's own order."""
    named = {word.strip() for word in text.split(",") if word.strip()}
    known = {member.value for member in kind}
    if unknown := sorted(named - known):
        raise TrainingError(
            f"{option} does not know '{unknown[0]}'; it takes {', '.join(member.value for member in kind)}"
        )
    return tuple(member for member in kind if member.value in named)


def _trained(config: RunConfig) -> RunReport:
    with _status("starting"), _quiet():
        from bwsk_fx.training import experiments
    from bwsk_fx.training.progress import on_console

    with _quiet(), on_console(_console(stderr=True)) as reporter:
        return experiments.train(config, reporter)


def _show_run(report: RunReport) -> None:
    console = _console()
    skipped = [folder for folder in report.results if folder not in report.trained]
    if skipped:
        console.print(f"[dim]already there: {', '.join(skipped)}[/dim]")
    for table in _tables(report, console):
        console.print(table, "")
    console.print(f"Models, plots and model card: [b]{report.output}[/b]", soft_wrap=True)


def _tables(report: RunReport, console: Console) -> Iterable[Table]:
    if report.comparison is None:
        return [_comparison(report, console)]
    from bwsk_fx.training.seed_tables import comparison_tables

    return comparison_tables(report.comparison, console.width)


def _comparison(report: RunReport, console: Console) -> Table:
    """The whole comparison table, or its essential columns where the whole does not fit."""
    from rich.measure import Measurement

    from bwsk_fx.training import card

    rows = card.rows(report.results)
    whole = _table(rows, card.HEADINGS, card.HEADINGS)
    unbounded = console.options.update(width=1000)
    fits = Measurement.get(console, unbounded, whole).maximum <= console.width
    return whole if fits else _table(rows, card.HEADINGS, card.ESSENTIAL)


def _table(rows: list[tuple[str, ...]], headings: tuple[str, ...], shown: tuple[str, ...]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, int(shown is headings), 0, 0))
    for heading in shown:
        # Units and rulesets go below their words, since the figures are narrower than "time (s)".
        table.add_column(heading.replace(" ", "\n"), justify="left" if heading == "variant" else "right", no_wrap=True)
    for row in rows:
        cells = dict(zip(headings, row, strict=True))
        table.add_row(*(cells[heading] for heading in shown))
    return table


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


def _show_reports(model: str, ruleset: Ruleset, reports: dict[str, Any], as_json: bool) -> None:
    if as_json:
        contents = {name: report.to_json() for name, report in reports.items()}
        typer.echo(json.dumps({"model": model, "ruleset": ruleset.value, **contents}, indent=1))
        return
    console = _console()
    console.print(f"[b]{model}[/b] under the [b]{ruleset.value}[/b] ruleset")
    for place, report in enumerate(reports.values()):
        console.print(*([""] if place else []), report)


@contextmanager
def _errors_as_lines() -> Iterator[None]:
    """Turns the library's errors into one line on stderr and exit code 2."""
    try:
        yield
    except BwskError as error:
        message = " ".join(str(error).split())
        typer.secho("error: ", fg=typer.colors.RED, bold=True, err=True, nl=False)
        typer.echo(message, err=True)
        raise typer.Exit(2) from error


@contextmanager
def _status(label: str) -> Iterator[None]:
    with _console(stderr=True).status(label):
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    from bwsk_fx.training.quiet import quiet, use_cache_when_offline

    use_cache_when_offline()
    with quiet():
        yield


def _console(stderr: bool = False) -> Console:
    from rich.console import Console

    console = Console(stderr=stderr, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        # Of a narrow table in a file little could be read.
        console.width = max(console.width, _FILE_WIDTH)
    return console


if __name__ == "__main__":
    main()
