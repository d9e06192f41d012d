"""A traced region before its plan is chosen: what plans there are, and what each would take."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from bwsk_fx.planning.calibration import cost_model
from bwsk_fx.planning.cost import CostModel
from bwsk_fx.planning.derivations import derive
from bwsk_fx.planning.integer_program import Limits, Problem
from bwsk_fx.planning.joint import nbytes
from bwsk_fx.planning.options import PlanOptions
from bwsk_fx.planning.partition import Partition, partition
from bwsk_fx.planning.plan import Plan, rows
from bwsk_fx.planning.program import Layout, Program
from bwsk_fx.planning.solve import Solution, solve
from bwsk_fx.planning.stored import read_plans
from bwsk_fx.planning.trace import Outputs, Traced, trace
from bwsk_fx.rules.inverse_linear import WELL_CONDITIONED

# Between the least time and the least bytes, this many limits on time are tried.
_STEPS = 8


class Prospect:
    """A traced region: its problem, and the programs that solve it.

    Attributes:
        region: Its name, for errors.
        options: What plans are asked for.
        traced: Forward and backward in one graph.
        costs: Says how long calls take.
        problem: Values and the ways to them.
    """

    def __init__(self, region: str, options: PlanOptions, traced: Traced, costs: CostModel) -> None:
        self.region, self.options, self.traced, self.costs = region, options, traced, costs
        joint = traced.joint
        self.conventional_seconds = math.fsum(costs.seconds(node) for node in joint.conventional.nodes)
        self.conventional_bytes = joint.conventional_bytes()
        compiled = options.compiler != "eager"
        hypergraph = derive(joint, costs, exact=options.faith == "exact", invert=options.inverses, compiled=compiled)
        self.problem = Problem.of(joint, hypergraph, self.conventional_seconds)
        self._programs: dict[Solution, Program] = {}

    @cached_property
    def least_bytes(self) -> Solution:
        """The fewest bytes kept, whatever the time."""
        return self.solve(Limits())

    @cached_property
    def no_product_twice(self) -> Solution:
        """The fewest bytes kept with no matrix product, convolution or attention run again."""
        return self.solve(Limits(products=0.0))

    @cached_property
    def fingerprint(self) -> str:
        """Tells the traced graph, and the ways to its values, from any others."""
        ways = sorted(f"{one.head.name} {one.rule} {one.tails}" for one in self.problem.derivations)
        text = "\n".join([*map(_line, self.traced.joint.graph.nodes), *ways])
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    @cached_property
    def candidates(self) -> tuple[Program, ...]:
        """Programs from the least time to the fewest bytes kept, none of which another beats in every figure."""
        marks = {0.0, self.no_product_twice.extra_seconds, self.least_bytes.extra_seconds}
        most = max(marks)
        marks |= {most * step / _STEPS for step in range(1, _STEPS)}
        found = [self.least_bytes, self.no_product_twice]
        found += [self.solve(Limits(extra=mark)) for mark in marks]
        figures = {_figures(one): one for one in found}
        best = (one for mine, one in sorted(figures.items()) if not any(_beats(other, mine) for other in figures))
        return tuple(map(self.program, best))

    def from_file(self, path: str, region: str) -> Program:
        """Return the program that a file of plans has for a region; equal regions share a prospect, and no plan.

        Raises:
            PlanError: The file cannot be read, or has none.
        """
        return self.program(read_plans(path).solution(region, self.fingerprint, self.problem))

    def within_budget(self) -> Program:
        """Return the program with the fewest bytes kept within the budget, for this region by itself."""
        budget = self.options.budget
        if budget == 0.0:
            return self.program(self.no_product_twice)
        if math.isinf(budget):
            return self.program(self.least_bytes)
        seconds = budget * self.conventional_seconds
        extra = max(seconds, self.no_product_twice.extra_seconds)
        return self.program(self.solve(Limits(seconds, extra)))

    def solve(self, limits: Limits) -> Solution:
        """Return the solution with the fewest bytes kept within `limits`."""
        return solve(self.problem, limits, self.region)

    def program(self, solution: Solution) -> Program:
        """Write the program of a solution."""
        if solution not in self._programs:
            joint = self.traced.joint
            parts = partition(joint, self.problem.hypergraph, solution, exact=self.options.faith == "exact")
            tangents = tuple(Layout.of(tangent.meta["val"]) for tangent in joint.tangents)
            plan = self._plan(solution, parts)
            self._programs[solution] = Program(
                parts.forward,
                parts.backward,
                parts.static,
                self.traced.differentiable,
                tangents,
                joint.tangents_read(),
                plan,
                self.region,
                self.options.compiler,
            )
        return self._programs[solution]

    def _plan(self, solution: Solution, parts: Partition) -> Plan:
        joint = self.traced.joint
        written = (*parts.forward.graph.nodes, *parts.backward.graph.nodes)
        gradients = zip(joint.primals, joint.gradients, strict=False)
        own = (gradient for primal, gradient in gradients if gradient is not None and primal in joint.static_primals)
        return Plan(
            rows(joint, self.problem.hypergraph, solution),
            solution.kept_bytes,
            self.conventional_bytes,
            solution.extra_seconds,
            solution.intensive_seconds,
            math.fsum(self.costs.seconds(node) for node in written),
            self.conventional_seconds,
            parts.forward_peak,
            parts.backward_peak,
            sum(map(nbytes, own)),
            solution.gap,
            solution.solver,
            self.fingerprint,
        )


def _figures(solution: Solution) -> tuple[float, ...]:
    return solution.extra_seconds, solution.kept_bytes, solution.intensive_seconds


def _beats(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one != other and all(mine <= theirs for mine, theirs in zip(one, other, strict=True))


def _line(node: fx.Node) -> str:
    tensors = (leaf for leaf in tree_leaves(node.meta.get("val")) if isinstance(leaf, Tensor))
    layouts = [(tuple(value.shape), value.stride(), str(value.dtype), value.device.type) for value in tensors]
    return f"{node.name} {node.op} {node.target} {node.args} {node.kwargs} {layouts}"


def survey(
    function: Callable[..., Outputs],
    inputs: Mapping[str, Tensor],
    static: Sequence[int],
    options: PlanOptions,
    region: str,
    invertible: Sequence[int] = (),
) -> Prospect:
    """Trace a region and find the ways to its values.

    Args:
        function: The region as a function of its primals.
        inputs: Tensors like those that its programs will be called with, by name; fake ones will do.
        static: Which of them are parameters or buffers.
        options: What its plan is asked for.
        region: The region's name, for errors.
        invertible: Which of the inputs are weights of linear maps that may be undone.

    Raises:
        PlanError: The region cannot be traced.
    """
    traced = trace(function, inputs, static, region)
    for index in invertible:
        traced.joint.primals[index].meta[WELL_CONDITIONED] = True
    return Prospect(region, options, traced, cost_model(next(iter(inputs.values())).device, options.costs))


def build_program(
    function: Callable[..., Outputs],
    inputs: Mapping[str, Tensor],
    static: Sequence[int],
    options: PlanOptions,
    region: str,
) -> Program:
    """Trace, plan and partition a region by itself; arguments and errors as for `survey`.

    Raises:
        PlanError: The region cannot be traced or no plan fits.
    """
    return survey(function, inputs, static, options, region).within_budget()
