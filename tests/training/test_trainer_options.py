import pytest
from transformers import TrainingArguments

from bwsk_fx.errors import TrainingError
from bwsk_fx.training import trainer_options
from bwsk_fx.training.config import Precision, Recipe
from bwsk_fx.training.trainer import Task, _arguments


def test_what_a_run_sets_is_refused_or_given_way_to(tmp_path):
    recipe = Recipe(learning_rate=0.1, epochs=1, batch_size=1, patience=1, max_grad_norm=1.0)
    task = Task(None, [0], None, None, recipe, Precision.FP32, seed=7)
    ours, defaults = _arguments(task, tmp_path, "steps"), TrainingArguments(output_dir="other", use_cpu=True)
    changed = {
        name for name in TrainingArguments.__dataclass_fields__ if getattr(ours, name) != getattr(defaults, name)
    }
    given_way = {
        *("optim", "per_device_eval_batch_size", "logging_strategy"),
        *("dataloader_pin_memory", "ddp_find_unused_parameters"),
    }
    assert {"learning_rate", "seed", "output_dir"} <= changed
    assert changed - given_way <= trainer_options._REFUSED.keys()


def test_settings_reach_the_trainer(tmp_path):
    recipe = Recipe(learning_rate=0.1, epochs=1, batch_size=1, patience=1, max_grad_norm=1.0)
    settings = {"optim": "adafactor", "per_device_eval_batch_size": 3, "adam_beta2": 0.95}
    arguments = _arguments(Task(None, [0], None, None, recipe, Precision.FP32, 7, settings=settings), tmp_path, "no")
    assert {name: getattr(arguments, name) for name in settings} == settings
    assert arguments.logging_strategy == "no"
    assert trainer_options.logged({"report_to": "tensorboard"})
    assert not trainer_options.logged({"report_to": ["none"]})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"learning_rate": 0.1}, "learning_rate is not taken: use --learning-rate"),
        ({"max_steps": 3}, "max_steps is not taken: use --epochs"),
        ({"eval_strategy": "epoch"}, "use --evaluation-steps"),
        ({"activation_checkpointing": True}, "use --modes"),
        ({"optm": "sgd"}, "does not know 'optm'; did you mean 'optim'"),
        ({"learning_rat": 1}, "did you mean 'learning_rate'"),
        ({"xyzzy": 1}, "fields of transformers' TrainingArguments"),
        ({"dataloader_num_workers": "four"}, "dataloader_num_workers must be a whole number, not 'four'"),
        ({"label_smoothing_factor": True}, "label_smoothing_factor must be a number, not True"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be at least 1"),
        ({"optim": "adamw"}, "optim: transformers says 'adamw is not a valid OptimizerNames"),
        ({"report_to": "nobody"}, "report_to: transformers says 'nobody is not supported"),
        ({"lr_scheduler_kwargs": {"min_lr": 1}}, "--schedule cosine cannot be made .*min_lr"),
    ],
)
def test_settings_that_no_run_takes(settings, words):
    with pytest.raises(TrainingError, match=words):
        trainer_options.require_valid(settings, ["cosine"])


def test_settings_that_a_run_takes():
    settings = {"label_smoothing_factor": 0, "optim": "adafactor", "report_to": "none", "lr_scheduler_kwargs": None}
    trainer_options.require_valid(settings, ["cosine", "linear"])


def test_schedules_are_those_of_transformers():
    with pytest.raises(TrainingError, match="--schedule does not know 'cosin'; it takes linear, cosine, "):
        trainer_options.require_valid({}, ["cosin"])
    with pytest.raises(TrainingError, match=r"cosine_with_min_lr cannot be made .*--trainer 'lr_scheduler_kwargs="):
        trainer_options.require_valid({}, ["cosine_with_min_lr"])
    trainer_options.require_valid({"lr_scheduler_kwargs": {"min_lr": 1e-6}}, ["cosine_with_min_lr"])


def test_only_what_weights_depend_on_decides():
    settings = {"report_to": "tensorboard", "optim": "sgd", "dataloader_num_workers": 4, "adam_beta1": 0.8}
    assert trainer_options.deciding(settings) == {"adam_beta1": 0.8, "optim": "sgd"}


def test_tensorboard_writes_where_nothing_is_removed(tmp_path):
    from transformers import integrations

    callback = object.__new__(integrations.TensorBoardCallback)
    callback.logging_dir = None
    handler = type("Handler", (), {"callbacks": [callback]})
    trainer_options.log_into(type("Trainer", (), {"callback_handler": handler}), tmp_path / "logs" / "mine")
    assert callback.logging_dir == str(tmp_path / "logs" / "mine")
    trainer_options.log_into(type("Trainer", (), {"callback_handler": handler}), tmp_path / "other")
    assert callback.logging_dir == str(tmp_path / "logs" / "mine")
