import json
from pathlib import Path

import pytest

from bwsk_fx.errors import TrainingError
from bwsk_fx.training.config import (
    Experiment,
    Mode,
    Precision,
    ReversibleOptions,
    RunConfig,
    Variant,
    published,
    published_recipe,
)

OUT = Path("out")


def test_folders_are_those_of_the_published_repository():
    assert [variant.folder for variant in RunConfig(OUT).variants] == [
        "finetune-conventional",
        "finetune-bwsk-analyzed",
        "finetune-bwsk-reversible",
        "scratch-conventional",
        "scratch-bwsk-analyzed",
        "scratch-bwsk-reversible",
    ]


def test_published_numbers_are_the_defaults_off_the_digits():
    recipe = RunConfig(OUT, data="cifar10").recipe(Experiment.FINETUNE)
    assert recipe == published_recipe(Experiment.FINETUNE)
    assert (recipe.learning_rate, recipe.batch_size, recipe.patience) == (5e-5, 16, 3)
    assert (recipe.max_grad_norm, recipe.schedule) == (1.0, "cosine")
    assert published_recipe(Experiment.SCRATCH).learning_rate == 3e-4
    assert "Zervas" in published()["source"]


def test_overrides_reach_both_experiments_and_the_pretraining():
    config = RunConfig(OUT, epochs=2, batch_size=4)
    recipes = [config.recipe(experiment) for experiment in Experiment] + [config.pretraining_recipe()]
    assert {(recipe.epochs, recipe.batch_size) for recipe in recipes} == {(2, 4)}


def test_only_the_reversible_mode_depends_on_the_plan():
    def identities(plan: ReversibleOptions) -> list[dict]:
        config = RunConfig(OUT, plan=plan)
        return [config.identity(Variant(Experiment.SCRATCH, mode), Precision.FP32) for mode in Mode]

    eager, other = identities(ReversibleOptions()), identities(ReversibleOptions(budget=0.25))
    assert eager[:2] == other[:2]
    assert (eager[2]["budget"], other[2]["budget"]) == (0.0, 0.25)


def test_identity_names_no_folder_of_this_machine(tmp_path):
    data, model = tmp_path / "pictures", tmp_path / "checkpoint"
    data.mkdir(), model.mkdir()
    config = RunConfig(tmp_path / "out", data=str(data), model=str(model))
    identity = config.identity(Variant(Experiment.FINETUNE, Mode.REVERSIBLE), Precision.FP32)
    assert (identity["data"], identity["model"]) == ("pictures", "checkpoint")
    assert str(tmp_path) not in json.dumps(identity)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "--epochs must be at least 1"),
        ({"batch_size": -1}, "--batch-size must be at least 1"),
        ({"plan": ReversibleOptions(budget=-0.1)}, "--budget must be at least 0"),
        ({"modes": ()}, "nothing to train"),
    ],
)
def test_values_that_no_run_can_use(changes, message):
    with pytest.raises(TrainingError, match=message):
        RunConfig(OUT, **changes).validate()
