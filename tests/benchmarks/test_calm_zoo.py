"""Axis claims about whole models, on shards and beside DTensor's rules."""

from unittest.mock import patch

import dtensor_rules
import pytest
from calm_zoo import SMALL_MODELS, small_model
from torch import nn
from torch.nn import functional as F

import bwsk_fx
from bwsk_fx.report.axis_certificate import Status
from bwsk_fx.rules.axis import _RULES, Behaviour, mapped

# Encoder and decoder models write the decoder's inputs element by element.
UNKNOWN = {"T5": 2, "SwitchTransformers": 2}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shards", [2, 3])
@pytest.mark.parametrize("name", SMALL_MODELS)
def test_no_claim_is_wrong(name, shards):
    model, inputs = small_model(name)
    certificates = bwsk_fx.certify_axes(bwsk_fx.capture(model, inputs), inputs, shards=shards)
    assert not certificates.wrong
    assert not certificates.having(Status.UNTRIED)
    assert len(certificates.unknown) == UNKNOWN.get(name, 0)
    assert len(certificates.having(Status.CERTIFIED)) > 2 * certificates.nodes
    assert {claim.behaviour for claim in certificates.claims} >= {Behaviour.MAP, Behaviour.REDUCE, Behaviour.BARRIER}


@pytest.fixture(scope="module")
def mesh():
    with dtensor_rules.fake_mesh() as mesh:
        yield mesh


def test_dtensor_never_needs_less_communication(mesh):
    found = dtensor_rules.compared(*small_model("ViT"), mesh)
    assert not list(dtensor_rules.disagreements(found))
    agreed = [one for one in found if one.verdict == "both"]
    assert len(agreed) > 0.8 * len(found)
    assert {one.ours for one in agreed} == {Behaviour.MAP, Behaviour.REDUCE, Behaviour.BARRIER}


def test_execution_decides_against_a_wrong_rule(mesh):
    def wrong(call):
        return mapped(call.operand.layout, "no")

    with patch.dict(_RULES, {F.layer_norm: wrong, nn.LayerNorm: wrong}):
        found = dtensor_rules.compared(*small_model("ViT"), mesh)
    assert {(one.operator, one.verdict) for one in dtensor_rules.disagreements(found)} == {("LayerNorm", "DTensor")}
