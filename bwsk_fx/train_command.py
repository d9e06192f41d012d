"""`bwsk-fx train`: its options, and the table at its end."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from bwsk_fx.console import errors_as_lines, make_console, quiet, status
from bwsk_fx.errors import TrainingError

# Everything heavy (torch, transformers, rich tables) is imported inside the command, so that --help is quick.
if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from bwsk_fx.training.config import RunConfig
    from bwsk_fx.training.experiments import RunReport

Choice = TypeVar("Choice", bound=StrEnum)


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
    with errors_as_lines():
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
    with status("starting"), quiet():
        from bwsk_fx.training import experiments
    from bwsk_fx.training.progress import on_console

    with quiet(), on_console(make_console(stderr=True)) as reporter:
        return experiments.train(config, reporter)


def _show_run(report: RunReport) -> None:
    console = make_console()
    skipped = [folder for folder in report.results if folder not in report.trained]
    if skipped:
        console.print(f"[dim]already there: {', '.join(skipped)}[/dim]")
    console.print(_comparison(report, console), "")
    console.print(f"Models, plots and model card: [b]{report.output}[/b]", soft_wrap=True)


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
