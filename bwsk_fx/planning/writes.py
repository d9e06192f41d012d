"""What a compiled graph writes into its inputs: buffers that count, average or remember.

AOTAutograd makes a graph functional. What an input becomes is an output of the forward pass, which the caller copies
into the input (`backend="bwsk_fx"`), or the operand of a `copy_` at the end of the joint graph (Inductor). Either way
the input is another one by the time of the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from bwsk_fx import _torch_private as private
from bwsk_fx.errors import PlanError
from bwsk_fx.planning.joint import depending_on, is_tangent

aten = torch.ops.aten


@dataclass(frozen=True)
class Writes:
    """The inputs that change when the forward pass is over.

    Attributes:
        rewritten: Their places among the placeholders.
        copied: Places of those that the graph itself writes into; their new values are the last forward outputs.
    """

    rewritten: tuple[int, ...]
    copied: tuple[int, ...]

    def append(self, graph: fx.Graph, primals: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> Sequence[fx.Node]:
        """Write the new values among a forward graph's outputs into its inputs, and return the other outputs.

        Args:
            graph: The graph, complete but for its output.
            primals: Its placeholders.
            outputs: What it returns.
        """
        own = len(outputs) - len(self.copied)
        for place, value in zip(self.copied, outputs[own:], strict=True):
            graph.call_function(aten.copy_.default, (primals[place], value))
        return outputs[:own]


def take_writes(joint: fx.GraphModule, num_forward_outputs: int) -> Writes:
    """Turn the writes of a joint graph into forward outputs behind the others, so that nothing in it writes.

    Args:
        joint: As AOTAutograd traces it.
        num_forward_outputs: How many of its outputs belong to the forward pass.

    Raises:
        PlanError: The backward pass writes, or something other than a copy does.
    """
    primals = joint.graph.find_nodes(op="placeholder")
    writers = [node for node in joint.graph.nodes if _writes(node)]
    backward = depending_on(joint.graph, list(filter(is_tangent, primals)))
    for node in writers:
        if node in backward or private.runs_in_backward(node):
            raise PlanError(f"the backward pass {_what(node)}: let the forward pass do it")
        if node.target is not aten.copy_.default or node.args[0] not in primals:
            raise PlanError(f"the graph {_what(node)} by {node.target}; a plan takes in-place operators on values only")
    copied = tuple(primals.index(node.args[0]) for node in writers)
    output = joint.graph.output_node()
    returned = list(output.args[0])  # type: ignore[arg-type]
    returned[num_forward_outputs:num_forward_outputs] = [node.args[1] for node in writers]
    output.args = (tuple(returned),)
    for node in writers:
        node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
        joint.graph.erase_node(node)
    return Writes(tuple(sorted({*_mutated(joint), *copied})), copied)


def _mutated(joint: fx.GraphModule) -> list[int]:
    try:
        return private.mutated_inputs(joint)
    except LookupError as error:
        raise PlanError(
            f"the graph writes into {error.args[0]}, which is none of its inputs by itself; do that outside of the "
            "compiled model (torch.compiler.disable)"
        ) from error


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _what(node: fx.Node) -> str:
    return f"writes into {node.args[0]}, at {node.stack_trace or 'an unknown line'}"
