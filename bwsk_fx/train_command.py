"""`bwsk-fx train`: its options, and the table at its end."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_type_hints

import typer

from bwsk_fx.console import errors_as_lines, make_console, quiet, status
from bwsk_fx.errors import TrainingError

# Everything heavy (torch, transformers, rich tables) is imported inside the command, so that --help is quick.
if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from bwsk_fx.training.config import RunConfig
    from bwsk_fx.training.experiments import RunReport

# Options that take a comma-separated list, which is a list in a file.
_LISTS = frozenset({"experiments", "modes"})
_SETTINGS = "bwsk_fx.trainer"

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


_RUN, _WHAT, _REVERSIBLE = "The run", "What is trained", "Reversible mode"
_HOW = "How it is trained; defaults are those of the experiment"


def _use_file(context: typer.Context, file: Path | None) -> Path | None:
    """Makes what a file says the defaults of this call, which flags override."""
    if file is None or context.resilient_parsing:
        return file
    with errors_as_lines():
        from bwsk_fx.training import run_file

        found = run_file.read(file, _option_types(), _LISTS)
    context.meta[_SETTINGS] = found.pop("trainer", {})
    context.default_map = found
    return file


def _option_types() -> dict[str, Any]:
    """What a file can set, and the type of each."""
    hints = get_type_hints(train)
    return {name: hints[name] for name in hints if name not in ("context", "config", "return")} | {"trainer": dict}


Config = Annotated[
    Path | None,
    typer.Option(
        metavar="<file>",
        show_default=False,
        is_eager=True,
        callback=_use_file,
        rich_help_panel=_RUN,
        help="YAML file with options by name, [b]trainer[/b] as a mapping. Flags win over it.",
    ),
]
Output = Annotated[Path, typer.Option(metavar="<path>", rich_help_panel=_RUN, help="Receives the variants.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", metavar="", rich_help_panel=_RUN, help="Train finished variants again.")
]
Data = Annotated[
    str,
    typer.Option(
        metavar="<name>",
        rich_help_panel=_WHAT,
        help="[b]digits[/b], [b]cifar10[/b], a folder with a sub-folder per class, or a Hub id.",
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        metavar="<name>",
        show_default="a small ViT for the digits, else ViT-base",
        rich_help_panel=_WHAT,
        help="Checkpoint to fine-tune, and architecture to train from scratch.",
    ),
]
Experiments = Annotated[
    str,
    typer.Option(
        metavar="<list>",
        show_default="both",
        rich_help_panel=_WHAT,
        help="From which start: [b]finetune[/b], [b]scratch[/b].",
    ),
]
Modes = Annotated[
    str,
    typer.Option(
        metavar="<list>",
        show_default="all three",
        rich_help_panel=_WHAT,
        help="Which step: [b]conventional[/b], [b]analyzed[/b], [b]reversible[/b].",
    ),
]
TrainLimit = Annotated[
    int | None,
    typer.Option(
        metavar="<int>", show_default="all", rich_help_panel=_WHAT, help="Train on at most this many samples."
    ),
]
Augment = Annotated[
    bool | None,
    typer.Option(
        "--augment/--no-augment",
        metavar="",
        show_default="all but the digits",
        rich_help_panel=_WHAT,
        help="Crop and mirror training images at random. A mirrored digit is another sign, so digits are left alone.",
    ),
]
Budget = Annotated[
    float,
    typer.Option(metavar="<float>", rich_help_panel=_REVERSIBLE, help="Extra time to spend, as a fraction of a step."),
]
FaithOption = Annotated[
    Faith, typer.Option(rich_help_panel=_REVERSIBLE, help="Bit-identical gradients, or equal up to rounding.")
]
GranularityOption = Annotated[Granularity, typer.Option(rich_help_panel=_REVERSIBLE, help="What becomes one region.")]
Seed = Annotated[
    int,
    typer.Option(
        metavar="<int>", rich_help_panel=_RUN, help="Of weights, data order and splits; the same for all modes."
    ),
]
Seeds = Annotated[
    int,
    typer.Option(
        metavar="<int>", rich_help_panel=_RUN, help="Train this many seeds, each in a folder of its own, and compare."
    ),
]
PrecisionOption = Annotated[
    PrecisionChoice,
    typer.Option(
        metavar="<format>",
        rich_help_panel=_HOW,
        help="[b]fp32[/b], [b]bf16[/b], [b]fp16[/b], or [b]auto[/b]: fp16 on CUDA, as published, fp32 on a CPU.",
    ),
]
Trainer = Annotated[
    list[str] | None,
    typer.Option(
        metavar="<key=value>",
        show_default=False,
        rich_help_panel=_HOW,
        help="Any other field of transformers' TrainingArguments, such as [b]optim=adafactor[/b]. Repeatable.",
    ),
]


def _recipe(words: str, metavar: str) -> Any:
    return typer.Option(metavar=metavar, show_default=False, rich_help_panel=_HOW, help=words)


Epochs = Annotated[int | None, _recipe("At most this many.", "<int>")]
BatchSize = Annotated[int | None, _recipe("Samples per step.", "<int>")]
LearningRate = Annotated[float | None, _recipe("At its peak.", "<float>")]
Schedule = Annotated[str | None, _recipe("Of the learning rate, by its name in transformers.", "<name>")]
Warmup = Annotated[float | None, _recipe("Share of all steps over which the learning rate rises.", "<float>")]
WeightDecay = Annotated[float | None, _recipe("Of the optimizer.", "<float>")]
Clip = Annotated[float | None, _recipe("Largest norm of the gradients; 0 clips nothing.", "<float>")]
Patience = Annotated[int | None, _recipe("Evaluations without progress before training stops.", "<int>")]
EvaluationSteps = Annotated[int | None, _recipe("Steps between evaluations, at most an epoch.", "<int>")]


def train(
    context: typer.Context,
    config: Config = None,
    output: Output = Path("runs/digits"),
    overwrite: Overwrite = False,
    seed: Seed = 0,
    seeds: Seeds = 1,
    data: Data = "digits",
    model: Model = None,
    experiments: Experiments = "finetune,scratch",
    modes: Modes = "conventional,analyzed,reversible",
    train_limit: TrainLimit = None,
    augment: Augment = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    learning_rate: LearningRate = None,
    schedule: Schedule = None,
    warmup: Warmup = None,
    weight_decay: WeightDecay = None,
    clip: Clip = None,
    patience: Patience = None,
    evaluation_steps: EvaluationSteps = None,
    precision: PrecisionOption = PrecisionChoice.AUTO,
    trainer: Trainer = None,
    budget: Budget = 0.0,
    faith: FaithOption = Faith.ROUNDED,
    granularity: GranularityOption = Granularity.BLOCK,
) -> None:
    """Train variants of a ViT and compare accuracy, time and memory.

    Without options: six variants on scikit-learn's handwritten digits, in a few minutes on a CPU.

    Variants that the output folder already holds are skipped, and an unfinished one goes on from its newest checkpoint.

    Example: [b]bwsk-fx train --modes conventional,reversible --budget 0.1[/b]
    """
    from bwsk_fx.training import processes

    with errors_as_lines(), processes.main_heard_first():
        from bwsk_fx.training.config import Experiment, Mode, Precision, RecipeOptions, ReversibleOptions, RunConfig

        run = RunConfig(
            output=output,
            data=data,
            model=model,
            experiments=_choices("--experiments", experiments, Experiment),
            modes=_choices("--modes", modes, Mode),
            plan=ReversibleOptions(budget, faith.value, granularity.value),
            epochs=epochs,
            batch_size=batch_size,
            recipe_options=RecipeOptions(
                learning_rate, schedule, warmup, weight_decay, clip, patience, evaluation_steps
            ),
            trainer=_settings(context, trainer or []),
            augment=augment,
            seed=seed,
            seeds=seeds,
            precision=Precision(precision.value),
            train_limit=train_limit,
            overwrite=overwrite,
        )
        report = _trained(run)
        processes.leave()
        if processes.heard():
            _show_run(report)


def _settings(context: typer.Context, flags: list[str]) -> dict[str, Any]:
    """The settings of the file, with those of the flags in place of what it says about the same names."""
    from bwsk_fx.training.values import parse_setting

    return context.meta.get(_SETTINGS, {}) | dict(parse_setting(flag) for flag in flags)


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
