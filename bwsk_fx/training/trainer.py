"""Hugging Face `Trainer`, wired for one training: what it is told, what is watched, what comes out."""

from __future__ import annotations

import math
import pickle
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_model, save_model
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from bwsk_fx.errors import TrainingError
from bwsk_fx.measure import optimizer_bytes
from bwsk_fx.training import processes
from bwsk_fx.training.config import Precision, Recipe
from bwsk_fx.training.progress import Bar
from bwsk_fx.training.resume import Checkpoint, Checkpoints, Pace
from bwsk_fx.training.trainer_options import LOGS, log_into, logged
from bwsk_fx.training.watch import KeepBest, Watch

WEIGHTS_FILE = "model.safetensors"

AUTOCAST_DTYPES = {Precision.BF16: torch.bfloat16, Precision.FP16: torch.float16}


@dataclass(frozen=True)
class Task:
    """One training: a model, its data, how to train it, and its name in messages.

    Attributes:
        model: trained in place.
        train: samples with `pixel_values` and `labels`.
        validation: such samples; they decide when training stops and which weights are the best.
        test: such samples.
        recipe: the hyperparameters.
        precision: of the forward pass.
        seed: of the order of the data and of all random numbers.
        name: in messages.
        settings: further fields of `TrainingArguments`, which `trainer_options.require_valid` takes.
        augment: gives other `pixel_values` for those of a training batch.
    """

    model: Any
    train: Any
    validation: Any
    test: Any
    recipe: Recipe
    precision: Precision
    seed: int
    name: str = "training"
    settings: Mapping[str, Any] = field(default_factory=dict)
    augment: Callable[[torch.Tensor], torch.Tensor] | None = None


@dataclass(frozen=True)
class Outcome:
    """What a training gave.

    Attributes:
        losses: training loss of every step, over its whole batch.
        accuracies: (step, validation accuracy) of every evaluation.
        test_accuracy: of the best weights, which the model carries afterwards.
        epochs: completed epochs, the last one possibly in part.
        early_stopped: whether the validation accuracy ended the training.
        step_time_s: median time from the end of a step to the end of the next, evaluation excluded.
        train_time_s: training and validation together; of a resumed training, up to each checkpoint that it went on
            from and from there to the end, so that no step is counted twice.
        earlier_time_s: the part of `train_time_s` that earlier processes spent.
        resumed_at: the steps after which it went on from a checkpoint.
        optimizer_bytes: what the optimizer's state takes at the end, see `bwsk_fx.measure.optimizer_bytes`.
    """

    losses: tuple[float, ...]
    accuracies: tuple[tuple[int, float], ...]
    test_accuracy: float
    epochs: float
    early_stopped: bool
    step_time_s: float
    train_time_s: float
    earlier_time_s: float = 0.0
    resumed_at: tuple[int, ...] = ()
    optimizer_bytes: int = 0

    @property
    def best_accuracy(self) -> float:
        """The best validation accuracy."""
        return max(accuracy for _, accuracy in self.accuracies)

    @property
    def nan_count(self) -> int:
        """Steps whose loss was not a finite number."""
        return sum(not math.isfinite(loss) for loss in self.losses)


