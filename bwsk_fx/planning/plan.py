"""The plan of a region, as people read it: what the backward pass needs, and how it comes by each value."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import fx

from bwsk_fx.planning.derivations import Derivation, Hypergraph
from bwsk_fx.planning.joint import JointGraph, nbytes
from bwsk_fx.planning.sizes import as_numbers
from bwsk_fx.planning.solve import Solution


@dataclass(frozen=True)
class PlannedValue:
    """One value of the backward pass.

    Attributes:
        name: Its node in the region's joint graph.
        node: The torch-level node that it is part of, or the region's input.
        action: `keep`, `recompute` or `invert`.
        rule: The operator that is run again, or the rule that rebuilds the value; for a kept value, what needs it.
        sources: The values it is derived from; none for kept ones.
        operator: What computed it in the forward pass.
        shape: Its sizes; symbolic ones as they were when it was planned.
        dtype: Its dtype, without `torch.`.
        bytes: Its size.
        source: The user's source line.
    """

    name: str
    node: str
    action: str
    rule: str
    sources: tuple[str, ...]
    operator: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    source: str


@dataclass(frozen=True)
class Plan:
    """The plan of one region for one kind of input.

    Attributes:
        values: Kept values first, then derived ones.
        kept_bytes: Bytes that the region saves, parameters excluded.
        conventional_bytes: What eager execution saves in its place.
        extra_seconds: Modelled time of everything that is run again, inverted, or computed only to be kept.
        intensive_seconds: The part of it for matrix products, convolutions and attention.
        planned_seconds: Modelled time of the region's forward and backward pass.
        conventional_seconds: The same of eager execution, which the budget is a fraction of.
        forward_peak: The most bytes that the forward pass holds at a time, its inputs among them.
        backward_peak: The most bytes that the backward pass holds at a time, what is kept among them.
        gradient_bytes: Size of the gradients of parameters that the backward pass leaves behind.
        gap: How much smaller the objective of the best plan may be, as a fraction; what the solver proved.
        solver: `highs`, `greedy` where HiGHS found nothing better in time, or `file`.
        fingerprint: Tells the region's operators, shapes and dtypes, and the ways to its values, from any others.
    """

    values: tuple[PlannedValue, ...]
    kept_bytes: int
    conventional_bytes: int
    extra_seconds: float
    intensive_seconds: float
    planned_seconds: float
    conventional_seconds: float
    forward_peak: int
    backward_peak: int
    gradient_bytes: int
    gap: float
    solver: str
    fingerprint: str

    @property
    def overhead(self) -> float:
        """Modelled time beyond eager execution's, as a fraction of it; below zero where merged calls save more."""
        return self.planned_seconds / self.conventional_seconds - 1.0 if self.conventional_seconds else 0.0

    @property
    def kept(self) -> tuple[PlannedValue, ...]:
        """The values that the forward pass saves."""
        return tuple(value for value in self.values if value.action == "keep")

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON-compatible data."""
        return asdict(self)


def rows(joint: JointGraph, hypergraph: Hypergraph, solution: Solution) -> tuple[PlannedValue, ...]:
    """Put what a solution keeps and derives into words."""
    kept = [_kept(node, _readers(node, joint, hypergraph, solution)) for node in solution.kept]
    return (*kept, *map(_derived, solution.used))


def _readers(node: fx.Node, joint: JointGraph, hypergraph: Hypergraph, solution: Solution) -> list[str]:
    """Name what reads a kept value in the backward pass: gradient operators and derivations."""
    class_of = hypergraph.class_of
    gradients = [
        _operator(user)
        for user in joint.graph.nodes
        if user in joint.backward and any(class_of.get(operand) is node for operand in user.all_input_nodes)
    ]
    rules = [one.rule for one in solution.used if any(class_of[tail] is node for tail in one.tails)]
    return list(dict.fromkeys(gradients + rules))


def _kept(node: fx.Node, readers: Iterable[str]) -> PlannedValue:
    return _row(node, "keep", ", ".join(readers), ())


def _derived(one: Derivation) -> PlannedValue:
    return _row(one.head, one.kind.value, one.rule, tuple(tail.name for tail in one.tails))


def _row(node: fx.Node, action: str, rule: str, sources: tuple[str, ...]) -> PlannedValue:
    value = node.meta.get("val")
    tensor = value if isinstance(value, torch.Tensor) else torch.empty(0)
    return PlannedValue(
        node.name,
        _torch_level_name(node),
        action,
        rule,
        sources,
        _operator(node),
        as_numbers(tuple(tensor.shape)),
        str(tensor.dtype).removeprefix("torch."),
        nbytes(node),
        _source_line(node),
    )


def _torch_level_name(node: fx.Node) -> str:
    origins = node.meta.get("from_node")
    return origins[0].name if origins else str(node.meta.get("input_name", ""))


def _operator(node: fx.Node) -> str:
    if node.op == "placeholder":
        return "input"
    packet = getattr(node.target, "overloadpacket", None)
    if packet is not None:
        return str(packet).removeprefix("aten.").lstrip("_")
    if node.args and isinstance(node.args[0], fx.Node) and "getitem" in str(node.target):
        return f"{_operator(node.args[0])}[{node.args[1]}]"
    return str(getattr(node.target, "__name__", node.target))


def _source_line(node: fx.Node) -> str:
    """Return `file:line` of the innermost frame that was recorded."""
    frames = [line.strip() for line in (node.stack_trace or "").splitlines() if line.strip().startswith("File ")]
    if not frames:
        return ""
    place = frames[-1].split(", in ")[0].removeprefix('File "')
    return place.replace('", line ', ":")
