"""What every report says about a node of a torch-level graph."""

from __future__ import annotations

import re

from torch import fx

from bwsk_fx.errors import RuleError
from bwsk_fx.verdict import Verdict

_FRAME = re.compile(r'File "(.+?)", line (\d+)')


def verdict_of(node: fx.Node) -> Verdict:
    """Return the verdict of a node.

    Raises:
        RuleError: The node is not typed.
    """
    verdict = node.meta.get("bwsk")
    if verdict is None:
        raise RuleError(f"node '{node.name}' has no verdict; call bwsk_fx.type_nodes(graph) first")
    return verdict


def source_line(node: fx.Node) -> str:
    """Return `file:line` of the model's code that made the node; empty for inputs, attributes and sizes."""
    frame = _FRAME.search(node.stack_trace or "")
    return f"{frame[1]}:{frame[2]}" if frame else ""
