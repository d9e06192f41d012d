"""`BwskCallback` in a `Trainer`: in force during training, gone afterwards, reported, and never silently idle."""

import json
import socket
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import integration_utils

import bwsk_fx
from bwsk_fx.errors import PlanError, RegionError, TrainingError
from bwsk_fx.measure import saved_for_backward
from bwsk_fx.training.callback import BwskCallback

PLAN_KEYS = {"bwsk_kept_bytes", "bwsk_conventional_bytes", "bwsk_regions"}
RATIO_KEYS = {f"bwsk_{label}_ratio_{ruleset}" for label in "sk" for ruleset in ("sound", "published")}
LATE = r"has not seen this model before the Trainer prepared it: pass the callback as Trainer\(callbacks=\[...\]\)"


def as_the_trainer_calls_it(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The Trainer adds the number of samples, which the loss is divided by."""
    return batch | {"num_items_in_batch": torch.tensor(float(len(batch["labels"])))}


class Recorder(TrainerCallback):
    """Writes down the logs that it is given, and the mode that each step ran in."""

    def __init__(self) -> None:
        self.logs, self.modes = [], []

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        self.logs.append(dict(logs))

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        applied = bwsk_fx.applied(model)
        self.modes.append(applied.mode if applied and applied.rewritten is not None else None)

    def figures(self) -> list[dict[str, float]]:
        found = [{key: value for key, value in logs.items() if key.startswith("bwsk_")} for logs in self.logs]
        return [figures for figures in found if figures]


class Tracker(Recorder):
    """Stands where the callbacks of TensorBoard or W&B stand."""


class Interrupt(TrainerCallback):
    """Ctrl-C after the first step."""

    def on_step_end(self, args, state, control, **kwargs) -> None:
        raise KeyboardInterrupt


@pytest.fixture(autouse=True)
def fresh_accelerator():
    # The state is one per process: precision and wrappers of one Trainer would be those of the next.
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def make_model(make_vit):
    return lambda: make_vit(num_hidden_layers=1)


@pytest.fixture
def make_trainer(make_images, tmp_path):
    def make(model, *callbacks: TrainerCallback, **changes) -> Trainer:
        images = make_images(6)
        data = [{name: value[row] for name, value in images.items()} for row in range(6)]
        defaults = {"max_steps": 2, "per_device_train_batch_size": 3, "logging_steps": 1, "save_strategy": "no"}
        quiet = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "dataloader_pin_memory": False}
        arguments = TrainingArguments(tmp_path / "out", **(defaults | quiet | changes))
        which = {"model_init": model} if not isinstance(model, nn.Module) else {"model": model}
        return Trainer(**which, args=arguments, train_dataset=data, eval_dataset=data[:2], callbacks=[*callbacks])

    return make


# -- in force ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["analyzed", "reversible"])
def test_the_mode_is_in_force_in_training_and_gone_afterwards(make_model, make_trainer, mode):
    model, recorder = make_model(), Recorder()
    original = type(model)
    trainer = make_trainer(model, BwskCallback(mode), recorder)
    trainer.train()
    assert recorder.modes == [mode, mode]
    assert type(model) is original and bwsk_fx.applied(model) is None and not model._forward_pre_hooks
    trainer.train()
    assert recorder.modes == [mode] * 4 and bwsk_fx.applied(model) is None


def test_the_mode_stays_if_asked_to(make_model, make_trainer):
    model = make_model()
    make_trainer(model, BwskCallback("reversible", restore=False, budget=0.25)).train()
    assert bwsk_fx.applied(model).mode == "reversible" and bwsk_fx.applied(model).plan.budget == 0.25


def test_mixed_precision_does_not_bypass_the_mode(make_model, make_trainer):
    """accelerate binds the forward method, so that it goes on calling it when the mode has been taken back."""
    model, recorder = make_model(), Recorder()
    trainer = make_trainer(model, BwskCallback("reversible"), recorder, bf16=True)
    for trainings in (1, 2):
        trainer.train()
        assert recorder.modes == ["reversible"] * 2 * trainings and len(recorder.figures()) == trainings
        assert "forward" in vars(model) and bwsk_fx.applied(model) is None
        assert trainer.evaluate()["eval_loss"] > 0


def test_inside_distributed_data_parallel(make_model, make_trainer, monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    model, recorder = make_model(), Recorder()
    try:
        trainer = make_trainer(model, BwskCallback("reversible"), recorder, ddp_backend="gloo")
        trainer.train()
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    assert isinstance(trainer.model_wrapped, DistributedDataParallel)
    assert recorder.modes == ["reversible"] * 2 and len(recorder.figures()) == 1
    assert bwsk_fx.applied(model) is None


def test_a_mode_of_the_users_own_is_left_in_place(make_model, make_trainer):
    model = bwsk_fx.apply(make_model(), "reversible", budget=0.25)
    make_trainer(model, BwskCallback("reversible", budget=0.25)).train()
    assert bwsk_fx.applied(model).mode == "reversible"


def test_a_model_init_that_applies_the_mode_itself(make_model, make_trainer):
    recorder = Recorder()
    trainer = make_trainer(lambda: bwsk_fx.apply(make_model()), BwskCallback("reversible"), recorder)
    trainer.train()
    assert recorder.modes == ["reversible"] * 2 and bwsk_fx.applied(trainer.model).mode == "reversible"


def test_a_class_that_was_changed_in_training_is_kept_and_said(make_model, make_trainer):
    class Reclass(TrainerCallback):
        def on_epoch_end(self, args, state, control, model=None, **kwargs) -> None:
            model.__class__ = type("FSDPViT", (type(model),), {})

    model = make_model()
    with pytest.warns(UserWarning, match="class has become FSDPViT since apply.*; the model stays in its mode"):
        make_trainer(model, BwskCallback("reversible"), Reclass()).train()
    assert type(model).__name__ == "FSDPViT"


# -- never idle in silence --------------------------------------------------------------------------------------------


def test_a_callback_that_comes_too_late_is_refused(make_model, make_trainer):
    trainer = make_trainer(make_model())
    trainer.add_callback(BwskCallback("reversible"))
    with pytest.raises(TrainingError, match=LATE):
        trainer.train()


def test_a_model_that_model_init_makes_is_refused(make_model, make_trainer):
    trainer = make_trainer(make_model, BwskCallback("reversible"))
    with pytest.raises(TrainingError, match=LATE):
        trainer.train()


@pytest.mark.parametrize(
    ("mode", "options", "text"),
    [
        ("analyzed", {}, r"the ViT\w+ is in mode 'analyzed' \(.*asked for 'reversible' \(budget=0.0, faith='rounded'"),
        ("reversible", {"budget": 0.25}, r"is in mode 'reversible' \(budget=0.25, .* asked for 'reversible' \(budget="),
        ("reversible", {"granularity": "whole"}, r"granularity='whole'\), and .*granularity='block'\): call bwsk_fx"),
    ],
)
def test_another_mode_is_not_replaced(make_model, make_trainer, mode, options, text):
    model = bwsk_fx.apply(make_model(), mode, **options)
    with pytest.raises(TrainingError, match=text):
        make_trainer(model, BwskCallback("reversible"))
    assert bwsk_fx.applied(model).mode == mode


def test_a_bypassed_mode_ends_the_training(make_model, make_trainer):
    model = make_model()
    trainer = make_trainer(model, BwskCallback("reversible"))
    model.forward = type(make_model()).forward.__get__(model)
    with pytest.raises(TrainingError, match="mode 'reversible' did not take effect: the first training step captured"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_what_an_earlier_training_captured_is_no_effect_of_this_one(make_model, make_trainer, make_images):
    model = bwsk_fx.apply(make_model())
    model(**make_images()).loss.backward()
    trainer = make_trainer(model, BwskCallback("reversible"))
    model.forward = type(make_model()).forward.__get__(model)
    with pytest.raises(TrainingError, match="mode 'reversible' did not take effect"):
        trainer.train()


def test_a_model_without_regions_ends_the_training(make_trainer):
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(()))

        def forward(self, pixel_values, labels=None):
            return {"loss": self.bias.view(())}

    with pytest.raises(RegionError, match="no node of this graph belongs to a region, so nothing would be reversible"):
        make_trainer(Bare(), BwskCallback("reversible")).train()


def test_options_are_checked_at_once():
    for options, error, text in [
        ({"mode": "conventional"}, RegionError, "mode is 'conventional': expected one of 'analyzed', 'reversible'"),
        ({"budget": -1}, PlanError, "budget is -1"),
        ({"granularity": "layer"}, PlanError, "granularity is 'layer'"),
    ]:
        with pytest.raises(error, match=text):
            BwskCallback(**options)


# -- what is reported -------------------------------------------------------------------------------------------------


def test_figures_reach_trackers_and_later_callbacks_once(make_model, make_trainer, monkeypatch):
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tracker", Tracker)
    later = Recorder()
    trainer = make_trainer(make_model(), BwskCallback("reversible"), later, report_to=["tracker"])
    trainer.train()
    tracker = next(one for one in trainer.callback_handler.callbacks if isinstance(one, Tracker))
    (figures,) = later.figures()
    assert set(figures) == PLAN_KEYS | RATIO_KEYS | {"bwsk_saved_bytes"}
    assert all(isinstance(value, (int, float)) for value in figures.values())
    assert tracker.figures() == [figures] and "loss" in tracker.logs[0]
    assert figures.items() <= trainer.state.log_history[0].items()
    assert not any("bwsk_regions" in entry for entry in trainer.state.log_history[1:])


def test_figures_are_those_of_the_first_step(make_model, make_trainer, make_images):
    recorder = Recorder()
    make_trainer(make_model(), BwskCallback("reversible"), recorder, eval_on_start=True).train()
    (found,) = recorder.figures()
    model, images = make_model(), as_the_trainer_calls_it(make_images())
    conventional = saved_for_backward(model, images)
    bwsk_fx.apply(model)
    assert found["bwsk_saved_bytes"] == saved_for_backward(model, images) < conventional
    report = bwsk_fx.explain_saved(model)
    assert found["bwsk_kept_bytes"] == report.kept_bytes < found["bwsk_conventional_bytes"]
    assert found["bwsk_conventional_bytes"] == report.totals.conventional_bytes
    assert found["bwsk_regions"] == len(report.regions) > 0
    for ruleset in ("published", "sound"):
        summary = bwsk_fx.summarize(bwsk_fx.type_nodes(bwsk_fx.applied(model).graph, ruleset=ruleset))
        assert found[f"bwsk_s_ratio_{ruleset}"] == summary.s_ratio > 0
        assert found[f"bwsk_k_ratio_{ruleset}"] == summary.k_ratio > 0


def test_analyzed_has_ratios_and_no_plan(make_model, make_trainer, make_images, tmp_path):
    recorder = Recorder()
    make_trainer(make_model(), BwskCallback("analyzed"), recorder).train()
    (found,) = recorder.figures()
    images = as_the_trainer_calls_it(make_images())
    assert set(found) == RATIO_KEYS | {"bwsk_saved_bytes"}
    assert found["bwsk_saved_bytes"] == saved_for_backward(bwsk_fx.apply(make_model(), "analyzed"), images)
    assert not (tmp_path / "out" / "bwsk_plan.json").exists()


def test_every_log_on_cuda_has_the_peak(make_model, make_trainer, monkeypatch):
    """Only asked for its device here: the training itself is on the CPU, where no peak is measured."""
    callback, recorder, asked = BwskCallback("reversible"), Recorder(), []
    trainer = make_trainer(make_model(), callback, recorder)
    trainer.train()
    assert not any("bwsk_peak_bytes" in logs for logs in recorder.logs)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: asked.append(device) or 12345)
    for _ in range(2):
        logs = {"loss": 1.0}
        callback.add_to(logs, SimpleNamespace(device=torch.device("cuda", 1)), trainer.state)
        assert logs == {"loss": 1.0, "bwsk_peak_bytes": 12345}
    assert asked == [torch.device("cuda", 1)] * 2


def test_nothing_is_lost_without_logs_in_between(make_model, make_trainer):
    recorder = Recorder()
    make_trainer(make_model(), BwskCallback("reversible"), recorder, logging_strategy="no").train()
    assert len(recorder.logs) == 1 and "train_loss" in recorder.logs[0] and len(recorder.figures()) == 1


def test_every_training_reports_its_own_model(make_model, make_trainer):
    """A second Trainer in the same process gets nothing of the first one's, which never came to its end."""
    stranger = Recorder()
    interrupted = make_trainer(make_model(), BwskCallback("reversible"), Interrupt())
    with pytest.raises(KeyboardInterrupt):
        interrupted.train()
    make_trainer(make_model(), stranger).train()
    assert len(stranger.logs) == 3 and stranger.figures() == []


def test_the_plan_can_be_followed(make_model, make_trainer, make_images, tmp_path):
    """Also in the last batch of an epoch, which is smaller."""
    model = make_model()
    make_trainer(model, BwskCallback("reversible", restore=False, budget=0.25), per_device_train_batch_size=4).train()
    path = tmp_path / "out" / "bwsk_plan.json"
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    regions = [entry["region"] for entry in json.loads(path.read_text())["regions"]]
    assert sorted([*set(regions)] * 2) == sorted(regions)
    for batch in (4, 2):
        follower = bwsk_fx.apply(make_model(), budget=0.25, plan=str(path))
        follower(**as_the_trainer_calls_it(make_images(batch))).loss.backward()
        assert {entry.region for entry in bwsk_fx.explain_saved(follower).regions} == set(regions)


def test_an_interrupted_training_leaves_its_plan(make_model, make_trainer, tmp_path):
    model = make_model()
    trainer = make_trainer(model, BwskCallback("reversible"), Interrupt())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert json.loads((tmp_path / "out" / "bwsk_plan.json").read_text())["regions"]
    assert bwsk_fx.applied(model).mode == "reversible"
    trainer.remove_callback(Interrupt)
    trainer.train()
    assert bwsk_fx.applied(model) is None and not model._forward_pre_hooks
