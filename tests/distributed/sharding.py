"""FSDP2 as it is used: accumulated and clipped gradients, half precision, accelerate, and what regions refuse."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from steps import DEVICE, Named, backward, batch, full, over_ranks, program_ran, reference, refusal, vit
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

import bwsk_fx
from bwsk_fx import parallel
from bwsk_fx.measure import saved_for_backward

STEPS = 3
SINGLE = torch.float32
UNITS = ("root", "blocks")
Weights = dict[str, Tensor]


def shard(model: nn.Module, unit: str, mode: str = "reversible", fsdp: Any = None, **plan: Any) -> nn.Module:
    """Put a model into a mode and shard it, in one group of parameters or a group per block."""
    if unit == "blocks":
        dtype = next(model.parameters()).dtype
        return parallel.fully_shard_blocks(model, batch(0, dtype), mode, fsdp=fsdp, **plan)
    return fully_shard(bwsk_fx.apply(model, mode, **plan), **(fsdp or {}))


def share(inputs: Named, parts: int = 1, part: int = 0) -> Named:
    """Return this process's samples, or a part of them."""
    mine = {name: tensor.chunk(dist.get_world_size())[dist.get_rank()] for name, tensor in inputs.items()}
    return {name: tensor.chunk(parts)[part] for name, tensor in mine.items()}


def regions(model: nn.Module) -> int:
    return sum(program_ran(state.rewritten) for one in model.modules() if (state := bwsk_fx.applied(one)))


# Accumulated and clipped gradients


def learn(
    model: nn.Module, step_loss: Callable[[Named], Tensor], wrap: Any = lambda one: one
) -> tuple[Tensor, Weights]:
    """Take steps with clipped gradients; return the losses and the whole weights after them."""
    optimizer = wrap(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        losses.append(step_loss(batch(step, SINGLE)))
        # Smaller than the gradient is.
        assert torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1) > 0.1
        optimizer.step()
    return torch.stack(losses), {name: full(name, one.detach()).clone() for name, one in model.named_parameters()}


def accumulated(model: nn.Module, inputs: Named) -> Tensor:
    """Run two micro-batches, of which the second one reduces the gradients; evaluate before them."""
    with torch.no_grad():
        model(**share(inputs))
    total = torch.zeros((), device=DEVICE)
    for part in range(2):
        model.set_requires_gradient_sync(part == 1)
        loss = model(**share(inputs, 2, part)).loss / 2
        loss.backward()
        total += loss.detach()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def distance(found: tuple[Tensor, Weights], wanted: tuple[Tensor, Weights]) -> dict[str, float]:
    assert found[1].keys() == wanted[1].keys()
    weights = max((found[1][name] - weight).abs().max().item() for name, weight in wanted[1].items())
    return {
        "loss_error": over_ranks((found[0] - wanted[0]).abs().max().item()),
        "weight_error": over_ranks(weights),
    }


def alone() -> tuple[Tensor, Weights]:
    model = vit(SINGLE)
    return learn(model, lambda inputs: backward(model, inputs).detach())


def as_one_process(unit: str, reshard: bool) -> dict[str, Any]:
    model = shard(vit(SINGLE), unit, fsdp={"reshard_after_forward": reshard}, budget=0.2)
    found = learn(model, partial(accumulated, model))
    return distance(found, alone()) | {"regions": regions(model)}


# Half precision


def gradients(model: nn.Module) -> Weights:
    inputs = share(batch(0, SINGLE))
    backward(model, inputs)
    return {name: full(name, one.grad).clone() for name, one in model.named_parameters()}


def in_half_precision(unit: str, reshard: bool) -> dict[str, Any]:
    """Compare gradients with those of FSDP2 without regions, and both with float64."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=SINGLE)
    fsdp = {"reshard_after_forward": reshard, "mp_policy": policy}
    model = shard(vit(SINGLE), unit, fsdp=fsdp, tier="exact")
    exact, plain = gradients(model), gradients(shard(vit(SINGLE), unit, "conventional", fsdp))
    rounded = gradients(shard(vit(SINGLE), unit, fsdp=fsdp, budget=0.2))
    _, wanted = reference(torch.float64)[0]
    error, usual = (
        max(((found[name].double() - one).norm() / floor(one, wanted)).item() for name, one in wanted.items())
        for found in (rounded, plain)
    )
    same = all(torch.equal(exact[name], one) for name, one in plain.items())
    return {"same": same, "rounded": error, "plain": usual, "regions": regions(model)}


def floor(gradient: Tensor, all_of_them: Weights) -> Tensor:
    """Softmax makes the gradient of a key's bias zero but for rounding."""
    return torch.maximum(gradient.norm(), 1e-3 * max(one.norm() for one in all_of_them.values()))


# Bytes


