"""The summary of a module tree under the `published` ruleset: the way in which the study counted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict

from torch import nn

from bwsk_fx.blocks import grouped, section_and_index
from bwsk_fx.report.summary import Block, Counts, GrayNode, Summary, counts_of
from bwsk_fx.rules.published import module_verdict
from bwsk_fx.verdict import Label, Verdict

_Leaf = tuple[str, nn.Module, Verdict]


class ModuleSummary(Summary):
    """What the published labels of a module tree add up to; `gray_nodes` holds modules by their paths."""

    @property
    def unit(self) -> str:
        """What is counted, in words."""
        return "leaf modules"


def summarize_modules(model: nn.Module) -> ModuleSummary:
    """Add up the published labels of a model's leaf modules: those of its module tree that have no children.

    Every leaf counts once, however often it is called: a dropout that attention bypasses counts, and a ReLU that a
    block calls three times counts as one. `bwsk_fx.summarize` of a graph counts the calls instead. The model is not
    run, so that it may live on the `meta` device. Blocks are those of `bwsk_fx.blocks.block_of`.

    Args:
        model: Any module, in the mode that is asked about: batch norms are K in train mode and S in eval mode.

    Returns:
        A summary of the ruleset `"published"`.

    Source:
        Zervas (2026), table 1, counts leaf modules.
    """
    leaves = [(path, leaf, module_verdict(leaf)) for path, leaf in model.named_modules() if _is_leaf(leaf)]
    gray = [
        GrayNode(path, type(leaf).__name__, verdict.rationale)
        for path, leaf, verdict in leaves
        if verdict.label is Label.GRAY
    ]
    return ModuleSummary(
        **asdict(_counts(leaves)), ruleset="published", blocks=tuple(_blocks(leaves)), gray_nodes=tuple(gray)
    )


def _is_leaf(module: nn.Module) -> bool:
    return not any(True for _ in module.children())


def _counts(leaves: Iterable[_Leaf]) -> Counts:
    return counts_of(verdict for _, _, verdict in leaves)


def _blocks(leaves: Iterable[_Leaf]) -> Iterator[Block]:
    for path, inside in grouped(leaves, lambda leaf: _block_of(leaf[0])):
        section, index = section_and_index(path)
        yield Block(**asdict(_counts(inside)), section=section, index=index)


def _block_of(path: str) -> str | None:
    """Return the outermost ancestor that its container holds under a number."""
    parts = path.split(".")
    ends = (end for end, part in enumerate(parts[:-1], 1) if part.isdecimal())
    end = next(ends, None)
    return None if end is None else ".".join(parts[:end])
