"""Callbacks of a training: what is written down about it, and which weights it ends with."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from bwsk_fx.training.config import Precision
from bwsk_fx.training.faults import require_finite
from bwsk_fx.training.progress import Bar
from bwsk_fx.training.resume import Checkpoint

BEST_FILE = "best.safetensors"
WATCHED_FILE = "watched.json"


@dataclass
class Watch(TrainerCallback):
    """Writes down losses, accuracies and step times, and moves the progress bar."""

    bar: Bar
    name: str
    precision: Precision
    latest: torch.Tensor | None = None
    batches: int = 0
    losses: list[float] = field(default_factory=list)
    accuracies: list[tuple[int, float]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    resumed_at: list[int] = field(default_factory=list)
    earlier_s: float = 0.0
    _started: float = 0.0
    _began: float = 0.0

    def start(self) -> None:
        """Starts the clock of this process."""
        self._started = time.perf_counter()

    @property
    def elapsed_s(self) -> float:
        """Time spent on the steps so far, by earlier processes too."""
        return self.earlier_s + time.perf_counter() - self._started

    def add(self, loss: torch.Tensor) -> None:
        """Takes the loss of a batch, or its share where several batches make a step."""
        self.latest = loss if self.latest is None else self.latest + loss
        self.batches += 1

    def save(self, folder: Path) -> None:
        """Adds what has been written down to a checkpoint."""
        kept = {name: getattr(self, name) for name in ("losses", "accuracies", "times", "resumed_at")}
        (folder / WATCHED_FILE).write_text(json.dumps(kept | {"elapsed_s": self.elapsed_s}), encoding="utf-8")

    def load(self, checkpoint: Checkpoint) -> None:
        """Takes over what was written down until a checkpoint, and moves the bar there."""
        kept = json.loads((checkpoint.folder / WATCHED_FILE).read_text(encoding="utf-8"))
        self.losses, self.times, self.earlier_s = kept["losses"], kept["times"], kept["elapsed_s"]
        self.accuracies = [(step, accuracy) for step, accuracy in kept["accuracies"]]
        self.resumed_at = [*kept["resumed_at"], checkpoint.step]
        for loss in self.losses:
            self.bar.advance(loss=loss)
        for _, accuracy in self.accuracies:
            self.bar.note(accuracy=accuracy)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts the clock of a step."""
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Writes a step down; raises a TrainingError when its loss is no number."""
        if args.device.type == "cuda":
            torch.cuda.synchronize(args.device)
        self.times.append(time.perf_counter() - self._began)
        assert self.latest is not None
        self.losses.append(float(self.latest))
        self.latest, self.batches = None, 0
        require_finite(self.name, self.losses, self.precision)
        self.bar.advance(loss=self.losses[-1])

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Writes a validation accuracy down."""
        if metrics and "eval_accuracy" in metrics:
            self.accuracies.append((state.global_step, metrics["eval_accuracy"]))
            self.bar.note(accuracy=metrics["eval_accuracy"])


@dataclass
class KeepBest(TrainerCallback):
    """Stops when validation no longer improves and gives the best weights back at the end.

    Trainer's own `load_best_model_at_end` is no help: it saves a checkpoint under the names of the Hub and loads it
    under the names of the modules, which for a ViT of transformers 5.23 leaves every layer as the last step left it.
    """

    patience: int
    best: float = -math.inf
    _weights: dict[str, torch.Tensor] = field(default_factory=dict)
    _waited: int = 0

    def save(self, folder: Path) -> None:
        """Adds the best weights to a checkpoint, and how long they have been the best."""
        state = json.dumps({"best": self.best, "waited": self._waited})
        weights = {key: value.contiguous() for key, value in self._weights.items()}
        save_file(weights, folder / BEST_FILE, metadata={"keep_best": state})

    def load(self, checkpoint: Checkpoint) -> None:
        """Takes over what a checkpoint holds."""
        with safe_open(checkpoint.folder / BEST_FILE, framework="pt") as file:
            state = json.loads(file.metadata()["keep_best"])
        self._weights = load_file(checkpoint.folder / BEST_FILE)
        self.best, self._waited = state["best"], state["waited"]

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, model: Any = None, **kwargs: Any
    ) -> None:
        """Keeps the weights if they are the best so far, and stops the training when none have been for long."""
        accuracy = (metrics or {}).get("eval_accuracy")
        if accuracy is None:
            return
        if accuracy > self.best:
            self.best, self._waited = accuracy, 0
            self._weights = {key: value.detach().cpu().clone() for key, value in model.state_dict().items()}
            return
        self._waited += 1
        # Never set back: after the last step it is set already.
        control.should_training_stop |= self._waited >= self.patience

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Gives the model the best weights."""
        model.load_state_dict(self._weights)
        self._weights = {}
