"""Training on several devices with PyTorch's distributed engine, derived from what a graph's axes allow."""

from bwsk_fx.parallel.data import apply_to_blocks, fully_shard_blocks
from bwsk_fx.parallel.flows import Group
from bwsk_fx.parallel.pipeline import PipelineStages, Stage, pipeline_stages
from bwsk_fx.parallel.rewrite import full_state_dict, tensor_parallel
from bwsk_fx.parallel.tensor import TensorPlan, tensor_plan

__all__ = [
    "Group",
    "PipelineStages",
    "Stage",
    "TensorPlan",
    "apply_to_blocks",
    "full_state_dict",
    "fully_shard_blocks",
    "pipeline_stages",
    "tensor_parallel",
    "tensor_plan",
]
