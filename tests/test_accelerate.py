"""The backend by its name alone: accelerate's plugin, its Accelerator, and transformers' Trainer."""

import copy
import json
import pickle
import subprocess
import sys

import accelerate
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DynamoBackend, TorchDynamoPlugin
from accelerate.utils import dataclasses as accelerates
from transformers import HfArgumentParser, Trainer, TrainingArguments

import bwsk_fx
from bwsk_fx.errors import TrainingError

COMPILED = {"torch_compile": True, "torch_compile_backend": "bwsk_fx"}
OPTIONS = {"budget": 0.2, "compiler": "eager"}


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    # Accelerators of one process share their state, the plugin included.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def make_model(make_vit):
    # Left open, transformers' loss fills it in on the first step, and Dynamo compiles the second one anew.
    return lambda: make_vit(num_hidden_layers=1, problem_type="single_label_classification")


@pytest.fixture
def train(make_model, make_images, tmp_path):
    """Train for three steps and return the losses and how many graphs have been compiled meanwhile."""

    def run(options: dict | None = None, **changes) -> tuple[list[float], int]:
        images = make_images(8)
        samples = [{name: value[place] for name, value in images.items()} for place in range(8)]
        fixed = {"use_cpu": True, "report_to": [], "save_strategy": "no", "logging_steps": 1, "learning_rate": 1e-2}
        arguments = TrainingArguments(str(tmp_path), max_steps=3, per_device_train_batch_size=4, **(fixed | changes))
        trainer = Trainer(make_model(), arguments, train_dataset=samples)
        trainer.accelerator.state.dynamo_plugin.options = options
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return losses, torch._dynamo.utils.counters["stats"]["unique_graphs"] - before

    return run


def test_trainer_takes_the_backend_by_name(train):
    expected, nothing = train()
    found, graphs = train(**COMPILED)
    assert (len(found), nothing, graphs) == (3, 0, 1)
    assert found == pytest.approx(expected, rel=1e-5)
    report = bwsk_fx.compile.last_report()
    assert report.plan is not None
    assert report.options.compiler == "inductor"


def test_trainers_plugin_takes_options_until_training_starts(train):
    expected, _ = train()
    found, graphs = train(OPTIONS, **COMPILED)
    assert (len(found), graphs) == (3, 1)
    assert found == pytest.approx(expected, rel=1e-5)
    report = bwsk_fx.compile.last_report()
    assert (report.options.budget, report.options.compiler) == (0.2, "eager")
    assert report.plan.kept_bytes < 0.5 * report.plan.conventional_bytes


def test_accelerator_compiles_with_the_options_of_its_plugin(make_model, make_images):
    def losses(run: torch.nn.Module) -> list[float]:
        optimizer, found = torch.optim.SGD(run.parameters(), lr=0.1), []
        for _ in range(3):
            optimizer.zero_grad()
            found.append(run(**make_images())["loss"])
            found[-1].backward()
            optimizer.step()
        return [loss.item() for loss in found]

    accelerator = Accelerator(cpu=True, dynamo_plugin=TorchDynamoPlugin(backend="bwsk_fx", options=OPTIONS))
    prepared = accelerator.prepare(make_model())
    assert losses(prepared) == pytest.approx(losses(make_model()), rel=1e-5)
    report = bwsk_fx.compile.last_report()
    assert (report.options.budget, report.options.compiler) == (0.2, "eager")
    assert report.plan is not None


def test_the_environment_names_the_backend(monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "bwsk_fx")
    assert TorchDynamoPlugin().to_kwargs() == {"backend": "bwsk_fx"}


def test_arguments_survive_json(tmp_path):
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], **COMPILED)
    (tmp_path / "arguments.json").write_text(arguments.to_json_string())
    (again,) = HfArgumentParser(TrainingArguments).parse_json_file(tmp_path / "arguments.json")
    assert again.torch_compile and again.torch_compile_backend == "bwsk_fx"
    assert again.to_dict() == arguments.to_dict()
    plugin = TorchDynamoPlugin(backend="bwsk_fx", options=OPTIONS)
    assert json.loads(json.dumps(plugin.to_dict()))["backend"] == "bwsk_fx"


def test_the_name_is_one_of_accelerates():
    name = DynamoBackend("BWSK_FX")
    assert isinstance(name, DynamoBackend) and name != DynamoBackend.NO
    assert (str(name), name.name, name) == ("BWSK_FX", "BWSK_FX", "BWSK_FX")
    assert "BWSK_FX" in DynamoBackend
    assert pickle.loads(pickle.dumps(name)) is copy.deepcopy(name) is name


def test_registering_twice_is_harmless():
    before = DynamoBackend("BWSK_FX"), DynamoBackend.__dict__["_missing_"], DynamoBackend.list(), len(sys.meta_path)
    bwsk_fx.accelerate.register()
    bwsk_fx.accelerate.register_on_import()
    after = DynamoBackend("BWSK_FX"), DynamoBackend.__dict__["_missing_"], DynamoBackend.list(), len(sys.meta_path)
    assert after == before


@pytest.mark.parametrize("unknown", ["bwsk", "bwsk_fx2", "no_such_backend"])
def test_unknown_names_are_still_refused(unknown):
    assert unknown.upper() not in DynamoBackend
    with pytest.raises(ValueError, match=f"'{unknown.upper()}' is not a valid DynamoBackend"):
        TorchDynamoPlugin(backend=unknown)


def test_a_release_with_other_names_is_named(monkeypatch):
    monkeypatch.setattr(accelerates, "DynamoBackend", int)
    bwsk_fx.accelerate.register_on_import()
    with pytest.raises(TrainingError, match=f"accelerate {accelerate.__version__} .* no enumeration"):
        bwsk_fx.accelerate.register()


def test_a_release_that_drops_the_name_is_named(monkeypatch):
    monkeypatch.setattr(TorchDynamoPlugin, "to_kwargs", lambda self: {"backend": "inductor"})
    with pytest.raises(TrainingError, match=f"accelerate {accelerate.__version__} .* does not pass on the name"):
        bwsk_fx.accelerate.register()


# Each starts with an interpreter in which nothing has been imported.
_BEFORE = """
import sys, bwsk_fx
assert not {"accelerate", "transformers"} & sys.modules.keys()
from accelerate.utils import DynamoBackend
"""
_AFTER = """
from accelerate.utils import DynamoBackend
others = list(DynamoBackend)
assert "BWSK_FX" not in DynamoBackend
import bwsk_fx
assert list(DynamoBackend) == others and all(DynamoBackend(name.value) is name for name in others)
"""
_AGAIN = """
import sys, bwsk_fx
import accelerate.utils.dataclasses as module
from importlib import reload
old = module.DynamoBackend
assert reload(module).DynamoBackend is not old
from accelerate.utils.dataclasses import DynamoBackend
"""


@pytest.mark.parametrize("order", [_BEFORE, _AFTER, _AGAIN], ids=["before", "after", "again"])
def test_the_name_is_known_whichever_is_imported_first(order):
    done = subprocess.run(
        [sys.executable, "-c", f'{order}\nprint(DynamoBackend("BWSK_FX"))'], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "BWSK_FX\n"), done.stderr
