"""Regions planned together: budgets and bounds on memory hold over the whole step, as modelled and as measured."""

import copy
import signal
from unittest.mock import patch

import pytest
import torch
from torch import nn

import bwsk_fx
from bwsk_fx.errors import PlanError
from bwsk_fx.measure import measure
from bwsk_fx.planner import Planner, foresee
from bwsk_fx.planning.options import bytes_of
from bwsk_fx.reversible import ReversibleRegion

BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def vit(make_vit):
    return make_vit(num_hidden_layers=6, hidden_size=128, intermediate_size=512, num_attention_heads=2)


@pytest.fixture(scope="module")
def graph(vit, make_images):
    return bwsk_fx.capture(vit, make_images())


def _totals(fused, inputs, dtype=None):
    with torch.autocast("cpu", dtype or BF16, enabled=dtype is not None):
        fused(**inputs)
    return bwsk_fx.explain_saved(fused).totals


def _regions(fused) -> list[ReversibleRegion]:
    return [module for module in fused.modules() if isinstance(module, ReversibleRegion)]


@pytest.mark.parametrize("dtype", [None, BF16])
@pytest.mark.parametrize("options", [{"budget": 0.0}, {"budget": 0.1}, {"budget": 0.2}, {"tier": "smallest"}])
def test_what_is_modelled_is_what_is_kept_and_held(graph, make_images, options, dtype):
    inputs = make_images(32)
    fused = bwsk_fx.fuse_regions(graph, **options)
    totals, found = _totals(fused, inputs, dtype), measure(fused, inputs, dtype)
    assert found.saved_bytes == totals.kept_bytes
    assert found.peak_bytes == pytest.approx(totals.peak_bytes, rel=0.1)


@pytest.mark.parametrize("dtype", [None, BF16])
def test_what_eager_execution_keeps_is_modelled(vit, graph, make_images, dtype):
    inputs = make_images(32)
    totals = _totals(bwsk_fx.fuse_regions(graph), inputs, dtype)
    assert totals.conventional_bytes == measure(vit, inputs, dtype).saved_bytes


def test_a_budget_is_kept_and_buys_memory(graph, make_images):
    found = [_totals(bwsk_fx.fuse_regions(graph, budget), make_images(32), BF16) for budget in (0.0, 0.1, 0.15, 0.2)]
    for totals, budget in zip(found, (0.0, 0.1, 0.15, 0.2), strict=True):
        cheap = found[0].extra_seconds
        assert totals.extra_seconds <= max(budget * totals.conventional_seconds, cheap) * 1.001
        assert totals.intensive_seconds <= budget * totals.conventional_seconds * 1.001
    assert [totals.peak_bytes for totals in found] == sorted((totals.peak_bytes for totals in found), reverse=True)


def test_equal_blocks_may_follow_unequal_plans(graph, make_images):
    """Six blocks share a budget that suffices for some of them."""
    fused = bwsk_fx.fuse_regions(graph, activation_fraction=0.35)
    _totals(fused, make_images(32), BF16)
    kept = [region.program.plan.kept_bytes for region in _regions(fused) if "layers" in region.name]
    assert len(kept) == 6 and len(set(kept)) > 1


@pytest.mark.parametrize("share", [0.5, 0.3])
def test_a_share_of_eagers_bytes(vit, graph, make_images, share):
    fused, inputs = bwsk_fx.fuse_regions(graph, activation_fraction=share), make_images(32)
    totals = _totals(fused, inputs, BF16)
    assert 0.6 * share < totals.kept_bytes / totals.conventional_bytes <= share
    assert measure(fused, inputs, BF16).saved_bytes <= share * measure(vit, inputs, BF16).saved_bytes


def test_a_bound_on_memory_holds(graph, make_images):
    inputs = make_images(32)
    loose, tight = (_totals(bwsk_fx.fuse_regions(graph, budget), inputs, BF16) for budget in (0.0, 0.2))
    memory = (loose.peak_bytes + tight.peak_bytes) // 2
    fused = bwsk_fx.fuse_regions(graph, memory=memory)
    totals = _totals(fused, inputs, BF16)
    assert tight.peak_bytes < totals.peak_bytes <= memory
    assert loose.extra_seconds <= totals.extra_seconds <= tight.extra_seconds
    assert measure(fused, inputs, BF16).peak_bytes <= memory * 1.1


def test_memory_to_spare_costs_no_time(graph, make_images):
    totals = _totals(bwsk_fx.fuse_regions(graph, memory="1GiB"), make_images(32), BF16)
    assert totals.extra_seconds == 0.0


def test_too_little_memory_says_how_much_is_needed(graph, make_images):
    inputs = make_images(32)
    with pytest.raises(PlanError) as failure:
        bwsk_fx.fuse_regions(graph, memory="1KiB")(**inputs)
    assert str(failure.value).startswith("no choice of plans within 1.00 KiB: a training step needs at least ")
    needed = bytes_of(str(failure.value).rpartition("at least ")[2])
    assert _totals(bwsk_fx.fuse_regions(graph, memory=int(needed * 1.01)), inputs).peak_bytes <= needed * 1.01
    with pytest.raises(PlanError):
        bwsk_fx.fuse_regions(graph, memory=int(needed * 0.99))(**inputs)


def test_each_kind_of_input_is_foreseen_once(graph, make_images):
    fused = bwsk_fx.fuse_regions(graph, 0.1)
    with patch("bwsk_fx.planner.foresee", side_effect=foresee) as foreseen:
        for batch in (3, 2, 3, 2):
            fused(**make_images(batch))
        with torch.no_grad():
            fused(**make_images(4))
    assert foreseen.call_count == 2


