"""Where do the axis rules and PyTorch's DTensor rules differ, and who is right?

Every node of small models runs once more on DTensors over two devices that do not exist (PyTorch's fake process group),
with its operands sharded along one axis. What DTensor does is a behaviour: results sharded likewise without
communication (MAP), partial results (REDUCE, or JOIN of extremes), or communication inside the operator, or a gathered
result (BARRIER). Where that differs from the claim, `certify_axes` has the last word: it ran the claim on real shards.

Compared are axes that have a dimension of their own, or the outer part of one, since DTensor cuts dimensions into
contiguous halves.

    python benchmarks/dtensor_rules.py
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from calm_zoo import SMALL_MODELS, small_model
from common import RESULTS, report
from torch import Tensor, fx, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.func import functional_call
from torch.utils import _pytree as pytree

import bwsk_fx
from bwsk_fx.axes import Step, follow_axes
from bwsk_fx.axis_facts import Facts
from bwsk_fx.report.axis_certificate import AxisCertificate, Status
from bwsk_fx.rules.axis import Behaviour, Claim, Value

QUESTION = "dtensor-rules"
DEVICES = 2
NO_RULE = "no rule"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--models", nargs="+", choices=list(SMALL_MODELS), default=list(SMALL_MODELS))
    arguments.add_argument("--output", type=Path, default=RESULTS, help="folder of the result file")
    options = arguments.parse_args()
    options.device = "cpu"
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    with fake_mesh() as mesh:
        rows = summed([found for name in options.models for found in compared(*small_model(name), mesh)])
    report(QUESTION, options, rows, dict.fromkeys(("operator", "axis rule", "DTensor", "claims", "who is right"), str))


@dataclass(frozen=True)
class Comparison:
    """One claim beside what DTensor does."""

    operator: str
    ours: Behaviour
    theirs: str
    status: Status

    @property
    def verdict(self) -> str:
        """Who is right, by execution."""
        if self.theirs == self.ours:
            return "both"
        if self.theirs == NO_RULE:
            return "no comparison"
        if self.ours is Behaviour.BARRIER:
            return "DTensor, which shards more" if self.status is Status.CAUTIOUS else "the axis rule"
        if self.status is not Status.CERTIFIED:
            return "DTensor"
        return "both: DTensor asks for more communication" if self.theirs == Behaviour.BARRIER else "the axis rule"


def summed(found: Sequence[Comparison]) -> list[dict[str, Any]]:
    """Count equal comparisons, agreement first."""
    counts = Counter((one.operator, str(one.ours), one.theirs, one.verdict) for one in found)
    order = sorted(counts, key=lambda key: (key[3] != "both", key[3], key))
    names = ("operator", "axis rule", "DTensor", "who is right")
    return [dict(zip(names, key, strict=True)) | {"claims": counts[key]} for key in order]


@contextmanager
def fake_mesh() -> Iterator[DeviceMesh]:
    """Make two devices that are not there: collectives return at once, with anything."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=DEVICES, store=FakeStore())
    try:
        yield init_device_mesh("cpu", (DEVICES,))
    finally:
        dist.destroy_process_group()


def compared(model: nn.Module, inputs: Mapping[str, Tensor], mesh: DeviceMesh) -> list[Comparison]:
    """Compare every claim about a model with what DTensor does."""
    graph = bwsk_fx.capture(model, inputs)
    steps, axes = follow_axes(graph)
    certificates = bwsk_fx.certify_axes(graph, inputs, shards=DEVICES).claims
    run = _Run(graph, {step.node.name: step for step in steps}, Facts(axes, {}), mesh, list(certificates))
    with torch.no_grad():
        run.run(*(inputs[str(node.target)] for node in graph.graph.find_nodes(op="placeholder")))
    return run.found


