"""The image classification loop of the Hugging Face documentation, with one line more."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import bwsk_fx
from bwsk_fx.measure import saved_for_backward
from bwsk_fx.training.callback import BwskCallback
from bwsk_fx.training.data import digits

LOADER = Path(__file__).with_name("without_bwsk_fx.py")


@dataclass(frozen=True)
class Trained:
    """What a training leaves."""

    model: Any
    saved_bytes: int
    metrics: dict[str, float]
    folder: Path

    @property
    def weights(self) -> dict[str, Tensor]:
        return self.model.state_dict()


def train(folder: Path, one_line: Any = None, callbacks: Any = None) -> Trained:
    """Train as the documentation does; `one_line` is called where a user would write it."""
    from transformers import (
        AutoModelForImageClassification,
        DefaultDataCollator,
        Trainer,
        TrainingArguments,
        ViTConfig,
        set_seed,
    )

    set_seed(0)
    data = digits()["train"].select(range(48)).train_test_split(test_size=16, seed=0)
    labels = data["train"].features["label"].names

    def transforms(examples: dict[str, Any]) -> dict[str, Any]:
        pixels = [torch.from_numpy(np.array(image, np.float32) / 255) for image in examples.pop("image")]
        return examples | {"pixel_values": [image.expand(3, -1, -1) for image in pixels]}

    data = data.with_transform(transforms)

    def compute_metrics(eval_pred: Any) -> dict[str, float]:
        predictions, references = eval_pred
        return {"accuracy": float(np.mean(np.argmax(predictions, axis=1) == references))}

    config = ViTConfig(
        image_size=8,
        patch_size=2,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        hidden_dropout_prob=0.1,
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
    )
    model = AutoModelForImageClassification.from_config(config)
    if one_line is not None:
        one_line(model)

    training_args = TrainingArguments(
        output_dir=folder,
        remove_unused_columns=False,
        eval_strategy="epoch",
        save_strategy="epoch",
        learning_rate=1e-3,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        per_device_eval_batch_size=16,
        num_train_epochs=2,
        warmup_steps=1,
        logging_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        report_to="none",
        use_cpu=True,
    )
    trainer = Trainer(
        model=model,
        args=training_args,
        data_collator=DefaultDataCollator(),
        train_dataset=data["train"],
        eval_dataset=data["test"],
        compute_metrics=compute_metrics,
        callbacks=callbacks,
    )
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model()
    batch = DefaultDataCollator()([data["train"][row] for row in range(8)])
    return Trained(model, saved_for_backward(model.train(), dict(batch)), metrics, folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """The loop as it is, with the line, and with the callback."""
    root = tmp_path_factory.mktemp("hf")
    yield SimpleNamespace(
        plain=train(root / "plain"),
        line=train(root / "line", lambda model: bwsk_fx.apply(model, mode="reversible", faith="exact")),
        callback=train(root / "callback", callbacks=[BwskCallback("reversible", faith="exact", restore=False)]),
    )


@pytest.mark.parametrize("way", ["line", "callback"])
def test_the_same_weights_from_fewer_saved_bytes(runs, way):
    found = getattr(runs, way)
    assert bwsk_fx.applied(found.model).mode == "reversible" and bwsk_fx.applied(runs.plain.model) is None
    assert list(found.weights) == list(runs.plain.weights)
    assert all(torch.equal(value, runs.plain.weights[name]) for name, value in found.weights.items())
    assert found.metrics["eval_accuracy"] == runs.plain.metrics["eval_accuracy"]
    assert found.metrics["eval_loss"] == runs.plain.metrics["eval_loss"]
    assert 0 < found.saved_bytes < 0.8 * runs.plain.saved_bytes


def test_the_weights_were_trained(runs):
    """Otherwise equal weights would say nothing."""
    from transformers import AutoModelForImageClassification, set_seed

    set_seed(0)
    fresh = AutoModelForImageClassification.from_config(runs.plain.model.config).state_dict()
    assert all(not torch.equal(value, fresh[name]) for name, value in runs.plain.weights.items())


@pytest.mark.parametrize("way", ["line", "callback"])
def test_what_was_saved_needs_no_bwsk_fx(runs, way, tmp_path):
    found = getattr(runs, way)
    pixels = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.save(pixels, tmp_path / "pixels.pt")
    command = [sys.executable, LOADER, tmp_path / "pixels.pt", found.folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = found.model.eval()(pixels).logits
    assert torch.equal(torch.load(f"{found.folder}.logits.pt", weights_only=True), expected)


def test_the_line_alone_trains(tmp_path, runs):
    """As a user writes it, without options."""
    found = train(tmp_path, lambda model: bwsk_fx.apply(model, mode="reversible"))
    assert abs(found.metrics["eval_loss"] - runs.plain.metrics["eval_loss"]) < 1e-3
    assert 0 < found.saved_bytes < 0.8 * runs.plain.saved_bytes
