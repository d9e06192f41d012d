"""Do the label table and the way of counting reproduce every row of the study, and what does `sound` say of each model?

Every model of the study is built from its configuration at its real size, all but Switch without weights. `modules`
counts the leaf modules of its tree, as the study did, and `calls` the leaf-module calls of the captured graph. `match`
says which of them has the study's totals, number of blocks and counts of the first two blocks. `sound` labels the same
calls, and `operators` are all operators on dynamic tensors that `sound` labels. `seconds` is for capturing the graph
and labelling it under both rulesets. Counts are S / K / GRAY.

    python benchmarks/published_ratios.py
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from common import RESULTS, report
from torch import fx, nn

import bwsk_fx
from bwsk_fx.capture import default_is_leaf
from bwsk_fx.report.comparison import LabelCounts, compare_rulesets
from bwsk_fx.report.modules import summarize_modules
from bwsk_fx.report.summary import Counts, Summary

QUESTION = "published-ratios"
DATA = Path(__file__).parents[1] / "tests" / "data"
# They send each token where its router says, which depends on data.
ROUTED = ("SwitchTransformersTop1Router", "SwitchTransformersExperts")


def main() -> None:
    configs, study = (_models(name) for name in ("study_configs.json", "published_sk_ratios.json"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(configs), default=list(configs))
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result file")
    options = parser.parse_args()
    options.device = "cpu"
    transformers.logging.set_verbosity_error()
    rows = [_row(name, configs[name], study[name]) for name in options.models]
    counts = dict.fromkeys(("study", "modules"), _in_short) | {"match": str}
    counts |= dict.fromkeys(("calls", "sound", "operators"), _in_short)
    report(QUESTION, options, rows, {"variant": str, **counts, "seconds": "{:.1f}".format})


def _models(name: str) -> dict[str, Any]:
    return json.loads((DATA / name).read_text(encoding="utf-8"))["models"]


def _row(name: str, description: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    model = _build(description)
    modules = summarize_modules(model)
    start = time.perf_counter()
    graph = _capture(model)
    comparison = compare_rulesets(graph)
    seconds = time.perf_counter() - start
    return {
        "variant": name,
        "study": [row["s"], row["k"], row["gray"]],
        "modules": _counts(modules),
        "match": _match(row, modules, bwsk_fx.summarize(bwsk_fx.type_nodes(graph, "published"))),
        "calls": _counts(comparison.published),
        "sound": _counts(comparison.sound),
        "operators": _counts(bwsk_fx.summarize(bwsk_fx.type_nodes(graph))),
        "seconds": seconds,
        "disagreements": [asdict(group) for group in comparison.disagreements],
    }


def _match(row: Mapping[str, Any], modules: Summary, calls: Summary) -> str:
    equal = [name for name, ours in (("modules", modules), ("calls", calls)) if _agrees(row, ours)]
    return " and ".join(equal) or "no"


def _agrees(row: Mapping[str, Any], ours: Summary) -> bool:
    blocks = [[block[name] for name in ("s_count", "k_count", "gray_count")] for block in row["blocks"]]
    totals = [row["leaf_modules"], row["s"], row["k"], row["gray"], row["n_blocks"]]
    first = [_counts(block) for block in ours.blocks[: len(blocks)]]
    return [ours.total, *_counts(ours), len(ours.blocks)] == totals and first == blocks


def _build(description: Mapping[str, Any]) -> nn.Module:
    kind = getattr(transformers, description["model"])
    config = kind.config_class(**description["config"])
    with torch.device("meta"):
        model = kind(config).train()
    # Routed modules run on real numbers for the shapes of their results.
    return kind(config).train() if any(map(_is_routed, model.modules())) else model


def _capture(model: Any) -> fx.GraphModule:
    with model.device:
        tokens = torch.ones(2, 8, dtype=torch.long)
        inputs: dict[str, Any] = {model.main_input_name: tokens}
        if model.main_input_name == "pixel_values":
            inputs = {"pixel_values": torch.ones(2, 3, 224, 224)}
        if model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = tokens
        if model.can_generate():
            inputs["use_cache"] = False
    return bwsk_fx.capture(model, inputs, is_leaf=lambda module: default_is_leaf(module) or _is_routed(module))


def _is_routed(module: nn.Module) -> bool:
    return type(module).__name__ in ROUTED


def _counts(counts: Counts | LabelCounts) -> list[int]:
    return [counts.s, counts.k, counts.gray]


def _in_short(counts: Sequence[int]) -> str:
    return " / ".join(map(str, counts))


if __name__ == "__main__":
    main()
