"""The torch.compile backend under DDP, which Dynamo cuts where DDP's buckets of gradients end.

Run by torchrun, this file is the worker: it takes steps with DDP alone and compiled, and writes down how they differ.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

EXACT = {"budget": 0.2, "compiler": "eager", "faith": "exact"}
# Options, what `torch._dynamo.config.optimize_ddp` is, and the bytes of a bucket.
RUNS = {
    "buckets": (EXACT, True, 10_000),
    # One ends between the projections of a block's queries and keys and that of its values.
    "shared": (EXACT, True, 8192),
    "whole": (EXACT, False, 10_000),
    "generated": ({"budget": 0.2}, True, 10_000),
}


def _step(run: nn.Module, model: nn.Module) -> dict[str, torch.Tensor]:
    from steps import backward, batch

    model.zero_grad()
    rank = dist.get_rank()
    # Masks have to be each process's own for their places in the generators to matter.
    torch.manual_seed(rank)
    share = {name: tensor.chunk(2)[rank] for name, tensor in batch(0, torch.float32).items()}
    loss = backward(run, share).detach()
    return {"loss": loss} | {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def _steps(bucket: int, **keywords: Any) -> list[dict[str, torch.Tensor]]:
    """Take two steps: DDP makes up its buckets anew after the first. Without a backend, nothing is compiled."""
    from steps import vit

    # Left open, transformers' loss fills the type in on the first step, and Dynamo compiles the second one anew.
    settled = {"hidden_dropout_prob": 0.1, "problem_type": "single_label_classification"}
    model = vit(torch.float32, **settled)
    replica = DistributedDataParallel(model, bucket_cap_mb=bucket / 2**20)
    torch._dynamo.reset()
    run = torch.compile(replica, **keywords) if keywords else replica
    return [_step(run, model) for _ in range(2)]


def _figures(options: dict[str, Any], cut: bool, bucket: int) -> dict[str, Any]:
    import bwsk_fx

    # Dynamo and DDP let the first bucket be a MiB otherwise, which is the whole model.
    dist._DEFAULT_FIRST_BUCKET_BYTES = min(bucket, 4096)
    with torch._dynamo.config.patch(optimize_ddp=cut):
        plain, pieces = _steps(bucket), _steps(bucket, backend="aot_eager")
        found = _steps(bucket, backend="bwsk_fx", options=options)
    reports = bwsk_fx.compile.reports()
    return {
        "from_plain": _differences(found, plain),
        "from_pieces": _differences(found, pieces),
        "parameters": sum(name != "loss" for name in plain[0]),
        "parameters_in_graphs": [_parameters(report.graph) for report in reports],
        "bytes": [(report.plan.kept_bytes, report.plan.conventional_bytes) for report in reports if report.plan],
        "asked": [[getattr(report.options, name) for name in EXACT] for report in reports],
    }


def _differences(found: list[dict[str, torch.Tensor]], expected: list[dict[str, torch.Tensor]]) -> list[float]:
    """Return the largest of each step; zero where all bits are the same."""
    return [
        max(float((one[name] - other[name]).abs().max()) for name in other)
        for one, other in zip(found, expected, strict=True)
    ]


def _parameters(graph: torch.fx.GraphModule) -> int:
    values = [node.meta["example_value"] for node in graph.graph.find_nodes(op="placeholder")]
    return sum(isinstance(value, nn.Parameter) for value in values)


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    figures = _figures(*RUNS[sys.argv[2]])
    (Path(sys.argv[1]) / f"{dist.get_rank()}.json").write_text(json.dumps(figures))
    dist.destroy_process_group()


def _run(folder: Path, name: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", __file__]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*command, str(folder), name], env=environment, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def _assert_cut_at_buckets(figures: dict[str, Any]) -> None:
    parameters = figures["parameters_in_graphs"]
    assert len(parameters) == len(figures["bytes"]) > 4
    assert min(parameters) > 0 and sum(parameters) == figures["parameters"]


def _kept(figures: dict[str, Any]) -> float:
    kept, conventional = map(sum, zip(*figures["bytes"], strict=True))
    return kept / conventional


def test_each_bucket_has_a_plan_and_gradients_have_the_bits_of_plain_ddp(tmp_path):
    for figures in _run(tmp_path, "buckets"):
        assert figures["from_plain"] == [0, 0]
        _assert_cut_at_buckets(figures)
        assert figures["asked"] == [[*EXACT.values()]] * len(figures["bytes"])
        assert _kept(figures) < 0.5


@pytest.mark.slow
def test_a_bucket_that_ends_among_readers_adds_gradients_in_aot_autograds_order(tmp_path):
    for figures in _run(tmp_path, "shared"):
        assert figures["from_pieces"] == [0, 0]
        assert all(0 < difference < 1e-6 for difference in figures["from_plain"])
        _assert_cut_at_buckets(figures)


@pytest.mark.slow
def test_without_buckets_there_is_one_plan(tmp_path):
    for figures in _run(tmp_path, "whole"):
        assert figures["from_plain"] == [0, 0]
        assert figures["parameters_in_graphs"] == [figures["parameters"]]
        # Nothing has to be kept because it goes from one graph into the next.
        assert _kept(figures) < 0.2


@pytest.mark.slow
def test_generated_code_has_the_gradients_of_plain_ddp(tmp_path):
    for figures in _run(tmp_path, "generated"):
        _assert_cut_at_buckets(figures)
        assert all(0 < difference < 1e-5 for difference in figures["from_plain"])
        assert figures["asked"] == [[0.2, "inductor", "rounded"]] * len(figures["bytes"])


if __name__ == "__main__":
    main()
