"""The CALM report in a terminal."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from typing import TYPE_CHECKING

from bwsk_fx.report.calm import AxisReport, CalmReport, counted, size_text
from bwsk_fx.rules.axis import Behaviour

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from bwsk_fx.calm_order import Fork, Order

_NAME = 40
_NAMED = 4
_NUMBER = re.compile(r"_?\d+")  # what tells the names of repeated blocks and calls apart
_BACKWARD = (Behaviour.MAP, Behaviour.REDUCE, Behaviour.BARRIER)


def forward_table(report: CalmReport) -> Table:
    """Return what each axis allows in the forward pass."""
    table = _table("CALM", ("axis",), ("nodes", *Behaviour, "partitions", "moved/sample"))
    for axis in report.axes:
        counts = (str(axis.counts[behaviour]) for behaviour in Behaviour)
        moved = size_text(axis.bytes_per_sample)
        table.add_row(axis.axis, str(axis.nodes), *counts, str(len(axis.partitions)), moved)
    return table


def backward_table(report: CalmReport) -> Table:
    """Return what each axis allows in the backward pass, and which gradients are summed over its shards."""
    headings = (*_BACKWARD, "parameters summed", "per step", "activations", "per sample")
    table = _table("Backward", ("axis",), headings)
    for axis in report.axes:
        if any(axis.backward_counts.values()):
            counts = (str(axis.backward_counts[behaviour]) for behaviour in _BACKWARD)
            parameters = sum(each.parameter for each in axis.gradients)
            sums = (str(parameters), size_text(axis.parameter_gradient_bytes))
            others = (str(len(axis.gradients) - parameters), size_text(axis.activation_gradient_bytes))
            table.add_row(axis.axis, *counts, *sums, *others)
    return table


def axis_tables(axis: AxisReport) -> RenderableType:
    """Return one axis in detail: where shards wait or are summed, and what runs in between."""
    from rich.console import Group
    from rich.text import Text

    points = _table("", ("where", "", "first"), ("times", "moved/sample"))
    groups: dict[Hashable, list] = defaultdict(list)
    for point in (*axis.barriers, *axis.reduces):
        groups[point.behaviour, point.target, point.bytes_per_sample].append(point)
    for same in groups.values():
        first = same[0]
        moved = size_text(sum(point.bytes_per_sample for point in same))
        points.add_row(first.target, str(first.behaviour), first.node, str(len(same)), moved)
    parts = _table("", ("partition from", "to"), ("nodes", "times"))
    alike: dict[Hashable, list[tuple[str, ...]]] = defaultdict(list)
    for partition in axis.partitions:
        alike[tuple(_NUMBER.sub("", node) for node in partition)].append(partition)
    for partitions in alike.values():
        nodes = partitions[0]
        parts.add_row(nodes[0], nodes[-1], str(len(nodes)), str(len(partitions)))
    reasons = dict.fromkeys(f"{point.target}: {point.reason}" for point in (*axis.barriers, *axis.reduces))
    lines = [axis.verdict, axis.backward_verdict]
    return Group(*map(Text, lines), "", parts, "", points, *map(Text, reasons))


def order_lines(order: Order) -> Iterator[str]:
    """Yield what the partial order allows on one device."""
    share = order.critical_flops / order.flops if order.flops else 1.0
    yield (
        f"one device: {order.nodes} nodes, {_flops(order.flops)} per sample; the critical path has {share:.0%} of it "
        f"({counted(len(order.critical_path), 'node')}, {order.critical_path[0]} … {order.critical_path[-1]})"
        if order.critical_path
        else "one device: nothing to compute"
    )
    if order.widest:
        more = ", …" if order.width > _NAMED else ""
        yield f"at most {order.width} nodes at a time: {', '.join(order.widest[:_NAMED])}{more}"
    for times, fork in _forks(order.forks):
        branches = " | ".join(f"{branch.nodes[0]} ({_flops(branch.flops)})" for branch in fork.branches)
        yield f"side by side{f', {times} times' if times > 1 else ''}, until {fork.join}: {branches}"
    if order.unmeasured:
        yield f"FLOPs unknown, counted as 0: {', '.join(order.unmeasured)}"


def _forks(forks: Sequence[Fork]) -> Iterator[tuple[int, Fork]]:
    """Yield forks that have products in two branches, equal ones once; branches without products are left out."""
    groups: dict[Hashable, list[Fork]] = defaultdict(list)
    for fork in forks:
        if sum(branch.flops > 0 for branch in fork.branches) > 1:
            groups[tuple((len(branch.nodes), branch.flops) for branch in fork.branches)].append(fork)
    yield from ((len(same), same[0]) for same in groups.values())


def _flops(count: float) -> str:
    for unit in ("", "k", "M", "G", "T"):
        if count < 1000:
            return f"{count:.3g} {unit}FLOP"
        count /= 1000
    return f"{count:.3g} PFLOP"


def _table(title: str, words: Sequence[str], figures: Sequence[str]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for heading in words:
        table.add_column(heading, no_wrap=True, max_width=_NAME, overflow="ellipsis")
    for heading in figures:
        table.add_column(heading, justify="right", no_wrap=True)
    return table
