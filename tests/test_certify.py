"""Certification keeps S labels that hold, and catches rules that are wrong."""

import copy
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import bwsk_fx
from bwsk_fx.errors import CaptureError, RuleError
from bwsk_fx.rules import Undo, by_products, preserves, registry
from bwsk_fx.verdict import Label, WitnessKind


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


class _Calls(nn.Module):
    """A function as a model."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


def _certified(model, x, **options):
    """Capture, type and certify a model, and return its last certificate with the graph."""
    inputs = {"x": x} if isinstance(model, _Calls) else x
    # The outermost module is opened up; inside a container a leaf stays one node.
    model = model if isinstance(model, _Calls) else nn.Sequential(model)
    graph = bwsk_fx.type_nodes(bwsk_fx.capture(model, inputs))
    return bwsk_fx.certify(graph, inputs, **options).nodes[-1], graph


def _claim(monkeypatch, target, rebuild, **options):
    """Make `target` S with the given inverse, as a deliberately wrong rule would."""
    undo = Undo(rebuild, by_products=options.pop("made", None))
    monkeypatch.setitem(registry._RULES, target, lambda call: preserves("wrong on purpose", undo=undo, **options))


# -- rules that are wrong -------------------------------------------------------------------------------------------


def test_square_as_s_is_caught(monkeypatch):
    _claim(monkeypatch, torch.square, lambda run: run.output.sqrt())
    certificate, graph = _certified(_Calls(torch.square), torch.randn(4, 8))
    assert certificate.verdict.label is Label.GRAY
    assert "its inverse fails in float32" in certificate.verdict.rationale
    assert certificate.error("float32") == pytest.approx(2, rel=0.1)
    square = next(node for node in graph.graph.nodes if node.name == "square")
    assert square.meta["bwsk"] is certificate.verdict


def test_square_as_s_is_caught_on_inputs_that_hide_it(monkeypatch):
    _claim(monkeypatch, torch.square, lambda run: run.output.sqrt())
    positive = torch.rand(4, 8) + 0.5
    certificate, _ = _certified(_Calls(torch.square), positive)
    assert certificate.trials[0].real.complete
    assert certificate.verdict.label is Label.GRAY
    trusting, _ = _certified(_Calls(torch.square), positive, adversarial=False)
    assert trusting.certified


def test_a_contracting_linear_as_s_is_caught(monkeypatch):
    def pseudo_inverse(run):
        inverse = run.once("inverse", lambda: torch.linalg.pinv(run.module.weight))
        return (run.output - run.module.bias) @ inverse.T

    _claim(monkeypatch, nn.Linear, pseudo_inverse)
    certificate, _ = _certified(nn.Linear(3072, 768), torch.randn(2, 3072), dtypes=(torch.float64,))
    assert certificate.verdict.label is Label.GRAY
    assert certificate.trials[0].real.wrong > 5000


def test_dropout_as_s_is_caught(monkeypatch):
    _claim(monkeypatch, nn.Dropout, lambda run: run.output * (1 - run.module.p))
    certificate, _ = _certified(nn.Dropout(0.1).train(), torch.randn(16, 64))
    assert certificate.verdict.label is Label.GRAY
    assert certificate.trials[0].real.wrong / (16 * 64) == pytest.approx(0.1, abs=0.04)


def test_layer_norm_without_its_witness_is_caught(monkeypatch):
    _claim(monkeypatch, nn.LayerNorm, lambda run: (run.output - run.module.bias) / run.module.weight)
    certificate, _ = _certified(nn.LayerNorm(32), 3 * torch.randn(4, 32) + 1)
    assert certificate.verdict.label is Label.GRAY
    assert certificate.trials[0].real.wrong > 120


def test_layer_norm_that_looks_at_its_operand_is_caught(monkeypatch):
    def peek(run):
        return run.output * run.before.std(-1, keepdim=True) + run.before.mean(-1, keepdim=True)

    _claim(monkeypatch, nn.LayerNorm, peek)
    certificate, _ = _certified(nn.LayerNorm(32), torch.randn(4, 32))
    assert certificate.verdict.label is Label.GRAY
    assert "meta" in certificate.verdict.rationale or "witness does not name" in certificate.verdict.rationale


def test_gelu_as_s_is_caught_near_its_minimum(monkeypatch):
    def upper_branch(run):
        x = run.output.clamp(min=0) + 0.1
        for _ in range(60):
            slope = torch.special.ndtr(x) + x * torch.exp(-x * x / 2) / 2.5066282746
            x = (x - (F.gelu(x) - run.output) / slope).clamp(min=-0.7517916)
        return x

    _claim(monkeypatch, F.gelu, upper_branch)
    certificate, _ = _certified(_Calls(F.gelu), torch.rand(4, 8) + 1)
    assert certificate.trials[0].real.complete
    assert certificate.verdict.label is Label.GRAY


def test_a_claim_without_an_inverse_is_not_believed(monkeypatch):
    monkeypatch.setitem(registry._RULES, torch.square, lambda call: preserves("trust me", undo=None))
    certificate, _ = _certified(_Calls(torch.square), torch.randn(4, 8))
    assert "it has no inverse that could be run" in certificate.verdict.rationale


def test_an_inverse_that_works_in_one_dtype_only_is_caught(monkeypatch):
    _claim(monkeypatch, torch.positive, lambda run: run.output if run.output.dtype is torch.float32 else -run.output)
    certificate, _ = _certified(_Calls(torch.positive), torch.randn(4, 8))
    assert certificate.trials[0].real.complete
    assert "its inverse fails in float64" in certificate.verdict.rationale


# -- rules that hold ------------------------------------------------------------------------------------------------


def test_a_certified_label_has_confidence_one_and_says_how_well_it_did():
    certificate, _ = _certified(nn.Linear(8, 16), torch.randn(4, 8))
    assert certificate.certified
    assert (certificate.verdict.label, certificate.verdict.confidence) == (Label.S, 1.0)
    assert "certified with a worst relative error of" in certificate.verdict.rationale
    assert 1 < certificate.condition < 1e3


def test_errors_grow_as_precision_falls():
    certificate, _ = _certified(nn.LayerNorm(64), torch.randn(4, 64))
    errors = [certificate.trials[0].real.error] + [trial.real.error for trial in certificate.trials[1:]]
    by_dtype = dict(zip((trial.dtype for trial in certificate.trials), errors, strict=True))
    assert by_dtype["float64"] < 1e-13 < by_dtype["float32"] < 1e-5 < by_dtype["float16"] < by_dtype["bfloat16"] < 0.1


def test_a_rank_deficient_weight_is_demoted_with_its_condition_number():
    linear = nn.Linear(8, 16)
    with torch.no_grad():
        linear.weight[:, 3] = linear.weight[:, 5]
    certificate, _ = _certified(linear, torch.randn(4, 8))
    assert certificate.verdict.label is Label.K
    assert certificate.condition > 1e6
    assert "the condition number of its map is" in certificate.verdict.rationale
    assert certificate.verdict.erasure.elements >= 2


def _without_rows(weight):
    weight[[3, 5]] = 0


def _without_a_column(weight):
    weight[:, 2] = 0


def _with_twin_columns(weight):
    weight[:, 3] = weight[:, 4]


def _with_twin_rows(weight):
    weight[3] = weight[4]


@pytest.mark.parametrize(
    ("damage", "lost"),
    [(_without_rows, 16), (_with_twin_rows, 16), (_without_a_column, 1), (_with_twin_columns, 2), (torch.zero_, 16)],
)
@pytest.mark.parametrize("seed", range(3))
def test_what_a_weight_without_full_rank_leaves_open_is_lost(damage, lost, seed):
    torch.manual_seed(seed)
    linear = nn.Linear(16, 16, bias=False)
    with torch.no_grad():
        damage(linear.weight)
    certificate, _ = _certified(linear, torch.randn(4, 16))
    assert certificate.verdict.label is Label.K
    assert certificate.verdict.erasure.elements == lost


def test_saturated_activations_are_demoted_with_a_count():
    x = torch.full((4, 8), 0.5)
    x[:, :2] = 30.0
    certificate, graph = _certified(nn.Tanh(), x)
    assert certificate.verdict.label is Label.K
    assert certificate.verdict.erasure.elements == 2
    assert bwsk_fx.summarize(graph).k == 1
    kept, _ = _certified(nn.Tanh(), torch.randn(4, 8))
    assert kept.certified


def test_a_vit_is_certified_whole(make_vit, make_images):
    graph = bwsk_fx.capture(make_vit(), make_images())
    certificates = bwsk_fx.certify(graph, make_images())
    assert len(certificates.nodes) == bwsk_fx.summarize(graph).s + len(certificates.demoted)
    assert [
        (node.node, node.verdict.rationale) for node in certificates.demoted if node.verdict.label is Label.GRAY
    ] == []
    assert {node.operator for node in certificates.demoted} <= {"Linear"}
    assert {node.meta["bwsk"].confidence for node in graph.graph.nodes if node.name.startswith("add")} == {1.0}


def test_certifying_changes_neither_the_model_nor_the_random_state(make_images):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(3, 48, 4, stride=4), nn.BatchNorm2d(48), nn.Dropout(0.5)).train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    graph = bwsk_fx.capture(model, x)
    bwsk_fx.certify(graph, x)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_in_place_operators_are_certified_on_values_from_before_they_write():
    certificate, _ = _certified(_Calls(lambda x: (x + 1).mul_(3)), torch.randn(4, 8))
    assert certificate.certified


# -- the interface --------------------------------------------------------------------------------------------------


def test_only_the_sound_ruleset_can_be_certified():
    graph = bwsk_fx.type_nodes(bwsk_fx.capture(nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4)), "published")
    with pytest.raises(RuleError, match='"sound" ruleset'):
        bwsk_fx.certify(graph, torch.randn(2, 4))


def test_inputs_that_do_not_fit_are_named():
    graph = bwsk_fx.capture(nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4))
    with pytest.raises(CaptureError, match=r"graph's inputs \(input"):
        bwsk_fx.certify(graph, (torch.randn(2, 4), torch.randn(2, 4)))


def test_another_mode_is_refused():
    class Own(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.dropout(x, 0.5, self.training) + 1

    graph = bwsk_fx.capture(Own().train(), torch.randn(2, 4))
    with pytest.raises(CaptureError, match="captured in train mode"):
        bwsk_fx.certify(graph.eval(), torch.randn(2, 4))


def test_the_report_is_json_and_text(make_vit, make_images):
    graph = bwsk_fx.capture(make_vit(), make_images())
    certificates = bwsk_fx.certify(graph, make_images(), adversarial=False)
    found = json.loads(json.dumps(certificates.to_json()))
    assert found["certified"] == len(certificates.certified)
    norm = next(node for node in found["nodes"] if node["operator"] == "LayerNorm")
    assert norm["verdict"]["witness"]["names"] == ["mean", "rstd"]
    assert {trial["dtype"] for trial in norm["trials"]} == {"float64", "float32", "float16", "bfloat16"}
    text = str(certificates)
    assert "LayerNorm" in text and "worst relative round-trip error" in text


def test_a_witness_is_needed_and_used(monkeypatch):
    def mean_of(run):
        return {"mean": run.before.mean(-1, keepdim=True)}

    _claim(monkeypatch, nn.Hardtanh, lambda run: run.output, made=mean_of, witness=by_products("mean"))
    certificate, _ = _certified(nn.Hardtanh(-100, 100), torch.rand(2, 3), adversarial=False)
    assert certificate.verdict.witness.kind is WitnessKind.BY_PRODUCTS