def kept(unit: str, reshard: bool) -> dict[str, Any]:
    """Measure what a process keeps beside what the same share of the batch keeps without FSDP2."""
    inputs = share(batch(0, SINGLE))
    make = partial(vit, SINGLE, num_hidden_layers=1)
    whole = make()
    if unit == "blocks":
        parallel.apply_to_blocks(whole, batch(0, SINGLE), budget=0.2)
    else:
        bwsk_fx.apply(whole, budget=0.2)
    model = shard(make(), unit, fsdp={"reshard_after_forward": reshard}, budget=0.2)
    found, wanted = saved_for_backward(model, inputs), saved_for_backward(whole, inputs)
    planned = [
        [state.rewritten for one in each.modules() if (state := bwsk_fx.applied(one))] for each in (model, whole)
    ]
    plans = [sum(bwsk_fx.explain_saved(graph).kept_bytes for graph in graphs) for graphs in planned]
    return {"kept": found, "wanted": wanted, "eager": saved_for_backward(make(), inputs), "planned": plans}


# accelerate


def with_accelerate(unit: str) -> dict[str, Any]:
    """Let `Accelerator.prepare` load and shard as it does on GPUs: it looks for FSDP nowhere else, so it is told."""
    from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
    from accelerate.state import PartialState

    policy = {"auto_wrap_policy": "no_wrap"}
    if unit == "blocks":
        policy = {"auto_wrap_policy": "transformer_based_wrap", "transformer_cls_names_to_wrap": ["ViTLayer"]}
    accelerator = Accelerator(cpu=DEVICE == "cpu")
    states = (PartialState(), accelerator.state)
    before = accelerator.state.distributed_type
    for state in states:
        state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, **policy)
    try:
        model = vit(SINGLE)
        if unit == "blocks":
            parallel.apply_to_blocks(model, batch(0, SINGLE), budget=0.2)
        else:
            bwsk_fx.apply(model, budget=0.2)
        return prepared(accelerator, model)
    finally:
        for state in states:
            state.distributed_type = before


def prepared(accelerator: Any, model: nn.Module) -> dict[str, Any]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model, optimizer = accelerator.prepare(model, optimizer)
    assert accelerator.is_fsdp2 and isinstance(model, FSDPModule)
    found = learn(model, partial(accumulated, model), lambda _: optimizer)
    return distance(found, alone()) | {"regions": regions(model)}


# What is refused


def step(model: nn.Module) -> None:
    backward(model, share(batch(0)))


def evaluate(model: nn.Module) -> None:
    with torch.no_grad():
        model(**share(batch(0)))


def blocks_inside() -> dict[str, Any]:
    model = bwsk_fx.apply(shard(vit(), "blocks", "conventional"))
    return refusal(partial(step, model))


def blocks_after_a_step() -> dict[str, Any]:
    model = bwsk_fx.apply(vit())
    step(model)
    for block in model.vit.layers:
        fully_shard(block, reshard_after_forward=False)
    fully_shard(model, reshard_after_forward=False)
    # From here on the blocks' parameters are whole, and their graph is there.
    evaluate(model)
    return refusal(partial(step, model))


def gathered_by_an_evaluation() -> dict[str, Any]:
    """The images need no gradient, so that FSDP2 puts no autograd Function around what it has gathered."""
    model = bwsk_fx.apply(vit())
    fully_shard(model.vit.embeddings, reshard_after_forward=False)
    fully_shard(model)
    evaluate(model)
    return refusal(partial(step, model))


def inside_a_block() -> dict[str, Any]:
    model = parallel.apply_to_blocks(vit(), batch(0))
    fully_shard(model.vit.layers[1].mlp)
    fully_shard(model)
    return refusal(partial(step, model))


def around_the_hooks() -> dict[str, Any]:
    model = shard(vit(), "root")
    step(model)
    return refusal(lambda: model.forward(**share(batch(0))))


def flattened() -> dict[str, Any]:
    """FSDP1."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(bwsk_fx.apply(vit()), device_id=torch.device(DEVICE))
    return refusal(partial(step, model))


EACH = tuple(product(UNITS, (True, False)))
HOW = {True: "reshard", False: "gathered"}
OF_ALL: dict[str, Callable[[], dict[str, Any]]] = {
    **{f"fsdp-{unit}-{HOW[how]}-accumulated-regions": partial(as_one_process, unit, how) for unit, how in EACH},
    **{f"fsdp-{unit}-{HOW[how]}-half-regions": partial(in_half_precision, unit, how) for unit, how in EACH},
    **{f"fsdp-{unit}-{HOW[how]}-kept": partial(kept, unit, how) for unit, how in EACH},
}
FEW = ("fsdp-root-reshard-accumulated-regions", "fsdp-blocks-gathered-half-regions", "fsdp-blocks-reshard-kept")
SHARDED: dict[str, Callable[[], dict[str, Any]]] = {
    **{name: OF_ALL[name] for name in FEW},
    "fsdp-accelerate-blocks-accumulated-regions": partial(with_accelerate, "blocks"),
    "fsdp-accelerate-root-refusal": lambda: refusal(partial(with_accelerate, "root")),
    "fsdp-blocks-refusal": blocks_inside,
    "fsdp-late-blocks-refusal": blocks_after_a_step,
    "fsdp-evaluated-refusal": gathered_by_an_evaluation,
    "fsdp-inner-refusal": inside_a_block,
    "fsdp-forward-refusal": around_the_hooks,
    "fsdp-flat-refusal": flattened,
}
MORE = {name: scenario for name, scenario in OF_ALL.items() if name not in FEW}
