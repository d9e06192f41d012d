"""What ways back look like in a terminal."""

from rich.console import Console

from bwsk_fx.report.provenance import Cut, PathStep, Provenance, WayBack
from bwsk_fx.verdict import NOTHING, Erasure, Label, Witness, WitnessKind

_OTHER = Witness(WitnessKind.OTHER_OPERAND, ("y",), 1500, 6000)
_UNKNOWN = Witness(WitnessKind.OTHER_OPERAND, ("z",))
_STEPS = (
    PathStep("head", "Linear", Label.S, NOTHING, source="/models/own.py:9"),
    PathStep("add", "add", Label.S, _OTHER),
    PathStep("exp", "exp", Label.S, NOTHING, domain="|x| <= 80"),
)
_CUT = Cut("down", "Linear", Label.K, Erasure(elements=2304, bits=7), "linear: it contracts", "/models/own.py:7")


def _provenance(*ways):
    return Provenance("head", "Linear", Label.S, ways)


def _lines(found):
    return str(found).splitlines()


def test_a_way_to_an_input():
    assert _lines(_provenance(WayBack(_STEPS, input="x"))) == [
        "head (Linear, S) determines x, given the witnesses below",
        "",
        "way back: reaches x",
        "node  operator  label  needs, or erases",
        "───────────────────────────────────────",
        "head  Linear    S",
        "add   add       S      y: 1,500",
        "exp   exp       S",
        "x     input",
        "exp is undone where |x| <= 80",
        "at hand for this way: 1,500 elements, 6,000 bytes per sample",
    ]


def test_a_way_to_a_cut():
    assert _lines(_provenance(WayBack(_STEPS[:1], cut=_CUT))) == [
        "head (Linear, S) determines no input of the model",
        "",
        "way back: cut at down",
        "node  operator  label  needs, or erases",
        "────────────────────────────────────────────────",
        "head  Linear    S",
        "down  Linear    K      2,304 elements and 7 bits",
        "linear: it contracts (own.py:7)",
    ]


def test_several_ways_are_numbered():
    lines = _lines(_provenance(WayBack((), input="x"), WayBack((), cut=_CUT), WayBack(())))
    assert [line for line in lines if line.startswith(("head", "way back"))] == [
        "head (Linear, S) determines x",
        "way back 1 of 3: reaches x",
        "way back 2 of 3: cut at down",
        "way back 3 of 3: ends in random values",
    ]


def test_amounts_that_nobody_knows():
    unmeasured = Cut("drop", "own", Label.K, None, "own: it erases")
    gray = Cut("drop", "own", Label.GRAY, None, "unknown: no rule for Own")
    step = PathStep("mul", "mul", Label.S, _UNKNOWN)
    text = str(_provenance(WayBack((step,), cut=unmeasured)))
    assert "an unknown amount" in text
    assert "at hand for this way: witnesses of unknown size" in text
    assert WayBack((step, *_STEPS)).witness_elements is None
    assert "unknown amount" not in str(_provenance(WayBack((), cut=gray)))


def test_no_ways():
    assert str(_provenance()) == "head (Linear, S) is static: it depends on no input"


def test_long_names_of_a_vit_fit_a_small_terminal():
    step = PathStep("vit_embeddings_patch_embeddings_projection", "LayerNorm", Label.S, NOTHING)
    console = Console(width=80, highlight=False)
    with console.capture() as captured:
        console.print(_provenance(WayBack((step,), input="pixel_values")))
    assert f"\n{step.node}  LayerNorm" in captured.get()
