"""One tiny run of all six variants, shared by the tests that look at what it left."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from bwsk_fx.training.config import RunConfig
from bwsk_fx.training.experiments import RunReport, train
from bwsk_fx.training.quiet import quiet


def tiny(output: Path, **changes) -> RunConfig:
    """A configuration that trains a variant in about a second."""
    return RunConfig(**({"output": output, "epochs": 1, "train_limit": 48, "batch_size": 8} | changes))


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    # Both are read at import, so the environment alone would come too late.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


@pytest.fixture(scope="session")
def six_variants(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunReport]:
    with quiet():
        yield train(tiny(tmp_path_factory.mktemp("six") / "out"))


@pytest.fixture
def make_tiny():
    return tiny
