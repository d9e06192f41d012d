"""The model card of an output folder: metadata that the Hub reads, and the comparison table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from bwsk_fx.training.comparison import CONFIDENCE, METRICS, Comparison, Metric, Paired, Results, Spread
from bwsk_fx.training.config import DIGITS, Experiment, Mode, Variant, published

HEADINGS = (
    "variant",
    "test",
    "val",
    "loss",
    "epochs",
    "time (s)",
    "step (ms)",
    "kept (MiB)",
    "peak (MiB)",
    "S/K% published",
    "S/K% sound",
)
# What fits into 80 columns and still compares accuracy, loss, time, memory and ratios.
ESSENTIAL = ("variant", "test", "loss", "time (s)", "kept (MiB)", "peak (MiB)", "S/K% published", "S/K% sound")

SEED_HEADINGS = ("variant", *(metric.heading for metric in METRICS))
PAIRED_HEADINGS = ("variant", "metric", "difference", f"{CONFIDENCE:.0%} interval", "t", "p", "d_z")


def rows(results: Results) -> list[tuple[str, ...]]:
    """The comparison table, one row per variant under `HEADINGS`."""
    return [_row(folder, result) for folder, result in results.items()]


def seed_rows(comparison: Comparison) -> list[tuple[str, ...]]:
    """Means and standard deviations over seeds, one row per variant under `SEED_HEADINGS`."""
    table = []
    for experiment, metrics in comparison.experiments.items():
        for mode in metrics[METRICS[0].name].modes:
            cells = (_mean(metric, metrics[metric.name].modes[mode]) for metric in METRICS)
            table.append((_folder(experiment, mode), *cells))
    return table


def paired_rows(comparison: Comparison) -> list[tuple[str, ...]]:
    """Every variant against the conventional one, one row per metric under `PAIRED_HEADINGS`."""
    return [
        (_folder(experiment, mode), metric.heading, *_paired(metric, metrics[metric.name].against_conventional[mode]))
        for experiment, metrics in comparison.experiments.items()
        for mode in metrics[METRICS[0].name].against_conventional
        for metric in METRICS
    ]


def render(results: Results) -> str:
    """The README.md of an output folder, YAML front matter included."""
    evaluations = [_evaluation(folder, result, result["test_metric"]) for folder, result in results.items()]
    return _rendered(results, evaluations, headings=HEADINGS, rows=rows(results), comparison=None)


def render_seeds(runs: Mapping[int, Results], comparison: Comparison) -> str:
    """The README.md of an output folder with several seeds, YAML front matter included.

    Args:
        runs: the results of every seed of the comparison.
        comparison: of these seeds.
    """
    results = next(iter(runs.values()))
    return _rendered(
        results,
        _mean_evaluations(results, comparison),
        headings=SEED_HEADINGS,
        rows=seed_rows(comparison),
        comparison=comparison,
        paired_headings=PAIRED_HEADINGS,
        paired_rows=paired_rows(comparison),
        confidence=f"{CONFIDENCE:.0%}",
    )


def _rendered(results: Results, evaluations: list[EvalResult], **figures: Any) -> str:
    environment = Environment(
        loader=PackageLoader("bwsk_fx.training", "."),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    first = next(iter(results.values()))
    return environment.get_template("model_card.md.jinja").render(
        metadata=_metadata(first, evaluations).to_yaml(),
        slug=first["model_slug"],
        data=first["configuration"]["data"],
        small=first["configuration"]["data"] == DIGITS,
        seed=first["configuration"]["seed"],
        results=results,
        recipes=_recipes(results),
        environment=first["environment"],
        precision=first["configuration"]["precision"],
        source=published()["source"],
        **figures,
    )


def _row(folder: str, result: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        folder,
        f"{result['test_metric']:.2%}",
        f"{result['best_val_metric']:.2%}",
        f"{result['final_train_loss']:.4f}",
        f"{result['epochs_completed']:g}",
        f"{result['wall_time_s']:.1f}",
        f"{1000 * result['step_time_s']:.1f}",
        f"{result['saved_for_backward_bytes'] / 2**20:.2f}",
        f"{result['peak_memory_mb']:.2f}",
        _ratios(result["parallelism_ratio"], result["erasure_budget"]),
        _ratios(result["sound_s_ratio"], result["sound_k_ratio"]),
    )


def _ratios(s: float, k: float) -> str:
    return f"{100 * s:.1f}/{100 * k:.1f}" if s or k else "-"


def _recipes(results: Results) -> dict[str, Mapping[str, Any]]:
    return {result["experiment"]: result["configuration"] for result in results.values()}


def _folder(experiment: str, mode: str) -> str:
    return Variant(Experiment(experiment), Mode(mode.removeprefix("bwsk_"))).folder


def _mean(metric: Metric, spread: Spread) -> str:
    if spread.mean is None:
        return str(spread.undefined)
    deviation = spread.standard_deviation
    return metric.shown(spread.mean) + ("" if deviation is None else f" ± {metric.shown(deviation)}")


def _paired(metric: Metric, paired: Paired) -> tuple[str, ...]:
    """The cells behind variant and metric; what is undefined says why once, in the place of the interval."""
    difference = "-" if paired.mean_difference is None else metric.shown(paired.mean_difference, "+")
    if paired.confidence_interval is None or paired.p is None:
        return difference, str(paired.undefined), "-", "-", "-"
    low, high = (metric.shown(bound, "+") for bound in paired.confidence_interval)
    p = f"{paired.p:.3f}" if paired.p >= 0.001 else "< 0.001"
    return difference, f"{low} to {high}", f"{paired.t:.2f}", p, f"{paired.d_z:.2f}"


def _metadata(first: Mapping[str, Any], evaluations: list[EvalResult]) -> ModelCardData:
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=["bwsk-fx", "image-classification", "reversible", "torch.fx"],
        metrics=["accuracy"],
        model_name=f"bwsk-{first['model_slug'].split('/')[-1]}",
        eval_results=evaluations,
    )


def _mean_evaluations(results: Results, comparison: Comparison) -> list[EvalResult]:
    evaluations = []
    for folder, result in results.items():
        spread = comparison.experiments[result["experiment"]]["test_accuracy"].modes[result["mode"]]
        assert spread.mean is not None  # an accuracy is a finite number
        evaluation = _evaluation(folder, result, spread.mean)
        evaluation.metric_name = f"Accuracy ({folder}), mean of {_seeds(len(comparison.seeds))}"
        evaluation.metric_args = {"seeds": list(comparison.seeds)}
        if spread.standard_deviation is not None:
            evaluation.metric_args["standard_deviation"] = round(spread.standard_deviation, 6)
        evaluations.append(evaluation)
    return evaluations


def _evaluation(folder: str, result: Mapping[str, Any], accuracy: float) -> EvalResult:
    data = result["configuration"]["data"]
    return EvalResult(
        task_type="image-classification",
        dataset_type=data,
        dataset_name="scikit-learn digits" if data == DIGITS else data,
        dataset_split="test",
        metric_type="accuracy",
        metric_name=f"Accuracy ({folder})",
        metric_value=round(accuracy, 6),
    )


def _seeds(number: int) -> str:
    return f"{number} seed{'' if number == 1 else 's'}"
