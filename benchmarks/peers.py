"""The ways to train a ViT that `pareto.py` compares: eager execution, bwsk-fx, and its peers in PyTorch and papers.

Every variant is built from a copy of one model and trains the same weights; `memory_sharing` has the one exception.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from common import checkpointed
from memory_sharing import share_memory
from torch import Tensor, fx, nn
from torch._dynamo import lookup_backend
from torch._functorch import config as functorch_config
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext, create_selective_checkpoint_contexts
from transformers import ViTForImageClassification

import bwsk_fx
from bwsk_fx.measure import saved_for_backward

FLOOR = float("inf")
MEMORY_BUDGETS = (1.0, 0.5, 0.25, 0.0)
WITH_INVERSES: dict[str, Any] = {"faith": "rounded"}
WITHOUT_INVERSES: dict[str, Any] = {"faith": "rounded", "inverses": False}
OURS: dict[str, dict[str, Any]] = {
    "bwsk-fx": WITH_INVERSES,
    "bwsk-fx without inverses": WITHOUT_INVERSES,
    "bwsk-fx by Inductor": {**WITH_INVERSES, "compiler": "inductor"},
}

_ATTENTION = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)
INTENSIVE = frozenset(getattr(torch.ops.aten, name).default for name in ("mm", "addmm", "bmm", "baddbmm", *_ATTENTION))

Build = Callable[[ViTForImageClassification], nn.Module]


@dataclass(frozen=True)
class Variant:
    """One way to train the model.

    Attributes:
        method: what it is; the points of one method make one line in the plot.
        setting: which point of the method; empty where there is only one.
        build: rewrites the model that it is given, in place, and returns what to call.
        policy: the policy of selective checkpointing, whose cache PyTorch's hooks on saved tensors do not see.
        is_compiled: whether Inductor has to work, inside whose code a dispatch mode does not see allocations.
        note: what a reader of its figures has to know.
    """

    method: str
    setting: str
    build: Build
    policy: MatmulPolicy | None = None
    is_compiled: bool = False
    note: str = ""

    @property
    def name(self) -> str:
        """Method and setting."""
        return f"{self.method}, {self.setting}" if self.setting else self.method

    def applied_to(self, model: ViTForImageClassification) -> nn.Module:
        """Build the variant from a copy of `model`."""
        return self.build(copy.deepcopy(model))

    def saved_bytes(self, model: nn.Module, inputs: dict[str, Tensor], dtype: torch.dtype | None) -> int:
        """Bytes that a forward pass leaves for the backward pass, a checkpoint's cache included."""
        saved = saved_for_backward(model, inputs, dtype)
        return saved if self.policy is None else saved + self.policy.cached_by(lambda: _forward(model, inputs, dtype))


class MatmulPolicy:
    """Policy of selective checkpointing: keep the outputs of matrix products and attention, run the rest again."""

    def __init__(self) -> None:
        self._cached = 0

    def __call__(
        self, context: SelectiveCheckpointContext, operator: torch._ops.OpOverload, *args: Any, **kwargs: Any
    ) -> CheckpointPolicy:
        """Decide about one operator."""
        if operator not in INTENSIVE:
            return CheckpointPolicy.PREFER_RECOMPUTE
        if not context.is_recompute:
            # Before torch 2.12 a policy is asked first, and the operator runs afterwards.
            result = getattr(context, "op_output", None)
            result = _shapes_of(operator, args, kwargs) if result is None else result
            outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
            storages = {output.untyped_storage()._cdata: output.untyped_storage().nbytes() for output in outputs}
            self._cached += sum(storages.values())
        return CheckpointPolicy.MUST_SAVE

    def cached_by(self, forward: Callable[[], None]) -> int:
        """Bytes that checkpoints cache in one call of `forward`."""
        before = self._cached
        forward()
        return self._cached - before


def _shapes_of(operator: torch._ops.OpOverload, args: Any, kwargs: Any) -> Any:
    """What an operator would return, as tensors without elements."""
    return operator(*tree_map_only(Tensor, _without_elements, args), **tree_map_only(Tensor, _without_elements, kwargs))


