"""`tensor_parallel`: a captured graph in which this device holds its share, with the sums over devices as its nodes.

`parallelize_module` puts hooks and DTensors on modules, which a reversible region refuses. Here the graph itself is
rewritten: weights are plain tensors of local sizes and collectives are functions that the graph calls, so that regions
contain them. A collective is never run again in the backward pass.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.distributed.device_mesh import DeviceMesh

from bwsk_fx.calm import Analysis
from bwsk_fx.errors import PlanError
from bwsk_fx.graphs import with_graph
from bwsk_fx.parallel.collectives import Link, RowLinear, fan_out, gather_parts, summing_gradients, take_part
from bwsk_fx.parallel.flows import path_of
from bwsk_fx.parallel.sequence import TokenParts, token_parts
from bwsk_fx.parallel.tensor import TensorPlan
from bwsk_fx.passes.propagate_values import PropagateValues
from bwsk_fx.reversible import ReversibleRegion
from bwsk_fx.signature import HOOKS

_META = "tensor_parallel"
# Where a call's arguments say the sizes of its result: from this place on, one by one or as one sequence.
_SIZES = {"view": 1, "reshape": 1, "expand": 1, torch.reshape: 1}


@dataclass(frozen=True)
class Shards:
    """Which parameters of a rewritten graph are shares of larger ones.

    Attributes:
        group: The process group that holds all shares.
        dims: The dimension along which each is shared out, by name.
    """

    group: dist.ProcessGroup
    dims: Mapping[str, int]

    def whole(self, name: str, share: Tensor) -> Tensor:
        """Gather a parameter or its gradient from the shares of all devices, which all have to call this."""
        if name not in self.dims:
            return share
        parts = [torch.empty_like(share) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, share.contiguous(), group=self.group)
        return torch.cat(parts, self.dims[name])

    def __deepcopy__(self, memo: dict[int, Any]) -> Shards:
        # Process groups cannot be copied.
        return self


def tensor_parallel(
    graph: fx.GraphModule, plan: TensorPlan, mesh: DeviceMesh, *, sequence_parallel: bool = False
) -> fx.GraphModule:
    """Return the graph as this device runs it: sharded Linears hold its share, and devices sum where the plan says.

    Every device calls this with the same weights. The result has two sums per pair of Linears and step, one in the
    forward and one in the backward pass; `fuse_regions` takes it as any captured graph. Parameters that are not sharded
    are shared with `graph`, and so are their gradients, which are whole on every device. Dropout that sees a shard or a
    part draws on each device for its own; everywhere else all devices have to draw alike, from one seed.

    Args:
        graph: A captured graph, not fused yet; it stays as it is.
        plan: From `tensor_plan(graph, mesh.size())`.
        mesh: One dimension of devices.
        sequence_parallel: Let each device have a part of the tokens only where they are mapped between row-wise and
            column-wise Linears. A sum becomes a reduce-scatter there and an all-gather here, which move as much; and
            the gradients of what maps the tokens (normalisations, biases of row-wise Linears) are summed, one small
            all-reduce each.

    Raises:
        PlanError: The plan is for another graph or another number of devices, the graph is fused, a sharded Linear
            carries hooks, or the tokens do not divide by the devices.
    """
    _require_fitting(graph, plan, mesh)
    parts = token_parts(Analysis.of(graph), plan.groups, plan.devices) if sequence_parallel else TokenParts()
    rewritten = _Rewrite(graph, plan, parts, mesh).result()
    _require_local_shapes(graph, rewritten, plan, parts.dims)
    return rewritten


def full_state_dict(graph: fx.GraphModule) -> dict[str, Tensor]:
    """Return the state dict of the model from before `tensor_parallel`; a collective, on every device the same.

    Raises:
        PlanError: The graph does not come from `tensor_parallel`.
    """
    shards = graph.meta.get(_META)
    if not isinstance(shards, Shards):
        raise PlanError("this graph has no shards: full_state_dict takes what tensor_parallel returned, fused or not")
    return {name: shards.whole(name, tensor) for name, tensor in graph.state_dict().items()}


class _Rewrite:
    """Copies a graph, with collectives between what sees a shard, a part of the tokens, or everything."""

    def __init__(self, original: fx.GraphModule, plan: TensorPlan, parts: TokenParts, mesh: DeviceMesh) -> None:
        self._original = original
        self._plan = plan
        self._parts = parts
        self._tokens = parts.dims
        self._mesh = mesh
        self._link: Link = (mesh.get_group().group_name, mesh.size(), mesh.get_local_rank())
        self._shards = {node: dim for group in plan.groups for node, dim in group.dims.items()}
        self._graph = fx.Graph()
        self._at: dict[fx.Node, fx.Node] = {}
        self._handed: dict[tuple[fx.Node, Any], fx.Node] = {}

    def result(self) -> fx.GraphModule:
        for node in self._original.graph.nodes:
            handed = {operand: self._hand(operand, node) for operand in node.all_input_nodes}
            copied = self._graph.node_copy(node, handed.__getitem__)
            dim = self._shards.get(node, self._tokens.get(node))
            if dim is not None:
                copied.args = _local_sizes(node, copied.args, dim, self._plan.devices)
            self._at[node] = copied
        result = with_graph(self._original, self._graph, {})
        result.meta[_META] = Shards(self._mesh.get_group(), dict(self._replace_modules(result)))
        PropagateValues().run(result)
        return result

    def _hand(self, operand: fx.Node, reader: fx.Node) -> fx.Node:
        """Return an operand as its reader needs it, past a collective where the two see different things."""
        if operand in self._shards or not isinstance(operand.meta.get("val"), Tensor):
            return self._at[operand]
        if operand in self._tokens:
            if reader in self._tokens:
                return self._at[operand]
            return self._call(
                gather_parts, operand, reader, (self._tokens[operand], self._link, reader in self._shards)
            )
        if (operand, reader) in self._parts.operands:
            return self._call(take_part, operand, reader, (self._parts.operands[operand, reader], self._link))
        if (reader in self._shards or reader in self._tokens) and _has_gradient(operand):
            return self._call(fan_out, operand, reader, (self._link,))
        return self._at[operand]

    def _call(
        self, function: Callable[..., Tensor], operand: fx.Node, reader: fx.Node, args: tuple[Any, ...]
    ) -> fx.Node:
        key = operand, (function, args)
        if key not in self._handed:
            self._handed[key] = self._graph.call_function(function, (self._at[operand], *args))
            self._handed[key].meta = {name: value for name, value in reader.meta.items() if name != "val"}
        return self._handed[key]

    def _replace_modules(self, result: fx.GraphModule) -> Iterator[tuple[str, int]]:
        """Put local modules in place, under copies of the modules on the way; yield their sharded parameters."""
        shells: dict[str, nn.Module] = {"": result}
        parts = {path_of(node): dim for node, dim in self._tokens.items() if node.op == "call_module"}
        for group in self._plan.groups:
            for path, dim in [*((path, 0) for path in group.columns), *((path, 1) for path in group.rows)]:
                local = _local(path, self._original.get_submodule(path), dim, self._mesh)
                if isinstance(local, RowLinear):
                    local.link, local.parts = self._link, parts.pop(path, None)
                _put(shells, path, local)
                yield f"{path}.weight", 1 if isinstance(local, nn.Embedding) else dim
                if dim == 0 and getattr(local, "bias", None) is not None:
                    yield f"{path}.bias", 0
        for path in parts:
            module = self._original.get_submodule(path)
            if any(True for _ in module.parameters()):
                _put(shells, path, summing_gradients(module, self._link))


def _put(shells: dict[str, nn.Module], path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    _shell(shells, parent)._modules[name] = module


def _shell(shells: dict[str, nn.Module], path: str) -> nn.Module:
    """Return the copy of a container that holds the very same children, copying what is above it first."""
    if path not in shells:
        parent, _, name = path.rpartition(".")
        above = _shell(shells, parent)
        shell = copy.copy(above._modules[name])
        assert shell is not None
        shell.__dict__["_modules"] = dict(shell._modules)
        above._modules[name] = shells[path] = shell
    return shells[path]


def _local(path: str, module: nn.Module, dim: int, mesh: DeviceMesh) -> nn.Module:
    """Return a module with this device's share of the outputs (dim 0) or of the inputs (dim 1)."""
    if any(module.__dict__[hooks] for hooks in HOOKS):
        raise PlanError(f"{path} carries hooks, which its local part would not run; remove them before tensor_parallel")
    if isinstance(module, nn.Embedding):
        local = copy.copy(module)
        local.__dict__["_parameters"] = {"weight": _share(module.weight, 1, mesh)}
        local.embedding_dim //= mesh.size()
        return local
    assert isinstance(module, nn.Linear)
    return _local_linear(module, dim, mesh)


