"""What the variants of one run share, and how one of them is trained."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import default_data_collator, set_seed

from bwsk_fx.errors import TrainingError
from bwsk_fx.measure import StepMemory, measure
from bwsk_fx.training import models, modes, processes
from bwsk_fx.training.augment import random_crop_and_flip
from bwsk_fx.training.config import Experiment, Mode, Precision, Recipe, RunConfig, Variant, published
from bwsk_fx.training.data import Splits, as_tensors, load_splits, only_labels
from bwsk_fx.training.faults import (
    image_size_explained,
    images_explained,
    memory_explained,
    unused_parameters_explained,
)
from bwsk_fx.training.models import TINY_VIT
from bwsk_fx.training.output import PRETRAINED, RESULT_FILE, Output, differences, read_json, write_json
from bwsk_fx.training.progress import Bar, Reporter
from bwsk_fx.training.results import Measured, variant_result
from bwsk_fx.training.resume import Checkpoint, Checkpoints
from bwsk_fx.training.summary import summarize
from bwsk_fx.training.trainer import AUTOCAST_DTYPES, Outcome, Task, run

PRETRAINING_FILE = "pretraining_results.json"
PRETRAINING_LABELS = range(5)


@dataclass(frozen=True)
class Material:
    """What all variants of a run are trained on."""

    splits: Splits
    processor: Any
    train: Any
    validation: Any
    test: Any


def read_material(config: RunConfig, reporter: Reporter) -> Material:
    """Reads the data set and prepares it for the model."""
    with reporter.working(f"reading {config.data}"):
        splits = load_splits(config.data, config.seed, config.train_limit)
        processor = models.load_processor(_architecture(config))
        parts = (splits.train, splits.validation, splits.test)
        with images_explained(config.data, parts):
            return Material(splits, processor, *(as_tensors(part, processor) for part in parts))


@dataclass
class Session:
    """One run, with what its variants share."""

    config: RunConfig
    precision: Precision
    output: Output
    reporter: Reporter
    material: Material

    def require_resumable(self, pending: list[Variant]) -> None:
        """Raises a TrainingError when unfinished work in the folder is of another configuration."""
        if self.config.overwrite:
            return
        if self.config.small and any(variant.experiment is Experiment.FINETUNE for variant in pending):
            self._checkpoints(PRETRAINED, self._pretraining_identity()).require_same_identity()
        for variant in pending:
            self._checkpoints(variant.folder, self._identity(variant)).require_same_identity()

    def train_variant(self, variant: Variant) -> None:
        """Trains one variant, from its newest checkpoint if there is one, and puts its folder in place."""
        load, source = self._start(variant.experiment)
        began = time.perf_counter()
        checkpoints = self._checkpoints(variant.folder, self._identity(variant))
        start = self._resumed(checkpoints)
        bar = self._bar(variant.folder, start)
        recipe = self.config.recipe(variant.experiment)
        set_seed(self.config.seed)
        with self._explained(variant.folder, variant.mode, recipe):
            model = processes.main_first(partial(load, source, self.material.splits.labels))
            model.to(processes.device()).train()
            prepared = self._prepare(model, variant, recipe)
            preparation = time.perf_counter() - began
            outcome = run(self._task(model, recipe, variant.folder), bar, checkpoints, start)
        wall_time = outcome.earlier_time_s + time.perf_counter() - began
        self._finish(variant, model, outcome, Measured(*prepared, preparation, wall_time))
        checkpoints.discard()
        processes.decided(partial(summarize, self.output, self.config))

    def _finish(self, variant: Variant, model: Any, outcome: Outcome, measured: Measured) -> None:
        slug = self.config.model_name(Experiment.SCRATCH)
        result = variant_result(variant, slug, outcome, measured, self._identity(variant))
        self._publish(variant.folder, model, RESULT_FILE, result.to_json() | resumption(outcome))

    @contextmanager
    def _explained(self, name: str, mode: Mode, recipe: Recipe) -> Iterator[None]:
        """Turns what a user can do something about into one line."""
        splits = self.material.splits
        with (
            memory_explained(name, mode, self.config.plan.budget, recipe.batch_size),
            # Large data sets are decoded while they are trained on.
            images_explained(self.config.data, (splits.train, splits.validation, splits.test)),
            unused_parameters_explained(name),
        ):
            yield

    def _identity(self, variant: Variant) -> dict[str, Any]:
        return self.config.identity(variant, self.precision)

    def _checkpoints(self, folder: str, identity: dict[str, Any]) -> Checkpoints:
        """The checkpoints of one training; what they hold is the same only for the same data and versions."""
        splits = self.material.splits
        samples = "/".join(str(len(split)) for split in (splits.train, splits.validation, splits.test))
        circumstances = {
            "samples": samples,
            "classes": len(splits.labels),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "device": processes.device().type,
        }
        if processes.count() > 1:
            # Another number of processes rounds sums over a batch in another way.
            circumstances["processes"] = processes.count()
        return Checkpoints(folder, self.output.unfinished(folder), identity | circumstances)

    def _resumed(self, checkpoints: Checkpoints) -> Checkpoint | None:
        """Where a training goes on; with `overwrite` it starts from its beginning, as finished ones do."""
        if self.config.overwrite:
            checkpoints.discard()
        return checkpoints.newest()

    def _bar(self, label: str, start: Checkpoint | None) -> Bar:
        return self.reporter.bar(label if start is None else f"{label}, from step {start.step}")

    def _start(self, experiment: Experiment) -> tuple[Callable[[str, tuple[str, ...]], Any], str]:
        """How the weights are made, and from what."""
        if experiment is Experiment.SCRATCH:
            return models.from_scratch, _architecture(self.config)
        source = str(self._checkpoint) if self.config.small else _architecture(self.config)
        return models.from_checkpoint, source

    def _prepare(self, model: Any, variant: Variant, recipe: Recipe) -> tuple[StepMemory, modes.Ratios, modes.Ratios]:
        """Puts the mode into place, measures a step in it, and makes sure that it was that mode's step."""
        modes.put_into(model, variant.mode, self.config.plan)
        size = min(processes.batch_of_each(recipe.batch_size), len(self.material.train))
        samples = [self.material.train[index] for index in range(size)]
        batch = {key: value.to(processes.device()) for key, value in default_data_collator(samples).items()}
        with image_size_explained(variant.folder, batch["pixel_values"].shape[-2:], model.config):
            memory = measure(model, batch, AUTOCAST_DTYPES.get(self.precision))
        modes.require_effect(model, variant.mode)
        return memory, modes.ratios(model, "published"), modes.ratios(model, "sound")

    def _task(self, model: Any, recipe: Recipe, name: str) -> Task:
        material = self.material
        splits = (material.train, material.validation, material.test)
        return self._told(Task(model, *splits, recipe, self.precision, self.config.seed, name))

    def _told(self, task: Task) -> Task:
        """A training with what the run's options say about all of its trainings."""
        return replace(
            task,
            settings=self.config.trainer,
            augment=random_crop_and_flip if self.config.augmented else None,
        )

    @cached_property
    def _checkpoint(self) -> Path:
        """The checkpoint that knows the digits 0 to 4, trained in the conventional mode unless it is there."""
        folder, identity = self.output.root / PRETRAINED, self._pretraining_identity()
        found = processes.decided(partial(read_json, folder / PRETRAINING_FILE))
        if found is None or self.config.overwrite:
            self._pretrain(identity)
        elif differing := differences(found["configuration"], identity):
            raise TrainingError(
                f"'{folder}' is of another configuration ({'; '.join(differing)}); "
                "choose another --output or pass --overwrite"
            )
        return folder

    def _pretrain(self, identity: dict[str, Any]) -> None:
        set_seed(self.config.seed)
        data, processor = self.material.splits, self.material.processor
        model = models.from_scratch(TINY_VIT, data.labels[: len(PRETRAINING_LABELS)])
        splits = (only_labels(split, PRETRAINING_LABELS) for split in (data.train, data.validation, data.test))
        train, validation, test = (as_tensors(split, processor) for split in splits)
        recipe, label = self.config.pretraining_recipe(), "pretraining on digits 0-4"
        task = Task(model, train, validation, test, recipe, self.precision, self.config.seed, label)
        checkpoints = self._checkpoints(PRETRAINED, identity)
        start = self._resumed(checkpoints)
        with self._explained(label, Mode.CONVENTIONAL, recipe):
            outcome = run(self._told(task), self._bar(label, start), checkpoints, start)
        self._publish(PRETRAINED, model, PRETRAINING_FILE, _pretraining_result(outcome, identity))
        checkpoints.discard()

    def _pretraining_identity(self) -> dict[str, Any]:
        identity = self._identity(Variant(Experiment.FINETUNE, Mode.CONVENTIONAL))
        return identity | vars(self.config.pretraining_recipe()) | {"model": TINY_VIT, "experiment": "pretrain"}

    def _publish(self, folder: str, model: Any, result_file: str, result: dict[str, Any]) -> None:
        processes.decided(partial(self._write_folder, folder, model, result_file, result))

    def _write_folder(self, folder: str, model: Any, result_file: str, result: dict[str, Any]) -> None:
        with self.output.staged(folder) as stage:
            model.save_pretrained(stage)
            self.material.processor.save_pretrained(stage)
            write_json(stage / result_file, result)


def _pretraining_result(outcome: Outcome, identity: dict[str, Any]) -> dict[str, Any]:
    return {
        "best_val_metric": outcome.best_accuracy,
        "test_metric": outcome.test_accuracy,
        "metric_name": "accuracy",
        "total_steps": len(outcome.losses),
        "wall_time_s": outcome.train_time_s,
        "configuration": identity,
    } | resumption(outcome)


def resumption(outcome: Outcome) -> dict[str, Any]:
    """What marks the times of a training that was cut off as put together from several processes."""
    if not outcome.resumed_at:
        return {}
    return {"resumed_at_steps": list(outcome.resumed_at), "earlier_time_s": outcome.earlier_time_s}


def _architecture(config: RunConfig) -> str:
    return TINY_VIT if config.small else config.model or published()["model"]
