"""What `worker.py` can run: each way to share work out among processes, with regions and without."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from sharding import SHARDED
from steps import (
    DEVICE,
    Named,
    Step,
    backward,
    batch,
    compared,
    errors,
    full,
    program_ran,
    refusal,
    train,
    vit,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import Schedule1F1B, ScheduleGPipe
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import bwsk_fx
from bwsk_fx import parallel

# The plan by hand is the benchmark's.
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from communication import MEGATRON

# Batch: DDP and FSDP2


def on_my_share(model: nn.Module, inputs: Named) -> Tensor:
    """Run on this process's share of the batch; return the loss of all of it."""
    rank, size = dist.get_rank(), dist.get_world_size()
    loss = backward(model, {name: tensor.chunk(size)[rank] for name, tensor in inputs.items()}).detach().clone()
    dist.all_reduce(loss)
    return loss / size


def data_parallel(make: Callable[[nn.Module], nn.Module], dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    model = make(vit(dtype))
    figures: dict[str, Any] = errors(train(model, partial(on_my_share, model), full, dtype), dtype)
    return figures | {"regions": regions_that_ran(model)}


def regions_that_ran(model: nn.Module) -> int:
    graphs = [state.rewritten for module in model.modules() if (state := bwsk_fx.applied(module))]
    return sum(program_ran(graph) for graph in [*graphs, model])


def sharded_root(model: nn.Module, order: str, **options: Any) -> nn.Module:
    if order == "before":
        bwsk_fx.apply(model, budget=0.2)
    fully_shard(model, **options)
    return bwsk_fx.apply(model, budget=0.2) if order == "after" else model


def sharded_blocks(model: nn.Module, mode: str, **options: Any) -> nn.Module:
    dtype = next(model.parameters()).dtype
    return parallel.fully_shard_blocks(model, batch(0, dtype), mode, fsdp=options)


def with_accelerate(model: nn.Module) -> nn.Module:
    from accelerate import Accelerator

    return Accelerator(cpu=DEVICE == "cpu").prepare(bwsk_fx.apply(model))


def as_accelerate_shards(model: nn.Module) -> nn.Module:
    """Shard as `Accelerator.prepare` does with FSDP2, which it is never asked for on a CPU."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["ViTLayer"],
        cpu_ram_efficient_loading=False,
    )
    accelerator = Accelerator(cpu=DEVICE == "cpu")
    accelerator.state.fsdp_plugin = plugin
    return fsdp2_prepare_model(accelerator, parallel.apply_to_blocks(model, batch(0)))


# Tensors


def line() -> DeviceMesh:
    return init_device_mesh(DEVICE, (dist.get_world_size(),))


def planned(dtype: torch.dtype = torch.float64, **options: Any) -> tuple[torch.fx.GraphModule, parallel.TensorPlan]:
    graph = bwsk_fx.capture(vit(dtype), batch(0, dtype))
    return graph, parallel.tensor_plan(graph, dist.get_world_size(), **options)


def with_modules(plan: dict[str, Any]) -> nn.Module:
    return parallelize_module(vit(), line(), plan)


def with_graph(dtype: torch.dtype = torch.float64, sequence: bool = False, **options: Any) -> nn.Module:
    graph = parallel.tensor_parallel(*planned(dtype), line(), sequence_parallel=sequence)
    return bwsk_fx.fuse_regions(graph, **options) if options else graph


def tensor_parallel(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    model = make()
    counts = collectives(model, batch(0, dtype))
    shards = model.meta["tensor_parallel"] if isinstance(model, torch.fx.GraphModule) else None
    whole = full if shards is None else shards.whole
    return (
        errors(train(model, partial(backward, model), whole, dtype), dtype) | counts | {"regions": program_ran(model)}
    )


def collectives(model: nn.Module, inputs: Named) -> dict[str, int]:
    """Count the collectives of a step by pass and kind, after one in which regions were planned."""
    backward(model, inputs)
    with counting() as forward_counts:
        loss = model(**inputs).loss
    with counting() as backward_counts:
        loss.backward()
    model.zero_grad()
    passes = {"forward": forward_counts, "backward": backward_counts}
    return {f"{name} {kind}": count for name, counts in passes.items() for kind, count in counts.items()}


@contextmanager
def counting() -> Iterator[dict[str, int]]:
    counts: dict[str, int] = {}
    with CommDebugMode() as mode:
        # It tracks modules with hooks of its own and loses its place where a module is called twice, as dropout is.
        mode.advanced_module_tracker.__exit__()
        yield counts
    counts.update({str(kind).rpartition(".")[2]: count for kind, count in mode.get_comm_counts().items()})


def grouped_queries() -> dict[str, Any]:
    """A language model with two queries per key, rotary positions and gated Linears."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
    config = LlamaConfig(vocab_size=50, num_hidden_layers=2, use_cache=False, **sizes)
    tokens = torch.arange(4 * 8, device=DEVICE).view(4, 8) % 50
    return one_step(LlamaForCausalLM(config), {"input_ids": tokens, "labels": tokens})


class Numbers(nn.Module):
    """Attention whose code has the number of heads in it."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        q, k, v = (layer(x).view(-1, 4, 2, 4).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return {"loss": self.o(mixed.reshape(-1, 4, 8)).sin().sum()}


def heads_as_numbers() -> dict[str, Any]:
    torch.manual_seed(0)
    return one_step(Numbers(), {"x": torch.randn(3, 4, 8, dtype=torch.float64).to(DEVICE)})


def one_step(model: nn.Module, inputs: Named) -> dict[str, Any]:
    """Compare a step in shards and in parts of the tokens."""
    model = model.to(DEVICE, torch.float64).train()
    wanted = backward(model, inputs), {name: one.grad.clone() for name, one in model.named_parameters()}
    graph = bwsk_fx.capture(model, inputs)
    plan = parallel.tensor_plan(graph, dist.get_world_size())
    local = parallel.tensor_parallel(graph, plan, line(), sequence_parallel=True)
    local = bwsk_fx.fuse_regions(local, tier="exact", granularity="block" if len(plan) > 4 else "whole")
    model.zero_grad()
    loss = backward(local, inputs)
    whole = local.meta["tensor_parallel"].whole
    found = loss, {name: whole(name, one.grad) for name, one in local.named_parameters()}
    return compared([found], [wanted]) | {"regions": program_ran(local), "sharded": len(plan)}


def saved_whole() -> dict[str, Any]:
    found, wanted = parallel.full_state_dict(with_graph(budget=0.0)), vit().state_dict()
    same = list(found) == list(wanted) and all(torch.equal(found[name], wanted[name]) for name in wanted)
    return {"same": same}


def mesh_of_other_size() -> dict[str, Any]:
    graph, _ = planned()
    return refusal(lambda: parallel.tensor_parallel(graph, parallel.tensor_plan(graph, 1), line()))


def tokens_that_do_not_divide() -> dict[str, Any]:
    inputs = {"pixel_values": torch.zeros(2, 3, 16, 16, dtype=torch.float64, device=DEVICE)}
    graph = bwsk_fx.capture(vit(image_size=16), inputs)
    plan = parallel.tensor_plan(graph, dist.get_world_size())
    return refusal(lambda: parallel.tensor_parallel(graph, plan, line(), sequence_parallel=True))


def fused_too_early() -> dict[str, Any]:
    graph, plan = planned()
    return refusal(lambda: parallel.tensor_parallel(bwsk_fx.fuse_regions(graph), plan, line()))


# Layers


def pipeline(
    schedule: Callable[..., Any], *, regions: bool, loss_in_graph: bool = False, dtype: torch.dtype = torch.float64
) -> dict[str, Any]:
    inputs = batch(0, dtype)
    if not loss_in_graph:
        del inputs["labels"]
    stages = parallel.pipeline_stages(vit(dtype), dist.get_world_size(), inputs)
    rank = dist.get_rank()
    graph = bwsk_fx.fuse_regions(stages[rank].graph, budget=0.1) if regions else stages[rank].graph
    loss_of = (lambda output, target: output) if loss_in_graph else F.cross_entropy
    run = stepping(schedule(stages.of_rank(DEVICE, submodule=graph), 4, loss_fn=loss_of), stages, rank)
    steps = gathered(train(graph, run, dtype=dtype))
    sent = max(stage.sent_bytes for stage in stages)
    return errors(steps, dtype) | {"regions": program_ran(graph), "sent_bytes": sent}


def stepping(schedule: Any, stages: parallel.PipelineStages, rank: int) -> Callable[[Named], Tensor]:
    def run(inputs: Named) -> Tensor:
        losses: list[Tensor] = []
        given = stages.inputs_of(rank, inputs)
        schedule.step(**given, target=inputs["labels"], losses=losses, return_outputs=False)
        return torch.stack(losses).mean() if losses else torch.zeros((), device=DEVICE)

    return run


def gathered(steps: list[Step], group: dist.ProcessGroup | None = None) -> list[Step]:
    """Bring the loss of the last stage and the gradients of all stages together."""
    everywhere: list[Any] = [None] * dist.get_world_size(group)
    local = [(loss.cpu(), {name: value.cpu() for name, value in gradients.items()}) for loss, gradients in steps]
    dist.all_gather_object(everywhere, local, group=group)
    found = []
    for parts in zip(*everywhere, strict=True):
        names = [name for _, gradients in parts for name in gradients]
        assert len(names) == len(set(names)), "two stages have one parameter"
        gradients = {name: value.to(DEVICE) for _, part in parts for name, value in part.items()}
        found.append((parts[-1][0].to(DEVICE), gradients))
    return found


# Two dimensions of devices


def square() -> tuple[DeviceMesh, DeviceMesh]:
    mesh = init_device_mesh(DEVICE, (2, 2), mesh_dim_names=("outer", "tensor"))
    return mesh["outer"], mesh["tensor"]


def both(make: Callable[[torch.fx.GraphModule, DeviceMesh], nn.Module]) -> dict[str, Any]:
    """Share the batch out along one dimension, heads and features along the other."""
    outer, tensor = square()
    graph = bwsk_fx.capture(vit(), batch(0))
    local = parallel.tensor_parallel(graph, parallel.tensor_plan(graph, tensor.size()), tensor)
    local = bwsk_fx.fuse_regions(local, budget=0.1)
    model, shards = make(local, outer), local.meta["tensor_parallel"]

    def run(inputs: Named) -> Tensor:
        loss = on_share_of(outer, model, inputs)
        dist.all_reduce(loss, group=outer.get_group())
        return loss / outer.size()

    def whole(name: str, gradient: Tensor) -> Tensor:
        return shards.whole(name.removeprefix("module."), full(name, gradient))

    return errors(train(model, run, whole), torch.float64) | {"regions": program_ran(local)}


def on_share_of(mesh: DeviceMesh, model: nn.Module, inputs: Named) -> Tensor:
    share = {name: tensor.chunk(mesh.size())[mesh.get_local_rank()] for name, tensor in inputs.items()}
    return backward(model, share).detach().clone()


def reduced(graph: nn.Module, mesh: DeviceMesh) -> nn.Module:
    return DistributedDataParallel(graph, process_group=mesh.get_group())


def sharded(graph: nn.Module, mesh: DeviceMesh) -> nn.Module:
    return fully_shard(graph, mesh=mesh)


def tensor_in_stages() -> dict[str, Any]:
    """Stages along one dimension, heads and features along the other."""
    outer, tensor = square()
    graph = bwsk_fx.capture(vit(), {"pixel_values": batch(0)["pixel_values"]})
    local = parallel.tensor_parallel(graph, parallel.tensor_plan(graph, tensor.size()), tensor)
    stages, rank = parallel.pipeline_stages(local, outer.size()), outer.get_local_rank()
    fused = bwsk_fx.fuse_regions(stages[rank].graph, budget=0.1)
    stage = stages.of_rank(DEVICE, outer.get_group(), submodule=fused)
    run = stepping(ScheduleGPipe(stage, 4, loss_fn=F.cross_entropy), stages, rank)
    steps = gathered(train(fused, run, local.meta["tensor_parallel"].whole), outer.get_group())
    return errors(steps, torch.float64) | {"regions": program_ran(fused)}


SINGLE = torch.float32
SCENARIOS: dict[str, Callable[[], dict[str, Any]]] = {
    "ddp": partial(data_parallel, DistributedDataParallel),
    "ddp-regions": partial(data_parallel, lambda model: DistributedDataParallel(bwsk_fx.apply(model))),
    "ddp-regions-float32": partial(
        data_parallel, lambda model: DistributedDataParallel(bwsk_fx.apply(model)), dtype=SINGLE
    ),
    "ddp-accelerate-regions": partial(data_parallel, with_accelerate),
    "fsdp-root-regions-before": partial(data_parallel, partial(sharded_root, order="before")),
    "fsdp-root-regions-after": partial(data_parallel, partial(sharded_root, order="after", reshard_after_forward=True)),
    "fsdp-blocks": partial(data_parallel, partial(sharded_blocks, mode="conventional")),
    "fsdp-blocks-regions": partial(data_parallel, partial(sharded_blocks, mode="reversible")),
    "fsdp-blocks-regions-float32": partial(
        data_parallel, partial(sharded_blocks, mode="reversible", reshard_after_forward=False), dtype=SINGLE
    ),
    "fsdp-accelerate-regions": partial(data_parallel, as_accelerate_shards),
    **SHARDED,
    "tensor-megatron": partial(
        tensor_parallel, lambda: with_modules({path: style() for path, style in MEGATRON.items()})
    ),
    "tensor-modules": partial(tensor_parallel, lambda: with_modules(planned()[1])),
    "tensor-graph": partial(tensor_parallel, with_graph),
    "tensor-regions": partial(tensor_parallel, partial(with_graph, budget=0.0)),
    "tensor-regions-smallest": partial(tensor_parallel, partial(with_graph, tier="smallest")),
    "tensor-regions-exact": partial(tensor_parallel, partial(with_graph, tier="exact")),
    "tensor-regions-float32": partial(tensor_parallel, partial(with_graph, SINGLE, budget=0.0), dtype=SINGLE),
    "tensor-sequence": partial(tensor_parallel, partial(with_graph, sequence=True)),
    "tensor-sequence-regions": partial(tensor_parallel, partial(with_graph, sequence=True, tier="smallest")),
    "tensor-llama-regions": grouped_queries,
    "tensor-numbers-regions": heads_as_numbers,
    "tensor-sequence-refusal": tokens_that_do_not_divide,
    "tensor-state-dict": saved_whole,
    "tensor-mesh-refusal": mesh_of_other_size,
    "tensor-fused-refusal": fused_too_early,
    "pipeline": partial(pipeline, ScheduleGPipe, regions=False),
    "pipeline-regions": partial(pipeline, ScheduleGPipe, regions=True),
    "pipeline-1f1b-loss-regions": partial(pipeline, Schedule1F1B, regions=True, loss_in_graph=True),
    "pipeline-regions-float32": partial(pipeline, Schedule1F1B, regions=True, dtype=SINGLE),
}
ON_FOUR: dict[str, Callable[[], dict[str, Any]]] = {
    "ddp-tensor-regions": partial(both, reduced),
    "fsdp-tensor-regions": partial(both, sharded),
    "pipeline-tensor-regions": tensor_in_stages,
}