class _Run(fx.Interpreter):
    """Runs a graph, and each node once more on DTensors per claim."""

    def __init__(
        self,
        graph: fx.GraphModule,
        steps: Mapping[str, Step],
        facts: Facts,
        mesh: DeviceMesh,
        certificates: list[AxisCertificate],
    ) -> None:
        super().__init__(graph)
        self.found: list[Comparison] = []
        self._steps, self._facts, self._mesh, self._certificates = steps, facts, mesh, certificates

    def run_node(self, n: fx.Node) -> Any:
        step = self._steps.get(n.name)
        if step is not None and n.op in ("call_module", "call_function", "call_method"):
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            target = self.fetch_attr(str(n.target)) if n.op == "call_module" else n.target
            for claim in step.claims:
                certificate = self._certificates.pop(0)
                theirs = self._behaviour(n.op, target, (args, kwargs), step, claim, certificate)
                if theirs is not None:
                    self.found.append(Comparison(step.target, claim.behaviour, theirs, certificate.status))
        return super().run_node(n)

    def _behaviour(
        self, op: str, target: Any, given: Any, step: Step, claim: Claim, certificate: AxisCertificate
    ) -> str | None:
        """Return what DTensor does; None where the axis has no dimension that it could cut."""
        leaves, spec = pytree.tree_flatten(given)
        real = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        cuts = {place: self._cut(claim, value) for place, value in zip(real, step.inputs, strict=True)}
        if all(cut is None for cut in cuts.values()) and not certificate.parameters:
            return None
        weights = self._weights(target, dict(certificate.parameters))
        if weights is None or any(
            cut is not None and leaves[place].shape[cut] % DEVICES for place, cut in cuts.items()
        ):
            return None
        for place, cut in cuts.items():
            leaves[place] = self._sharded(leaves[place].detach(), cut)
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        try:
            with CommDebugMode() as communication:
                result = _called(op, target, args, kwargs, weights)
        except (RuntimeError, NotImplementedError, AssertionError, ValueError, TypeError):
            return NO_RULE
        return self._read(result, communication.get_total_counts(), step, claim)

    def _cut(self, claim: Claim, value: Value) -> int | None:
        """Return the dimension whose halves are halves of the axis."""
        dim = self._facts.dim(value, claim.axis)
        if dim is None:
            return None
        own, axes = value.layout[dim], self._facts.axes
        while own is not None and axes.find(own) != axes.find(claim.axis):
            outer = axes.parts(own)[0][0]
            own = outer if self._facts.carries(outer, claim.axis) else None
        return None if own is None else dim

    def _weights(self, target: Any, cuts: Mapping[str, int]) -> dict[str, Tensor] | None:
        if not isinstance(target, nn.Module):
            return None if cuts else {}
        own = {**dict(target.named_parameters()), **dict(target.named_buffers())}
        if any(own[name].shape[dim] % DEVICES for name, dim in cuts.items()):
            return None
        return {name: self._sharded(tensor.detach(), cuts.get(name)) for name, tensor in own.items()}

    def _sharded(self, tensor: Tensor, dim: int | None) -> DTensor:
        placement = Replicate() if dim is None else Shard(dim)
        # Nothing is sent: a process group that only pretends would give back what happened to be in memory.
        return distribute_tensor(tensor, self._mesh, [placement], src_data_rank=None)

    def _read(self, result: Any, communications: int, step: Step, claim: Claim) -> str:
        results = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, DTensor)]
        placements = [leaf.placements[0] for leaf in results]
        if communications or not placements:
            return str(Behaviour.BARRIER)
        if any(isinstance(one, Partial) for one in placements):
            extremes = all(one.reduce_op in ("max", "min") for one in placements if isinstance(one, Partial))
            return str(Behaviour.JOIN if extremes else Behaviour.REDUCE)
        made = [self._cut(claim, value) for value in step.results]
        if any(cut is not None for cut in made) or not claim.produced:
            return str(Behaviour.MAP if any(isinstance(one, Shard) for one in placements) else Behaviour.BARRIER)
        return NO_RULE


def _called(op: str, target: Any, args: Any, kwargs: Any, weights: Mapping[str, Tensor]) -> Any:
    if op == "call_method":
        return getattr(args[0], target)(*args[1:], **kwargs)
    if isinstance(target, nn.Module):
        return functional_call(target, dict(weights), args, kwargs)
    return target(*args, **kwargs)


def disagreements(found: Sequence[Comparison]) -> Iterator[Comparison]:
    """Yield the claims where the two differ and one of them is wrong."""
    return (one for one in found if one.verdict in ("DTensor", "the axis rule", "DTensor, which shards more"))


if __name__ == "__main__":
    main()
