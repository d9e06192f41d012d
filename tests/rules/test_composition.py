"""Calls without a rule are typed by the ATen operators that they are made of."""

import copy

import pytest
import torch
from torch import nn

import bwsk_fx
from bwsk_fx.rules import sound
from bwsk_fx.rules.decomposition import UndecomposableError, decompose
from bwsk_fx.rules.round_trip import execute, round_trip
from bwsk_fx.verdict import Label, WitnessKind

X = torch.rand(3, 8, generator=torch.Generator().manual_seed(0)) + 0.5


class Affine(nn.Module):
    """A leaf module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(8) + 0.5)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return (x * self.gamma + 1).exp()


def _verdict(target, *args):
    executed = execute(target, args, {})
    return sound.verdict(executed.call), executed


@pytest.mark.parametrize(
    "target",
    [
        Affine(),
        lambda x: (x * 2).exp().reshape(4, 6),
        lambda x: x.exp().mul_(3).add_(1),
        lambda x: x.t().contiguous() + 1,
    ],
)
def test_steps_that_preserve_preserve_together(target):
    verdict, executed = _verdict(target, X)
    assert (verdict.label, verdict.rule, verdict.confidence) == (Label.S, "composition", 0.8)
    trip = round_trip(executed, verdict)
    assert trip.complete and trip.error < 1e-5


def test_the_other_operand_is_a_witness():
    verdict, executed = _verdict(lambda x, y: (x * 3 + y).exp(), X, X + 1)
    assert verdict.witness.kind is WitnessKind.OTHER_OPERAND
    assert verdict.witness.names == ("operand_1",)
    assert round_trip(executed, verdict).complete


def test_a_step_that_erases_erases_what_its_rule_says():
    verdict, _ = _verdict(lambda x: (x * 2).relu() + 1, X)
    assert verdict.label is Label.K
    assert verdict.rationale == "composition: aten.relu erases, in aten.mul → aten.relu → aten.add"
    assert verdict.erasure.elements == 12


def test_copies_that_a_step_erases_are_no_elements_of_the_operand():
    verdict, _ = _verdict(lambda x: (x.repeat(2, 1) * 2).amax(1), X)  # 48 copies of 24 elements become 6 numbers
    assert (verdict.label, verdict.erasure.elements) == (Label.K, 24 - 6)
    verdict, _ = _verdict(lambda x: (x.repeat(2, 1) * 2).relu(), X)
    assert (verdict.label, verdict.erasure) == (Label.K, None)
    verdict, _ = _verdict(lambda x: (x.repeat(2, 1) * 2).square(), X)
    assert (verdict.label, verdict.erasure) == (Label.K, None)


def test_an_amount_may_be_about_the_other_operand_of_a_step():
    verdict, _ = _verdict(lambda x, y: (x * 2) @ (y * 2), X, X.mT[:, :2])
    assert (verdict.label, verdict.erasure) == (Label.K, None)


def test_expectations_stay_expectations():
    verdict, _ = _verdict(lambda x: (x * 2).relu(), X)
    assert verdict.erasure.expected
    verdict, _ = _verdict(lambda x: (x * 2).sum(0), X)
    assert (verdict.erasure.elements, verdict.erasure.expected) == (16, False)


def test_a_detour_around_an_erasing_step_is_not_called_erasing():
    verdict, _ = _verdict(lambda x: x.relu() + x, X)
    assert verdict.label is Label.GRAY
    assert "no way of undoing" in verdict.rationale


def test_erasing_steps_side_by_side_may_preserve_together():
    verdict, _ = _verdict(lambda x: torch.cat([x.relu(), (-x).relu()]), X)  # CReLU
    assert verdict.label is Label.GRAY


def test_two_ways_that_both_preserve_are_not_called_preserving_without_an_inverse():
    verdict, _ = _verdict(lambda x: x * x.exp(), X)
    assert verdict.label is Label.GRAY


def test_a_second_output_makes_a_product_invertible():
    verdict, executed = _verdict(lambda x: (x.relu(), x * 2), X)
    assert verdict.label is Label.S
    assert round_trip(executed, verdict).complete


def test_an_operator_without_a_rule_is_named(monkeypatch):
    from bwsk_fx.rules import registry

    monkeypatch.delitem(registry._RULES, "aten.exp")
    verdict, _ = _verdict(lambda x: x.exp() + 1, X)
    assert verdict.label is Label.GRAY
    assert "no rule for exp" in verdict.rationale


def test_modules_are_left_as_they_are():
    module = Affine()
    graph = bwsk_fx.type_nodes(bwsk_fx.capture(nn.Sequential(module), X))
    assert module.calls == 0
    assert next(node for node in graph.graph.nodes if node.op == "call_module").meta["bwsk"].label is Label.S
    assert copy.deepcopy(graph)


def test_a_data_dependent_call_is_gray_with_the_reason():
    class Picky(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1 if float(x.sum()) > 0 else x

    graph = bwsk_fx.capture(nn.Sequential(nn.Identity()), X)
    del graph
    with pytest.raises(UndecomposableError, match="cannot be decomposed"):
        from bwsk_fx import _torch_private as private

        fake = private.fake_tensor(private.fake_mode(), X)
        decompose(Picky(), (fake,), {}, [fake])


def test_writes_to_views_are_not_followed():
    def write(x):
        y = x * 1
        y[0].fill_(0)
        return y

    verdict, _ = _verdict(write, X)
    assert verdict.label is Label.GRAY
    assert "writes to a tensor that has views" in verdict.rationale


def test_decomposition_lists_operators_in_order():
    parts = decompose(lambda x: torch.addmm(torch.ones(4), x, torch.ones(8, 4)).relu(), (X,), {}, [X])
    assert [str(step.target) for step in parts.steps()][-2:] == ["aten.addmm.default", "aten.relu.default"]
    assert len(parts.operands) == len(parts.outputs) == 1
