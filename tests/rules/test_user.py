"""Users' rules and overrides count once their claims have been tried, and say what is wrong otherwise."""

from importlib.metadata import EntryPoint

import pytest
import torch
from torch import nn

import bwsk_fx
from bwsk_fx.errors import RuleError
from bwsk_fx.rules import Call, Example, Matching, Undo, erases, preserves, unproven, user
from bwsk_fx.rules.registry import USER_RULES
from bwsk_fx.verdict import Label, Verdict

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


class Warp(nn.Module):
    """Computed in Python on data, so that no rule of the library covers it."""

    def __init__(self, factor: float = 3.0) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(x) * 0 + x * self.factor


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.act = nn.ReLU()
        self.warp = Warp()
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.warp(self.act(self.first(x)))
        for layer in self.layers:
            x = layer(x)
        return torch.square(x)


@pytest.fixture(autouse=True)
def _own_rules_go():
    before = dict(USER_RULES)
    yield
    USER_RULES.clear()
    USER_RULES.update(before)


@pytest.fixture
def graph():
    torch.manual_seed(0)
    return bwsk_fx.capture(Net(), X)


def _verdicts(graph) -> dict[str, Verdict]:
    return {node.name: node.meta["bwsk"] for node in graph.graph.nodes}


def _divide(run):
    return run.output / run.module.factor


EXAMPLE = Example(Warp(), (X,))


# -- rules ----------------------------------------------------------------------------------------------------------


def test_a_rule_whose_inverse_holds_is_used(graph):
    assert _verdicts(bwsk_fx.type_nodes(graph))["warp"].label is Label.GRAY

    @bwsk_fx.rule(Warp, examples=[EXAMPLE])
    def warp(call: Call) -> Verdict:
        return preserves(f"dividing by {call.module.factor} undoes it", undo=Undo(_divide))

    verdict = _verdicts(bwsk_fx.type_nodes(graph))["warp"]
    assert (verdict.label, verdict.confidence, verdict.rule) == (Label.S, 0.5, "test_user.warp")
    assert (
        bwsk_fx.certify(graph, X)
        and graph.graph.find_nodes(op="call_module", target="warp")[0].meta["bwsk"].confidence == 1
    )


def test_a_rule_outweighs_the_librarys_own():
    @bwsk_fx.rule(nn.ReLU, examples=[Example(nn.ReLU(), (X,))])
    def modest(call: Call) -> Verdict:
        return unproven("says nothing")

    graph = bwsk_fx.type_nodes(bwsk_fx.capture(Net(), X))
    assert _verdicts(graph)["act"].label is Label.GRAY


@pytest.mark.parametrize(
    ("target", "undo", "complaint"),
    [
        (torch.square, Undo(lambda run: run.output.sqrt()), r"claims S, but its inverse fails in float32: 4 of 8"),
        (nn.ReLU(), Undo(lambda run: run.output), "elements are wrong"),
        (nn.ReLU(), Undo(lambda run: run.before + 0), "uses a value that its witness does not name"),
        (nn.ReLU(), Undo(lambda run: run.nonsense), "AttributeError"),
        (nn.Dropout(0.1), Undo(lambda run: run.output * 0.9), "elements are wrong"),
        (nn.ReLU(), None, r"claims S without an inverse; pass `undo=Undo\(...\)` to `preserves`"),
    ],
)
def test_a_rule_that_claims_too_much_is_refused(target, undo, complaint):
    x = torch.randn(64, 8) if isinstance(target, nn.Dropout) else torch.tensor([[-1.0, 2, -3, 4], [5, -6, 7, -8]])
    key = type(target) if isinstance(target, nn.Module) else target
    with pytest.raises(RuleError, match=complaint):
        bwsk_fx.rule(key, examples=[Example(target, (x,))])(lambda call: preserves("sure", undo=undo))
    assert key not in USER_RULES


def test_a_claim_that_holds_on_the_example_only_is_refused():
    positive = torch.rand(2, 4) + 1
    with pytest.raises(RuleError, match="its inverse fails"):
        bwsk_fx.rule(torch.abs, examples=[Example(torch.abs, (positive,))])(
            lambda call: preserves("it is positive", undo=Undo(lambda run: run.output))
        )


def test_more_cannot_be_erased_than_there_is():
    with pytest.raises(RuleError, match="erases 9 elements of operands that have 8"):
        bwsk_fx.rule(Warp, examples=[EXAMPLE])(lambda call: erases("much", elements=9))


def test_a_rule_needs_an_example_and_one_target_has_one_rule():
    with pytest.raises(RuleError, match="needs a target, and an example"):
        bwsk_fx.rule(Warp, examples=[])
    bwsk_fx.rule(Warp, examples=[EXAMPLE])(lambda call: unproven("first"))
    with pytest.raises(RuleError, match="already has the user rule"):
        bwsk_fx.rule(Warp, examples=[EXAMPLE])(lambda call: unproven("second"))


