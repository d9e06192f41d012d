"""What do the devices of a tensor-parallel training step tell each other, and what does each keep?

Collectives are counted by PyTorch's CommDebugMode. `Megatron` is the usual plan for `parallelize_module`, written by
hand; the others are derived from the graph. Saved bytes are those of one device, as in `kept_memory.py`; of DTensors,
whose storages have global sizes, they are not known.

    torchrun --nproc-per-node 2 benchmarks/communication.py
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from common import Shape, parser, report, shape_of
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode

import bwsk_fx
from bwsk_fx import parallel
from bwsk_fx.measure import measure

QUESTION = "communication"
MEGATRON = {
    "vit.layers.*.attention.q_proj": ColwiseParallel,
    "vit.layers.*.attention.k_proj": ColwiseParallel,
    "vit.layers.*.attention.v_proj": ColwiseParallel,
    "vit.layers.*.attention.o_proj": RowwiseParallel,
    "vit.layers.*.mlp.fc1": ColwiseParallel,
    "vit.layers.*.mlp.fc2": RowwiseParallel,
}


class Moved(TorchDispatchMode):
    """Sums the bytes that enter all-reduces."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            # Its own operators come by once more, on local tensors.
            return NotImplemented
        if func is torch.ops._c10d_functional.all_reduce.default:
            self.bytes += args[0].nbytes
        return func(*args, **(kwargs or {}))


@contextmanager
def counted(row: dict[str, Any], name: str) -> Iterator[None]:
    """Count the all-reduces in a block of code, and add their bytes up."""
    with CommDebugMode() as mode, Moved() as moved:
        # It tracks modules with hooks of its own and loses its place where a module is called twice, as dropout is.
        mode.advanced_module_tracker.__exit__()
        yield
    row[name] = mode.get_total_counts()
    row["moved MiB"] = row.get("moved MiB", 0.0) + moved.bytes / 2**20


def figures(make: Callable[[], nn.Module], shape: Shape, device: str) -> dict[str, Any]:
    model, inputs, row = make(), shape.inputs(device), {}
    with torch.autocast(device, shape.dtype or torch.bfloat16, enabled=shape.dtype is not None):
        # Regions plan themselves in their first step.
        model(**inputs).loss.backward()
        with counted(row, "forward"):
            loss = model(**inputs).loss
    with counted(row, "backward"):
        loss.backward()
    local = not any(isinstance(parameter, DTensor) for parameter in model.parameters())
    row["kept MiB"] = measure(model, inputs, shape.dtype).saved_bytes / 2**20 if local else None
    return row


def variants(shape: Shape, device: str, mesh: DeviceMesh) -> dict[str, Callable[[], nn.Module]]:
    def planned() -> tuple[torch.fx.GraphModule, parallel.TensorPlan]:
        with torch.autocast(device, shape.dtype or torch.bfloat16, enabled=shape.dtype is not None):
            graph = bwsk_fx.capture(shape.model(device), shape.inputs(device))
        return graph, parallel.tensor_plan(graph, mesh.size())

    def by_hand() -> nn.Module:
        return parallelize_module(shape.model(device), mesh, {path: style() for path, style in MEGATRON.items()})

    def derived() -> nn.Module:
        return parallelize_module(shape.model(device), mesh, planned()[1])

    def rewritten() -> torch.fx.GraphModule:
        return parallel.tensor_parallel(*planned(), mesh)

    return {
        "Megatron": by_hand,
        "derived plan": derived,
        "rewritten graph": rewritten,
        "regions, budget 0": lambda: bwsk_fx.fuse_regions(rewritten(), budget=0.0),
        "regions, budget 0.2": lambda: bwsk_fx.fuse_regions(rewritten(), budget=0.2),
        "regions, smallest": lambda: bwsk_fx.fuse_regions(rewritten(), tier="smallest"),
    }


def figure(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def main() -> None:
    options = parser(__doc__, Shape(layers=4, hidden=192, batch=4, image=224, precision="fp32")).parse_args()
    device = torch.device(options.device).type
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    shape, rows = shape_of(options), []
    for name, make in variants(shape, device, mesh).items():
        row = figures(make, shape, device)
        per_block = {f"{way} per block": row.pop(way) / shape.layers for way in ("forward", "backward")}
        rows.append({"variant": name, "devices": mesh.size()} | per_block | row)
    if dist.get_rank() == 0:
        columns: dict[str, Callable[[Any], str]] = dict.fromkeys(rows[0], figure)
        report(QUESTION, options, rows, columns | {"variant": str, "devices": str})
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
