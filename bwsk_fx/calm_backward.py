"""What the backward pass of each node does along each axis, derived from what the forward pass says of it.

The gradient of a tensor has the tensor's axes. So an axis that operand and result both have stays a MAP; an operand
or a weight that lacks an axis of the result was used by every shard of it, and each shard has a partial sum of its
gradient (REDUCE); a sum over shards sends one gradient to all of them, which each takes as it is (MAP); what waits for
a whole axis forward waits for it backward (BARRIER). Megatron-LM calls the middle two the conjugate operators f and g
(Shoeybi et al. 2019, section 3).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bwsk_fx.axes import Step
from bwsk_fx.calm_cost import Operation, Trials, Weight, axis_size, closure, has
from bwsk_fx.report.calm import BackwardFact, GradientReduce
from bwsk_fx.rules.axis import Behaviour, Claim, Value
from bwsk_fx.rules.axis_table import Axis, AxisTable

_EVEN_TIES = frozenset({"amax", "amin", "aminmax", "max", "min"})
_TIES = "equal extremes share the gradient, so shards count them"
_TAKES = "each shard takes the gradient of the sum as it is"
_STAYS = "the gradient of each fact needs that fact's gradient alone"
_PLACES = "the gradient of each fact returns under its old index"


@dataclass(frozen=True)
class Backward:
    """The backward passes of one graph's operations.

    Attributes:
        operations: The operations, in order.
        axes: The axes.
        trials: Runs single nodes, which tells weights that carry an axis from those that lack it.
    """

    operations: Sequence[Operation]
    axes: AxisTable
    trials: Trials

    def facts(self, operation: Operation) -> tuple[BackwardFact, ...]:
        """Return what the backward pass of an operation does on each axis that has a name; nothing if it has none."""
        if not operation.learns:
            return ()
        found = (fact for claim in operation.step.claims for fact in self._facts(operation, claim))
        return tuple(dict.fromkeys(fact for fact in found if fact.axis))

    def _facts(self, operation: Operation, claim: Claim) -> Iterator[BackwardFact]:
        name = self.axes.name(claim.axis)
        if claim.behaviour is Behaviour.BARRIER:
            yield BackwardFact(name, Behaviour.BARRIER, f"as forward: {claim.reason}")
        for tensor in self.partial_gradients(operation, claim):
            yield _partial(name, tensor)
        if _shares_ties(operation, claim):
            moved = sum(value.bytes_per_sample for value in operation.step.results)
            yield BackwardFact(name, Behaviour.REDUCE, _TIES, bytes=moved)
        elif claim.consumed and claim.behaviour is not Behaviour.BARRIER:
            yield BackwardFact(name, Behaviour.MAP, _map_reason(claim))

    def partial_gradients(self, operation: Operation, claim: Claim) -> Iterator[Weight | Value]:
        """Yield the weights and operands of whose gradient each shard of an axis has a partial sum.

        They are what learns and lacks an axis of the result. What the result lacks, too, adds nothing to sum over.
        In place of an operand that follows from weights alone, those weights are meant.
        """
        if not claim.produced:
            return
        lacking = {weight.name: weight for weight in self.lacking_weights(operation, claim)}
        if claim.behaviour is not Behaviour.BARRIER:
            for source, value in self.learning(operation):
                if self._lacks(operation, value, claim):
                    if not self.operations[source].static:
                        yield value
                    lacking |= {weight.name: weight for weight in self._behind(source)}
        yield from lacking.values()

    def lacking_weights(self, operation: Operation, claim: Claim) -> list[Weight]:
        """Return the weights that an operation uses and that lack an axis of its result."""
        if not claim.produced:
            return []
        return [weight for weight in operation.weights if not self.carries(operation, weight, claim)]

    def _behind(self, source: int) -> Iterator[Weight]:
        """Yield the weights that a static operation's result follows from; none for others."""
        operation = self.operations[source]
        if operation.static:
            yield from operation.weights
            for earlier, _ in self.learning(operation):
                yield from self._behind(earlier)

    def learning(self, operation: Operation) -> Iterator[tuple[int, Value]]:
        """Yield the operands that get a gradient, with the operations that compute them."""
        for source, value in operation.sources:
            if self.operations[source].learns:
                yield source, value

    def carries(self, operation: Operation, weight: Weight, claim: Claim) -> bool:
        """Whether a weight has an axis: seen in its layout, or because the node runs on no other size of the axis."""
        axis = claim.axis
        if has(weight.layout, axis, self.axes):
            return True
        if claim.consumed and self.trials.stretches(operation, axis):
            return False
        values = (*operation.step.results, *operation.step.inputs)
        size = next((size for value in values if (size := axis_size(value, axis, self.axes)) is not None), None)
        return isinstance(size, int) and size in weight.shape

    def _lacks(self, operation: Operation, value: Value, claim: Claim) -> bool:
        own = [claim.axis] if claim.consumed else reindexed(operation.step, claim, self.axes)
        return not any(has(value.layout, axis, self.axes) for axis in own)


def reindexed(step: Step, claim: Claim, axes: AxisTable) -> list[Axis]:
    """Return the axes that an axis replaces, or that replace it: a reshape, a slice, a concatenation.

    They have the same facts under other indices, so that neither is born in the step, nor summed up in it.
    """
    if claim.behaviour is not Behaviour.MAP:
        return []
    mine = set(closure(claim.axis, axes))
    others = (other for other in step.claims if other.behaviour is Behaviour.MAP)
    turned = (other.axis for other in others if (other.consumed, other.produced) == (claim.produced, claim.consumed))
    return [
        axis
        for axis in dict.fromkeys(turned)
        if axis != claim.axis and (axes.relabelled(claim.axis, axis) or not mine.isdisjoint(closure(axis, axes)))
    ]


def _partial(axis: str, tensor: Weight | Value) -> BackwardFact:
    if isinstance(tensor, Weight):
        gradient, moved = tensor.name, tensor.bytes
    else:
        gradient, moved = tensor.node.name, tensor.bytes_per_sample
    reason = f"every shard used {gradient}, and has a partial sum of its gradient"
    return BackwardFact(axis, Behaviour.REDUCE, reason, gradient, isinstance(tensor, Weight), moved)


def _shares_ties(operation: Operation, claim: Claim) -> bool:
    return claim.behaviour is Behaviour.JOIN and not claim.produced and operation.step.target in _EVEN_TIES


def _map_reason(claim: Claim) -> str:
    if claim.produced:
        return _STAYS
    return _TAKES if claim.behaviour is Behaviour.REDUCE else _PLACES


def gradient_reduces(facts: Sequence[tuple[str, BackwardFact]], axis: str) -> tuple[GradientReduce, ...]:
    """Sum up what is reduced along an axis: once per gradient, however many nodes contribute to it.

    Args:
        facts: Names of nodes with what their backward passes do.
        axis: The axis.
    """
    found: dict[str, list[tuple[str, BackwardFact]]] = {}
    for node, fact in facts:
        if fact.axis == axis and fact.behaviour is Behaviour.REDUCE:
            found.setdefault(fact.gradient or node, []).append((node, fact))
    return tuple(
        GradientReduce(
            gradient,
            uses[0][1].parameter,
            max(fact.bytes for _, fact in uses),
            tuple(dict.fromkeys(node for node, _ in uses)),
        )
        for gradient, uses in found.items()
    )
