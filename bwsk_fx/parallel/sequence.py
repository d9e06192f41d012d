"""Which nodes between the sharded Linears of a plan can run on a part of the tokens.

Between a row-wise Linear and the next column-wise ones lie normalisations, dropout and residual sums, which map tokens.
Their results, which every device would hold in full, can be shared out along the token axis at no more communication.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import fx

from bwsk_fx.axes import Step
from bwsk_fx.calm import Analysis
from bwsk_fx.errors import PlanError
from bwsk_fx.parallel.flows import Group, module_of, path_of
from bwsk_fx.rules.axis import Behaviour, Value
from bwsk_fx.rules.axis_table import Axis, AxisTable


@dataclass(frozen=True)
class TokenParts:
    """The nodes that run on a part of the tokens.

    Attributes:
        dims: The nodes, row-wise Linears included, each with the dimension of its result that is the token axis.
        operands: (operand, reader) to the dimension of the operand that is the token axis, for readers that are no
            row-wise Linears. Operands without the axis are missing.
    """

    dims: Mapping[fx.Node, int] = field(default_factory=dict)
    operands: Mapping[tuple[fx.Node, fx.Node], int] = field(default_factory=dict)


def token_parts(analysis: Analysis, groups: Iterable[Group], devices: int) -> TokenParts:
    """Find the nodes that can run on a part of the tokens.

    Raises:
        PlanError: The row-wise Linears have no token axis, its size does not divide by the devices, or a module with
            parameters is called on all of the tokens as well.
    """
    groups = tuple(groups)
    paths = {path for group in groups for path in group.rows}
    rows = [step for step in analysis.steps if step.node.op == "call_module" and path_of(step.node) in paths]
    sharded = {node for group in groups for node in group.dims}
    axis = _common_axis(rows, analysis.axes, devices)
    found = {step.node: dim for step in rows if (dim := _dim(step.results[0], axis, analysis.axes)) is not None}
    operands: dict[tuple[fx.Node, fx.Node], int] = {}
    for step in analysis.steps:
        if step.node not in found and step.node not in sharded and any(value.node in found for value in step.inputs):
            dim = _mapped_dim(step, axis, analysis.axes)
            if dim is not None:
                found[step.node] = dim
                there = ((value.node, _dim(value, axis, analysis.axes)) for value in step.inputs)
                operands |= {(node, step.node): place for node, place in there if place is not None}
    _require_one_role(analysis, found)
    return TokenParts(found, operands)


def _require_one_role(analysis: Analysis, found: Mapping[fx.Node, int]) -> None:
    calls = [step.node for step in analysis.steps if step.node.op == "call_module"]
    inside = {path_of(node) for node in calls if node in found}
    for node in calls:
        if path_of(node) in inside and node not in found and any(True for _ in module_of(node).parameters()):
            raise PlanError(
                f"sequence_parallel: {path_of(node)} is called on a part of the tokens and, as {node.name}, on all of "
                "them; its gradients would be summed in one case only: leave sequence_parallel out"
            )


def _common_axis(rows: list[Step], axes: AxisTable, devices: int) -> Axis:
    """Return the axis before the features of the first result that has one."""
    for step in rows:
        result = step.results[0]
        axis = result.layout[-2] if result.rank > 2 else None
        if axis is not None:
            size = result.shape[-2]
            if not isinstance(size, int) or size % devices:
                raise PlanError(
                    f"sequence_parallel: {step.node.name} has {size} positions of axis '{axes.name(axis)}', which do "
                    f"not divide by {devices} devices; pad the sequence, or leave sequence_parallel out"
                )
            return axes.find(axis)
    raise PlanError("sequence_parallel: no row-wise Linear of this plan has a token axis; leave it out")


def _mapped_dim(step: Step, axis: Axis, axes: AxisTable) -> int | None:
    """Return where the result has the axis, if the step maps it and nothing else happens to it there."""
    said = [claim.behaviour for claim in step.claims if axes.find(claim.axis) == axis]
    dims = {_dim(value, axis, axes) for value in step.results}
    if step.unknown or len(dims) != 1 or set(said) != {Behaviour.MAP}:
        return None
    return dims.pop()


def _dim(value: Value, axis: Axis, axes: AxisTable) -> int | None:
    return next((dim for dim, own in enumerate(value.layout) if own is not None and axes.find(own) == axis), None)
