"""Normalisations: statistics that the operator yields anyway rebuild the input."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from bwsk_fx import _torch_private as private
from bwsk_fx.rules.arguments import Arguments
from bwsk_fx.rules.axis import AxisCall, Behaviour, Effect, along, axis_rule, mapped
from bwsk_fx.rules.axis_table import Extent, Layout
from bwsk_fx.rules.registry import Call, by_products, erases, labels, other_operand, preserves, unproven
from bwsk_fx.rules.sizes import elements
from bwsk_fx.rules.undo import Run, Undo
from bwsk_fx.verdict import NOTHING, OPERATOR, REFINED, Verdict, Witness, WitnessKind

_DOMAIN = "no scale is zero, or so small that the shift absorbs the scaled value"

# The shape in which the statistics are one per row, and its dimensions that are normalised.
Rows = Callable[[Arguments, Sequence[Any]], tuple[Sequence[Any], tuple[int, ...]]]


@dataclass(frozen=True)
class Form:
    """One normalisation y = (x - mean) rstd γ + β: what it normalises, and where its arguments are.

    Attributes:
        rows: Returns the shape in which each row has statistics of its own, and that shape's normalised dimensions.
        places: Positions of a function's arguments by name; a module has them as attributes.
        per_channel: Whether γ and β belong to dimension 1 instead of the last dimensions.
        centred: Whether the mean is taken off.
        whole_batch: Whether rows span the batch, so that the statistics are nothing per sample.
    """

    rows: Rows
    places: Mapping[str, int] = field(hash=False)
    per_channel: bool = True
    centred: bool = True
    whole_batch: bool = False

    def of(self, arguments: Arguments, name: str) -> Any:
        """Return an argument by its name; None where this form has no such argument."""
        return arguments.option(self.places[name], name) if name in self.places else None

    def view(self, value: Tensor, rank: int) -> Tensor:
        """Return γ, β or a running statistic so that it broadcasts against an operand of `rank` dimensions."""
        return value.view(-1, *[1] * (rank - 2)) if self.per_channel else value


def normalised(form: Form, call: Call, running: bool = False) -> Verdict:
    """Return the verdict of a normalisation: S with its statistics, or with none where they are `running` ones.

    Scales that are at hand are looked at: each zero among them erases what it scales.
    """
    if not call.is_dynamic(call.argument(0, "input")) or call.operands[0] is not call.argument(0, "input"):
        return unproven("what is normalised is static")
    names = ("weight", "bias", *(("running_mean", "running_var") if running else ()))
    others = tuple(value for value in (form.of(call, name) for name in names) if call.is_dynamic(value))
    if call.operands[0] in others:
        return unproven("it is scaled or shifted by itself")
    scales = call.static(form.of(call, "weight"))
    zeros = 0 if scales is None else int(scales.numel() - scales.count_nonzero())
    if scales is not None and zeros:
        total = call.elements()
        lost = None if total is None else total // scales.numel() * zeros
        return erases(f"{zeros} of its {scales.numel()} scales are zero", lost, confidence=REFINED)
    statistics = NOTHING if running else by_products(*_names(form), elements=_count(form, call))
    undo = Undo(partial(_rebuild, form, running), by_products=None if running else partial(_statistics, form))
    why = "running statistics make it a static affine map" if running else f"{' and '.join(_names(form))} rebuild it"
    confidence = REFINED if scales is not None or running else OPERATOR
    return preserves(why, _joined(others, statistics), confidence, undo=undo, domain=_DOMAIN)


def _names(form: Form) -> tuple[str, ...]:
    return ("mean", "rstd") if form.centred else ("rstd",)


def _joined(others: tuple[fx.Node, ...], statistics: Witness) -> Witness:
    """Return a witness of operands and statistics; it names both."""
    if not others:
        return statistics
    witness = other_operand(*others)
    known = witness.elements is not None and (statistics is NOTHING or statistics.elements is not None)
    count = (witness.elements or 0) + (statistics.elements or 0) if known else None
    size = (witness.bytes or 0) + (statistics.bytes or 0) if known else None
    return Witness(WitnessKind.OTHER_OPERAND, (*witness.names, *statistics.names), count, size)


def _count(form: Form, call: Call) -> int | None:
    """Return how many statistics there are per sample."""
    view, dims = form.rows(call, call.before.shape)
    total, width = call.elements(), math.prod(view[dim] for dim in dims)
    known = not form.whole_batch and isinstance(width, int) and width > 0
    return total // width * len(_names(form)) if known and total is not None else None


def _statistics(form: Form, run: Run) -> Mapping[str, Tensor]:
    """Return the mean and the reciprocal standard deviation of each row, as the fused kernels do."""
    value = run.argument(0, "input")
    view, dims = form.rows(run, value.shape)
    value = value.to(_compute(value)).reshape(view)
    eps = _eps(form, run)
    if not form.centred:
        return {"rstd": (value.square().mean(dims, keepdim=True) + eps).rsqrt()}
    variance, mean = torch.var_mean(value, dims, correction=0, keepdim=True)
    return {"mean": mean, "rstd": (variance + eps).rsqrt()}


def _rebuild(form: Form, running: bool, run: Run) -> Tensor:
    """Return x = (y - β) / (γ rstd) + mean."""
    before = run.before
    value = run.value
    value = value.to(_compute(before))
    weight, bias = form.of(run, "weight"), form.of(run, "bias")
    value = value if bias is None else value - form.view(bias, before.dim())
    value = value if weight is None else value / form.view(weight, before.dim())
    if running:
        mean, variance = (form.view(form.of(run, name), before.dim()) for name in ("running_mean", "running_var"))
        return value * (variance + _eps(form, run)).sqrt() + mean
    value = value.reshape(form.rows(run, before.shape)[0]) / run.by_products["rstd"]
    return (value + run.by_products["mean"] if form.centred else value).reshape(before.shape)


def _eps(form: Form, run: Run) -> float:
    eps = form.of(run, "eps")
    default = torch.finfo(run.before.dtype).eps if not form.centred else 1e-5
    return default if eps is None else eps


def _compute(value: Tensor) -> torch.dtype:
    return torch.promote_types(value.dtype, torch.float32)


# -- which rows -----------------------------------------------------------------------------------------------------


def _last_dims(arguments: Arguments, shape: Sequence[Any]) -> tuple[Sequence[Any], tuple[int, ...]]:
    normalized = arguments.option(1, "normalized_shape", ())
    count = len(normalized) if isinstance(normalized, (tuple, list, torch.Size)) else 1
    return shape, tuple(range(-count, 0))


def _channels(_: Arguments, shape: Sequence[Any]) -> tuple[Sequence[Any], tuple[int, ...]]:
    return shape, tuple(dim for dim in range(len(shape)) if dim != 1)


def _each_channel(_: Arguments, shape: Sequence[Any]) -> tuple[Sequence[Any], tuple[int, ...]]:
    return shape, tuple(range(2, len(shape)))


def _module_channels(arguments: Arguments, shape: Sequence[Any]) -> tuple[Sequence[Any], tuple[int, ...]]:
    """Rows of an InstanceNorm module, which also takes one sample without a batch dimension."""
    spatial = int(type(arguments.module).__name__[-2])
    return shape, tuple(range(-spatial, 0))


def _groups(place: int, name: str, arguments: Arguments, shape: Sequence[Any]) -> tuple[Sequence[Any], tuple[int, ...]]:
    groups = arguments.option(place, name)
    return (shape[0], groups, shape[1] // groups, *shape[2:]), tuple(range(2, len(shape) + 1))


# -- the operators --------------------------------------------------------------------------------------------------

_LAYER = Form(_last_dims, {"weight": 2, "bias": 3, "eps": 4}, per_channel=False)
_RMS = Form(_last_dims, {"weight": 2, "eps": 3}, per_channel=False, centred=False)
_GROUP = Form(partial(_groups, 1, "num_groups"), {"weight": 2, "bias": 3, "eps": 4})
_NATIVE_GROUP = Form(partial(_groups, 6, "group"), {"weight": 1, "bias": 2, "eps": 7})
_RUNNING_FIRST = {"running_mean": 1, "running_var": 2, "weight": 3, "bias": 4, "training": 5, "eps": 7}
_RUNNING_LAST = {"weight": 1, "bias": 2, "running_mean": 3, "running_var": 4, "training": 5, "eps": 7}
_WITHOUT_MODE = {"weight": 1, "bias": 2, "running_mean": 3, "running_var": 4, "eps": 6}
_WITHOUT_RUNNING = {"weight": 1, "bias": 2, "eps": 5}


@labels(nn.LayerNorm, F.layer_norm, torch.layer_norm, torch.native_layer_norm, atens="layer_norm native_layer_norm")
def layer_norm(call: Call) -> Verdict:
    """LayerNorm: mean and rstd undo it."""
    return normalised(_LAYER, call)


@labels(nn.RMSNorm, F.rms_norm, torch.rms_norm, *private.operators("_fused_rms_norm"), atens="rms_norm _fused_rms_norm")
def rms_norm(call: Call) -> Verdict:
    """RMSNorm: rstd undoes it."""
    return normalised(_RMS, call)


@labels(nn.GroupNorm, F.group_norm, torch.group_norm, atens="group_norm")
def group_norm(call: Call) -> Verdict:
    """GroupNorm: the mean and rstd of each group undo it."""
    return normalised(_GROUP, call)


@labels(torch.native_group_norm, atens="native_group_norm")
def native_group_norm(call: Call) -> Verdict:
    """The ATen form of GroupNorm, with arguments of its own."""
    return normalised(_NATIVE_GROUP, call)


@labels(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, F.batch_norm)
def batch_norm(call: Call) -> Verdict:
    """BatchNorm: the batch's statistics undo it in train mode, the running ones in eval mode."""
    form = Form(_channels, _RUNNING_FIRST, whole_batch=True)
    return _by_mode(form, call, call.option(5, "training", False))


