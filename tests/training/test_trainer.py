import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

from bwsk_fx.training import models, trainer
from bwsk_fx.training.augment import random_crop_and_flip
from bwsk_fx.training.config import Experiment, Mode, Precision, Recipe, ReversibleOptions, RunConfig
from bwsk_fx.training.data import as_tensors, load_splits
from bwsk_fx.training.modes import put_into, require_effect
from bwsk_fx.training.progress import SilentBar
from bwsk_fx.training.quiet import quiet
from bwsk_fx.training.resume import Checkpoints
from bwsk_fx.training.trainer import Outcome, Task, run, set_seed
from bwsk_fx.training.watch import KeepBest

RECIPE = Recipe(learning_rate=1e-3, epochs=1, batch_size=8, patience=3, max_grad_norm=1.0)
PLAN = ReversibleOptions()
_KEEP_BEST = KeepBest.on_evaluate


@pytest.fixture(scope="module")
def splits():
    loaded, processor = load_splits("digits", train_limit=400), models.load_processor("vit-tiny-digits")
    parts = (loaded.train, loaded.validation, loaded.test.select(range(40)))
    return loaded.labels, [as_tensors(part, processor) for part in parts]


def _train(splits, recipe: Recipe = RECIPE, mode: Mode = Mode.CONVENTIONAL, plan: ReversibleOptions = PLAN, **told):
    labels, parts = splits
    set_seed(0)
    model = models.from_scratch("vit-tiny-digits", labels).train()
    put_into(model, mode, plan)
    with quiet():
        outcome = run(Task(model, *parts, recipe, Precision.FP32, seed=0, **told), SilentBar())
    require_effect(model, mode)
    return model, outcome


def _accuracy(model, samples) -> float:
    pixels = torch.stack([sample["pixel_values"] for sample in samples])
    labels = torch.tensor([sample["labels"] for sample in samples])
    with torch.no_grad():
        return (model.eval()(pixel_values=pixels).logits.argmax(-1) == labels).float().mean().item()


def test_an_epoch_is_trained_step_by_step(splits):
    _, outcome = _train(splits)
    assert len(outcome.losses) == 50
    assert outcome.losses[0] == pytest.approx(math.log(10), abs=0.5)
    assert sum(outcome.losses[-10:]) < sum(outcome.losses[:10])
    assert (outcome.epochs, outcome.early_stopped, outcome.nan_count) == (1.0, False, 0)
    assert 0 < outcome.step_time_s < outcome.train_time_s


def test_a_process_that_sees_two_gpus_uses_one(splits, monkeypatch):
    arguments_of = trainer._arguments

    def with_two_gpus(*args, **kwargs):
        arguments = arguments_of(*args, **kwargs)
        arguments._n_gpu = 2
        return arguments

    monkeypatch.setattr(trainer, "_arguments", with_two_gpus)
    labels, (train, *rest) = splits
    _, outcome = _train((labels, (train[:40], *rest)))
    assert len(outcome.losses) == 5


def test_the_best_weights_come_back(splits, monkeypatch):
    # The accuracies are dictated, so that the best evaluation is neither the first nor the last.
    dictated = iter([0.3, 0.9, 0.5, 0.9, 0.2])
    weights = []

    def watched(self, args, state, control, metrics=None, model=None, **kwargs):
        if "eval_accuracy" in metrics:
            metrics["eval_accuracy"] = next(dictated)
            weights.append(model.classifier.weight.detach().clone())
        _KEEP_BEST(self, args, state, control, metrics=metrics, model=model, **kwargs)

    monkeypatch.setattr(KeepBest, "on_evaluate", watched)
    model, outcome = _train(splits, replace(RECIPE, evaluation_steps=10))
    assert len(weights) == 5
    assert torch.equal(model.classifier.weight, weights[1])
    assert not torch.equal(weights[1], weights[4])
    assert _accuracy(model, splits[1][2]) == pytest.approx(outcome.test_accuracy)


def test_patience_ends_the_training(splits):
    _, outcome = _train(splits, replace(RECIPE, epochs=4, learning_rate=1e-9, evaluation_steps=10, patience=2))
    assert outcome.early_stopped
    assert [step for step, _ in outcome.accuracies] == [10, 20, 30]
    assert len(outcome.losses) == 30


def test_same_seed_same_losses(splits):
    assert _train(splits)[1].losses == _train(splits)[1].losses


@pytest.mark.parametrize(
    ("mode", "plan"), [(Mode.ANALYZED, ReversibleOptions()), (Mode.REVERSIBLE, ReversibleOptions(faith="exact"))]
)
def test_exact_modes_have_bit_identical_losses_for_50_steps(splits, mode, plan):
    conventional, other = _train(splits)[1], _train(splits, mode=mode, plan=plan)[1]
    assert len(conventional.losses) == 50
    assert other.losses == conventional.losses


