import math
import re
from enum import StrEnum
from pathlib import Path

import pytest

from bwsk_fx.errors import TrainingError
from bwsk_fx.training import run_file
from bwsk_fx.training.config import Experiment, Mode, RecipeOptions, ReversibleOptions, RunConfig
from bwsk_fx.training.values import parse_setting


class Shade(StrEnum):
    DARK = "dark"
    LIGHT = "light"


OPTIONS = {
    "output": Path,
    "epochs": int | None,
    "learning_rate": float | None,
    "modes": str,
    "shade": Shade,
    "augment": bool | None,
    "trainer": dict,
}


@pytest.fixture
def read(tmp_path):
    def read(text: str) -> dict:
        (tmp_path / "run.yaml").write_text(text)
        return run_file.read(tmp_path / "run.yaml", OPTIONS, frozenset({"modes"}))

    return read


def test_options_are_named_with_dashes_or_underscores(read):
    assert read("learning-rate: 0.5\nepochs: 2") == read("learning_rate: 0.5\nepochs: 2")
    assert read("learning-rate: 0.5") == {"learning_rate": 0.5}


def test_lists_are_lists_or_comma_separated(read):
    assert read("modes: [analyzed, reversible]") == read("modes: analyzed,reversible")


def test_numbers_are_those_of_yaml_1_2_and_dates_are_text(read):
    # PyYAML itself takes 1e-4 for text and 2026-01-01 for a date.
    assert read("learning_rate: 1e-4") == {"learning_rate": 1e-4}
    assert read("learning_rate: 1E3") == {"learning_rate": 1000.0}
    assert read("learning_rate: 1") == {"learning_rate": 1}
    assert read("trainer: {run_name: 2026-01-01, adam_epsilon: -.5e-7}") == {
        "trainer": {"run_name": "2026-01-01", "adam_epsilon": -0.5e-7}
    }
    assert read("modes: e1-e4") == {"modes": "e1-e4"}


def test_null_leaves_the_default(read):
    assert read("epochs: null\nlearning_rate:") == {}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("epoch: 3", "unknown option 'epoch'; did you mean 'epochs'"),
        ("config: other.yaml", "unknown option 'config'; known are output, epochs"),
        ("epochs: three", "epochs must be a whole number or null, not 'three'"),
        ("epochs: 2.5", "epochs must be a whole number or null, not 2.5"),
        ("epochs: true", "epochs must be a whole number or null, not True"),
        ("augment: 1", "augment must be true or false or null, not 1"),
        ("shade: grey", "shade must be one of dark, light, not 'grey'"),
        ("output: [a]", "output must be a path, not \\['a'\\]"),
        ("modes: [1]", "modes must be a list or comma-separated text, not \\[1\\]"),
        ("trainer: optim", "trainer must be a mapping, not 'optim'"),
        ("learning_rate: 1\nlearning-rate: 2", "'learning_rate' is there twice"),
        ("epochs: 1\nepochs: 2", r"is not YAML \(line 1: 'epochs' is there twice"),
        ("epochs: [", r"is not YAML \(line 1: "),
        ("!!python/object/apply:os.getcwd []", "is not YAML"),
        ("- epochs", "must hold a mapping"),
        ("", "must hold a mapping"),
    ],
)
def test_what_is_wrong_is_one_line_that_names_the_file(read, text, words):
    with pytest.raises(TrainingError, match=rf"run\.yaml'.*{words}"):
        read(text)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(TrainingError, match=r"--config '.*missing\.yaml' cannot be read \(No such file"):
        run_file.read(tmp_path / "missing.yaml", OPTIONS, frozenset())
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TrainingError, match=r"binary\.yaml' cannot be read"):
        run_file.read(tmp_path / "binary.yaml", OPTIONS, frozenset())


def test_what_is_written_is_read_back(tmp_path):
    from bwsk_fx import train_command

    config = RunConfig(
        Path("runs/ünder"),
        experiments=(Experiment.SCRATCH,),
        modes=(Mode.CONVENTIONAL, Mode.REVERSIBLE),
        plan=ReversibleOptions(budget=math.inf, faith="exact"),
        recipe_options=RecipeOptions(learning_rate=1e-7, clip=0.0),
        trainer={"optim": "adafactor", "lr_scheduler_kwargs": {"num_cycles": 0.5}},
        augment=False,
        overwrite=True,
    )
    run_file.write(tmp_path / "config.yaml", config.options())
    found = run_file.read(tmp_path / "config.yaml", train_command._option_types(), train_command._LISTS)
    # A run that is asked for again does not overwrite.
    assert "overwrite" not in found
    assert found == config.options() | {"experiments": "scratch", "modes": "conventional,reversible"}


@pytest.mark.parametrize(
    ("text", "setting"),
    [
        ("optim=adafactor", ("optim", "adafactor")),
        ("adam_epsilon=1e-6", ("adam_epsilon", 1e-6)),
        ("torch_compile = true", ("torch_compile", True)),
        ("optim_args=a=1,b=2", ("optim_args", "a=1,b=2")),
        ("lr_scheduler_kwargs={min_lr: 0.1}", ("lr_scheduler_kwargs", {"min_lr": 0.1})),
    ],
)
def test_settings_are_yaml_behind_the_first_equals_sign(text, setting):
    assert parse_setting(text) == setting


@pytest.mark.parametrize(("text", "words"), [("optim", "KEY=VALUE"), ("=1", "KEY=VALUE"), ("optim=[", "is not YAML")])
def test_settings_that_are_none(text, words):
    with pytest.raises(TrainingError, match=re.escape(words)):
        parse_setting(text)
