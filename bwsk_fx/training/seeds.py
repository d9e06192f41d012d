"""Several seeds in one output folder: each an ordinary run in its own folder, and a comparison of them at the root."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

from bwsk_fx.errors import TrainingError
from bwsk_fx.training import card, plots, run_file
from bwsk_fx.training.comparison import METRICS, Comparison, Results, compare
from bwsk_fx.training.config import Precision, RunConfig
from bwsk_fx.training.output import (
    ALL_VARIANTS,
    SUMMARY_FILE,
    Output,
    require_same_configuration,
    seed_folder,
    without_curves,
    write_json,
)
from bwsk_fx.training.progress import Bar, Reporter

COMPARISON_FILE = "comparison.json"
PLOT = "comparison"
CARD = "README.md"


@dataclass(frozen=True)
class SeedReporter:
    """Passes on what the run of one seed reports, under the name of its folder."""

    reporter: Reporter
    folder: str

    def bar(self, label: str) -> Bar:
        """A bar for one training."""
        return self.reporter.bar(f"{self.folder}/{label}")

    def working(self, label: str) -> AbstractContextManager[None]:
        """Around a stage without steps."""
        return self.reporter.working(f"{self.folder}: {label}")


def each_seed(config: RunConfig) -> Iterator[tuple[str, RunConfig]]:
    """The folder's name and the ordinary run of every seed that a configuration asks for."""
    for seed in range(config.seed, config.seed + config.seeds):
        folder = seed_folder(seed)
        yield folder, replace(config, output=config.output / folder, seed=seed, seeds=1)


def require_same_configurations(output: Output, config: RunConfig, precision: Precision) -> None:
    """Raises a TrainingError when a seed in the folder comes from another configuration, or from somebody else.

    Seeds that this run does not train count too, since they would enter the comparison.
    """
    requested = {one.seed for _, one in each_seed(config)}
    for seed, folder in output.seeds().items():
        folder.require_usable()
        own = replace(config, output=folder.root, seed=seed)
        identities = {variant.folder: own.identity(variant, precision) for variant in ALL_VARIANTS}
        # A run without experiments replaces nothing.
        require_same_configuration(folder, own if seed in requested else replace(own, experiments=()), identities)


def forget_comparison(output: Output) -> None:
    """Removes what speaks of seeds that are about to be trained again."""
    for name in (SUMMARY_FILE, COMPARISON_FILE, CARD, run_file.FILE, *(f"{PLOT}.{suffix}" for suffix in plots.FORMATS)):
        (output.root / name).unlink(missing_ok=True)


def write_comparison(output: Output, config: RunConfig) -> Comparison:
    """Compares the seeds in a folder, and writes the files that speak of all of them.

    Args:
        output: the folder.
        config: the run that trained them last.

    Raises:
        TrainingError: no seed holds every variant, so that nothing can be compared.
    """
    runs = {seed: folder.results() for seed, folder in output.seeds().items()}
    runs = {seed: results for seed, results in runs.items() if results}
    comparison = compare(runs)
    if not comparison.seeds:
        raise TrainingError(
            f"no seed in '{output.root}' holds every variant that another one holds; "
            "train the missing --modes and --experiments, or choose another --output"
        )
    complete = {seed: runs[seed] for seed in comparison.seeds}
    output.write(COMPARISON_FILE, lambda path: write_json(path, comparison.to_json()))
    output.write(SUMMARY_FILE, lambda path: write_json(path, _summary(complete, comparison)))
    output.write(run_file.FILE, lambda path: run_file.write(path, config.options()))
    for name, fill in plots.pictures({PLOT: plots.draw_comparison(comparison)}):
        output.write(name, fill)
    text = card.render_seeds(complete, comparison)
    output.write(CARD, lambda path: path.write_text(text, encoding="utf-8"))
    return comparison


def _summary(runs: Mapping[int, Results], comparison: Comparison) -> dict[str, Any]:
    """All results in one object: over the seeds, and of each seed, without the curves."""
    first = next(iter(runs.values()))
    over_seeds = {folder: _figures(comparison, result) for folder, result in first.items()}
    each = {
        seed_folder(seed): {folder: without_curves(result) for folder, result in results.items()}
        for seed, results in runs.items()
    }
    return {"generator": "bwsk-fx", "seeds": list(runs), "variants": over_seeds, "runs": each}


def _figures(comparison: Comparison, result: Mapping[str, Any]) -> dict[str, Any]:
    metrics = comparison.experiments[result["experiment"]]
    spreads = {metric.name: metrics[metric.name].modes[result["mode"]] for metric in METRICS}
    return {
        name: {"mean": spread.mean, "standard_deviation": spread.standard_deviation} for name, spread in spreads.items()
    }
