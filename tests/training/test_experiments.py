"""What a whole run leaves: the published layout, comparable results, and nothing that says where it was made."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bwsk_fx.errors import TrainingError
from bwsk_fx.training import models, modes
from bwsk_fx.training.config import Experiment, Mode, Precision, ReversibleOptions
from bwsk_fx.training.data import load_splits
from bwsk_fx.training.experiments import resolve_precision, train

FOLDERS = [
    "finetune-conventional",
    "finetune-bwsk-analyzed",
    "finetune-bwsk-reversible",
    "scratch-conventional",
    "scratch-bwsk-analyzed",
    "scratch-bwsk-reversible",
]
PUBLISHED_KEYS = [
    "model_slug",
    "experiment",
    "mode",
    "final_train_loss",
    "best_val_metric",
    "test_metric",
    "metric_name",
    "epochs_completed",
    "total_steps",
    "early_stopped",
    "wall_time_s",
    "peak_memory_mb",
    "nan_count",
    "erasure_budget",
    "parallelism_ratio",
]
PICTURES = {f"{name}.{suffix}" for name in ("loss", "accuracy", "memory", "timeline") for suffix in ("png", "svg")}
CURVES = {"loss_curve", "accuracy_curve", "memory_timeline"}
SCRATCH = {"experiments": (Experiment.SCRATCH,), "modes": (Mode.CONVENTIONAL,)}


def test_the_layout_is_the_published_one(six_variants):
    assert list(six_variants.results) == list(six_variants.trained) == FOLDERS
    for folder in FOLDERS:
        assert {path.name for path in (six_variants.output / folder).iterdir()} == {
            "config.json",
            "model.safetensors",
            "preprocessor_config.json",
            "training_results.json",
        }
    top = {path.name for path in six_variants.output.iterdir()} - set(FOLDERS)
    assert top == {"README.md", "config.yaml", "results.json", "pretrained", *PICTURES}


def test_results_have_the_published_keys_first(six_variants):
    for folder in FOLDERS:
        result = json.loads((six_variants.output / folder / "training_results.json").read_text())
        assert list(result)[: len(PUBLISHED_KEYS)] == PUBLISHED_KEYS
        assert result["total_steps"] == 6
        assert len(result["loss_curve"]["loss"]) == 6
        assert result["final_train_loss"] == result["loss_curve"]["loss"][-1]
        assert result["nan_count"] == 0
        assert result["saved_for_backward_bytes"] < result["peak_memory_mb"] * 2**20
    summary = json.loads((six_variants.output / "results.json").read_text())
    assert list(summary["variants"]) == FOLDERS
    for folder, figures in summary["variants"].items():
        full = six_variants.results[folder]
        assert figures == {key: full[key] for key in full if key not in CURVES}


def test_modes_are_named_and_rated_as_published(six_variants):
    for folder, result in six_variants.results.items():
        conventional = result["mode"] == "conventional"
        assert result["mode"] == ("conventional" if conventional else f"bwsk_{folder.rsplit('-', 1)[1]}")
        assert (result["parallelism_ratio"] == 0) == conventional
        if not conventional:
            assert result["parallelism_ratio"] + result["erasure_budget"] == pytest.approx(1)
            # Four blocks of 8 S and 3 K; outside them two S (last norm, classifier), two K (projection, dropout).
            assert result["parallelism_ratio"] == pytest.approx((4 * 8 + 2) / (4 * 11 + 4))


def test_modes_start_from_the_same_weights_and_data(six_variants):
    first = {folder: result["loss_curve"]["loss"][0] for folder, result in six_variants.results.items()}
    for experiment in Experiment:
        losses = [loss for folder, loss in first.items() if folder.startswith(experiment.value)]
        assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


def test_analyzed_keeps_what_conventional_keeps_and_reversible_keeps_less(six_variants):
    saved = {folder: result["saved_for_backward_bytes"] for folder, result in six_variants.results.items()}
    assert saved["scratch-bwsk-analyzed"] == saved["scratch-conventional"]
    assert saved["scratch-bwsk-reversible"] < saved["scratch-conventional"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_variant_loads_as_an_ordinary_model(six_variants, folder):
    from transformers import AutoModelForImageClassification

    model, report = AutoModelForImageClassification.from_pretrained(
        six_variants.output, subfolder=folder, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert type(model).__name__ == "ViTForImageClassification"
    assert model.config.id2label[7] == "7"
    processor = models.load_processor(str(six_variants.output / folder))
    image = load_splits("digits").test[0]["image"].convert("RGB")
    assert model(**processor(image, return_tensors="pt")).logits.shape == (1, 10)


def test_a_process_without_bwsk_fx_gets_the_accuracies_that_were_reported(six_variants, tmp_path):
    # Links, so that what the process writes is not found in the run's folder.
    folders = [tmp_path / folder for folder in FOLDERS]
    for folder in folders:
        folder.symlink_to(six_variants.output / folder.name)
    test, processor = load_splits("digits").test, models.load_processor(str(folders[0]))
    images = [image.convert("RGB") for image in test["image"]]
    torch.save(processor(images, return_tensors="pt")["pixel_values"], tmp_path / "pixels.pt")
    program = Path(__file__).with_name("without_bwsk_fx.py")
    command = [sys.executable, program, tmp_path / "pixels.pt", *folders]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    labels = torch.tensor(test["label"])
    for folder in folders:
        right = torch.load(f"{folder}.logits.pt", weights_only=True).argmax(-1) == labels
        assert right.double().mean().item() == pytest.approx(six_variants.results[folder.name]["test_metric"])


def test_finetuning_starts_from_a_checkpoint_of_the_digits_0_to_4(six_variants):
    from transformers import AutoModelForImageClassification

    checkpoint = AutoModelForImageClassification.from_pretrained(six_variants.output / "pretrained")
    assert sorted(checkpoint.config.id2label.values()) == list("01234")
    result = json.loads((six_variants.output / "pretrained" / "pretraining_results.json").read_text())
    torch.manual_seed(0)
    tuned = models.from_checkpoint(str(six_variants.output / "pretrained"), tuple("0123456789"))
    assert tuned.classifier.out_features == 10
    for name, weight in tuned.vit.state_dict().items():
        assert torch.equal(weight, checkpoint.vit.state_dict()[name]), name
    assert 0 <= result["test_metric"] <= 1


def test_no_output_names_a_folder_of_this_machine(six_variants):
    for path in six_variants.output.rglob("*"):
        if path.suffix in {".json", ".md", ".safetensors"}:
            assert str(six_variants.output.parent).encode() not in path.read_bytes(), path


def test_finished_variants_are_skipped_and_missing_ones_trained(make_tiny, tmp_path):
    config = make_tiny(tmp_path / "out", **SCRATCH)
    assert train(config).trained == ("scratch-conventional",)
    stamp = (tmp_path / "out" / "scratch-conventional" / "model.safetensors").stat().st_mtime_ns
    again = train(replace(config, modes=(Mode.CONVENTIONAL, Mode.ANALYZED)))
    assert again.trained == ("scratch-bwsk-analyzed",)
    assert list(again.results) == ["scratch-conventional", "scratch-bwsk-analyzed"]
    assert (tmp_path / "out" / "scratch-conventional" / "model.safetensors").stat().st_mtime_ns == stamp


def test_another_configuration_needs_another_folder_or_overwrite(make_tiny, tmp_path):
    config = make_tiny(tmp_path / "out", **SCRATCH)
    losses = train(config).results["scratch-conventional"]["loss_curve"]["loss"]
    other = replace(config, seed=3)
    with pytest.raises(TrainingError, match=r"seed is 0, not 3.*--overwrite"):
        train(other)
    report = train(replace(other, overwrite=True))
    assert report.results["scratch-conventional"]["loss_curve"]["loss"] != losses
    with pytest.raises(TrainingError, match=r"holds scratch-conventional of another configuration"):
        train(replace(config, experiments=(Experiment.FINETUNE,)))


def test_results_of_an_earlier_version_are_named(make_tiny, tmp_path):
    config = make_tiny(tmp_path / "out", **SCRATCH)
    path = train(config).output / "scratch-conventional" / "training_results.json"
    result = json.loads(path.read_text())
    del result["memory_timeline"]
    path.write_text(json.dumps(result))
    with pytest.raises(TrainingError, match=r"scratch-conventional' is of an earlier .*without memory_timeline"):
        train(replace(config, overwrite=True))


def test_the_plan_only_concerns_the_reversible_variant(make_tiny, tmp_path):
    config = make_tiny(tmp_path / "out", **SCRATCH)
    train(config)
    assert train(replace(config, plan=ReversibleOptions(budget=0.25))).trained == ()


def test_a_failing_variant_leaves_the_finished_ones_only(make_tiny, tmp_path, monkeypatch):
    def fail(model, mode, plan):
        if mode is Mode.ANALYZED:
            raise RuntimeError("no")

    monkeypatch.setattr(modes, "put_into", fail)
    config = make_tiny(tmp_path / "out", **SCRATCH | {"modes": (Mode.CONVENTIONAL, Mode.ANALYZED)})
    with pytest.raises(RuntimeError):
        train(config)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"scratch-conventional", "README.md", "config.yaml", "results.json", *PICTURES}


def test_a_mode_that_takes_no_effect_is_an_error(make_tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(modes, "put_into", lambda model, mode, plan: None)
    config = make_tiny(tmp_path / "out", **SCRATCH | {"modes": (Mode.REVERSIBLE,)})
    with pytest.raises(TrainingError, match="mode 'reversible' did not take effect"):
        train(config)
    assert not (tmp_path / "out").exists()


def test_a_local_checkpoint_and_a_folder_of_images(six_variants, make_tiny, tmp_path):
    from PIL import Image

    for index in range(40):
        folder = tmp_path / "pictures" / ("dark" if index % 2 else "light")
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (9, 7), 20 if index % 2 else 220).save(folder / f"{index}.png")
    changes = {"data": str(tmp_path / "pictures"), "model": str(six_variants.output / "pretrained")}
    config = make_tiny(tmp_path / "out", **changes, modes=(Mode.CONVENTIONAL,), precision=Precision.BF16)
    report = train(config)
    assert set(report.results) == {"finetune-conventional", "scratch-conventional"}
    configuration = report.results["finetune-conventional"]["configuration"]
    assert (configuration["data"], configuration["model"], configuration["precision"]) == (
        "pictures",
        "pretrained",
        "bf16",
    )
    assert (configuration["learning_rate"], configuration["patience"]) == (5e-5, 3)
    assert str(tmp_path) not in (tmp_path / "out" / "README.md").read_text()


def test_a_missing_checkpoint_leaves_nothing(make_tiny, tmp_path):
    for model in (str(tmp_path / "missing"), "nobody/nothing"):
        with pytest.raises(TrainingError, match=f"checkpoint '{model}'"):
            train(make_tiny(tmp_path / "out", model=model))
        assert not (tmp_path / "out").exists()


def test_precision():
    assert resolve_precision(Precision.BF16) is Precision.BF16
    if not torch.cuda.is_available():
        assert resolve_precision(Precision.AUTO) is Precision.FP32
        with pytest.raises(TrainingError, match="fp16 needs a CUDA device"):
            resolve_precision(Precision.FP16)
