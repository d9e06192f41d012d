"""Runs `worker.py` under torchrun, once for each number of processes, and hands its figures to the tests."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

_WORKER = Path(__file__).with_name("worker.py")
Figures = Callable[[str], dict[str, Any]]


def _run(
    factory: pytest.TempPathFactory, name: str, processes: int, device: str = "cpu", scenarios: tuple[str, ...] = ()
) -> Figures:
    """Run the worker, once for all processes of pytest-xdist."""
    alone = "PYTEST_XDIST_WORKER" not in os.environ
    folder = (factory.getbasetemp() if alone else factory.getbasetemp().parent) / name
    with FileLock(folder.with_suffix(".lock")):
        done = folder / "stderr.txt"
        if not done.exists():
            folder.mkdir()
            done.write_text(_worked(folder, processes, device, scenarios), encoding="utf-8")
    return partial(_figures, folder)


def _worked(folder: Path, processes: int, device: str, scenarios: tuple[str, ...]) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "BWSK_FX_TEST_DEVICE": device, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [*command, str(_WORKER), str(folder), *scenarios], env=environment, capture_output=True, text=True, timeout=540
    ).stderr


def _figures(folder: Path, scenario: str) -> dict[str, Any]:
    path, log = folder / f"{scenario}.json", (folder / "stderr.txt").read_text(encoding="utf-8")
    assert path.exists(), f"{scenario} left nothing behind:\n{log[-4000:]}"
    found = json.loads(path.read_text())
    assert "error" not in found, found["error"]
    return found


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Figures:
    return _run(tmp_path_factory, "two", 2)


@pytest.fixture(scope="session")
def more_on_two_processes(tmp_path_factory: pytest.TempPathFactory) -> Figures:
    return _run(tmp_path_factory, "more", 2, scenarios=("more",))


@pytest.fixture(scope="session")
def four_processes(tmp_path_factory: pytest.TempPathFactory) -> Figures:
    return _run(tmp_path_factory, "four", 4)


@pytest.fixture(scope="session")
def all_gpus(tmp_path_factory: pytest.TempPathFactory) -> Figures:
    import torch

    return _run(tmp_path_factory, "nccl", torch.cuda.device_count(), "cuda")
