"""Statistics that a normalisation computes on its way, where it is written out in separate operators.

`x * rsqrt(mean(x²) + eps)` divides by a number that is made of x itself, so undoing it operator by operator needs that
number. It is one per row, and a fused kernel yields it, as LayerNorm yields its mean and rstd.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor, fx

from bwsk_fx.rules.decomposition import Decomposition
from bwsk_fx.rules.sizes import elements
from bwsk_fx.rules.targets import operator_name

_MEANS = frozenset({"mean", "var"})
_ROOTS = frozenset({"rsqrt", "sqrt"})


def statistics(parts: Decomposition, affected: Collection[fx.Node]) -> tuple[fx.Node, ...]:
    """Return the means over rows from which a decomposition takes roots, and the other means over the same rows.

    Args:
        parts: The decomposition.
        affected: What depends on the operand that is to be rebuilt.

    Returns:
        Means of at most half as many elements as the operand each; none where no mean becomes a root.
    """
    means = [step for step in parts.steps() if step in affected and _name(step) in _MEANS and _merges(step)]
    roots = [step for step in parts.steps() if step in affected and _is_root(step)]
    rooted = {mean for root in roots for mean in means if _leads(mean, root)}
    return tuple(mean for mean in means if any(_same_rows(mean, other) for other in rooted))


def _merges(step: fx.Node) -> bool:
    given, kept = elements(step.all_input_nodes[0].meta["val"]), elements(step.meta["val"])
    return given is not None and kept is not None and 2 * kept <= given


def _is_root(step: fx.Node) -> bool:
    return _name(step) in _ROOTS or (_name(step) == "pow" and step.args[1] in (0.5, -0.5))


def _leads(mean: fx.Node, root: fx.Node) -> bool:
    """Whether a root is taken of a mean, with additions of constants and casts between them."""
    node = root.all_input_nodes[0]
    while node is not mean and node.all_input_nodes and node.meta["val"].shape == mean.meta["val"].shape:
        node = node.all_input_nodes[0]
    return node is mean


def _same_rows(one: fx.Node, other: fx.Node) -> bool:
    first, second = one.meta["val"], other.meta["val"]
    return isinstance(first, Tensor) and isinstance(second, Tensor) and first.shape == second.shape


def _name(step: fx.Node) -> str:
    return operator_name(step.target).removesuffix("_")