class _WatchedTrainer(Trainer):
    """A Trainer that hands every step's loss to a watch, and whose checkpoints hold all that decides the result."""

    def __init__(
        self,
        watch: Watch,
        keeper: KeepBest,
        checkpoints: Checkpoints | None,
        augment: Callable[[torch.Tensor], torch.Tensor] | None,
        **kwargs: Any,
    ) -> None:
        super().__init__(callbacks=[watch, keeper], **kwargs)
        self.watch, self.keeper, self._checkpoints, self._pace = watch, keeper, checkpoints, Pace()
        self._augment, self._weight = augment, 1.0
        # Otherwise the number of samples in the batch would become one more input of the model, for a loss that
        # is the same mean either way.
        self.model_accepts_loss_kwargs = False
        for chatter in (PrinterCallback, ProgressCallback):
            self.remove_callback(chatter)

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        inputs = self._own(inputs)
        # Here and not where samples are read: the random numbers are then those of this process, which checkpoints
        # hold, and each epoch has images of its own.
        if self._augment is not None:
            inputs = {**inputs, "pixel_values": self._augment(inputs["pixel_values"])}
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.watch.add(processes.mean(loss.detach()))
        return loss

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        found = super().compute_loss(model, inputs, *args, **kwargs)
        return found * self._weight if model.training and self._weight != 1 else found

    def _own(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """This process's part of a step, without the samples that fill up the last batch of an epoch.

        Accelerate gives each process a batch of the same size and takes from the epoch's beginning what lacks.
        """
        if processes.count() == 1:
            return inputs
        samples, size = len(self.train_dataset), self.args.train_batch_size * self.args.world_size
        batches, in_step = math.ceil(samples / size), self.args.gradient_accumulation_steps
        place = self.state.global_step % math.ceil(batches / in_step) * in_step + self.watch.batches
        share = processes.share(min(size, samples - place * size), size)
        self._weight = share.weight
        return {name: value[: share.samples] for name, value in inputs.items()}

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        began = time.perf_counter()
        # A training that is over is tested and published at once; from a checkpoint it would take one step more.
        if self._checkpoints is None or self.control.should_training_stop:
            return
        if not processes.decided(lambda: self._pace.due(began)):
            return
        with self._checkpoints.saving(self.state.global_step) as folder:
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                self.watch.save(folder)
                self.keeper.save(folder)
        self._pace.saved(began, time.perf_counter())

    # Trainer saves weights under the names of the Hub and loads those that have the names of the modules.

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.args.should_save:
            save_model(self.model, str(Path(output_dir or self.args.output_dir) / WEIGHTS_FILE))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_model(self.model if model is None else model, Path(resume_from_checkpoint) / WEIGHTS_FILE)


def run(task: Task, bar: Bar, checkpoints: Checkpoints | None = None, start: Checkpoint | None = None) -> Outcome:
    """Trains, restores the weights of the best validation accuracy and tests them.

    Args:
        task: what to train; its model is trained in place.
        bar: the progress bar to move.
        checkpoints: where to put checkpoints, at evaluations; there are none otherwise.
        start: the checkpoint to go on from.

    Raises:
        TrainingError: the loss is no longer a number, or a checkpoint cannot be written.
    """
    watch, planned = Watch(bar, task.name, task.precision), _steps_per_epoch(task) * task.recipe.epochs
    with _folder(checkpoints) as folder:
        trainer = _trainer(task, watch, folder, checkpoints)
        bar.begin(total=planned)
        _train(task, trainer, start)
        elapsed = watch.elapsed_s
        test = trainer.evaluate(task.test, metric_key_prefix="test")
    bar.finish()
    return Outcome(
        losses=tuple(watch.losses),
        accuracies=tuple(watch.accuracies),
        test_accuracy=test["test_accuracy"],
        epochs=trainer.state.epoch,
        early_stopped=trainer.state.global_step < planned,
        step_time_s=median(watch.times),
        train_time_s=elapsed,
        earlier_time_s=watch.earlier_s,
        resumed_at=tuple(watch.resumed_at),
        optimizer_bytes=optimizer_bytes(trainer.optimizer),
    )


@contextmanager
def _folder(checkpoints: Checkpoints | None) -> Iterator[Path]:
    """Trainer's output folder, which it makes whether or not it has anything to put there."""
    if checkpoints is not None:
        with checkpoints.opened() as folder:
            yield folder
        return
    with tempfile.TemporaryDirectory(prefix="bwsk-fx-") as scratch:
        yield Path(scratch)


def _train(task: Task, trainer: _WatchedTrainer, start: Checkpoint | None) -> None:
    # What capturing and measuring drew must not shift the random numbers of the modes against each other. Processes
    # draw different ones, as the samples of one batch do; the order of the data has a generator of its own.
    set_seed(task.seed + processes.rank())
    trainer.watch.start()
    if start is None:
        trainer.train()
        return
    trainer.watch.load(start)
    trainer.keeper.load(start)
    try:
        trainer.train(resume_from_checkpoint=str(start.folder))
    except pickle.UnpicklingError as error:
        raise TrainingError(
            f"{task.name}: the checkpoint '{start.folder}' holds what is not safe to load; remove it"
        ) from error


def _trainer(task: Task, watch: Watch, folder: Path, checkpoints: Checkpoints | None) -> _WatchedTrainer:
    arguments = _arguments(task, folder, save_strategy="no" if checkpoints is None else "steps")
    # One process that sees several GPUs would train on all of them, with as many times the batch.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    trainer = _WatchedTrainer(
        watch,
        KeepBest(task.recipe.patience),
        checkpoints,
        task.augment,
        model=task.model,
        args=arguments,
        train_dataset=task.train,
        eval_dataset=task.validation,
        compute_metrics=_accuracy,
    )
    if checkpoints is not None:
        log_into(trainer, checkpoints.folder.parent / LOGS / checkpoints.name)
    return trainer


def _arguments(task: Task, folder: Path, save_strategy: str) -> TrainingArguments:
    recipe, steps = task.recipe, _steps_per_epoch(task)
    evaluation_steps = min(recipe.evaluation_steps or steps, steps)
    own = {
        "output_dir": str(folder),
        "num_train_epochs": recipe.epochs,
        "per_device_train_batch_size": processes.batch_of_each(recipe.batch_size),
        "per_device_eval_batch_size": 4 * processes.batch_of_each(recipe.batch_size),
        "ddp_find_unused_parameters": False,
        "learning_rate": recipe.learning_rate,
        "weight_decay": recipe.weight_decay,
        "lr_scheduler_type": recipe.schedule,
        "warmup_steps": round(recipe.warmup_fraction * steps * recipe.epochs),
        "max_grad_norm": recipe.max_grad_norm,
        "optim": "adamw_torch",
        "use_cpu": processes.device().type == "cpu",
        "bf16": task.precision is Precision.BF16,
        "fp16": task.precision is Precision.FP16,
        "seed": task.seed,
        "data_seed": task.seed,
        "eval_strategy": "steps",
        "eval_steps": evaluation_steps,
        "save_strategy": save_strategy,
        "save_steps": evaluation_steps,
        "logging_strategy": "steps" if logged(task.settings) else "no",
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "dataloader_pin_memory": processes.device().type == "cuda",
        "disable_tqdm": True,
        "report_to": "none",
    }
    return TrainingArguments(**(own | dict(task.settings)))


def _steps_per_epoch(task: Task) -> int:
    batches = math.ceil(len(task.train) / task.recipe.batch_size)
    return math.ceil(batches / task.settings.get("gradient_accumulation_steps", 1))


def _accuracy(prediction: Any) -> dict[str, float]:
    logits = prediction.predictions
    logits = logits[0] if isinstance(logits, tuple) else logits
    return {"accuracy": float(np.mean(logits.argmax(-1) == prediction.label_ids))}
