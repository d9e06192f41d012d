"""Dropout masks drawn again from the generator's state: the same bits, and a generator that is left as it was."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import bwsk_fx
from bwsk_fx.reversible import ReversibleRegion
from bwsk_fx.rules.replay import draw_again, generator_state

aten = torch.ops.aten
ROWS = 4096


class Dropping(nn.Module):
    def __init__(self, rate: float) -> None:
        super().__init__()
        self.first, self.second, self.rate = nn.Linear(32, 32), nn.Linear(32, 32), rate

    def forward(self, x):
        x = F.dropout(self.first(x), self.rate)
        return self.second(x.sin() + F.dropout(x.t(), self.rate).t())


@pytest.fixture(params=[0.1, 0.5])
def pair(request):
    torch.manual_seed(0)
    model, x = Dropping(request.param), torch.randn(ROWS, 32)
    return model, bwsk_fx.fuse_regions(bwsk_fx.capture(model, x), faith="exact", granularity="whole"), x


def _region(fused) -> ReversibleRegion:
    return next(module for module in fused.modules() if isinstance(module, ReversibleRegion))


def test_the_generators_state_is_kept_in_place_of_the_masks(pair, train_step, assert_same_bits):
    model, fused, x = pair
    expected = train_step(model, [x])
    for _ in range(2):
        assert_same_bits(train_step(fused, [x]), expected)
    kept = {value.operator: value.bytes for value in _region(fused).program.plan.kept}
    assert kept["generator_state"] == torch.get_rng_state().numel() < ROWS * 32 / 8
    assert not {"bernoulli", "pack_bits"} & set(kept)


def test_the_backward_pass_leaves_the_generator_alone(pair):
    _, fused, x = pair
    loss = fused(x).sum()
    torch.manual_seed(7)
    state = torch.get_rng_state()
    loss.backward()
    assert torch.equal(torch.get_rng_state(), state)


def test_two_forwards_have_a_mask_each(pair):
    model, fused, x = pair
    gradients = []
    for candidate in (model, fused):
        candidate.zero_grad()
        torch.manual_seed(0)
        first, second = candidate(x).sum(), candidate(x).square().sum()
        second.backward()
        first.backward()
        gradients.append(copy.deepcopy(model.first.weight.grad))
    assert torch.equal(*gradients)


@pytest.mark.parametrize(
    ("target", "args", "part"), [(aten.bernoulli.p, (0.3,), None), (aten.native_dropout.default, (0.3, True), 1)]
)
@pytest.mark.parametrize("shape", [(7,), (3, 5), (64, 64)])
def test_what_was_drawn_is_drawn_again(target, args, part, shape):
    operand = torch.randn(shape)
    state = generator_state(operand)
    drawn = target(operand, *args)
    drawn = drawn if part is None else drawn[part]
    torch.rand(100)
    after = torch.get_rng_state()
    like = (tuple(operand.shape), operand.stride(), operand.dtype, operand.device)
    assert torch.equal(draw_again(state, target, like, args, part), drawn)
    assert torch.equal(torch.get_rng_state(), after)


def test_a_failing_draw_gives_the_generator_back():
    state, after = generator_state(torch.empty(2)), torch.get_rng_state()
    like = ((2,), (1,), torch.float32, torch.device("cpu"))
    with pytest.raises(RuntimeError):
        draw_again(state, aten.bernoulli.p, like, (7.0,), None)
    assert torch.equal(torch.get_rng_state(), after)