def _without_elements(tensor: Tensor) -> Tensor:
    return tensor.to("meta")


class MemoryBudget:
    """A `torch.compile` backend that partitions under an activation memory budget.

    One object per budget: Dynamo shares compiled code between equal models under one backend, but not between two.
    """

    def __init__(self, budget: float, backend: str = "inductor") -> None:
        self.budget, self.backend = budget, backend

    def __call__(self, graph: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        """Compile a graph; its joint forward and backward graph is partitioned before this returns."""
        with functorch_config.patch(activation_memory_budget=self.budget):
            return lookup_backend(self.backend)(graph, inputs)


def variants(budgets: Sequence[float], *, fuse: bool) -> Iterator[Variant]:
    """Yield every variant, eager first.

    Args:
        budgets: of bwsk-fx.
        fuse: whether Inductor fuses the formulas of memory sharing, as its authors' CUDA kernels do.
    """
    yield Variant("eager", "", _unchanged)
    for method, options in OURS.items():
        for budget in budgets:
            build = partial(reversible, budget=budget, **options)
            yield Variant(method, budget_label(budget), build, is_compiled="compiler" in options)
    for budget in budgets:
        yield Variant("bwsk-fx backend", budget_label(budget), partial(planned, budget=budget), is_compiled=True)
    yield Variant("checkpoint per block", "", checkpointed)
    policy = MatmulPolicy()
    yield Variant("selective checkpoint", "", partial(selective, policy=policy), policy=policy)
    for memory in MEMORY_BUDGETS:
        yield Variant("torch.compile", f"{memory:g}", partial(compiled, budget=memory), is_compiled=True)
    note = "" if fuse else "its elementwise formulas are not fused, as they are in the paper"
    for setting, approximate in (("MS-LN", False), ("MS-LN + ReGELU2", True)):
        yield Variant("memory sharing", setting, partial(share_memory, approximate=approximate, fuse=fuse), note=note)


def methods() -> tuple[str, ...]:
    """Name the methods, eager first."""
    return tuple(dict.fromkeys(variant.method for variant in variants([0.0], fuse=False)))


def budget_label(budget: float) -> str:
    """Name a budget of bwsk-fx; the infinite one is the floor."""
    return "floor" if budget == FLOOR else f"{budget:g}"


def reversible(model: ViTForImageClassification, budget: float, **options: Any) -> nn.Module:
    """Apply bwsk-fx."""
    return bwsk_fx.apply(model, "reversible", budget=budget, **options)


def planned(model: ViTForImageClassification, budget: float) -> ViTForImageClassification:
    """Compile the whole model, planned by bwsk-fx."""
    model.compile(backend="bwsk_fx", options={"budget": budget}, fullgraph=True, dynamic=False)
    return model


def selective(model: ViTForImageClassification, policy: MatmulPolicy) -> ViTForImageClassification:
    """Checkpoint every block, but keep what `policy` says."""
    return checkpointed(model, context_fn=partial(create_selective_checkpoint_contexts, policy))


def compiled(model: ViTForImageClassification, budget: float, backend: str = "inductor") -> ViTForImageClassification:
    """Compile the whole model, without graph breaks, under an activation memory budget from 0 to 1."""
    # Without fullgraph Dynamo runs in eager mode, silently, what it cannot compile.
    model.compile(backend=MemoryBudget(budget, backend), fullgraph=True, dynamic=False)
    return model


def inductor_problem(device: str) -> str | None:
    """Why Inductor cannot compile for a device; None where it can."""
    try:
        torch.compile(lambda x: x.sin() + 1.0, fullgraph=True)(torch.ones(8, device=device))
    except (torch._dynamo.exc.TorchDynamoException, RuntimeError) as error:
        return f"Inductor cannot compile for {device}: {str(error).strip().splitlines()[0]}"
    return None


def _unchanged(model: ViTForImageClassification) -> nn.Module:
    return model


def _forward(model: nn.Module, inputs: dict[str, Tensor], dtype: torch.dtype | None) -> None:
    device = next(iter(inputs.values())).device.type
    with torch.autocast(device, dtype=dtype, enabled=dtype is not None):
        model(**inputs)
