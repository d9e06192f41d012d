"""Hugging Face `Trainer`, wired for one training: what it is told, what is watched, what comes out."""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
import torch
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from bwsk_fx.training.config import Precision, Recipe
from bwsk_fx.training.progress import Bar

AUTOCAST_DTYPES = {Precision.BF16: torch.bfloat16, Precision.FP16: torch.float16}


@dataclass(frozen=True)
class Task:
    """One training: a model, its data, how to train it."""

    model: Any
    train: Any
    validation: Any
    test: Any
    recipe: Recipe
    precision: Precision
    seed: int


@dataclass(frozen=True)
class Outcome:
    """What a training gave.

    Attributes:
        losses: training loss of every step.
        accuracies: (step, validation accuracy) of every evaluation.
        test_accuracy: of the best weights, which the model carries afterwards.
        epochs: completed epochs, the last one possibly in part.
        early_stopped: whether the validation accuracy ended the training.
        step_time_s: median time from the end of a step to the end of the next, evaluation excluded.
        train_time_s: training and validation together.
    """

    losses: tuple[float, ...]
    accuracies: tuple[tuple[int, float], ...]
    test_accuracy: float
    epochs: float
    early_stopped: bool
    step_time_s: float
    train_time_s: float

    @property
    def best_accuracy(self) -> float:
        """The best validation accuracy."""
        return max(accuracy for _, accuracy in self.accuracies)

    @property
    def nan_count(self) -> int:
        """Steps whose loss was not a finite number."""
        return sum(not math.isfinite(loss) for loss in self.losses)


@dataclass
class _Watch(TrainerCallback):
    """Writes down losses, accuracies and step times, and moves the progress bar."""

    bar: Bar
    losses: list[torch.Tensor] = field(default_factory=list)
    accuracies: list[tuple[int, float]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    _began: float = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.device.type == "cuda":
            torch.cuda.synchronize(args.device)
        self.times.append(time.perf_counter() - self._began)
        self.bar.advance(loss=float(self.losses[-1]))

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        if metrics and "eval_accuracy" in metrics:
            self.accuracies.append((state.global_step, metrics["eval_accuracy"]))
            self.bar.note(accuracy=metrics["eval_accuracy"])


@dataclass
class _KeepBest(TrainerCallback):
    """Stops when validation no longer improves and gives the best weights back at the end.

    Trainer's own `load_best_model_at_end` is no help: it saves a checkpoint under the names of the Hub and loads it
    under the names of the modules, which for a ViT of transformers 5.23 leaves every layer as the last step left it.
    """

    patience: int
    best: float = -math.inf
    _weights: dict[str, torch.Tensor] = field(default_factory=dict)
    _waited: int = 0

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, model: Any = None, **kwargs: Any
    ) -> None:
        accuracy = (metrics or {}).get("eval_accuracy")
        if accuracy is None:
            return
        if accuracy > self.best:
            self.best, self._waited = accuracy, 0
            self._weights = {key: value.detach().cpu().clone() for key, value in model.state_dict().items()}
            return
        self._waited += 1
        control.should_training_stop = self._waited >= self.patience

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model.load_state_dict(self._weights)
        self._weights = {}


class _WatchedTrainer(Trainer):
    """A Trainer that hands every step's loss to a watch."""

    def __init__(self, watch: _Watch, patience: int, **kwargs: Any) -> None:
        super().__init__(callbacks=[watch, _KeepBest(patience)], **kwargs)
        self._watch = watch
        # Otherwise the number of samples in the batch would become one more input of the model, for a loss that
        # is the same mean either way.
        self.model_accepts_loss_kwargs = False
        for chatter in (PrinterCallback, ProgressCallback):
            self.remove_callback(chatter)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self._watch.losses.append(loss.detach())
        return loss


def run(task: Task, bar: Bar) -> Outcome:
    """Trains, restores the weights of the best validation accuracy and tests them.

    Args:
        task: what to train; its model is trained in place.
        bar: the progress bar to move.
    """
    # Trainer makes its output folder whether or not it has anything to put there.
    with tempfile.TemporaryDirectory(prefix="bwsk-fx-") as scratch:
        return _run(task, bar, scratch)


def _run(task: Task, bar: Bar, scratch: str) -> Outcome:
    watch, planned = _Watch(bar), _steps_per_epoch(task) * task.recipe.epochs
    trainer = _trainer(task, watch, scratch)
    bar.begin(total=planned)
    # What capturing and measuring drew must not shift the random numbers of the modes against each other.
    set_seed(task.seed)
    began = time.perf_counter()
    trainer.train()
    elapsed = time.perf_counter() - began
    test = trainer.evaluate(task.test, metric_key_prefix="test")
    bar.finish()
    return Outcome(
        losses=tuple(torch.stack(watch.losses).float().tolist()),
        accuracies=tuple(watch.accuracies),
        test_accuracy=test["test_accuracy"],
        epochs=trainer.state.epoch,
        early_stopped=trainer.state.global_step < planned,
        step_time_s=median(watch.times),
        train_time_s=elapsed,
    )


def _trainer(task: Task, watch: _Watch, scratch: str) -> Trainer:
    return _WatchedTrainer(
        watch,
        task.recipe.patience,
        model=task.model,
        args=_arguments(task, scratch),
        train_dataset=task.train,
        eval_dataset=task.validation,
        compute_metrics=_accuracy,
    )


def _arguments(task: Task, scratch: str) -> TrainingArguments:
    recipe, steps = task.recipe, _steps_per_epoch(task)
    return TrainingArguments(
        output_dir=scratch,
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=4 * recipe.batch_size,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        lr_scheduler_type=recipe.schedule,
        warmup_steps=round(recipe.warmup_fraction * steps * recipe.epochs),
        max_grad_norm=recipe.max_grad_norm,
        optim="adamw_torch",
        use_cpu=not torch.cuda.is_available(),
        bf16=task.precision is Precision.BF16,
        fp16=task.precision is Precision.FP16,
        seed=task.seed,
        data_seed=task.seed,
        eval_strategy="steps",
        eval_steps=min(recipe.evaluation_steps or steps, steps),
        save_strategy="no",
        logging_strategy="no",
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        report_to="none",
    )


def _steps_per_epoch(task: Task) -> int:
    return math.ceil(len(task.train) / task.recipe.batch_size)


def _accuracy(prediction: Any) -> dict[str, float]:
    logits = prediction.predictions
    logits = logits[0] if isinstance(logits, tuple) else logits
    return {"accuracy": float(np.mean(logits.argmax(-1) == prediction.label_ids))}
