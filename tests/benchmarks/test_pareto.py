"""The search for the largest batch, the statistics, and one small run from end to end."""

import json
import sys

import pareto
import pytest
from pareto import fitted_batch, largest_batch, median_and_spread

LIMIT = 1000.0


@pytest.mark.parametrize("first", [1, 7, 64])
@pytest.mark.parametrize(("fixed", "per_image"), [(100.0, 3.0), (0.0, 1000.0), (990.0, 0.05)])
def test_the_largest_batch_of_a_line_takes_few_probes(first, fixed, per_image):
    probes = []

    def peak_of(batch: int) -> float:
        probes.append(batch)
        return fixed + per_image * batch

    assert largest_batch(peak_of, LIMIT, first) == int((LIMIT - fixed) / per_image)
    assert len(probes) <= 14


def test_the_largest_batch_with_steps_and_without_memory():
    assert largest_batch(lambda batch: float("inf") if batch > 37 else batch, LIMIT, 16) == 37
    assert largest_batch(lambda batch: 512 * (batch // 10), LIMIT, 4) == 19
    assert largest_batch(lambda batch: float("inf"), LIMIT, 4) == 0


def test_a_fitted_batch():
    # 10 + 3 per image.
    assert fitted_batch(4, 22.0, 34.0, LIMIT) == 330
    assert fitted_batch(4, 22.0, 34.0, 9.0) == 0


def test_median_and_spread():
    assert median_and_spread([4.0, 1.0, 2.0, 3.0, 10.0]) == (3.0, 2.0)
    assert median_and_spread([]) == (None, None)


@pytest.fixture
def run(tmp_path):
    def run(*arguments: str, device: str = "cpu") -> dict:
        small = ["--layers", "1", "--hidden", "64", "--batch", "2", "--image", "32", "--rounds", "2"]
        pareto.main([*small, "--device", device, "--output", str(tmp_path), *arguments])
        assert sorted(path.name for path in tmp_path.iterdir()) == [f"pareto-{device}.json", f"pareto-{device}.png"]
        assert (tmp_path / f"pareto-{device}.png").stat().st_size > 10_000
        return json.loads((tmp_path / f"pareto-{device}.json").read_text())

    return run


@pytest.mark.slow
def test_a_small_run(run):
    only = ["checkpoint per block", "bwsk-fx", "memory sharing"]
    result = run("--budgets", "0", "inf", "--max-batch", "--only", *only)
    rows = {row.pop("variant"): row for row in result["rows"]}
    assert list(rows) == [
        "eager",
        "bwsk-fx, 0",
        "bwsk-fx, floor",
        "checkpoint per block",
        "memory sharing, MS-LN",
        "memory sharing, MS-LN + ReGELU2",
    ]
    assert result["settings"]["budgets"] == ["0", "floor"]
    assert (rows["eager"]["ratio"], rows["eager"]["error"]) == (1.0, 1.0)
    assert rows["checkpoint per block"]["error"] == 1.0
    assert rows["bwsk-fx, 0"]["error"] < 1.5 < rows["memory sharing, MS-LN + ReGELU2"]["error"]
    for name, row in rows.items():
        assert row["note"].startswith("its elementwise formulas are not fused") == (row["method"] == "memory sharing")
        assert all(row[column] > 0 for column in ("ms", "ratio", "kept MiB", "units", "peak MiB", "max batch"))
        assert name == "eager" or row["kept MiB"] < rows["eager"]["kept MiB"]


@pytest.mark.gpu
def test_a_small_run_on_cuda(run):
    only = ["checkpoint per block", "selective checkpoint", "torch.compile", "memory sharing"]
    result = run("--precision", "fp16", "--max-batch", "--memory", "0.05", "--only", *only, device="cuda")
    rows = {row.pop("variant"): row for row in result["rows"]}
    assert len(rows) == 9
    for row in rows.values():
        assert row["note"] == ""
        assert all(row[column] > 0 for column in ("ms", "ratio", "kept MiB", "units", "peak MiB", "error", "max batch"))
    assert rows["checkpoint per block"]["max batch"] > rows["eager"]["max batch"]


def test_what_cannot_compile_is_a_row_with_a_reason(run, monkeypatch):
    monkeypatch.setattr(pareto, "inductor_problem", lambda device: f"no compiler for {device}")
    result = run("--only", "torch.compile")
    eager, *others = result["rows"]
    assert eager["ms"] > 0
    assert [row["setting"] for row in others] == ["1", "0.5", "0.25", "0"]
    for row in others:
        assert row["note"] == "no compiler for cpu"
        figures = ("ms", "ms IQR", "ratio", "ratio IQR", "kept MiB", "units", "peak MiB", "error", "max batch")
        assert [row[column] for column in figures] == [None] * len(figures)


def test_options_follow_the_device(monkeypatch):
    assert vars(pareto.parsed(["--device", "cpu"])).items() >= vars(pareto.ON_CPU).items()
    assert vars(pareto.parsed(["--device", "cuda"])).items() >= vars(pareto.ON_CUDA).items()
    assert pareto.parsed(["--device", "cuda", "--batch", "3"]).batch == 3
    monkeypatch.setattr(sys, "argv", ["pareto.py", "--device", "cpu"])
    assert pareto.parsed(None).only == list(pareto.methods())
