"""Files with anything in them give one of the library's errors, and what they name is written whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from torch import nn
from typer.testing import CliRunner

import bwsk_fx
from bwsk_fx.cli import app
from bwsk_fx.errors import BwskError, PlanError
from bwsk_fx.inspection import exported
from bwsk_fx.training import models

MANY = int(os.environ.get("BWSK_RANDOM_FILES", "2000"))
SIZES = [pytest.param(20, id="few"), pytest.param(MANY, id="many", marks=[pytest.mark.slow, pytest.mark.timeout(0)])]
X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


def _trying(count: int, strategy: st.SearchStrategy):
    def decorate(trial):
        checks = list(HealthCheck)
        limits = settings(max_examples=count, deadline=None, database=None, suppress_health_check=checks)
        return seed(0)(limits(given(strategy)(trial)))

    return decorate


def _places(value: object, at: tuple = ()) -> list[tuple]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, item in items for place in _places(item, (*at, key)))]


def _with(value: object, at: tuple, new: object) -> object:
    if not at:
        return new
    copied = value.copy()
    copied[at[0]] = _with(value[at[0]], at[1:], new)
    return copied


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.LayerNorm(4), nn.Linear(4, 2))


@pytest.fixture(scope="module")
def plan(model, tmp_path_factory) -> str:
    fused = bwsk_fx.fuse_regions(bwsk_fx.capture(model, X), granularity="whole")
    fused(X).sum().backward()
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    bwsk_fx.save_plan(fused, path)
    return path.read_text()


@pytest.mark.parametrize("count", SIZES)
def test_a_changed_plan_is_refused_or_right(model, plan, tmp_path, count):
    content, expected = json.loads(plan), _gradients(model)
    graph = bwsk_fx.capture(model, X)
    places = _places(content)
    numbers = iter(range(10**9))

    @_trying(count, st.tuples(st.sampled_from(places), JSON | st.sampled_from(["keep", "recompute", "invert"])))
    def trial(change):
        path = tmp_path / f"{next(numbers)}.json"
        path.write_text(json.dumps(_with(content, *change)))
        _require_refused_or_right(graph, model, path, expected)

    trial()


@pytest.mark.parametrize("count", SIZES)
def test_a_cut_plan_is_refused(model, plan, tmp_path, count):
    graph, numbers = bwsk_fx.capture(model, X), iter(range(10**9))

    @_trying(count, st.integers(0, len(plan) - 3) | st.binary(max_size=30))
    def trial(rest):
        path = tmp_path / f"{next(numbers)}.json"
        path.write_bytes(rest if isinstance(rest, bytes) else plan[:rest].encode())
        with pytest.raises(PlanError, match="no file of plans"):
            bwsk_fx.fuse_regions(graph, granularity="whole", plan=str(path))(X)

    trial()


def _require_refused_or_right(graph, model, path, expected) -> None:
    try:
        model.zero_grad()
        bwsk_fx.fuse_regions(graph, granularity="whole", plan=str(path))(X).sum().backward()
    except PlanError:
        return
    assert all(torch.allclose(one.grad, two, atol=1e-5) for one, two in zip(model.parameters(), expected, strict=True))


def _gradients(model: nn.Module) -> list[torch.Tensor]:
    model.zero_grad()
    model(X).sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("count", SIZES)
def test_a_changed_configuration_is_refused_or_read(tmp_path, count):
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 8}
    content = {"model_type": "vit", "architectures": ["ViTModel"], "image_size": 8, "patch_size": 4} | sizes
    values = JSON.filter(lambda value: not isinstance(value, (int, float)) or abs(value) < 50)

    @_trying(count, st.tuples(st.sampled_from(_places(content)), values))
    def trial(change):
        Path(tmp_path, "config.json").write_text(json.dumps(_with(content, *change)))
        try:
            models.from_config(str(tmp_path))
        except BwskError as error:
            assert len(str(error)) > 20

    trial()


@pytest.mark.parametrize("count", SIZES)
def test_run_files_are_refused_or_read(tmp_path, count):
    names = st.sampled_from(["epochs", "budget", "seed", "learning_rate", "trainer", "mode", "data", "warmup", "x"])
    texts = st.builds(lambda content: json.dumps(content), st.dictionaries(names, JSON, max_size=3)) | st.text()

    @_trying(count, texts)
    def trial(text):
        path = Path(tmp_path, "run.yaml")
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        result = CliRunner().invoke(app, ["train", "--config", str(path), "--data", "/no/such"])
        assert isinstance(result.exception, SystemExit), repr(result.exception)
        assert result.exit_code in (1, 2) and "Traceback" not in result.output

    trial()


@pytest.mark.parametrize("count", SIZES)
def test_a_cut_program_is_refused(tmp_path, count):
    path = tmp_path / "whole.pt2"
    torch.export.save(torch.export.export(nn.Linear(4, 4), (X,)), path)
    whole = path.read_bytes()

    @_trying(count, st.integers(0, len(whole) - 1) | st.binary(max_size=30))
    def trial(rest):
        path.write_bytes(rest if isinstance(rest, bytes) else whole[:rest])
        with pytest.raises(BwskError, match=r"cannot be loaded by torch\.export\.load"):
            exported.load(str(path))

    trial()
