"""Which architectures train with regions, how right are their gradients, and how much less do they keep?

Every model of the zoo is captured, labelled by both rulesets and trained for one step: as it is, in float64, and
rewritten. Errors of gradients are against float64, as a multiple of the model's own. Kept bytes count distinct storages
without parameters, see `bwsk_fx.measure`. What `capture` refuses goes through `torch.compile`.

    python benchmarks/zoo.py
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from common import RESULTS, report
from torch import Tensor, fx, nn
from zoo_entry import Entry
from zoo_models import ZOO

import bwsk_fx
from bwsk_fx.errors import CaptureError
from bwsk_fx.measure import loss_of, saved_for_backward
from bwsk_fx.rules.axis import Behaviour

QUESTION = "zoo"
VARIANTS = {
    "exact, budget 0": {"faith": "exact", "budget": 0.0},
    "budget 0": {"faith": "rounded", "budget": 0.0},
    "budget 0.1": {"faith": "rounded", "budget": 0.1},
}
# Errors below this share of a gradient are those of a few last bits, whoever makes them.
NOISE = 1e-7

Inputs = Mapping[str, Tensor]
Gradients = dict[str, Tensor]


def main() -> None:
    options = _options()
    found = _measured(options) | {
        name: row for name in options.only or ZOO if (row := _row(name, ZOO[name])) is not None
    }
    rows = [found[name] for name in ZOO if name in found]
    del options.only  # the file holds rows of several runs
    names = list(dict.fromkeys(name for row in rows for name in row))
    shown = ("model", "route", "nodes", "published", "sound", "kept MiB", *VARIANTS, "error", "bits")
    report(QUESTION, options, [dict.fromkeys(names) | row for row in rows], dict.fromkeys(shown, _cell))


def _options() -> argparse.Namespace:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument(
        "--only",
        nargs="+",
        choices=list(ZOO),
        metavar="MODEL",
        help="measure these anew; all by default",
    )
    arguments.add_argument("--output", type=type(RESULTS), default=RESULTS, help="folder of the result file")
    options = arguments.parse_args()
    options.device = "cpu"
    return options


def _measured(options: argparse.Namespace) -> dict[str, Any]:
    """Return the rows that are there already, where `--only` replaces some."""
    path = options.output / f"{QUESTION}-cpu.json"
    if not options.only or not path.exists():
        return {}
    return {row["model"]: row for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2f}"
    return "" if value is None else str(value)


def _row(name: str, entry: Entry) -> dict[str, Any] | None:
    """Return the figures of a model; None where its library is not installed."""
    try:
        row = {"model": name, "architecture": entry.architecture, "study": entry.study, **examine(entry)}
    except ImportError as error:
        print(f"{name}: left out, {error}")
        return None
    figures = (
        f"gradients {row['error']:.2f} times eager's error, {row['budget 0.1']:.0%} kept" if "error" in row else ""
    )
    print(f"{name}: {row['route']}", figures, flush=True)
    return row


def examine(entry: Entry) -> dict[str, Any]:
    """Capture, label and train a model.

    Returns:
        `route`, how the graph comes about; its `nodes`; labels by ruleset, as S/K/GRAY; `batch`, partitions and
        barriers of the batch axis; `kept MiB` of the model as it is, and the share of it that each variant keeps;
        `bits`, whose gradients the exact plan has: `eager`, `graph` for those of the captured graph, which may call
        other kernels, or in how many parameters it differs from that; `error`, that of the worst variant as a multiple
        of the model's own; `refused`, why it is not captured.
    """
    model, inputs = entry.make(), entry.example()
    try:
        graph = bwsk_fx.capture(model, inputs)
    except CaptureError as error:
        return _compiled(model, inputs) | {"refused": _with_its_line(error)}
    own, exact, eager = gradients(model, inputs), in_float64(model, inputs), saved_for_backward(model, inputs)
    labels = {ruleset: _labels(bwsk_fx.type_nodes(graph, ruleset=ruleset)) for ruleset in ("published", "sound")}
    kept, found = {}, {}
    for name, options in VARIANTS.items():
        variant = bwsk_fx.fuse_regions(graph, **options)
        found[name] = gradients(variant, inputs)
        kept[name] = saved_for_backward(variant, inputs) / eager
    return {
        "route": "capture",
        "nodes": len(graph.graph.nodes),
        **labels,
        "batch": _coordination(graph),
        "kept MiB": eager / 2**20,
        **kept,
        "bits": _bits(found["exact, budget 0"], own, gradients(graph, inputs)),
        "error": max(error_ratio(each, own, exact) for each in found.values()),
    }


def _compiled(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """Train a model through Dynamo, which breaks its graph where `capture` has to give up."""
    try:
        exact = in_float64(model, inputs)
    except RuntimeError:  # an operator for low precision alone, so that there is nothing to compare with
        return {"route": "none"}
    torch._dynamo.reset()
    options = {"budget": 0.1, "compiler": "eager"}
    variant = torch.compile(copy.deepcopy(model), backend="bwsk_fx", options=options)
    error = error_ratio(gradients(variant, inputs), gradients(model, inputs), exact)
    eager = saved_for_backward(model, inputs)
    kept = saved_for_backward(variant, inputs) / eager
    return {"route": "torch.compile", "kept MiB": eager / 2**20, "budget 0.1": kept, "error": error}


def _with_its_line(error: CaptureError) -> str:
    """Return the error with the line of the model's code, without the folder that it is installed in."""
    return re.sub(r'"[^"]*/site-packages/', '"', " ".join(str(error).split()))


def _labels(graph: fx.GraphModule) -> str:
    summary = bwsk_fx.summarize(graph)
    return f"{summary.s}/{summary.k}/{summary.gray}"


def _coordination(graph: fx.GraphModule) -> str:
    """Return into how many partitions the batch axis falls, and how many operators wait for the whole batch."""
    axis = bwsk_fx.analyze_calm(graph).axis("batch")
    return f"{len(axis.partitions)}/{axis.counts[Behaviour.BARRIER]}"


def gradients(model: nn.Module, inputs: Inputs) -> Gradients:
    """Run one step from seed 0, and return the gradients that there are, by name; buffers stay as they were."""
    model.zero_grad()
    torch.manual_seed(0)
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    loss_of(model(**inputs)).backward()
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)
    found = ((name.removeprefix("_orig_mod."), parameter.grad) for name, parameter in model.named_parameters())
    return {name: gradient.clone() for name, gradient in found if gradient is not None}


def in_float64(model: nn.Module, inputs: Inputs) -> Gradients:
    """Return the gradients of a copy of the model in float64."""
    wide = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    return gradients(copy.deepcopy(model).double(), wide)


def error_ratio(found: Gradients, own: Gradients, exact: Gradients) -> float:
    """Return the error of gradients as a multiple of the model's own, over all parameters."""
    if found.keys() != exact.keys():
        return math.inf
    error, allowed = (_norm(one[name] - exact[name] for name in exact) for one in (found, own))
    return error / max(allowed, NOISE * _norm(exact.values()))


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


def _bits(found: Gradients, own: Gradients, of_graph: Gradients) -> str:
    for name, expected in (("eager", own), ("graph", of_graph)):
        if found.keys() == expected.keys() and all(torch.equal(found[each], expected[each]) for each in expected):
            return name
    return f"{sum(not torch.equal(found[each], of_graph[each]) for each in of_graph)} of {len(of_graph)} differ"


if __name__ == "__main__":
    main()
