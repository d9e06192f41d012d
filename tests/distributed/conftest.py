"""Runs `worker.py` under torchrun, once for each number of processes, and hands its figures to the tests."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

_WORKER = Path(__file__).with_name("worker.py")
Figures = Callable[[str], dict[str, Any]]


def _run(folder: Path, processes: int, device: str, scenarios: tuple[str, ...]) -> Figures:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "BWSK_FX_TEST_DEVICE": device, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, str(_WORKER), str(folder), *scenarios], env=environment, capture_output=True, text=True, timeout=540
    )

    def figures(scenario: str) -> dict[str, Any]:
        path = folder / f"{scenario}.json"
        assert path.exists(), f"{scenario} left nothing behind:\n{done.stderr[-4000:]}"
        found = json.loads(path.read_text())
        assert "error" not in found, found["error"]
        return found

    return figures


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Figures:
    return _run(tmp_path_factory.mktemp("two"), 2, "cpu", ())


@pytest.fixture(scope="session")
def more_on_two_processes(tmp_path_factory: pytest.TempPathFactory) -> Figures:
    return _run(tmp_path_factory.mktemp("more"), 2, "cpu", ("more",))


@pytest.fixture(scope="session")
def four_processes(tmp_path_factory: pytest.TempPathFactory) -> Figures:
    return _run(tmp_path_factory.mktemp("four"), 4, "cpu", ())


@pytest.fixture(scope="session")
def all_gpus(tmp_path_factory: pytest.TempPathFactory) -> Figures:
    import torch

    return _run(tmp_path_factory.mktemp("nccl"), torch.cuda.device_count(), "cuda", ())
