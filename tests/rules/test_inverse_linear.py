"""Linear maps undone by QR: which weights qualify, what comes back, and that a plan follows the weights."""

import pytest
import torch
from torch import nn

import bwsk_fx
from bwsk_fx.reversible import ReversibleRegion
from bwsk_fx.rules.inverse_linear import is_well_conditioned, solve_linear, stands_for

WIDTH, ROWS = 16, 2048


def _weight(rows: int, columns: int, condition: float, dtype=torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(columns, columns, generator=generator, dtype=torch.float64))
    return (u * torch.linspace(1.0, 1.0 / condition, columns, dtype=torch.float64) @ v.mT).to(dtype)


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        (_weight(8, 8, 2.0), True),
        (_weight(32, 8, 3.9), True),
        (_weight(32, 8, 4.1), False),
        (_weight(32, 8, 2.0).mT.contiguous(), False),
        (_weight(8, 8, 2.0).bfloat16(), False),
        (_weight(8, 8, 2.0, torch.float64), True),
        (torch.zeros(8, 8), False),
        (torch.ones(8), False),
    ],
)
def test_which_weights_qualify(weight, expected):
    assert is_well_conditioned(weight) is expected
    assert not is_well_conditioned(nn.Parameter(weight))


def test_the_answer_follows_the_weight():
    weight = _weight(8, 8, 2.0)
    assert is_well_conditioned(weight)
    weight[0] *= 100.0
    assert not is_well_conditioned(weight)


def test_a_stand_in_has_the_answer_of_its_weight():
    weight, other = _weight(8, 8, 2.0), torch.empty(8, 8, device="meta")
    stands_for(other, weight)
    assert is_well_conditioned(other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
def test_the_operand_comes_back(dtype, bias):
    weight, x = _weight(32, 8, 4.0, dtype), torch.randn(100, 8, dtype=dtype)
    shift = torch.randn(32, dtype=dtype) if bias else None
    y = torch.nn.functional.linear(x, weight, shift)
    found = solve_linear(y, weight.t(), shift)
    assert (found - x).norm() <= 4.0 * 8 * torch.finfo(dtype).eps * x.norm()


class Adapted(nn.Module):
    """A trained scale before a frozen linear map; the scale's gradient needs the map's operand."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 2.0, WIDTH))
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        with torch.no_grad():
            self.up.weight.copy_(_weight(WIDTH, WIDTH, 2.0))
        self.up.requires_grad_(False)

    def forward(self, x):
        return self.down(self.up((x * self.scale).sin()).tanh())


def _rules(fused) -> set[str]:
    region = next(module for module in fused.modules() if isinstance(module, ReversibleRegion))
    *_, latest = region._programs.prospects.values()
    return {one.rule for one in latest.problem.derivations}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("budget", [float("inf"), 0.3])
def test_a_plan_may_use_it_only_where_it_is_asked_for_and_right(budget, train_step):
    torch.manual_seed(0)
    model, x = Adapted(), torch.randn(ROWS, WIDTH)
    graph = bwsk_fx.capture(model, x)
    plain, fused = (
        bwsk_fx.fuse_regions(graph, budget, granularity="whole", linear_inverses=wanted) for wanted in (False, True)
    )
    expected = train_step(model, [x])
    for candidate in (plain, fused):
        found = train_step(candidate, [x])
        torch.testing.assert_close(found["scale"], expected["scale"], rtol=1e-4, atol=1e-4)
    assert "frozen linear map" in _rules(fused)
    assert "frozen linear map" not in _rules(plain)
    model.up.requires_grad_(True)
    train_step(fused, [x])
    assert "frozen linear map" not in _rules(fused)


def test_undoing_a_map_counts_as_a_product():
    model, x = Adapted(), torch.randn(ROWS, WIDTH)
    fused = bwsk_fx.fuse_regions(bwsk_fx.capture(model, x), granularity="whole", linear_inverses=True)
    fused(x)
    region = next(module for module in fused.modules() if isinstance(module, ReversibleRegion))
    assert region.program.plan.intensive_seconds == 0.0
    (prospect,) = region._programs.prospects.values()
    assert all(one.intensive for one in prospect.problem.derivations if one.rule == "frozen linear map")