@pytest.fixture
def few(splits):
    labels, parts = splits
    return labels, [part[:40] for part in parts]


@dataclass
class Augmentation:
    """Augments, takes note of what it gave, and fails where it is told to."""

    fails_at: int = -1
    batches: list[torch.Tensor] = field(default_factory=list)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        if len(self.batches) == self.fails_at:
            raise KeyboardInterrupt
        self.batches.append(random_crop_and_flip(images))
        return self.batches[-1]


@pytest.mark.slow
def test_every_epoch_and_every_mode_sees_its_own_augmented_images(few):
    seen, recipe = {mode: Augmentation() for mode in Mode}, replace(RECIPE, epochs=2)
    exact = ReversibleOptions(faith="exact")
    losses = {mode: _train(few, recipe, mode, exact, augment=seen[mode])[1].losses for mode in Mode}
    assert len(set(losses.values())) == 1
    assert losses[Mode.CONVENTIONAL] != _train(few, recipe)[1].losses
    batches = [torch.stack(seen[mode].batches) for mode in Mode]
    # Ten steps, and none for validation or test images.
    assert batches[0].shape == (10, 8, 3, 16, 16)
    assert all(torch.equal(batches[0], other) for other in batches[1:])
    first, second = ({image.numpy().tobytes() for image in epoch.flatten(0, 1)} for epoch in batches[0].chunk(2))
    # Of 18 places and directions, few of the 40 images have the same one twice.
    assert len(first & second) < 10


def test_a_resumed_training_sees_the_same_augmented_images(few, tmp_path, monkeypatch):
    monkeypatch.setattr("bwsk_fx.training.resume.SAVING_SHARE", math.inf)
    labels, parts = few
    checkpoints = Checkpoints("mine", tmp_path / "mine")

    def trained(augment: Augmentation, checkpoints: Checkpoints | None) -> tuple[float, ...]:
        torch.manual_seed(0)
        model = models.from_scratch("vit-tiny-digits", labels).train()
        recipe = replace(RECIPE, epochs=2, evaluation_steps=3)
        start = checkpoints.newest() if checkpoints else None
        task = Task(model, *parts, recipe, Precision.FP32, seed=0, augment=augment)
        return run(task, SilentBar(), checkpoints, start).losses

    whole, cut_off, resumed = Augmentation(), Augmentation(fails_at=7), Augmentation()
    losses = trained(whole, None)
    with pytest.raises(KeyboardInterrupt):
        trained(cut_off, checkpoints)
    assert trained(resumed, checkpoints) == losses
    assert torch.equal(torch.stack(resumed.batches), torch.stack(whole.batches[6:]))


def test_accumulated_batches_make_one_step(few):
    whole = _train(few, replace(RECIPE, batch_size=16, evaluation_steps=2))[1]
    halves = _train(few, replace(RECIPE, evaluation_steps=2), settings={"gradient_accumulation_steps": 2})[1]
    # Five batches of 8: two steps of two, and one of the batch that is left.
    assert len(whole.losses) == len(halves.losses) == 3
    assert halves.losses == pytest.approx(whole.losses, rel=1e-4)
    assert halves.accuracies == whole.accuracies
    assert (halves.epochs, halves.early_stopped) == (1.0, False)


def test_keep_best_takes_the_first_of_equals():
    model, keeper = torch.nn.Linear(2, 2), KeepBest(patience=2)
    control = type("Control", (), {"should_training_stop": False})()
    weights = []
    for accuracy in (0.5, 0.7, 0.7, 0.6):
        weights.append(model.weight.detach().clone())
        keeper.on_evaluate(None, None, control, metrics={"eval_accuracy": accuracy}, model=model)
        torch.nn.init.normal_(model.weight)
    assert control.should_training_stop
    keeper.on_train_end(None, None, control, model=model)
    assert torch.equal(model.weight, weights[1])


def test_nan_losses_are_counted():
    outcome = Outcome((1.0, math.nan, math.inf), ((3, 0.5),), 0.5, 1.0, False, 0.1, 1.0)
    assert outcome.nan_count == 2


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(Mode))
def test_scratch_reaches_ninety_percent(mode):
    config = RunConfig(output=Path("unused"))
    loaded, processor = load_splits("digits"), models.load_processor("vit-tiny-digits")
    parts = [as_tensors(part, processor) for part in (loaded.train, loaded.validation, loaded.test)]
    _, outcome = _train((loaded.labels, parts), config.recipe(Experiment.SCRATCH), mode, config.plan)
    assert outcome.test_accuracy >= 0.9
