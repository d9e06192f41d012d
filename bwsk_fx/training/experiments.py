"""Runs the variants of a training run one after the other and writes the output folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bwsk_fx.errors import TrainingError
from bwsk_fx.training import processes, seeds
from bwsk_fx.training.comparison import Comparison
from bwsk_fx.training.config import Precision, RunConfig, Variant, published
from bwsk_fx.training.output import ALL_VARIANTS, Output, require_same_configuration
from bwsk_fx.training.progress import Reporter, SilentReporter
from bwsk_fx.training.session import Session, read_material
from bwsk_fx.training.summary import require_every_field, summarize


@dataclass(frozen=True)
class RunReport:
    """What a run leaves behind.

    Attributes:
        output: the folder.
        results: the contents of every `training_results.json` in it, by folder; with several seeds of those trained
            or found by this run, under names such as `seed-0/scratch-conventional`.
        trained: the folders that this run trained; the others were there already.
        comparison: of the modes over seeds, if there are several.
    """

    output: Path
    results: dict[str, dict[str, Any]]
    trained: tuple[str, ...]
    comparison: Comparison | None = None


def train(config: RunConfig, reporter: Reporter | None = None) -> RunReport:
    """Trains every requested variant that the output folder does not hold yet.

    With `config.seeds` above 1 each seed is a run of its own in a folder `seed-<n>`, and when all are there, they are
    compared. Under a launcher every process calls this with the same configuration; they share each batch, and the
    main one writes.

    Args:
        config: what to train.
        reporter: hears about progress; nothing is shown without one.

    Raises:
        TrainingError: the run cannot start or go on; finished variants stay, nothing half-written does.
        CaptureError: the model cannot be captured.
    """
    config.validate()
    precision = resolve_precision(config.precision)
    processes.require_supported(precision.value)
    output = Output(config.output)
    processes.decided(partial(_require_usable, config, precision, output))
    if config.seeds > 1:
        return _train_seeds(config, precision, output, reporter or SilentReporter())
    return _train_one_seed(config, precision, output, reporter or SilentReporter())


def _require_usable(config: RunConfig, precision: Precision, output: Output) -> None:
    output.require_usable()
    output.require_layout(of_seeds=config.seeds > 1)
    if config.seeds > 1:
        seeds.require_same_configurations(output, config, precision)


def _train_seeds(config: RunConfig, precision: Precision, output: Output, reporter: Reporter) -> RunReport:
    if config.overwrite:
        processes.decided(partial(seeds.forget_comparison, output))
    reports = {}
    for folder, one in seeds.each_seed(config):
        reports[folder] = _train_one_seed(one, precision, Output(one.output), seeds.SeedReporter(reporter, folder))
    with output.opened():
        comparison = processes.decided(partial(seeds.write_comparison, output, config))
    return RunReport(
        config.output,
        {f"{seed}/{folder}": result for seed, report in reports.items() for folder, result in report.results.items()},
        tuple(f"{seed}/{folder}" for seed, report in reports.items() for folder in report.trained),
        comparison,
    )


def _train_one_seed(config: RunConfig, precision: Precision, output: Output, reporter: Reporter) -> RunReport:
    pending = processes.decided(partial(_pending, config, precision, output))
    if pending:
        # Started before the output folder is made: a run that cannot start leaves nothing.
        session = _started(config, precision, output, reporter, pending)
        with output.opened(), _threads(config):
            for variant in pending:
                session.train_variant(variant)
    # Opened here too, so that what a killed run left is swept up when nothing remains to be trained.
    with output.opened():
        results = processes.decided(partial(summarize, output, config))
    return RunReport(config.output, results, tuple(variant.folder for variant in pending))


def _pending(config: RunConfig, precision: Precision, output: Output) -> list[Variant]:
    """The variants to train, in a folder that can take them."""
    identities = {variant.folder: config.identity(variant, precision) for variant in ALL_VARIANTS}
    require_same_configuration(output, config, identities)
    require_every_field(output)
    return [variant for variant in config.variants if config.overwrite or output.result(variant) is None]


def _started(
    config: RunConfig, precision: Precision, output: Output, reporter: Reporter, pending: list[Variant]
) -> Session:
    for recipe in (*map(config.recipe, config.experiments), *([config.pretraining_recipe()] if config.small else [])):
        processes.batch_of_each(recipe.batch_size)
    material = processes.main_first(partial(read_material, config, reporter))
    session = Session(config, precision, output, reporter, material)
    session.require_resumable(pending)
    return session


@contextmanager
def _threads(config: RunConfig) -> Iterator[None]:
    """Train the small ViT on one thread.

    Its operators are too short to share: two threads are no faster, and ten times slower when a second core is busy.
    """
    before = torch.get_num_threads()
    if config.small:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def resolve_precision(precision: Precision) -> Precision:
    """What `auto` means here; raises a TrainingError for a format that the device does not train in."""
    on_cuda = processes.device().type == "cuda"
    if precision is Precision.AUTO:
        return Precision(published()["cuda_precision"]) if on_cuda else Precision.FP32
    if precision is Precision.FP16 and not on_cuda:
        raise TrainingError("--precision fp16 needs a CUDA device; use bf16 or fp32 on a CPU")
    return precision
