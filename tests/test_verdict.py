"""Verdicts are valid from construction on."""

import json

import pytest

from bwsk_fx.errors import RuleError
from bwsk_fx.verdict import NOTHING, Erasure, Label, Verdict, Witness, WitnessKind


def _verdict(label=Label.S, witness=NOTHING, erasure=None, confidence=0.5, rationale="because") -> Verdict:
    return Verdict(label, witness, erasure, confidence, rationale, "family.rule")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"witness": None}, "S, and only S, has a witness"),
        ({"label": Label.K}, "S, and only S, has a witness"),
        ({"label": Label.GRAY}, "S, and only S, has a witness"),
        ({"erasure": Erasure(1)}, "only K erases"),
        ({"confidence": 0.7}, r"confidence 0.7 is none of 1.0, 0.8, 0.5, 0.3"),
        ({"rationale": ""}, "no rationale"),
        ({"label": "S"}, "is none of S, K, GRAY"),
    ],
)
def test_invalid_verdicts_name_their_rule(changes, message):
    with pytest.raises(RuleError, match=r"'family\.rule' gave an invalid verdict: .*" + message):
        _verdict(**changes)


@pytest.mark.parametrize("amounts", [{}, {"elements": -1}, {"bits": -0.5}, {"elements": 3, "bits": -1}])
def test_an_erasure_is_an_amount(amounts):
    with pytest.raises(RuleError, match="at least 0"):
        Erasure(**amounts)


def test_witnesses_are_named_when_there_is_something_to_name():
    with pytest.raises(RuleError, match="needs names"):
        Witness(WitnessKind.OTHER_OPERAND)
    with pytest.raises(RuleError, match="cannot have names"):
        Witness(WitnessKind.NOTHING, ("mean",))


def test_verdicts_do_not_change():
    with pytest.raises(AttributeError):
        _verdict().label = Label.K


def test_to_json_leaves_out_what_is_absent():
    witness = Witness(WitnessKind.BY_PRODUCTS, ("mean", "rstd"), 10, 40)
    assert json.loads(json.dumps(_verdict(witness=witness).to_json())) == {
        "label": "S",
        "witness": {"kind": "by-products", "names": ["mean", "rstd"], "elements": 10, "bytes": 40},
        "confidence": 0.5,
        "rationale": "because",
        "rule": "family.rule",
        "counted": True,
        "ruleset": "sound",
    }
    erased = _verdict(Label.K, None, Erasure(bits=7)).to_json()
    assert erased["label"] == "K"
    assert erased["erasure"] == {"bits": 7}
    assert "witness" not in erased
    expected = _verdict(Label.K, None, Erasure(0.5, expected=True)).to_json()
    assert expected["erasure"] == {"elements": 0.5, "expected": True}
