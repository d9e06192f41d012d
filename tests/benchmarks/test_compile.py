"""One small run from end to end."""

import json

import compile
import pytest


@pytest.mark.slow
def test_a_small_run(tmp_path):
    small = ["--layers", "1", "--hidden", "64", "--batch", "4", "--image", "32", "--rounds", "2", "--budgets", "0.1"]
    compile.main([*small, "--device", "cpu", "--output", str(tmp_path)])
    result = json.loads((tmp_path / "compile-cpu.json").read_text())
    rows = {row["variant"]: row for row in result["rows"]}
    assert list(rows) == [
        "inductor, 1",
        "inductor, 0.5",
        "inductor, 0.25",
        "inductor, 0",
        "bwsk_fx, 0.1",
        "Partitioner, 0.1",
    ]
    assert all(row["graphs"] == 1 for row in rows.values())
    assert rows["inductor, 1"]["kept"] == rows["inductor, 1"]["step"] == 1.0
    assert all(rows[own]["kept"] < 0.5 for own in ("bwsk_fx, 0.1", "Partitioner, 0.1"))
    assert all(row["error"] < 1.5 for row in rows.values())