def _local_linear(module: nn.Linear, dim: int, mesh: DeviceMesh) -> nn.Linear:
    sizes = [module.out_features, module.in_features]
    sizes[dim] //= mesh.size()
    like: dict[str, Any] = {"bias": module.bias is not None, "device": "meta", "dtype": module.weight.dtype}
    local = nn.Linear(sizes[1], sizes[0], **like) if dim == 0 else RowLinear(sizes[1], sizes[0], **like)
    local.weight = _share(module.weight, dim, mesh)
    if module.bias is not None:
        local.bias = _share(module.bias, 0, mesh) if dim == 0 else module.bias
    return local.train(module.training)


def _share(parameter: Tensor, dim: int, mesh: DeviceMesh) -> nn.Parameter:
    part = parameter.detach().chunk(mesh.size(), dim)[mesh.get_local_rank()]
    return nn.Parameter(part.clone(memory_format=torch.contiguous_format), parameter.requires_grad)


def _has_gradient(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def _local_sizes(node: fx.Node, args: tuple[Any, ...], dim: int, devices: int) -> tuple[Any, ...]:
    """Divide the one size of a reshape that the captured code wrote as a number and that is now a device's share."""
    start = _SIZES.get(node.target) if node.op in ("call_method", "call_function") else None
    if start is None:
        return args
    packed = len(args) == start + 1 and isinstance(args[start], (tuple, list))
    sizes = list(args[start] if packed else args[start:])
    if isinstance(sizes[dim], int) and sizes[dim] > 0:
        sizes[dim] //= devices
    return (*args[:start], tuple(sizes)) if packed else (*args[:start], *sizes)


def _require_fitting(graph: fx.GraphModule, plan: TensorPlan, mesh: DeviceMesh) -> None:
    if mesh.ndim != 1 or mesh.size() != plan.devices:
        raise PlanError(
            f"the plan is for {plan.devices} devices in one dimension, and the mesh has {tuple(mesh.shape)}: pass one "
            "dimension of it, such as mesh['tensor'], or make a plan for its size"
        )
    if any(isinstance(module, ReversibleRegion) for module in graph.modules()):
        raise PlanError("this graph is fused already: call tensor_parallel first, then fuse_regions on its result")
    if not {node for group in plan.groups for node in group.nodes} <= set(graph.graph.nodes):
        raise PlanError("this plan was made for another graph: tensor_parallel takes the graph that tensor_plan took")


def _require_local_shapes(
    before: fx.GraphModule, after: fx.GraphModule, plan: TensorPlan, tokens: Mapping[fx.Node, int]
) -> None:
    """Compare the sizes of every node with those that the plan foresees."""
    dims = {**tokens, **{node: dim for group in plan.groups for node, dim in group.dims.items()}}
    found = {node.name: node for node in after.graph.nodes}
    for node in before.graph.nodes:
        wanted = [list(value.shape) for value in _tensors(node)]
        for sizes in wanted if node in dims else ():
            sizes[dims[node]] //= plan.devices
        local = [list(value.shape) for value in _tensors(found[node.name])]
        if wanted != local:
            raise PlanError(
                f"node {node.name} ({node.target}) has the sizes {local} on one of {plan.devices} devices, expected "
                f"{wanted}: its call names a size that tensor_parallel cannot divide; take its Linears out of the plan"
            )


def _tensors(node: fx.Node) -> Sequence[Tensor]:
    value = node.meta.get("val")
    several = value if isinstance(value, (tuple, list)) else (value,)
    return [item for item in several if isinstance(item, Tensor)]
