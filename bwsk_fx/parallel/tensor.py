"""`tensor_plan`: a plan for PyTorch's `parallelize_module`, derived from the axis claims of a graph."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

from bwsk_fx.calm import Analysis
from bwsk_fx.errors import PlanError
from bwsk_fx.parallel.flows import Group, groups_of


class TensorPlan(dict[str, ParallelStyle]):
    """Styles by module path, as `torch.distributed.tensor.parallel.parallelize_module` takes them.

    Attributes:
        devices: How many devices the plan is for.
        groups: The Linears that are sharded together, and along what.
        left_out: Why each other module with a matrix stays whole, by path.
    """

    def __init__(self, devices: int, groups: Iterable[Group], left_out: dict[str, str]) -> None:
        self.devices = devices
        self.groups = tuple(groups)
        self.left_out = left_out
        super().__init__()
        for group in self.groups:
            self.update({path: ColwiseParallel() for path in group.columns})
            self.update({path: RowwiseParallel() for path in group.rows})

    @property
    def all_reduces(self) -> int:
        """How many sums over devices one forward pass has."""
        return sum(len(group.rows) for group in self.groups)

    def __str__(self) -> str:
        lines = [f"{len(self)} of {len(self) + len(self.left_out)} modules on {self.devices} devices"]
        for group in self.groups:
            lines.append(f"{group.axis} ({group.size}): {', '.join(group.columns)} -> {', '.join(group.rows)}")
        return "\n".join([*lines, *(f"whole: {path}: {reason}" for path, reason in self.left_out.items())])


def tensor_plan(graph: fx.GraphModule | Analysis, devices: int) -> TensorPlan:
    """Find the Linears of a graph that devices can share, in pairs with one sum over devices each.

    A Linear becomes column-wise where its out-feature axis is MAP and every operator on the way to other Linears maps
    that axis, and those become row-wise, since their in-feature axis is a REDUCE. An embedding can take the place of a
    column-wise Linear. What would need a collective of its own, as token embeddings and classifiers do, stays whole and
    is in `left_out` with the reason.

    Args:
        graph: A captured graph, or its analysis.
        devices: How many devices share each sharded Linear.

    Returns:
        A dictionary that `parallelize_module(model, mesh, plan)` takes as it is, for the model that was captured.

    Raises:
        PlanError: Nothing can be sharded; the message says why, Linear by Linear.
    """
    if devices < 1:
        raise PlanError(f"a tensor plan for {devices} devices: expected 1 or more")
    groups, left_out = groups_of(graph if isinstance(graph, Analysis) else Analysis.of(graph))
    accepted = []
    for group in groups:
        if group.size % devices:
            reason = f"its {group.size} shards of axis '{group.axis}' do not divide by {devices} devices"
            left_out |= dict.fromkeys((*group.columns, *group.rows), reason)
        else:
            accepted.append(group)
    if not accepted:
        found = "; ".join(f"{path}: {reason}" for path, reason in left_out.items()) or "it has none"
        raise PlanError(f"no Linear of this graph can be shared by {devices} devices: {found}")
    return TensorPlan(devices, accepted, left_out)
