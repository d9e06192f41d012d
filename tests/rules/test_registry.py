"""The registry refuses duplicates, finds rules for subclasses and in-place twins, and never guesses."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bwsk_fx.errors import RuleError
from bwsk_fx.rules import registry
from bwsk_fx.rules.registry import by_products, labels, preserves, registered_rules
from bwsk_fx.rules.targets import method, rule_name
from bwsk_fx.verdict import Label

X = torch.randn(2, 3, 4)


@torch.library.custom_op("bwsk_test::opaque", mutates_args=())
def opaque(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@opaque.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


class Unruled(nn.Module):
    """Calls an operator that no rule covers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return opaque(x)


def test_a_second_rule_for_a_target_is_refused_and_changes_nothing():
    before = registered_rules()
    with pytest.raises(RuleError, match=r"typing rule 'activation\.two_branches'"):
        labels(Unruled, nn.GELU)(lambda call: preserves("never"))
    assert registered_rules() == before


def test_an_operator_has_one_rule_as_function_and_as_method():
    rules = registered_rules()
    for name in ("exp", "matmul", "reshape", "softmax", "sum"):
        assert rules[getattr(torch, name)] is rules[method(name)]
    assert rules[F.gelu] is rules[nn.GELU]


def test_names_say_family_and_function():
    assert rule_name(registered_rules()[nn.Linear]) == "affine.linear"


def test_every_rule_that_is_named_by_text_names_a_class():
    import importlib

    named = [key for key in registered_rules() if isinstance(key, str) and key.startswith("transformers.")]
    assert len(named) >= 5
    for path in named:
        module, _, name = path.rpartition(".")
        assert issubclass(getattr(importlib.import_module(module), name), nn.Module)


def test_every_method_name_is_a_method_of_tensors():
    methods = [key.removeprefix("Tensor.") for key in registered_rules() if isinstance(key, str) and "Tensor." in key]
    assert [name for name in methods if not hasattr(torch.Tensor, name)] == []


def test_unknown_is_gray(verdict_of):
    verdict = verdict_of(Unruled(), X)
    assert (verdict.label, verdict.confidence) == (Label.GRAY, 0.3)
    assert "no rule for opaque" in verdict.rationale


def test_a_subclass_has_its_bases_rule_unless_it_computes_something_else(verdict_of):
    class Same(nn.Linear):
        pass

    class Other(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 0

    assert verdict_of(Same(4, 4), X).rule == "affine.linear"
    other = verdict_of(Other(4, 4), X)
    assert (other.label, other.rule) == (Label.K, "composition")


def test_in_place_methods_have_the_rule_of_their_twin(verdict_of):
    assert verdict_of(lambda x: (x + 1).mul_(2), X).rule == "elementwise.mul"


def test_rationales_name_the_rule(verdict_of):
    verdict = verdict_of(nn.GELU(), X)
    assert verdict.rationale.startswith("activation.two_branches: ")


def test_by_products_count_bytes():
    witness = by_products("mean", "rstd", elements=10)
    assert (witness.elements, witness.bytes) == (10, 40)


def test_the_registry_is_not_handed_out():
    registered_rules().clear()
    assert registered_rules()
    assert registered_rules() is not registry._RULES
