import json
from pathlib import Path

import pytest

from bwsk_fx.errors import TrainingError
from bwsk_fx.training.config import (
    Experiment,
    Mode,
    Precision,
    RecipeOptions,
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


def test_recipe_options_reach_both_experiments_and_the_pretraining():
    options = RecipeOptions(1e-5, "linear", warmup=0.0, weight_decay=0.0, clip=0.0, patience=9, evaluation_steps=2)
    config = RunConfig(OUT, recipe_options=options)
    for recipe in [config.recipe(experiment) for experiment in Experiment] + [config.pretraining_recipe()]:
        assert (recipe.learning_rate, recipe.schedule, recipe.warmup_fraction) == (1e-5, "linear", 0.0)
        assert (recipe.weight_decay, recipe.max_grad_norm, recipe.patience, recipe.evaluation_steps) == (0.0, 0.0, 9, 2)
    plain = RunConfig(OUT).recipe(Experiment.SCRATCH)
    assert RecipeOptions().changed(plain) == plain
    assert vars(RecipeOptions(patience=9).changed(plain)) == vars(plain) | {"patience": 9}


def test_identity_has_new_fields_only_where_they_are_used():
    def identity(**changes) -> dict:
        return RunConfig(OUT, **changes).identity(Variant(Experiment.SCRATCH, Mode.ANALYZED), Precision.FP32)

    plain = identity()
    assert not {"trainer", "augment"} & plain.keys()
    assert identity(trainer={"dataloader_num_workers": 2}, augment=False) == plain
    assert identity(trainer={"optim": "sgd"}) == plain | {"trainer": {"optim": "sgd"}}
    assert identity(augment=True) == plain | {"augment": True}


def test_all_data_but_the_digits_are_augmented():
    assert [RunConfig(OUT, data=data).augmented for data in ("digits", "cifar10")] == [False, True]
    assert not RunConfig(OUT, data="digits", model="mine").augmented
    assert RunConfig(OUT, augment=True).augmented
    assert not RunConfig(OUT, data="cifar10", augment=False).augmented


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
        ({"plan": ReversibleOptions(budget=float("nan"))}, "--budget must be at least 0"),
        ({"seed": -1}, "--seed must be at least 0"),
        ({"recipe_options": RecipeOptions(learning_rate=0.0)}, "--learning-rate must be above 0, not 0.0"),
        ({"recipe_options": RecipeOptions(learning_rate=float("inf"))}, "--learning-rate must be above 0, not inf"),
        ({"recipe_options": RecipeOptions(warmup=1.5)}, "--warmup must be a share of all steps, 0 to 1, not 1.5"),
        ({"recipe_options": RecipeOptions(warmup=0.1, schedule="constant")}, "--schedule constant has no warm-up"),
        ({"recipe_options": RecipeOptions(weight_decay=-1.0)}, "--weight-decay must be at least 0"),
        ({"recipe_options": RecipeOptions(clip=float("nan"))}, "--clip must be at least 0"),
        ({"recipe_options": RecipeOptions(patience=0)}, "--patience must be at least 1"),
        ({"recipe_options": RecipeOptions(evaluation_steps=0)}, "--evaluation-steps must be at least 1"),
        ({"recipe_options": RecipeOptions(schedule="fast")}, "--schedule does not know 'fast'"),
        ({"trainer": {"seed": 3}}, "--trainer seed is not taken: use --seed"),
        ({"modes": ()}, "nothing to train"),
    ],
)
def test_values_that_no_run_can_use(changes, message):
    with pytest.raises(TrainingError, match=message):
        RunConfig(OUT, **changes).validate()
