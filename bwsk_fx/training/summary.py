"""The files of an output folder that speak of all of its variants."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from bwsk_fx.errors import TrainingError
from bwsk_fx.training import card, plots, run_file
from bwsk_fx.training.config import RunConfig
from bwsk_fx.training.output import SUMMARY_FILE, Output, without_curves, write_json
from bwsk_fx.training.results import VariantResult


def summarize(output: Output, config: RunConfig) -> dict[str, dict[str, Any]]:
    """Writes the files that speak of all finished variants, and gives their results."""
    results = output.results()
    figures = {folder: without_curves(result) for folder, result in results.items()}
    output.write(SUMMARY_FILE, lambda path: write_json(path, {"generator": "bwsk-fx", "variants": figures}))
    output.write(run_file.FILE, lambda path: run_file.write(path, config.options()))
    for name, fill in plots.pictures({name: draw(results) for name, draw in plots.PLOTS.items()}):
        output.write(name, fill)
    output.write("README.md", lambda path: path.write_text(card.render(results), encoding="utf-8"))
    return results


def require_every_field(output: Output) -> None:
    """Raises a TrainingError for results that cannot be summarized, since an earlier version wrote less down."""
    wanted = {field.name for field in fields(VariantResult)}
    for folder, result in output.results().items():
        if lacking := sorted(wanted - result.keys()):
            raise TrainingError(
                f"'{output.root / folder}' is of an earlier version of bwsk-fx, without {', '.join(lacking)}; "
                "remove it or choose another --output"
            )
