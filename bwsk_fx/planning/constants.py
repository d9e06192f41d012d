"""Numbers that a traced graph holds as tensors, as calls that make them."""

from __future__ import annotations

import torch
from torch import fx

from bwsk_fx import _torch_private as private


def make_numbers(joint: fx.GraphModule) -> None:
    """Replace tensors that the graph holds by calls of `aten.full`, as long as they have at most one element.

    `indices[0] = 5` makes such a tensor while it is traced: an attribute of the graph module, which a program that is
    split in two does not have. Larger tensors stay, for `read_joint` to refuse.
    """
    for node in joint.graph.find_nodes(op="get_attr"):
        held = getattr(joint, str(node.target))
        if held.numel() <= 1:
            _make(node, held)


def _make(node: fx.Node, held: torch.Tensor) -> None:
    value = node.meta["val"]
    with private.without_fake_mode():
        number = held.item() if held.numel() else 0
    with node.graph.inserting_before(node):
        layout = {"dtype": value.dtype, "device": value.device}
        made = node.graph.call_function(torch.ops.aten.full.default, (list(value.shape), number), layout)
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made)
    node.graph.erase_node(node)