def test_a_rule_that_returns_no_verdict_is_refused():
    with pytest.raises(RuleError, match="gave a str instead of a Verdict"):
        bwsk_fx.rule(Warp, examples=[EXAMPLE])(lambda call: "S")


# -- overrides ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "nodes"),
    [
        (nn.Linear, ["first", "layers_0", "layers_1"]),
        (torch.square, ["square"]),
        ("layers.1", ["layers_1"]),
        ("act", ["act"]),
        (Matching(lambda node: "layers" in node.name), ["layers_0", "layers_1"]),
    ],
)
def test_an_override_applies_where_its_key_says(graph, key, nodes):
    verdicts = _verdicts(bwsk_fx.type_nodes(graph, overrides={key: "GRAY"}))
    assert [name for name, verdict in verdicts.items() if verdict.rule == "override"] == nodes
    assert {verdicts[name].confidence for name in nodes} == {1.0}


def test_a_path_outweighs_a_class(graph):
    verdicts = _verdicts(bwsk_fx.type_nodes(graph, overrides={"layers.1": "GRAY", nn.Linear: Label.K}))
    assert [verdicts[name].label for name in ("first", "layers_0", "layers_1")] == [Label.K, Label.K, Label.GRAY]


def test_an_override_with_an_inverse_is_tried_and_believed(graph):
    verdicts = _verdicts(bwsk_fx.type_nodes(graph, overrides={Warp: Undo(_divide)}))
    assert (verdicts["warp"].label, verdicts["warp"].confidence) == (Label.S, 1.0)
    certificates = bwsk_fx.certify(graph, X)
    assert "warp" in {node.node for node in certificates.certified}


def test_an_override_by_a_rule_sees_the_node(graph):
    def counted(call: Call) -> Verdict:
        return erases("by hand", elements=call.elements())

    verdict = _verdicts(bwsk_fx.type_nodes(graph, overrides={"square": counted}))["square"]
    assert (verdict.label, verdict.erasure.elements, verdict.confidence) == (Label.K, 2, 1.0)


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        ({"act": "S"}, "override of node 'act' is 'S'; say 'K' or 'GRAY', and for S give the inverse"),
        ({"act": Undo(lambda run: run.output)}, "override of node 'act' claims S, but its inverse fails in float32"),
        ({"layers.l": "K"}, r"override of 'layers.l' matches no operator of the graph; did you mean layers"),
        ({nn.GELU: "K"}, "override of GELU matches no operator"),
        ({"act": lambda call: None}, "gave a NoneType instead of a Verdict"),
    ],
)
def test_an_override_that_does_not_hold_is_refused(graph, overrides, complaint):
    with pytest.raises(RuleError, match=complaint):
        bwsk_fx.type_nodes(graph, overrides=overrides)


def test_overrides_serve_the_published_ruleset_too(graph):
    verdicts = _verdicts(bwsk_fx.type_nodes(graph, "published", {"act": "GRAY"}))
    assert (verdicts["act"].label, verdicts["act"].ruleset) == (Label.GRAY, "published")


def test_a_meta_model_says_why_a_claim_cannot_be_tried():
    with torch.device("meta"):
        graph = bwsk_fx.capture(Net(), torch.randn(2, 4, device="meta"))
    with pytest.raises(RuleError, match="cannot be tried: the parameters of 'first' are on the meta device"):
        bwsk_fx.type_nodes(graph, overrides={"first": Undo(lambda run: run.output)})


# -- entry points ---------------------------------------------------------------------------------------------------


def test_entry_points_are_loaded_once_before_typing(monkeypatch, tmp_path, graph):
    (tmp_path / "my_rules.py").write_text(
        "import bwsk_fx, torch\n"
        "from bwsk_fx.rules import Example, unproven\n"
        "@bwsk_fx.rule(torch.square, examples=[Example(torch.square, (torch.ones(2),))])\n"
        "def mine(call):\n    return unproven('from a plugin')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    point = EntryPoint("mine", "my_rules", user.ENTRY_POINTS)
    monkeypatch.setattr(user, "entry_points", lambda group: [point] if group == "bwsk_fx.rules" else [])
    user.load_entry_points.cache_clear()
    assert "from a plugin" in _verdicts(bwsk_fx.type_nodes(graph))["square"].rationale
    assert user.load_entry_points() == ("mine",)
    user.load_entry_points.cache_clear()


def test_a_broken_entry_point_is_named(monkeypatch, graph):
    point = EntryPoint("broken", "no_such_module_at_all", user.ENTRY_POINTS)
    monkeypatch.setattr(user, "entry_points", lambda group: [point])
    user.load_entry_points.cache_clear()
    with pytest.raises(RuleError, match=r"entry point 'broken' .* cannot be loaded: ModuleNotFoundError"):
        bwsk_fx.type_nodes(graph)
    user.load_entry_points.cache_clear()
