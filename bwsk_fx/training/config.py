"""What a training run is asked to do, as frozen values; the published configuration is the default."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from bwsk_fx.errors import TrainingError

DIGITS = "digits"


class Experiment(StrEnum):
    """Where the weights come from."""

    FINETUNE = "finetune"
    SCRATCH = "scratch"


class Mode(StrEnum):
    """What runs in the training step; see `bwsk_fx.apply`."""

    CONVENTIONAL = "conventional"
    ANALYZED = "analyzed"
    REVERSIBLE = "reversible"

    @property
    def published_name(self) -> str:
        """The mode's name in the published result files."""
        return self.value if self is Mode.CONVENTIONAL else f"bwsk_{self.value}"


class Precision(StrEnum):
    """Number format of the forward pass."""

    AUTO = "auto"
    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters of one training.

    Attributes:
        learning_rate: at its peak, after the warm-up.
        epochs: at most this many.
        batch_size: samples per step.
        patience: evaluations without a better validation accuracy before training stops.
        max_grad_norm: gradients are clipped to this norm.
        evaluation_steps: steps between evaluations; None, or more than an epoch has, means each epoch.
        schedule: of the learning rate, by its name in transformers.
        warmup_fraction: share of all steps over which the learning rate rises.
        weight_decay: of AdamW.
    """

    learning_rate: float
    epochs: int
    batch_size: int
    patience: int
    max_grad_norm: float
    evaluation_steps: int | None = None
    schedule: str = "cosine"
    warmup_fraction: float = 0.1
    weight_decay: float = 0.01


@dataclass(frozen=True)
class Variant:
    """One experiment in one mode; its folder in the output is named after it."""

    experiment: Experiment
    mode: Mode

    @property
    def folder(self) -> str:
        """The folder's name in the published layout."""
        prefix = "" if self.mode is Mode.CONVENTIONAL else "bwsk-"
        return f"{self.experiment.value}-{prefix}{self.mode.value}"


@dataclass(frozen=True)
class ReversibleOptions:
    """Options of `bwsk_fx.apply` that only the reversible mode reads."""

    budget: float = 0.0
    faith: str = "rounded"
    granularity: str = "block"


@dataclass(frozen=True)
class RunConfig:
    """One call of `bwsk-fx train`.

    Attributes:
        output: the folder that receives the variants.
        data: `digits`, `cifar10`, a folder of images, or a data set id on the Hub.
        model: checkpoint to fine-tune and architecture to train from scratch; None takes the small ViT for the
            digits and the published ViT-base otherwise.
        experiments: which experiments to run.
        modes: which modes to run, each with the same seed.
        plan: options of the reversible mode.
        epochs: overrides the recipe's number of epochs.
        batch_size: overrides the recipe's batch size.
        seed: of initial weights, data order and splits.
        seeds: how many seeds to train and compare, from `seed` upwards; more than one gives each its own folder.
        precision: `auto` means fp16 autocast on CUDA, as published, and fp32 on a CPU.
        train_limit: train on at most this many samples.
        overwrite: train the variants again that are there already.
    """

    output: Path
    data: str = DIGITS
    model: str | None = None
    experiments: tuple[Experiment, ...] = tuple(Experiment)
    modes: tuple[Mode, ...] = tuple(Mode)
    plan: ReversibleOptions = ReversibleOptions()
    epochs: int | None = None
    batch_size: int | None = None
    seed: int = 0
    seeds: int = 1
    precision: Precision = Precision.AUTO
    train_limit: int | None = None
    overwrite: bool = False

    @property
    def variants(self) -> tuple[Variant, ...]:
        """The variants in the order in which they run."""
        return tuple(Variant(experiment, mode) for experiment in self.experiments for mode in self.modes)

    @property
    def small(self) -> bool:
        """Whether the embedded data and its small ViT are used."""
        return self.data == DIGITS and self.model is None

    def recipe(self, experiment: Experiment) -> Recipe:
        """The hyperparameters of an experiment, with this run's own overrides."""
        return self._overridden(_DIGITS_RECIPES[experiment] if self.small else published_recipe(experiment))

    def pretraining_recipe(self) -> Recipe:
        """The hyperparameters of the checkpoint that the digits run makes for itself."""
        return self._overridden(_DIGITS_PRETRAINING)

    def _overridden(self, recipe: Recipe) -> Recipe:
        return replace(
            recipe,
            epochs=self.epochs if self.epochs is not None else recipe.epochs,
            batch_size=self.batch_size if self.batch_size is not None else recipe.batch_size,
        )

    def identity(self, variant: Variant, precision: Precision) -> dict[str, Any]:
        """Everything that decides a variant's weights; equal identities mean that a rerun may skip it."""
        identity: dict[str, Any] = {
            "data": self.data if not Path(self.data).is_dir() else Path(self.data).resolve().name,
            "model": self.model_name(variant.experiment),
            "experiment": variant.experiment.value,
            "mode": variant.mode.value,
            "seed": self.seed,
            "precision": precision.value,
            "train_limit": self.train_limit,
            **asdict(self.recipe(variant.experiment)),
        }
        if variant.mode is Mode.REVERSIBLE:
            identity |= asdict(self.plan)
        return identity

    def model_name(self, experiment: Experiment) -> str:
        """The model's name without machine-specific folders, for result files and cards."""
        if self.small:
            return "vit-tiny-digits" if experiment is Experiment.SCRATCH else "pretrained"
        name = self.model or published()["model"]
        return Path(name).resolve().name if Path(name).exists() else name

    def validate(self) -> None:
        """Raises a TrainingError for values that no run can use."""
        positive = {
            "--epochs": self.epochs,
            "--batch-size": self.batch_size,
            "--train-limit": self.train_limit,
            "--seeds": self.seeds,
        }
        for option, value in positive.items():
            if value is not None and value < 1:
                raise TrainingError(f"{option} must be at least 1, not {value}")
        if self.plan.budget < 0:
            raise TrainingError(f"--budget must be at least 0, not {self.plan.budget}")
        if not self.variants:
            raise TrainingError("nothing to train: name at least one experiment and one mode")


@cache
def published() -> dict[str, Any]:
    """The published training configuration, with its source."""
    text = resources.files("bwsk_fx.training").joinpath("published.json").read_text(encoding="utf-8")
    return json.loads(text)


def published_recipe(experiment: Experiment) -> Recipe:
    """The published hyperparameters; the number of epochs is ours, early stopping ends most runs before it."""
    values = published()
    return Recipe(
        learning_rate=values["learning_rate"][experiment.value],
        epochs=10,
        batch_size=values["batch_size"],
        patience=values["early_stopping_patience"],
        max_grad_norm=values["max_grad_norm"],
        evaluation_steps=values["evaluation_steps"],
        schedule=values["schedule"],
    )


# A model of 200 thousand weights on 1,300 images takes larger steps than ViT-base when it is fine-tuned. Its
# validation split holds 144 images, of which one is 0.7 %: a patience of 3 would stop on noise.
_DIGITS_PRETRAINING = Recipe(learning_rate=1e-3, epochs=10, batch_size=16, patience=5, max_grad_norm=1.0)
_DIGITS_RECIPES = {
    Experiment.FINETUNE: Recipe(learning_rate=5e-4, epochs=10, batch_size=16, patience=5, max_grad_norm=1.0),
    Experiment.SCRATCH: Recipe(learning_rate=3e-4, epochs=15, batch_size=16, patience=5, max_grad_norm=1.0),
}
