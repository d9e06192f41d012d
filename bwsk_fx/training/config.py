"""What a training run is asked to do, as frozen values; the published configuration is the default."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from enum import StrEnum
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from bwsk_fx.errors import TrainingError
from bwsk_fx.training import trainer_options

DIGITS = "digits"

_WITHOUT_WARMUP = ("constant", "reduce_lr_on_plateau")


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
class RecipeOptions:
    """What a run changes in the recipe of each experiment; None leaves the recipe's own value.

    Attributes:
        learning_rate: at its peak.
        schedule: of the learning rate, by its name in transformers.
        warmup: share of all steps over which the learning rate rises.
        weight_decay: of the optimizer.
        clip: gradients are clipped to this norm; 0 leaves them alone.
        patience: evaluations without a better validation accuracy before training stops.
        evaluation_steps: steps between evaluations; more than an epoch has means each epoch.
    """

    learning_rate: float | None = None
    schedule: str | None = None
    warmup: float | None = None
    weight_decay: float | None = None
    clip: float | None = None
    patience: int | None = None
    evaluation_steps: int | None = None

    def changed(self, recipe: Recipe) -> Recipe:
        """A recipe with these values in place of its own."""
        fields_of = vars(self) | {"warmup_fraction": self.warmup, "max_grad_norm": self.clip}
        return replace(recipe, **{name: fields_of[name] for name in vars(recipe) if fields_of.get(name) is not None})

    def validate(self) -> None:
        """Raises a TrainingError for numbers that no training can use; the schedule is left to transformers."""
        _require_at_least_one({"--patience": self.patience, "--evaluation-steps": self.evaluation_steps})
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise TrainingError(f"--learning-rate must be above 0, not {self.learning_rate}")
        for option, value in {"--weight-decay": self.weight_decay, "--clip": self.clip}.items():
            if value is not None and not 0 <= value < math.inf:
                raise TrainingError(f"{option} must be at least 0, not {value}")
        if self.warmup is not None and not 0 <= self.warmup <= 1:
            raise TrainingError(f"--warmup must be a share of all steps, 0 to 1, not {self.warmup}")
        if self.warmup and self.schedule in _WITHOUT_WARMUP:
            raise TrainingError(f"--schedule {self.schedule} has no warm-up; leave --warmup out or choose another")


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
        recipe_options: overrides of the recipe's other values.
        trainer: further fields of transformers' `TrainingArguments` by name, see `trainer_options`.
        augment: whether training images are cropped and mirrored at random; None means all but the digits.
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
    recipe_options: RecipeOptions = RecipeOptions()
    trainer: Mapping[str, Any] = field(default_factory=dict)
    augment: bool | None = None
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

    @property
    def augmented(self) -> bool:
        """Whether training images are augmented; by default all but the digits, of which a mirror image is none."""
        return self.data != DIGITS if self.augment is None else self.augment

    def recipe(self, experiment: Experiment) -> Recipe:
        """The hyperparameters of an experiment, with this run's own overrides."""
        return self._overridden(_DIGITS_RECIPES[experiment] if self.small else published_recipe(experiment))

    def pretraining_recipe(self) -> Recipe:
        """The hyperparameters of the checkpoint that the digits run makes for itself."""
        return self._overridden(_DIGITS_PRETRAINING)

    def _overridden(self, recipe: Recipe) -> Recipe:
        return replace(
            self.recipe_options.changed(recipe),
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
        # Only where they are used, so that results from before there were such options stay valid.
        if self.augmented:
            identity["augment"] = True
        if deciding := trainer_options.deciding(self.trainer):
            identity["trainer"] = deciding
        return identity

    def options(self) -> dict[str, Any]:
        """The options of `bwsk-fx train` that ask for this run, by name, as plain values; `overwrite` is left out."""
        return {name: value for name, value in _flat(self) if name != "overwrite" and value not in (None, {})}

    def model_name(self, experiment: Experiment) -> str:
        """The model's name without machine-specific folders, for result files and cards."""
        if self.small:
            return "vit-tiny-digits" if experiment is Experiment.SCRATCH else "pretrained"
        name = self.model or published()["model"]
        return Path(name).resolve().name if Path(name).exists() else name

    def validate(self) -> None:
        """Raises a TrainingError for values that no run can use."""
        counts = {"--epochs": self.epochs, "--batch-size": self.batch_size, "--train-limit": self.train_limit}
        _require_at_least_one(counts | {"--seeds": self.seeds})
        if not self.plan.budget >= 0:
            raise TrainingError(f"--budget must be at least 0, not {self.plan.budget}")
        if not 0 <= self.seed < 2**32:
            raise TrainingError(f"--seed must be at least 0 and below 2**32, not {self.seed}")
        self.recipe_options.validate()
        if not self.variants:
            raise TrainingError("nothing to train: name at least one experiment and one mode")
        schedules = dict.fromkeys(self.recipe(experiment).schedule for experiment in self.experiments)
        trainer_options.require_valid(self.trainer, tuple(schedules))


def _require_at_least_one(counts: dict[str, int | None]) -> None:
    for option, value in counts.items():
        if value is not None and value < 1:
            raise TrainingError(f"{option} must be at least 1, not {value}")


def _flat(options: Any) -> Iterator[tuple[str, Any]]:
    """The fields of options and of the options in them, as what YAML can hold."""
    for name, value in ((entry.name, getattr(options, entry.name)) for entry in fields(options)):
        if is_dataclass(value):
            yield from _flat(value)
        else:
            yield name, _plain(value)


def _plain(value: Any) -> Any:
    if isinstance(value, Path | StrEnum):
        return str(value)
    if isinstance(value, Mapping):
        return dict(value)
    return [_plain(entry) for entry in value] if isinstance(value, tuple) else value


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
