"""The nodes of a typed graph as plain values: what exports, filters and tables of nodes are made from."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx

from bwsk_fx.provenance import calls_of, elements_of, operator_of, tensors_of
from bwsk_fx.report.nodes import source_line, verdict_of
from bwsk_fx.rules.registry import Call
from bwsk_fx.rules.sizes import short
from bwsk_fx.verdict import Label, Witness, WitnessKind


@dataclass(frozen=True)
class NodeRecord:
    """One node of a typed graph.

    Attributes:
        name: Its name.
        op: What fx calls its kind (`call_module`).
        target: What it calls, as fx writes it: a module's path, a function's or method's name.
        operator: What people call its operator (`Linear`).
        module: Path of the module around it; of a leaf module its own path; empty at the top level.
        inputs: Names of the nodes that it reads.
        label: Its label.
        witness: What its inverse needs besides its value, in words; empty for K and GRAY.
        rationale: Why it has its label.
        confidence: How sure the label is; see `Verdict`.
        counted: Whether summaries count it.
        dynamic: Whether its value depends on the inputs or on chance.
        erased_elements: Elements per sample that it erases, where its rule knows.
        erased_bits: Bits per sample that it erases of elements that survive otherwise, where its rule knows.
        shapes: The shape of each tensor of its value; a symbolic size is the text of its symbol.
        dtypes: The dtype of each (`float32`).
        bytes: Bytes of its value per sample; None where they are not proportional to the batch.
        region: Name of the reversible region that it belongs to, else empty.
        source: `file:line` of the model's code.
    """

    name: str
    op: str
    target: str
    operator: str
    module: str
    inputs: tuple[str, ...]
    label: Label
    witness: str
    rationale: str
    confidence: float
    counted: bool
    dynamic: bool
    erased_elements: float | None
    erased_bits: float | None
    shapes: tuple[tuple[int | str, ...], ...]
    dtypes: tuple[str, ...]
    bytes: int | None
    region: str
    source: str

    @cached_property
    def measured(self) -> bool:
        """Whether the rule of a K node knows how much it erases."""
        return self.erased_elements is not None or self.erased_bits is not None

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready dictionaries."""
        return asdict(self) | {"label": str(self.label)}


def records(graph: fx.GraphModule) -> tuple[NodeRecord, ...]:
    """Return every node of a typed graph, in order.

    Raises:
        RuleError: The graph, or a node of it, is not typed.
    """
    calls = calls_of(graph)
    dynamic: Collection[fx.Node] = next(iter(calls.values())).dynamic if calls else ()
    return tuple(_record(call, node in dynamic) for node, call in calls.items())


def module_of(node: fx.Node) -> str:
    """Return the path of the innermost module around a node; empty at the top level."""
    if node.op == "call_module":
        return str(node.target)
    stack = list(node.meta.get("nn_module_stack") or ())
    return stack[-1] if stack else ""


def _record(call: Call, dynamic: bool) -> NodeRecord:
    node, verdict = call.node, verdict_of(call.node)
    erasure = verdict.erasure
    tensors = tensors_of(node.meta.get("val"))
    return NodeRecord(
        name=node.name,
        op=node.op,
        target=_target(node),
        operator=operator_of(call),
        module=module_of(node),
        inputs=tuple(source.name for source in node.all_input_nodes),
        label=verdict.label,
        witness=_words(verdict.witness),
        rationale=verdict.rationale,
        confidence=verdict.confidence,
        counted=verdict.counted,
        dynamic=dynamic,
        erased_elements=None if erasure is None else erasure.elements,
        erased_bits=None if erasure is None else erasure.bits,
        shapes=tuple(tuple(_size(size) for size in tensor.shape) for tensor in tensors),
        dtypes=tuple(short(tensor.dtype) for tensor in tensors),
        bytes=_bytes(tensors),
        region=node.meta.get("region", ""),
        source=source_line(node),
    )


def _target(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def _words(witness: Witness | None) -> str:
    if witness is None:
        return ""
    return f"{witness.kind}: {', '.join(witness.names)}" if witness.names else str(WitnessKind(witness.kind))


def _size(size: Any) -> int | str:
    return size if isinstance(size, int) else str(size)


def _bytes(tensors: list[torch.Tensor]) -> int | None:
    counts = [elements_of([tensor]) for tensor in tensors]
    total = 0
    for tensor, count in zip(tensors, counts, strict=True):
        if count is None:
            return None
        total += count * tensor.element_size()
    return total
