"""Numbers that a traced region holds as tensors of one element, as calls that make them."""

from __future__ import annotations

import torch
from torch import fx

from bwsk_fx import _torch_private as private

aten = torch.ops.aten


def make_numbers(joint: fx.GraphModule) -> None:
    """Replace attributes of one element by calls of `aten.full`, in place.

    `indices[0] = 5` makes such a tensor while it is traced: an attribute of the graph module, which a program that is
    split in two does not have. Larger tensors stay, for `read_joint` to refuse.
    """
    for node in joint.graph.find_nodes(op="get_attr"):
        value = getattr(joint, node.target, None)
        if isinstance(value, torch.Tensor) and value.numel() == 1 and not isinstance(value, torch.nn.Parameter):
            _make(node, value)


def _make(node: fx.Node, value: torch.Tensor) -> None:
    with private.without_fake_mode():
        number = value.item()
    with node.graph.inserting_before(node):
        made = node.graph.call_function(
            aten.full.default,
            (list(value.shape), number),
            {"dtype": value.dtype, "device": value.device, "pin_memory": False},
        )
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made)
    node.graph.erase_node(node)
