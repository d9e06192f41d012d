"""Architectures of the zoo train with regions: gradients as right as eager's, and less kept."""

import json

import pytest
from common import RESULTS
from zoo import NOISE, error_ratio, examine
from zoo_models import ZOO

BOUND = 1.5
# One of each kind that is cheap: convolutions with batch norms, padding, causal masks, sound, Fourier, Dynamo.
IN_CI = ("mobilenetv1", "bert eager", "llama", "audio spectrogram", "fnet", "clip vision", "beit", "mt5")
# What capture cannot take, and where.
REFUSED = {
    "deberta-v2": "if label_index.size(0) > 0:",
    "longformer": "if is_global_attn:",
    "switch-base-8": "for expert_idx in expert_hit:",
    "mixtral": "grouped_mm",
    "mixtral eager": "for expert_idx in expert_hit:",
}
CASES = [pytest.param(name, marks=() if name in IN_CI else pytest.mark.slow) for name in ZOO]


@pytest.fixture(scope="module", params=CASES)
def row(request):
    try:
        return {"model": request.param, "study": ZOO[request.param].study} | examine(ZOO[request.param])
    except ImportError as error:
        pytest.skip(f"not installed: {error}")


@pytest.mark.filterwarnings("ignore")
def test_gradients_are_right_and_less_is_kept(row):
    if row["model"] in REFUSED:
        assert REFUSED[row["model"]] in row["refused"]
    else:
        assert row["route"] == "capture" and row["batch"]
        assert row["budget 0.1"] <= row["budget 0"] + 1e-9
        assert max(row["exact, budget 0"], row["budget 0"]) < 0.9
    if row["route"] != "none":
        assert 0 < row["error"] <= BOUND
    if row["study"]:
        assert row["budget 0.1"] <= 0.75


def test_a_wrong_gradient_is_seen():
    import torch

    exact = {"weight": torch.ones(8, dtype=torch.float64)}
    own = {"weight": torch.ones(8) + 1e-6}
    assert error_ratio(own, own, exact) == pytest.approx(1.0)
    assert error_ratio({"weight": torch.ones(8) + 3e-6}, own, exact) == pytest.approx(3.0, rel=0.1)
    assert error_ratio({}, own, exact) == float("inf")
    assert error_ratio({"weight": torch.ones(8) + 1e-6}, {"weight": torch.ones(8)}, exact) == pytest.approx(
        1e-6 / NOISE, rel=0.1
    )


def test_the_zoo_has_the_study_and_more():
    assert sum(entry.study for entry in ZOO.values()) == 17
    assert len({entry.architecture for entry in ZOO.values() if not entry.study}) >= 60


def test_the_published_table_holds_all_that_is_promised():
    rows = json.loads((RESULTS / "zoo-cpu.json").read_text(encoding="utf-8"))["rows"]
    assert {row["model"] for row in rows} == {name for name in ZOO if not name.startswith("timm")}
    right = {row["architecture"] for row in rows if row["error"] is not None and row["error"] <= BOUND}
    assert len(right) >= 45
    assert {row["model"] for row in rows if row["refused"]} == set(REFUSED)
    assert all(row["error"] <= BOUND for row in rows if row["route"] != "none")
    assert all(row["budget 0.1"] <= 0.75 for row in rows if row["study"])
