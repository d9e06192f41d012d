"""Statistics rebuild what was normalised, in every precision, with and without scales and shifts."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bwsk_fx.rules import sound
from bwsk_fx.rules.round_trip import execute, round_trip
from bwsk_fx.verdict import Label, WitnessKind

X = torch.randn(2, 3, 4)
IMAGE = torch.randn(2, 6, 5, 5)
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def _spread(module: nn.Module) -> nn.Module:
    """Give a module scales, shifts and running statistics that are not those of a fresh one."""
    torch.manual_seed(0)
    for tensor in (*module.parameters(), *(b for b in module.buffers() if b.is_floating_point())):
        nn.init.uniform_(tensor, 0.5, 1.5)
    return module


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("module", "names", "elements"),
    [
        (nn.LayerNorm(4), ("mean", "rstd"), 24),
        (nn.LayerNorm((3, 4), elementwise_affine=False), ("mean", "rstd"), 4),
        (nn.LayerNorm(4, bias=False), ("mean", "rstd"), 24),
        (nn.RMSNorm(4), ("rstd",), 12),
        (nn.RMSNorm((3, 4), elementwise_affine=False), ("rstd",), 2),
    ],
)
def test_norms_of_vectors(certified, module, names, elements, dtype):
    operand = torch.randn(2, 2, 3, 4)[:, 0] if elements < 12 else torch.randn(4, 3, 4)
    verdict = certified(_spread(module).to(dtype), operand.to(dtype))
    assert (verdict.label, verdict.witness.kind, verdict.witness.names) == (Label.S, WitnessKind.BY_PRODUCTS, names)
    assert verdict.witness.elements == elements
    assert verdict.witness.bytes == 4 * elements


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("module", "elements"),
    [(nn.GroupNorm(2, 6), 8), (nn.GroupNorm(3, 6, affine=False), 12), (nn.InstanceNorm2d(6, affine=True), 24)],
)
def test_norms_of_groups_of_channels(certified, module, elements, dtype):
    verdict = certified(_spread(module).to(dtype), IMAGE.to(dtype))
    assert (verdict.label, verdict.witness.names, verdict.witness.elements) == (Label.S, ("mean", "rstd"), elements)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}])
@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.InstanceNorm2d])
def test_modes_of_norms_with_running_statistics(certified, kind, options, training):
    module = _spread(kind(6, **{"track_running_stats": True, **options})).train(training)
    verdict = certified(module, IMAGE)
    running = not training and module.running_mean is not None
    assert (verdict.label, verdict.witness.kind) == (
        Label.S,
        WitnessKind.NOTHING if running else WitnessKind.BY_PRODUCTS,
    )
    # The statistics of a batch are nothing per sample.
    assert verdict.witness.elements == (24 if kind is nn.InstanceNorm2d and not running else None)


@pytest.mark.parametrize("options", [{}, {"affine": False}])
def test_synchronised_batch_norm_in_eval_mode(certified, options):
    verdict = certified(_spread(nn.SyncBatchNorm(6, **options)).eval(), IMAGE)
    assert (verdict.label, verdict.witness.kind) == (Label.S, WitnessKind.NOTHING)


def test_instance_norm_of_one_sample_without_a_batch_dimension(certified):
    assert certified(nn.InstanceNorm1d(3), torch.randn(3, 8)).witness.elements == 6
    assert certified(nn.InstanceNorm1d(3, affine=True), torch.randn(3, 8)).label is Label.GRAY


W = torch.tensor([0.5, 1.0, 1.5, 2.0, -1.0, 3.0])
B = torch.randn(6)
MEAN, VAR = torch.randn(6), torch.rand(6) + 0.5


@pytest.mark.parametrize(
    ("function", "args"),
    [
        (F.layer_norm, (X, (4,), W[:4], B[:4])),
        (torch.native_layer_norm, (X, (4,), W[:4], B[:4], 1e-5)),
        (torch.ops.aten.native_layer_norm.default, (X, (4,), None, None, 1e-5)),
        (F.rms_norm, (X, (4,), W[:4], 1e-6)),
        (torch.ops.aten._fused_rms_norm.default, (X, (4,), W[:4], 1e-6)),
        (F.group_norm, (IMAGE, 3, W, B)),
        (torch.group_norm, (IMAGE, 3, W, B)),
        (torch.native_group_norm, (IMAGE, W, B, 2, 6, 25, 3, 1e-5)),
        (F.instance_norm, (IMAGE, None, None, W, B)),
        (F.instance_norm, (IMAGE, MEAN, VAR, W, B, False)),
        (torch.instance_norm, (IMAGE, W, B, None, None, True, 0.1, 1e-5, False)),
        (F.batch_norm, (IMAGE, MEAN, VAR, W, B)),
        (F.batch_norm, (IMAGE, MEAN, VAR, W, B, True)),
        (torch.batch_norm, (IMAGE, W, B, MEAN, VAR, False, 0.1, 1e-5, False)),
        (torch.native_batch_norm, (IMAGE, W, B, MEAN, VAR, True, 0.1, 1e-5)),
        (torch.ops.aten._native_batch_norm_legit.default, (IMAGE, W, B, MEAN, VAR, False, 0.1, 1e-5)),
        (torch.ops.aten._native_batch_norm_legit.no_stats, (IMAGE, W, B, True, 0.1, 1e-5)),
        (torch.ops.aten._native_batch_norm_legit_no_training.default, (IMAGE, W, B, MEAN, VAR, 0.1, 1e-5)),
        (torch.ops.aten._batch_norm_with_update.default, (IMAGE, W, B, MEAN, VAR, 0.1, 1e-5)),
    ],
)
def test_functional_and_aten_forms(certified, function, args):
    static = certified(function, *args, dynamic={id(args[0])})
    at_hand = any(isinstance(value, torch.Tensor) for value in args[1:])
    assert (static.label, static.confidence) == (Label.S, 0.8 if at_hand else 0.5)
    # Dynamic scales, shifts and running statistics join the witness.
    everything = certified(function, *args)
    tensors = [value for value in args[1:] if isinstance(value, torch.Tensor)]
    used = [value for value in tensors if value is not MEAN and value is not VAR] or tensors
    if not used:
        assert everything.witness.kind is WitnessKind.BY_PRODUCTS
        return
    assert everything.witness.kind is WitnessKind.OTHER_OPERAND
    running = static.witness.kind is WitnessKind.NOTHING
    assert len([name for name in everything.witness.names if name.startswith("operand_")]) == len(used) + 2 * running
    assert ("rstd" in everything.witness.names) is not running


@pytest.mark.parametrize(("module", "lost"), [(nn.LayerNorm(4), 2 * 6), (nn.RMSNorm(4), 2 * 6)])
def test_a_scale_of_zero_erases_what_it_scales(certified, module, lost):
    with torch.no_grad():
        module.weight[1:3] = 0
    verdict = certified(module, X)
    assert (verdict.label, verdict.erasure.elements, verdict.confidence) == (Label.K, lost, 0.8)


def test_a_channel_that_is_scaled_by_zero(certified, verdict_of):
    module = nn.BatchNorm2d(6)
    with torch.no_grad():
        module.weight[0] = 0
    assert certified(module, IMAGE).erasure.elements == 2 * 25
    assert verdict_of(module, IMAGE).erasure.elements == 25


def test_small_scales_lose_what_the_shift_absorbs():
    norm = nn.LayerNorm(4)
    with torch.no_grad():
        norm.weight[0], norm.bias[0] = 1e-7, 1.0
    executed = execute(norm, (torch.randn(5, 4),), {})
    verdict = sound.verdict(executed.call)
    trip = round_trip(executed, verdict)
    assert (verdict.label, trip.wrong, trip.lost) == (Label.S, 0, 5)
    assert "absorbs" in verdict.domain


def test_without_its_statistics_it_is_not_undone():
    executed = execute(nn.LayerNorm(4), (X,), {})
    verdict = sound.verdict(executed.call)
    assert verdict.undo.by_products(executed.run).keys() == {"mean", "rstd"}
    with pytest.raises(KeyError):
        verdict.undo.rebuild(executed.run)


def test_captured_norms_count_per_sample(verdict_of):
    assert verdict_of(nn.LayerNorm(4), X).witness.elements == 2 * 3
    assert verdict_of(lambda x: F.layer_norm(x, (3, 4)), X).witness.elements == 2
    assert verdict_of(nn.GroupNorm(2, 6), IMAGE).witness.elements == 4
    assert verdict_of(nn.RMSNorm(4), X).witness.elements == 3


def test_unit_vectors_have_lost_their_lengths(certified, verdict_of):
    assert certified(F.normalize, X).erasure.elements == 2 * 4
    assert certified(F.normalize, X, 1.0, -1).erasure.elements == 2 * 3
    assert verdict_of(lambda x: F.normalize(x, dim=-1), X).erasure.elements == 3
    assert certified(F.normalize, torch.complex(X, X)).erasure.elements == 2 * 4 / 2


def test_vectors_shorter_than_eps_keep_their_lengths(certified):
    short = F.normalize(X, eps=0.5) * 0.25
    torch.testing.assert_close(F.normalize(short, eps=0.5), short * 2)
    verdict = certified(F.normalize, X, eps=0.5)
    assert (verdict.label, verdict.erasure) == (Label.K, None)


@pytest.mark.parametrize("dim", [1, -1, (0, 2)])
def test_counts_of_elements_that_are_not_zero_are_seen_in_the_result(certified, dim):
    sparse = X.masked_fill(X > 0.5, 0.0)
    sparse[0] = 0
    assert certified(F.normalize, sparse, 0, dim).label is Label.S


def test_weight_norm_and_renorm_erase_lengths(certified):
    assert certified(torch._weight_norm, torch.randn(5, 3), torch.rand(5, 1)).erasure.elements == 5
    assert certified(torch.renorm, X, 2, 0, 1.0).label is Label.K


def test_local_response_norm_depends_on_its_exponent(certified):
    assert certified(nn.LocalResponseNorm(3), IMAGE).label is Label.K
    assert certified(nn.LocalResponseNorm(3, beta=0.4), IMAGE).label is Label.GRAY
    one = torch.linspace(0, 4, 100).view(-1, 1, 1)
    y = F.local_response_norm(one, 1, alpha=1.0, beta=0.75).flatten().diff()
    assert bool((y > 0).any()) and bool((y < 0).any())
