"""The model card of an output folder: metadata that the Hub reads, and the comparison table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from bwsk_fx.training.config import DIGITS, published

Results = Mapping[str, Mapping[str, Any]]

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


def rows(results: Results) -> list[tuple[str, ...]]:
    """The comparison table, one row per variant under `HEADINGS`."""
    return [_row(folder, result) for folder, result in results.items()]


def render(results: Results) -> str:
    """The README.md of an output folder, YAML front matter included."""
    environment = Environment(
        loader=PackageLoader("bwsk_fx.training", "."),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    first = next(iter(results.values()))
    return environment.get_template("model_card.md.jinja").render(
        metadata=_metadata(results, first).to_yaml(),
        slug=first["model_slug"],
        data=first["configuration"]["data"],
        small=first["configuration"]["data"] == DIGITS,
        seed=first["configuration"]["seed"],
        headings=HEADINGS,
        rows=rows(results),
        results=results,
        recipes=_recipes(results),
        environment=first["environment"],
        precision=first["configuration"]["precision"],
        source=published()["source"],
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


def _metadata(results: Results, first: Mapping[str, Any]) -> ModelCardData:
    data = first["configuration"]["data"]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=["bwsk-fx", "image-classification", "reversible", "torch.fx"],
        metrics=["accuracy"],
        model_name=f"bwsk-{first['model_slug'].split('/')[-1]}",
        eval_results=[_evaluation(folder, result, data) for folder, result in results.items()],
    )


def _evaluation(folder: str, result: Mapping[str, Any], data: str) -> EvalResult:
    return EvalResult(
        task_type="image-classification",
        dataset_type=data,
        dataset_name="scikit-learn digits" if data == DIGITS else data,
        dataset_split="test",
        metric_type="accuracy",
        metric_name=f"Accuracy ({folder})",
        metric_value=round(result["test_metric"], 6),
    )
