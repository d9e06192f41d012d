"""`FuseRegions`: each region becomes one call of a reversible module."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import ClassVar, Unpack

import torch
from torch import fx, nn

from bwsk_fx.errors import RegionError
from bwsk_fx.graphs import before_each_call, with_graph
from bwsk_fx.inplace import copied_out_of_place, is_read_again, shares_memory, written_operand
from bwsk_fx.passes.find_regions import REGION, FindRegions
from bwsk_fx.passes.pipeline import Pass, PassPipeline, PassResult
from bwsk_fx.passes.type_nodes import TypeNodes
from bwsk_fx.planner import Planner
from bwsk_fx.planning.options import PlanKeywords, PlanOptions, plan_options
from bwsk_fx.reversible import Programs, ReversibleRegion

CONTAINER = "reversible_regions"


@dataclass(frozen=True)
class FuseRegions(PlanOptions, Pass):
    """Replace the nodes of each region by one `call_module` of a `ReversibleRegion`.

    The result is a new graph module; it shares modules and parameters with the old one, and `state_dict` has the same
    keys. The attributes are those of `PlanOptions`.
    """

    name: ClassVar[str] = "fuse-regions"

    def run(self, graph_module: fx.GraphModule) -> PassResult:
        """Fuse the regions that `FindRegions` marked.

        Raises:
            RegionError: No node is marked.
        """
        regions = _members(graph_module.graph)
        if not regions:
            raise RegionError(
                "no node of this graph belongs to a region, so nothing would be reversible: run FindRegions first; if "
                "it found none, choose a larger granularity ('block' or 'whole')"
            )
        options = PlanOptions(**{option.name: getattr(self, option.name) for option in fields(PlanOptions)})
        return PassResult(_Fusion(graph_module, regions, options).fused(), True)


def _members(graph: fx.Graph) -> dict[str, list[fx.Node]]:
    regions: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if REGION in node.meta:
            regions.setdefault(node.meta[REGION], []).append(node)
    return regions


class _Fusion:
    """Copies a graph, with the members of each region replaced where its last member stood."""

    def __init__(self, original: fx.GraphModule, regions: dict[str, list[fx.Node]], options: PlanOptions) -> None:
        self._original = original
        self._regions = regions
        self._options = options
        self._graph = fx.Graph()
        self._at: dict[fx.Node, fx.Node] = {}
        self._container = nn.Module()
        self._programs = Programs()

    def fused(self) -> fx.GraphModule:
        """Return the graph module with its regions fused."""
        last = {members[-1]: name for name, members in self._regions.items()}
        for node in self._original.graph.nodes:
            if REGION not in node.meta:
                self._at[node] = self._graph.node_copy(node, self._at.__getitem__)
            elif node in last:
                self._add_region(last[node])
        self._drop_unread_attributes()
        result = with_graph(self._original, self._graph, {CONTAINER: self._container})
        if not self._options.is_local:
            before_each_call(result, Planner(self._options))
        return result

    def _add_region(self, name: str) -> None:
        inputs, outputs = _boundary(self._regions[name])
        subgraph = _subgraph(self._original, self._regions[name], inputs, outputs)
        attributes = sum(map(_is_attribute, inputs))
        region = ReversibleRegion(name, subgraph, attributes, self._options, self._programs)
        self._container.add_module(name, region)
        call = self._graph.call_module(f"{CONTAINER}.{name}", tuple(self._at[node] for node in inputs))
        call.meta = {"val": tuple(node.meta["val"] for node in outputs), REGION: name, "nn_module_stack": {}}
        for index, node in enumerate(outputs):
            part = self._graph.create_node("call_function", operator.getitem, (call, index), name=node.name)
            self._at[node] = part
            part.meta = dict(node.meta)

    def _drop_unread_attributes(self) -> None:
        for node in self._graph.find_nodes(op="get_attr"):
            if not node.users:
                self._graph.erase_node(node)


def _boundary(members: Sequence[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
    """Return what members read from outside, attributes last, and which of them are read outside."""
    inside = set(members)
    operands = dict.fromkeys(operand for node in members for operand in node.all_input_nodes)
    inputs = sorted((operand for operand in operands if operand not in inside), key=_is_attribute)
    outputs = [node for node in members if any(user not in inside for user in node.users)]
    return inputs, outputs


def _is_attribute(node: fx.Node) -> bool:
    """Whether the node reads a parameter or buffer, which a region takes as an input: it may be replaced later."""
    return node.op == "get_attr" and isinstance(node.meta["val"], torch.Tensor)


def _subgraph(
    original: fx.GraphModule, members: Sequence[fx.Node], inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]
) -> fx.GraphModule:
    graph = fx.Graph()
    at: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        at[node] = graph.placeholder(node.name)
        at[node].meta = dict(node.meta)

    for node in members:
        written = written_operand(node, original)
        copies = written is not None and _is_given(written, inputs) and not is_read_again(node, written)
        at[node] = (copied_out_of_place if copies else fx.Graph.node_copy)(graph, node, at.__getitem__)
    graph.output(tuple(at[node] for node in outputs))
    return fx.GraphModule(original, graph, class_name="Region")


def _is_given(node: fx.Node, inputs: Sequence[fx.Node]) -> bool:
    """Whether a value is an input of the region, or a view of one."""
    return any(shares_memory(node, given) for given in inputs)


def fuse_regions(
    graph: fx.GraphModule,
    budget: float | None = None,
    *,
    granularity: str = "block",
    **options: Unpack[PlanKeywords],
) -> fx.GraphModule:
    """Return the graph with its regions made reversible: same parameters, same `state_dict` keys, and it trains.

    Args:
        graph: A captured graph; it stays as it is.
        budget: Extra time that the plan may spend, as a fraction of the conventional step. 0.0, the default, runs no
            matrix product, convolution or attention twice.
        granularity: `block`, `s-run` or `whole`, see `FindRegions`. `s-run` labels the graph with the sound rules
            where it is not labelled yet.
        options: What else the plan is asked for, see `PlanOptions`; or `tier="exact"`, `"balanced"` or `"smallest"`
            in place of a budget and a faith. With `faith="exact"` gradients are bit-identical to eager's, but for the
            order of sums in five cases: a weight that is used twice under autocast (eager adds its gradients in half
            precision, a region in full); a value with three or more uses in several regions (a region adds those of its
            own uses first); a gradient that enters a region in another layout than the region was traced with; an
            output of a region without a gradient, beside others with one (zeros stand for it); gradients of softplus,
            ELU and hard activations on a CPU, whose layouts PyTorch foresees wrongly.

    Raises:
        PlanError: An option is out of range.
        RegionError: The graph has no region.
    """
    plan = plan_options(budget, **options)
    passes: list[Pass] = [FindRegions(granularity), FuseRegions(**asdict(plan))]
    if granularity == "s-run" and not all("bwsk" in node.meta for node in graph.graph.nodes):
        passes.insert(0, TypeNodes())
    return PassPipeline(passes)(graph)