def test_foreseeing_changes_nothing(graph, make_images):
    fused = bwsk_fx.fuse_regions(graph, 0.1)
    before = dict(fused.state_dict(keep_vars=True))
    state = torch.random.get_rng_state()
    foresight = foresee(fused, (), make_images())
    assert torch.equal(torch.random.get_rng_state(), state)
    after = fused.state_dict(keep_vars=True)
    assert all(after[name] is tensor and type(tensor) is nn.Parameter for name, tensor in before.items())
    assert [foreseen.region for foreseen in foresight.regions] == _regions(fused)
    assert foresight.outside_bytes == 0


def test_positional_arguments(graph, make_images):
    inputs = make_images()
    fused, named = bwsk_fx.fuse_regions(graph, 0.1), bwsk_fx.fuse_regions(graph, 0.1)
    names = [node.name for node in graph.graph.find_nodes(op="placeholder")]
    assert torch.equal(fused(*(inputs[name] for name in names))["loss"], named(**inputs)["loss"])
    assert bwsk_fx.explain_saved(fused).totals == bwsk_fx.explain_saved(named).totals


class Mixed(nn.Module):
    """BatchNorm in train mode stays outside of regions, and keeps what it keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)) for _ in range(2)])
        self.norm = nn.BatchNorm1d(16)

    def forward(self, x):
        for block in self.blocks:
            x = self.norm(x + block(x))
        return x.sum()


def test_what_is_kept_between_regions_counts():
    model, x = Mixed(), torch.randn(32, 16)
    fused = bwsk_fx.fuse_regions(bwsk_fx.capture(model, (x,)), 0.1)
    foresight = foresee(fused, (x,), {})
    fused(x)
    kept = bwsk_fx.explain_saved(fused).totals.kept_bytes
    # The operand of each norm, its mean and rstd.
    assert foresight.outside_bytes == 2 * (32 * 16 + 16 + 16) * 4
    assert measure(fused, (x,)).saved_bytes == pytest.approx(kept + foresight.outside_bytes, rel=0.05)


def test_the_running_statistics_are_not_touched_by_planning():
    model, x = Mixed(), torch.randn(32, 16)
    fused = bwsk_fx.fuse_regions(bwsk_fx.capture(model, (x,)), 0.1)
    fused(x)
    assert model.norm.num_batches_tracked == 2


class Branching(nn.Module):
    """A leaf that looks at numbers, which fake tensors do not have."""

    def forward(self, x):
        return x * 2 if float(x.sum()) > 0 else x * 3


class Opaque(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(8, 8), Branching(), nn.Linear(8, 8)

    def forward(self, x):
        return self.last(self.middle(self.first(x).tanh()).tanh()).sum()


@pytest.fixture
def opaque():
    model, x = Opaque(), torch.randn(4, 8)
    return bwsk_fx.capture(model, (x,), is_leaf=lambda module: isinstance(module, (Branching, nn.Linear))), x


def test_what_cannot_be_foreseen_is_planned_region_by_region(opaque):
    graph, x = opaque
    fused = bwsk_fx.fuse_regions(graph, 0.1, granularity="s-run")
    words = r"^node middle cannot be run on fake tensors.*each region spends the budget by itself$"
    with pytest.warns(UserWarning, match=words):
        fused(x).backward()
    assert _regions(fused) and all(region.program for region in _regions(fused))


def test_what_cannot_be_foreseen_has_no_bound_on_memory(opaque):
    graph, x = opaque
    with pytest.raises(PlanError, match=r"^node middle cannot be run on fake tensors"):
        bwsk_fx.fuse_regions(graph, memory="1MiB", granularity="s-run")(x)


def test_a_region_that_was_not_foreseen_keeps_as_little_as_it_can(graph, make_images):
    fused = bwsk_fx.fuse_regions(copy.deepcopy(graph), activation_fraction=0.9)
    fused(**make_images(32))
    regions = {region.name: region for region in _regions(fused)}
    loose = regions["vit_layers_2"].program.plan.kept_bytes
    fused.get_submodule("vit.layers.2.layernorm_before").eps *= 2
    with pytest.warns(UserWarning, match="region vit_layers_2 met a kind of input that was not foreseen when memory"):
        fused(**make_images(32))
    assert regions["vit_layers_2"].program.plan.kept_bytes < loose


def test_a_copy_plans_for_itself(graph, make_images):
    fused = bwsk_fx.fuse_regions(graph, 0.1)
    fused(**make_images())
    twin = copy.deepcopy(fused)
    assert torch.equal(twin(**make_images())["loss"], fused(**make_images())["loss"])
    assert bwsk_fx.explain_saved(twin).totals == bwsk_fx.explain_saved(fused).totals
    planners = [[*module._forward_pre_hooks.values()][-1] for module in (fused, twin)]
    assert all(isinstance(planner, Planner) for planner in planners) and planners[0] is not planners[1]


def test_an_interrupted_plan_can_be_made_again(graph, make_images):
    fused = bwsk_fx.fuse_regions(graph, 0.1)

    def interrupted(*_, **__):
        signal.raise_signal(signal.SIGINT)

    with patch("bwsk_fx.planning.highs.wait", side_effect=interrupted), pytest.raises(KeyboardInterrupt) as stop:
        fused(**make_images())
    assert str(stop.value) == "while region segment_0 was planned; the model is as it was, and can be run again"
    assert all(parameter.is_leaf and not parameter.grad for parameter in fused.parameters())
    fused(**make_images())["loss"].backward()
    assert all(region.program for region in _regions(fused))
