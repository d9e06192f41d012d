"""The two rulesets side by side, over the leaf-module calls of one graph."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from torch import fx

from bwsk_fx.arguments import require_graph
from bwsk_fx.blocks import block_of, grouped, section_and_index, span
from bwsk_fx.passes.type_nodes import type_nodes
from bwsk_fx.report.render import Printable
from bwsk_fx.verdict import Label, Verdict

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table


@dataclass(frozen=True)
class LabelCounts:
    """How many calls carry each label."""

    s: int
    k: int
    gray: int


@dataclass(frozen=True)
class BothCounts:
    """The same calls counted under both rulesets."""

    published: LabelCounts
    sound: LabelCounts


@dataclass(frozen=True)
class BlockCounts(BothCounts):
    """Both counts of one repeated block.

    Attributes:
        section: Path of the container.
        index: The block's number there.
    """

    section: str
    index: int


@dataclass(frozen=True)
class OperatorCounts(BothCounts):
    """Both counts of one class of leaf modules, such as `Linear`."""

    operator: str


@dataclass(frozen=True)
class Disagreement:
    """Calls to which the rulesets give different labels, for one reason.

    Attributes:
        operator: Class of the leaf module.
        published: The label of the study's table.
        sound: The label of the sound ruleset.
        rationale: Why the sound ruleset says so.
        count: Number of such calls.
        example: Name of the first one's node.
    """

    operator: str
    published: Label
    sound: Label
    rationale: str
    count: int
    example: str


@dataclass(frozen=True)
class Comparison(BothCounts, Printable):
    """What both rulesets say of a graph's leaf-module calls; prints with `rich`, and as plain text with `str`.

    Attributes:
        blocks: One row per repeated block, in order.
        operators: One row per class of leaf modules, in order of their first call.
        disagreements: The calls that are labelled differently, grouped; the most frequent group first.
    """

    blocks: tuple[BlockCounts, ...]
    operators: tuple[OperatorCounts, ...]
    disagreements: tuple[Disagreement, ...]

    @property
    def total(self) -> int:
        """Number of leaf-module calls."""
        return self.published.s + self.published.k + self.published.gray

    @property
    def agreed(self) -> int:
        """Number of calls that have the same label under both rulesets."""
        return self.total - sum(group.count for group in self.disagreements)

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready dictionaries, with the numbers of calls and of agreements."""
        return asdict(self) | {"total": self.total, "agreed": self.agreed}

    def __rich__(self) -> Group:
        """Render totals, blocks, operators and disagreements."""
        from rich.console import Group

        rows = [(span(run[0].section, [block.index for block in run]), run[0]) for run in _runs(self.blocks)]
        tables = [_table("block", rows)] if rows else []
        operators = _table("operator", [(row.operator, row) for row in self.operators])
        return Group(*_headlines(self), *tables, operators, *map(_sentence, self.disagreements))


@dataclass(frozen=True)
class _Call:
    node: fx.Node
    operator: str
    published: Verdict
    sound: Verdict


def compare_rulesets(graph: fx.GraphModule) -> Comparison:
    """Label every leaf-module call of a captured graph under both rulesets and count both.

    The calls are those that `published` counts. Under `sound` a call on static values alone, such as a position
    embedding, is S and in no summary; here it counts, so that both columns are about the same calls.

    Args:
        graph: A graph from `bwsk_fx.capture`, typed or not; its verdicts stay as they are.

    Raises:
        RuleError: A rule failed.
    """
    require_graph(graph)
    calls = _calls(graph)
    operators = {call.operator: [other for other in calls if other.operator == call.operator] for call in calls}
    return Comparison(
        **_both(calls),
        blocks=tuple(_blocks(calls)),
        operators=tuple(OperatorCounts(**_both(same), operator=name) for name, same in operators.items()),
        disagreements=tuple(sorted(_disagreements(calls), key=lambda group: -group.count)),
    )


def _calls(graph: fx.GraphModule) -> list[_Call]:
    with _verdicts_kept(graph.graph):
        published = _verdicts(type_nodes(graph, "published"))
        sound = _verdicts(type_nodes(graph, "sound"))
    return [
        _Call(node, type(graph.get_submodule(str(node.target))).__name__, verdict, sound[node])
        for node, verdict in published.items()
        if verdict.counted
    ]


def _verdicts(graph: fx.GraphModule) -> dict[fx.Node, Verdict]:
    return {node: node.meta["bwsk"] for node in graph.graph.nodes}


@contextmanager
def _verdicts_kept(graph: fx.Graph) -> Iterator[None]:
    before = [(node, node.meta.copy()) for node in graph.nodes]
    try:
        yield
    finally:
        for node, meta in before:
            node.meta.clear()
            node.meta.update(meta)


def _both(calls: Sequence[_Call]) -> dict[str, LabelCounts]:
    return {"published": _count(call.published for call in calls), "sound": _count(call.sound for call in calls)}


def _count(verdicts: Iterable[Verdict]) -> LabelCounts:
    labels = [verdict.label for verdict in verdicts]
    return LabelCounts(labels.count(Label.S), labels.count(Label.K), labels.count(Label.GRAY))


def _blocks(calls: Iterable[_Call]) -> Iterator[BlockCounts]:
    for path, inside in grouped(calls, lambda call: block_of(call.node)):
        section, index = section_and_index(path)
        yield BlockCounts(**_both(inside), section=section, index=index)


def _disagreements(calls: Iterable[_Call]) -> Iterator[Disagreement]:
    groups: dict[tuple[str, Label, Label, str], list[_Call]] = {}
    for call in calls:
        if call.published.label is not call.sound.label:
            key = (call.operator, call.published.label, call.sound.label, call.sound.rationale)
            groups.setdefault(key, []).append(call)
    for key, same in groups.items():
        yield Disagreement(*key, count=len(same), example=same[0].node.name)


def _headlines(comparison: Comparison) -> Iterator[str]:
    yield f"{comparison.total} leaf-module calls, {comparison.agreed} with the same label under both rulesets"
    for ruleset, counts in (("published", comparison.published), ("sound", comparison.sound)):
        ratio = counts.s / comparison.total if comparison.total else 0.0
        yield f"{ruleset}: [b]{counts.s} S[/b], [b]{counts.k} K[/b], [b]{counts.gray} GRAY[/b]; S ratio {ratio:.1%}"


def _runs(blocks: Iterable[BlockCounts]) -> Iterator[list[BlockCounts]]:
    """Yield each run of equal neighbours in one container."""
    for _, run in groupby(blocks, lambda block: (block.section, block.published, block.sound)):
        yield list(run)


def _table(heading: str, rows: Iterable[tuple[str, BothCounts]]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(heading, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for ruleset in ("published", "sound"):
        for label in Label:
            table.add_column(f"{ruleset} {label}" if label is Label.S else str(label), justify="right")
    for name, row in rows:
        counts = (row.published, row.sound)
        table.add_row(name, *(str(count) for both in counts for count in (both.s, both.k, both.gray)))
    return table


def _sentence(group: Disagreement) -> Any:
    from rich.text import Text

    calls = "1 call" if group.count == 1 else f"{group.count} calls"
    return Text(
        f"{group.operator}: {group.published} in published, {group.sound} in sound ({calls}, such as "
        f"{group.example}): {group.rationale}"
    )
