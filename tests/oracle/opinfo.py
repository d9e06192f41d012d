"""PyTorch's operator database against the typing rules: type every sample, and run the inverse of every S label."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch.utils import _pytree as pytree

from bwsk_fx.rules import sound
from bwsk_fx.rules.round_trip import execute, round_trip
from bwsk_fx.verdict import Label


@dataclass
class Survey:
    """What the samples of one operator came to.

    Attributes:
        name: The operator's name in the database, with its variant.
        labels: Verdicts by label, over samples, dtypes and choices of the dynamic operands.
        rules: The rules that gave them.
        wrong: Descriptions of samples whose S label is false.
        incomplete: Samples whose operand the output does not determine everywhere, in this dtype.
        gray: The reasons for GRAY.
        failed: Descriptions of samples that could not be typed.
        rejected: Samples that the operator itself refuses.
    """

    name: str
    labels: Counter[str] = field(default_factory=Counter)
    rules: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    incomplete: list[str] = field(default_factory=list)
    gray: Counter[str] = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)
    rejected: int = 0


def operators(names: str = "") -> Iterator[Any]:
    """Yield the database's entries; those that contain one of the space-separated `names`, or all."""
    from torch.testing._internal.common_methods_invocations import op_db

    wanted = names.split()
    for op in op_db:
        # Compiled at run time on a GPU, or kernels that no CPU has.
        if not wanted or any(full_name(op) == name or op.name == name for name in wanted):
            yield op


def full_name(op: Any) -> str:
    return f"{op.name}.{op.variant_test_name}" if op.variant_test_name else op.name


DTYPES = (torch.float32, torch.float64)


def samples(op: Any, dtypes: tuple[torch.dtype, ...] = DTYPES, limit: int | None = None) -> Iterator[tuple[str, Any]]:
    """Yield an operator's samples with their names, at most `limit` per dtype.

    An operator that has none of the dtypes is sampled in the first one that it has.
    """
    supported = op.supported_dtypes("cpu")
    for dtype in [dtype for dtype in dtypes if dtype in supported] or sorted(supported, key=str)[:1]:
        torch.manual_seed(0)
        for index, sample in enumerate(islice(op.sample_inputs("cpu", dtype), limit)):
            yield f"{dtype} #{index}", sample


def arguments(sample: Any) -> tuple[Any, ...]:
    """Return a sample's positional arguments."""
    return (sample.input, *sample.args)


def choices(sample: Any) -> list[set[int]]:
    """Return which tensors of a sample are dynamic, by identity: the input alone, then all of them."""
    first = _identities(sample.input)
    every = _identities((arguments(sample), sample.kwargs))
    return [first, every] if every != first else [first]


def _identities(values: Any) -> set[int]:
    return {id(leaf) for leaf in pytree.tree_leaves(values) if isinstance(leaf, torch.Tensor)}


def survey(op: Any, dtypes: tuple[torch.dtype, ...] = DTYPES, limit: int | None = None) -> Survey:
    """Type the samples of one operator, at most `limit` per dtype, and run what the S labels claim."""
    result = Survey(full_name(op))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for where, sample in samples(op, dtypes, limit):
            _try_sample(op, sample, where, result)
    return result


def _try_sample(op: Any, sample: Any, where: str, result: Survey) -> None:
    for dynamic in choices(sample):
        try:
            executed = execute(op.op, arguments(sample), sample.kwargs, dynamic)
        except Exception:
            result.rejected += 1
            return
        try:
            verdict = sound.verdict(executed.call)
        except Exception as error:
            result.failed.append(f"{where}: {type(error).__name__}: {error}")
            continue
        result.labels[str(verdict.label)] += 1
        result.rules[verdict.rule] += 1
        if verdict.label is Label.GRAY:
            result.gray[verdict.rationale] += 1
        if verdict.label is Label.S and verdict.counted and executed.call.operands:
            _run_claim(executed, verdict, where, result)


def _run_claim(executed: Any, verdict: Any, where: str, result: Survey) -> None:
    trip = round_trip(executed, verdict)
    if not trip.holds:
        shapes = [tuple(operand.shape) for operand in executed.run.operands]
        result.wrong.append(
            f"{where} {shapes} {verdict.rule}: {trip.note or f'error {trip.error:.1e}'}, {trip.wrong}/{trip.elements}"
        )
    elif not trip.complete:
        result.incomplete.append(f"{where}: {trip.lost}/{trip.elements}")


def main() -> None:
    """Print what the named operators came to: `python tests/oracle/opinfo.py add exp`."""
    import sys

    for op in operators(" ".join(sys.argv[1:])):
        found = survey(op, limit=30)
        print(found.name, dict(found.labels), dict(found.rules), f"rejected {found.rejected}" if found.rejected else "")
        for title in ("failed", "wrong", "incomplete"):
            for line in getattr(found, title)[:3]:
                print("   ", title, line[:300])
        for reason, count in list(found.gray.items())[:3]:
            print("    gray", count, reason[:300])


if __name__ == "__main__":
    main()
