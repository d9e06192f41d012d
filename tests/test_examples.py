"""The notebooks in `examples/` run from top to bottom, and are kept without outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import nbformat
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
NOTEBOOKS = ("inspect_vit", "train_with_a_budget")


def _read(name: str) -> Any:
    notebook = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    return notebook


def _run(name: str) -> None:
    """Run the code cells as one module; a kernel would add processes and seconds, and the code uses none of it."""
    names: dict[str, Any] = {"__name__": "notebook"}
    for cell in _read(name).cells:
        if cell.cell_type == "code":
            exec(compile(cell.source, f"{name}.ipynb, {cell.id}", "exec", dont_inherit=True), names)


@pytest.fixture(autouse=True)
def no_windows(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    plt.switch_backend("agg")
    yield
    plt.close("all")


def test_every_notebook_is_run():
    assert {path.stem for path in EXAMPLES.glob("*.ipynb")} == set(NOTEBOOKS)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_are_kept_without_outputs(name):
    cells = [cell for cell in _read(name).cells if cell.cell_type == "code"]
    assert not [cell.id for cell in cells if cell.outputs or cell.execution_count]


def test_a_vit_is_inspected():
    _run("inspect_vit")


def test_memory_is_compared_over_budgets():
    _run("train_with_a_budget")
