"""What does `torch.compile` keep, and how long does it take, with bwsk-fx's plans and with Inductor's own?

Each variant compiles one ViT as a whole and trains it, as `pareto.py` does: forward, backward and a fused AdamW step,
timed in rounds. All figures are beside those of Inductor's default in the same run.

* *first s*: time of the first forward and backward pass, with tracing, planning and code generation; no caches.
* *kept*: bytes that the forward pass leaves for the backward pass, over those of Inductor's default.
* *step*: median over rounds of the step's time over that of Inductor's default, with the distance between quartiles.
* *error*: distance of all gradients to those in float64, over that of Inductor's default.
* *last batch s*: time of the first step on a smaller batch, as at the end of an epoch, by code for any size
  (`dynamic=True`) that has run on the whole batch before; *graphs* is how many graphs that took.

    python benchmarks/compile.py
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from common import Shape, parser, report, shape_of
from pareto import Judge, Subject, backward, median_and_spread, race, resized
from peers import FLOOR, MEMORY_BUDGETS, MemoryBudget, Variant, budget_label, inductor_problem
from torch import Tensor, fx, nn
from torch._dynamo import lookup_backend
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config

import bwsk_fx

QUESTION = "compile"
ON_CPU = Shape(layers=6, hidden=192, batch=4, image=224, precision="bf16")
ON_CUDA = Shape(layers=12, hidden=768, batch=16, image=224, precision="fp16")
BUDGETS = [0.0, 0.1, 0.25, FLOOR]
Backend = Callable[..., Any]


class Partitioned:
    """Inductor as it is, with the planner as its partitioner."""

    def __init__(self, budget: float) -> None:
        self._partitioner = bwsk_fx.compile.Partitioner(budget)

    def __call__(self, graph: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        """Compile a graph."""
        with inductor_config.patch(custom_partitioner_fn=self._partitioner):
            return lookup_backend("inductor")(graph, inputs)


def backends(budgets: Sequence[float]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield method, setting and arguments of `torch.compile`; Inductor's default first."""
    for budget in MEMORY_BUDGETS:
        yield "inductor", f"{budget:g}", {"backend": MemoryBudget(budget)}
    for budget in budgets:
        yield "bwsk_fx", budget_label(budget), {"backend": "bwsk_fx", "options": {"budget": budget}}
    for budget in budgets:
        yield "Partitioner", budget_label(budget), {"backend": Partitioned(budget)}


def main(arguments: Sequence[str] | None = None) -> None:
    torch._dynamo.config.recompile_limit = 64
    options = parsed(arguments)
    problem = inductor_problem(options.device)
    if problem is not None:
        raise SystemExit(problem)
    with inductor_config.patch(force_disable_caches=True):
        rows = measured(options)
    options.budgets = [budget_label(budget) for budget in options.budgets]
    report(QUESTION, options, rows, {name: show for name, show in COLUMNS.items() if name in rows[0]})


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the options; the default shape follows the device."""
    reader = parser(__doc__, ON_CPU)
    reader.add_argument("--rounds", type=int, default=20)
    methods = tuple(dict.fromkeys(method for method, _, _ in backends(BUDGETS)))
    reader.add_argument(
        "--only", nargs="+", choices=methods, default=methods, help="besides Inductor's own partitioner"
    )
    reader.add_argument(
        "--last-batch", action=argparse.BooleanOptionalAction, default=True, help="try a smaller one, too"
    )
    reader.set_defaults(budgets=BUDGETS)
    if reader.parse_args(arguments).device.startswith("cuda"):
        reader.set_defaults(**vars(ON_CUDA))
    return reader.parse_args(arguments)


def measured(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows."""
    shape = shape_of(options)
    base = shape.model(options.device)
    judge = Judge(base, shape, options.device)
    subjects, firsts, lasts = [], [], []
    chosen = [one for one in backends(options.budgets) if one[0] in ("inductor", *options.only)]
    for method, setting, keywords in chosen:
        variant = Variant(method, setting, partial(compiled, **keywords), is_compiled=True)
        lasts.append(on_smaller_batch(base, shape, options.device, keywords) if options.last_batch else {})
        subjects.append(Subject(variant))
        began = time.perf_counter()
        judge.examine(subjects[-1])
        firsts.append(time.perf_counter() - began)
        print(f"{variant.name}: ready after {firsts[-1]:.1f} s", flush=True)
    race(subjects, judge.inputs, shape.dtype, options)
    return [
        row_of(subject, subjects[0], {"first s": first, **last})
        for subject, first, last in zip(subjects, firsts, lasts, strict=True)
    ]


def compiled(model: nn.Module, **keywords: Any) -> nn.Module:
    """Compile a model in place, without graph breaks."""
    model.compile(fullgraph=True, **{"dynamic": False, **keywords})
    return model


def on_smaller_batch(base: nn.Module, shape: Shape, device: str, keywords: dict[str, Any]) -> dict[str, float]:
    """Train on a batch and then on a smaller one, with code for any size."""
    torch.compiler.reset()
    model = compiled(copy.deepcopy(base), dynamic=True, **keywords)
    sizes = (shape.batch, max(2, shape.batch // 2))
    whole, smaller = (resized(shape, size).inputs(device) for size in sizes)
    # Transformers' loss notes in its first call what kind of problem it is, and Dynamo compiles the second anew.
    model.config.problem_type = "single_label_classification"
    counters.clear()
    backward(model, whole, shape.dtype)
    began = time.perf_counter()
    backward(model, smaller, shape.dtype)
    return {"last batch s": time.perf_counter() - began, "graphs": counters["stats"]["unique_graphs"]}


def row_of(subject: Subject, default: Subject, timings: dict[str, float]) -> dict[str, Any]:
    """Return a variant's row, relative to Inductor's default."""
    ratios = [own / other for own, other in zip(subject.seconds, default.seconds, strict=True)]
    ratio, spread = median_and_spread(ratios)
    kept, kept_by_default = (one.kept or 0 for one in (subject, default))
    error, default_error = (one.error or 0.0 for one in (subject, default))
    return {
        "variant": subject.variant.name,
        **timings,
        "kept MiB": kept / 2**20,
        "kept": kept / kept_by_default,
        "ms": median_and_spread([1000 * seconds for seconds in subject.seconds])[0],
        "step": ratio,
        "step IQR": spread,
        "error": error / default_error,
    }


COLUMNS: dict[str, Callable[[Any], str]] = {
    "variant": str,
    "first s": "{:.1f}".format,
    "last batch s": "{:.2f}".format,
    "graphs": str,
    "kept MiB": "{:.2f}".format,
    "kept": "{:.3f}".format,
    "ms": "{:.1f}".format,
    **dict.fromkeys(("step", "step IQR", "error"), "{:.3f}".format),
}


if __name__ == "__main__":
    main()
