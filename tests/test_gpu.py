"""The same promises on a CUDA device; run with `pytest -m gpu`."""

import copy

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

import bwsk_fx
from bwsk_fx.measure import measure, saved_for_backward

pytestmark = pytest.mark.gpu
BATCH = 16


def _vit(dropout: float = 0.0) -> ViTForImageClassification:
    torch.manual_seed(0)
    config = ViTConfig(
        num_hidden_layers=4,
        hidden_size=192,
        num_attention_heads=3,
        intermediate_size=768,
        num_labels=10,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return ViTForImageClassification(config).cuda().train()


def _images() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {"pixel_values": torch.randn(BATCH, 3, 224, 224).cuda(), "labels": torch.arange(BATCH).cuda() % 10}


def _gradients(model, inputs, dtype: torch.dtype | None) -> list[torch.Tensor]:
    torch.manual_seed(2)
    model.zero_grad()
    with torch.autocast("cuda", dtype=dtype or torch.float16, enabled=dtype is not None):
        loss = model(**inputs).loss
    # As a GradScaler does: half-precision gradients of a mean are too small otherwise.
    (loss * 1024).backward()
    return [parameter.grad for parameter in model.parameters()]


def _error(gradients, reference) -> float:
    squares = sum((a.double() - b.double()).pow(2).sum() for a, b in zip(gradients, reference, strict=True))
    return squares.sqrt().item()


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
def test_exact_gradients_have_the_bits_of_eager(dropout, dtype):
    eager, inputs = _vit(dropout), _images()
    exact = bwsk_fx.apply(copy.deepcopy(eager), faith="exact", budget=0.25)
    expected, found = _gradients(eager, inputs, dtype), _gradients(exact, inputs, dtype)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("budget", [0.0, 0.25])
def test_rounded_gradients_are_as_good_as_eagers(dtype, budget):
    eager, inputs = _vit(), _images()
    rounded = bwsk_fx.apply(copy.deepcopy(eager), budget=budget)
    doubled = {"pixel_values": inputs["pixel_values"].double(), "labels": inputs["labels"]}
    reference = _gradients(copy.deepcopy(eager).double(), doubled, None)
    eagers, ours = (_error(_gradients(model, inputs, dtype), reference) for model in (eager, rounded))
    assert ours <= 1.5 * eagers


def test_memory_of_the_allocator_falls():
    eager, inputs = _vit(), _images()
    reversible = bwsk_fx.apply(copy.deepcopy(eager))
    before, after = (measure(model, inputs, torch.float16) for model in (eager, reversible))
    assert after.saved_bytes < 0.55 * before.saved_bytes
    assert after.peak_bytes < 0.75 * before.peak_bytes


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
def test_compiled_gradients_are_as_good_as_inductors_and_less_is_kept(dtype):
    eager, inputs = _vit(), _images()
    reference = _gradients(
        copy.deepcopy(eager).double(),
        {"pixel_values": inputs["pixel_values"].double(), "labels": inputs["labels"]},
        None,
    )
    errors, kept = {}, {}
    for backend in ("inductor", "bwsk_fx"):
        model = copy.deepcopy(eager)
        model.compile(backend=backend, fullgraph=True)
        errors[backend] = _error(_gradients(model, inputs, dtype), reference)
        kept[backend] = saved_for_backward(model, inputs, dtype)
    assert errors["bwsk_fx"] <= 1.5 * errors["inductor"]
    assert kept["bwsk_fx"] <= 0.6 * kept["inductor"]