@labels(torch.batch_norm, torch.native_batch_norm, *private.operators("_native_batch_norm_legit"))
@labels(atens="batch_norm native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_functional")
def native_batch_norm(call: Call) -> Verdict:
    """ATen forms of BatchNorm that are told their mode."""
    if isinstance(call.argument(3, "running_mean"), bool):  # an overload without running statistics
        return normalised(Form(_channels, _WITHOUT_RUNNING, whole_batch=True), call)
    return _by_mode(Form(_channels, _RUNNING_LAST, whole_batch=True), call, call.argument(5, "training"))


@labels(atens="_batch_norm_with_update _batch_norm_with_update_functional")
def training_batch_norm(call: Call) -> Verdict:
    """ATen forms of BatchNorm in train mode."""
    return normalised(Form(_channels, _WITHOUT_MODE, whole_batch=True), call)


@labels(atens="_batch_norm_no_update _native_batch_norm_legit_no_training")
def inference_batch_norm(call: Call) -> Verdict:
    """ATen forms of BatchNorm in eval mode."""
    return normalised(Form(_channels, _WITHOUT_MODE, whole_batch=True), call, running=True)


@labels(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
def instance_norm(call: Call) -> Verdict:
    """InstanceNorm: the mean and rstd of each channel undo it, or the running ones in eval mode."""
    batched = len(call.before.shape) == int(type(call.module).__name__[-2]) + 2
    if not batched and (call.module.affine or call.module.track_running_stats):
        return unproven("its scales belong to the first dimension of a sample without a batch dimension")
    return _by_mode(Form(_module_channels, _RUNNING_FIRST), call, call.module.training)


@labels(F.instance_norm)
def functional_instance_norm(call: Call) -> Verdict:
    """`F.instance_norm`, whose mode is an argument."""
    return _by_mode(Form(_each_channel, _RUNNING_FIRST), call, call.argument(5, "use_input_stats", True))


@labels(torch.instance_norm, atens="instance_norm")
def native_instance_norm(call: Call) -> Verdict:
    """`torch.instance_norm`, which has its scales first."""
    return _by_mode(Form(_each_channel, _RUNNING_LAST), call, call.argument(5, "use_input_stats"))


def _by_mode(form: Form, call: Call, training: Any) -> Verdict:
    if not isinstance(training, bool):
        return unproven("its mode is not a constant")
    return normalised(form, call, running=not training and form.of(call, "running_mean") is not None)


@labels(F.normalize)
def normalize(call: Call) -> Verdict:
    """Vectors of length one: each has lost its length. Norms of order zero count elements, and zeros stay zeros."""
    order, dims, eps = call.argument(1, "p", 2.0), call.argument(2, "dim", 1), call.argument(3, "eps", 1e-12)
    if order == 0:
        why = "dividing by the number of elements that are not zero changes none to zero"
        return preserves(why, confidence=REFINED, undo=Undo(_multiply_by_count))
    width = math.prod(_sizes(call.before, dims if isinstance(dims, (tuple, list)) else (dims,)))
    total = call.elements()
    # Shorter vectors than eps are divided by eps, and keep their length.
    if not isinstance(width, int) or width == 0 or total is None or eps > torch.finfo(call.before.dtype).eps:
        return erases("the length of each vector goes")
    # A length is a real number, which is half of a complex one.
    return erases("the length of each vector goes", total // width * (0.5 if call.before.is_complex() else 1))


def _multiply_by_count(run: Run) -> Tensor:
    counts = torch.linalg.vector_norm(run.output, 0, run.argument(2, "dim", 1), keepdim=True)
    return run.output * counts.clamp(min=run.argument(3, "eps", 1e-12))


def _sizes(value: Tensor, dims: Sequence[int]) -> list[Any]:
    return [value.shape[dim] for dim in dims] if value.dim() else [1]


@labels(*private.operators("_weight_norm"), atens="_weight_norm_interface")
def weight_norm(call: Call) -> Verdict:
    """Directions times lengths: v / |v| keeps no length of v."""
    direction, length = call.argument(0, "v"), call.argument(1, "g")
    if not call.is_dynamic(direction):
        return unproven("the lengths are dynamic and the directions are static")
    size = length.meta["val"] if isinstance(length, fx.Node) else length
    return erases("the length of each vector of the first operand goes", elements(size))


@labels(nn.LocalResponseNorm, nn.CrossMapLRN2d, F.local_response_norm)
def local_response_norm(call: Call) -> Verdict:
    """X (k + α m)^-β with the mean square m over neighbours, on its own proportional to x |x|^-2β for large x."""
    alpha, beta = call.option(2, "alpha", 1e-4), call.option(3, "beta", 0.75)
    if alpha > 0 and beta > 0.5:
        return erases(f"with β = {beta} a channel on its own rises and then falls again", confidence=REFINED)
    return unproven(f"with α = {alpha} and β = {beta} it may be one-to-one")


@labels(ops="renorm")
def renorm(_: Call) -> Verdict:
    """Vectors that are too long are cut to one length."""
    return erases("vectors that are longer than the limit become equally long")


@axis_rule(nn.LayerNorm, F.layer_norm, torch.layer_norm, nn.RMSNorm, F.rms_norm, torch.rms_norm)
@axis_rule(atens="native_layer_norm _fused_rms_norm")
def last_dims_axes(call: AxisCall) -> Effect:
    """Waits for the normalised dimensions and maps the others."""
    shape = call.option("normalized_shape", 1)
    count = len(shape) if isinstance(shape, (tuple, list)) else 1
    rank = call.operand.rank
    call.axes.call(call.operand.layout[-1], "feature")
    return _normalized(call, range(rank - count, rank), "each vector is normalised on its own")


@axis_rule(nn.GroupNorm, F.group_norm, torch.group_norm)
def group_norm_axes(call: AxisCall) -> Effect:
    """Waits for channels and positions; samples are normalised on their own."""
    return _normalized(call, range(1, call.operand.rank), "each sample is normalised on its own")


@axis_rule(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
def instance_norm_axes(call: AxisCall) -> Effect:
    """Waits for positions; samples and channels are normalised on their own."""
    positions = range(call.operand.rank - len(call.operand.layout[2:]), call.operand.rank)
    return _normalized(call, positions, "each channel of each sample is normalised on its own")


@axis_rule(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
def batch_norm_axes(call: AxisCall) -> Effect:
    """Waits for batch and positions in train mode; in eval mode its statistics are constants."""
    if not call.target.training and call.target.running_mean is not None:
        return mapped(call.operand.layout, "running statistics make it a static affine map")
    dims = [dim for dim in range(call.operand.rank) if dim != 1]
    return _normalized(call, dims, "each channel has statistics of its own")


def _normalized(call: AxisCall, dims: Sequence[int], others: str) -> Effect:
    why = (
        "mean and variance need the whole axis before any element is scaled; the statistics alone would be a REDUCE of "
        "partial sums"
    )
    effect = along(call, dims, Behaviour.BARRIER, why, others, keeps=True)
    # Mean and reciprocal deviation have size one where they were taken.
    shared = zip(effect.layouts, call.shapes, strict=True)
    return Effect(effect.claims, tuple(_squeezed(layout, shape) for layout, shape in shared))


def _squeezed(layout: Layout, shape: Sequence[Extent]) -> Layout:
    return tuple(None if size == 1 else axis for axis, size in zip(layout, shape, strict=True))


@axis_rule(F.normalize)
def unit_axes(call: AxisCall) -> Effect:
    """Waits for the length of a vector and maps the others."""
    return _normalized(call, call.dims("dim", 2) if "dim" in call.kwargs else (1,), "each vector is scaled on its own")


@axis_rule(F.batch_norm)
def batch_norm_function_axes(call: AxisCall) -> Effect:
    """As for the module: with running statistics, it is a static affine map."""
    if not call.option("training", 5, False):
        return mapped(call.operand.layout, "running statistics make it a static affine map")
    dims = [dim for dim in range(call.operand.rank) if dim != 1]
    return _normalized(call, dims, "each channel has statistics of its own")
