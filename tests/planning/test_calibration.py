"""Fitting a roofline with times that the tests set, the file that remembers figures, and cost models by name."""

import json
import math
import warnings
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from bwsk_fx.errors import PlanError
from bwsk_fx.planning import calibration, timing
from bwsk_fx.planning.calibration import calibrate, cost_model, fresh_rate, launch_seconds
from bwsk_fx.planning.cost import Roofline, profile_of
from bwsk_fx.planning.figures import FigureFile, figures_path
from bwsk_fx.planning.options import COSTS
from bwsk_fx.planning.timing import MeasuredCosts

CPU = torch.device("cpu")
PROFILE = replace(profile_of(CPU), products_bfloat16=3e11, fresh=math.inf)


class Watch:
    """Says that everything takes `time`, or what `times` say in turn; runs nothing."""

    def __init__(self, device: str = "cpu", time: float = 1.0, times=()) -> None:
        self.device, self._time, self._times = torch.device(device), time, iter(times)

    def roughly(self, run) -> float:
        return self.seconds(run)

    def seconds(self, run) -> float:
        return next(self._times, self._time)


# -------------------------------------------------------------------------------------------------- fitting a profile


def test_rates_are_what_is_done_per_second(monkeypatch):
    monkeypatch.setattr(calibration, "fresh_rate", lambda watch: 5.0)
    profile, steady = calibrate(Watch(time=0.5))
    assert steady
    assert profile.products_float32 == profile.products_float16 == 2 * 128**3 / 0.5
    assert profile.attention_bfloat16 == 7 * 2 * 256**2 * 64 / 0.5
    assert profile.bandwidth == 128 * 256 * 18 / 0.5
    assert profile.functions == 4 * 128 * 256 / 0.5
    assert profile.normalizations == 128 * 256 / 0.5
    assert (profile.fresh, profile.launch) == (5.0, 0.5 / 64)


def test_work_grows_until_it_takes_long_enough():
    watch = Watch(times=[1e-5, 1e-4, 1e-3, 0.25])
    assert calibration._rate(watch, "products_float32", calibration.product, torch.float32) == 2 * 512**3 / 0.25


def test_the_best_of_several_passes_counts(monkeypatch):
    base = asdict(PROFILE)
    passes = iter(
        [
            {**base, "bandwidth": 10.0, "launch": 3.0, "fresh": 1.0},
            {**base, "bandwidth": 29.0, "launch": 2.0, "fresh": 100.0},
            {**base, "bandwidth": 1.0, "launch": 9.0, "fresh": 1.0},
        ]
    )
    monkeypatch.setattr(calibration, "_figures_once", lambda watch: next(passes))
    profile, steady = calibrate(Watch())
    assert profile == replace(PROFILE, bandwidth=29.0, launch=2.0, fresh=100.0)
    assert steady


@pytest.mark.parametrize(("name", "values"), [("bandwidth", (10.0, 31.0, 1.0)), ("launch", (1.0, 3.5, 4.0))])
def test_a_figure_that_no_other_pass_comes_near_is_not_steady(monkeypatch, name, values):
    passes = iter([{**asdict(PROFILE), name: value} for value in values])
    monkeypatch.setattr(calibration, "_figures_once", lambda watch: next(passes))
    assert not calibrate(Watch())[1]


def test_a_rate_that_cannot_be_measured_is_the_built_in_one():
    def fails(size, dtype, device):
        raise RuntimeError("not implemented for 'Half'\nand more")

    with pytest.warns(UserWarning, match="products_float16 cannot be measured on cpu .not implemented for 'Half'."):
        rate = calibration._rate(Watch(), "products_float16", fails, torch.float16)
    assert rate == profile_of(CPU).products_float16


@pytest.mark.parametrize("name", calibration._WORKS)
def test_every_work_runs_and_doubles_in_size(name):
    make, dtype = calibration._WORKS[name]
    amount, run = make(128, dtype, CPU)
    run()
    assert make(256, dtype, CPU)[0] / amount == (8 if "products" in name else 2 if "attention" in name else 4)


def test_hooks_of_the_caller_do_not_see_what_attention_saves():
    seen = []
    _, run = calibration.attention(128, torch.float32, CPU)
    with saved_tensors_hooks(seen.append, lambda saved: saved), torch.no_grad():
        run()
    assert not seen


@pytest.mark.parametrize(("new", "old", "rate"), [(3.0, 1.0, (2**25 + 2**20) / 2.0), (1.2, 1.0, math.inf)])
def test_fresh_memory_is_what_new_results_take_longer(new, old, rate):
    assert fresh_rate(Watch(times=[new, old])) == rate


def test_an_accelerator_has_no_fresh_memory():
    assert fresh_rate(Watch("cuda", times=[3.0, 1.0])) == math.inf


def test_a_launch_is_a_share_of_a_chain_of_operators():
    results = []
    watch = SimpleNamespace(device=CPU, seconds=lambda run: results.append(run()) or 6.4)
    assert launch_seconds(watch) == pytest.approx(0.1)
    assert results[0].item() == 65.0


# ----------------------------------------------------------------------------------------------------------- the file


def test_figures_are_there_again_in_the_next_process(tmp_path):
    path = tmp_path / "folder" / "figures.json"
    first = FigureFile(path)
    first.keep(PROFILE)
    first["aten.neg.default(x)"] = 2.5e-6
    second = FigureFile(path)
    assert second.profile == PROFILE
    assert dict(second) == {"aten.neg.default(x)": 2.5e-6}
    assert [file.name for file in path.parent.iterdir()] == ["figures.json"]
    assert json.loads(path.read_text())["calls"] == {"aten.neg.default(x)": 2.5e-6}


def test_processes_beside_each_other_keep_each_other_s_figures(tmp_path):
    one, other = (FigureFile(tmp_path / "figures.json") for _ in range(2))
    one["a"] = 1.0
    other["b"] = 2.0
    one["c"] = 3.0
    assert dict(FigureFile(tmp_path / "figures.json")) == {"a": 1.0, "b": 2.0, "c": 3.0}


GOOD = {"profile": asdict(PROFILE), "calls": {"a": 1.0}}


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        json.dumps({**GOOD, "calls": {"a": "1.0"}}),
        json.dumps({**GOOD, "calls": {"a": True}}),
        json.dumps({**GOOD, "calls": {"a": -1.0}}),
        json.dumps({**GOOD, "calls": {"a": math.nan}}),
        json.dumps({**GOOD, "profile": {"launch": 1.0}}),
        json.dumps({**GOOD, "profile": {**GOOD["profile"], "other": 1.0}}),
    ],
)
def test_a_corrupt_file_is_warned_of_and_replaced(tmp_path, content):
    path = tmp_path / "figures.json"
    path.write_text(content)
    with pytest.warns(UserWarning, match=r"figures\.json cannot be read"):
        figures = FigureFile(path)
    assert (figures.profile, dict(figures)) == (None, {})
    figures["b"] = 2.0
    assert dict(FigureFile(path)) == {"b": 2.0}


def test_a_file_that_cannot_be_written_is_warned_of_once(tmp_path):
    (tmp_path / "file").write_text("")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        figures = FigureFile(tmp_path / "file" / "figures.json")
        figures["a"] = 1.0
        figures["b"] = 2.0
    assert dict(figures) == {"a": 1.0, "b": 2.0}
    (warning,) = warned
    assert "cannot be written" in str(warning.message) and "BWSK_FX_CACHE" in str(warning.message)


def test_the_folder_is_the_user_s_choice(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("BWSK_FX_CACHE", raising=False)
    assert figures_path(CPU).parent == tmp_path / "home" / ".cache" / "bwsk-fx"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert figures_path(CPU).parent == tmp_path / "xdg" / "bwsk-fx"
    monkeypatch.setenv("BWSK_FX_CACHE", str(tmp_path / "own"))
    assert figures_path(CPU).parent == tmp_path / "own"


def test_the_file_belongs_to_device_threads_version_and_precision(monkeypatch):
    names = [figures_path(CPU).name]
    for owner, name, value in (
        (torch, "get_num_threads", lambda: 77),
        (torch, "__version__", "9.9"),
        (torch, "get_float32_matmul_precision", lambda: "medium"),
        (torch.cuda, "get_device_name", lambda device: "Card / 80GB"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            names.append(figures_path(torch.device("cuda") if owner is torch.cuda else CPU).name)
    assert len(set(names)) == 5
    assert "77-threads" in names[1]
    assert names[4].startswith("figures-1-Card-80GB-")


def test_without_a_home_folder_there_is_no_file(monkeypatch):
    def homeless():
        raise RuntimeError("no home")

    monkeypatch.delenv("BWSK_FX_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pathlib.Path.home", homeless)
    assert figures_path(CPU) is None
    figures = FigureFile(None)
    figures["a"] = 1.0
    assert dict(figures) == {"a": 1.0}


# ----------------------------------------------------------------------------------------------- cost models by name


@pytest.fixture
def device(monkeypatch, tmp_path):
    """A device that is measured in no time, and forgets on request that it was."""
    monkeypatch.setenv("BWSK_FX_CACHE", str(tmp_path))
    state = SimpleNamespace(calibrations=0, timings=0, steady=True)

    def calibrated(watch):
        state.calibrations += 1
        return PROFILE, state.steady

    def timed(call, watch):
        state.timings += 1
        return 4.0

    def restart():
        for cached in (calibration._figures, calibration._roofline, calibration._measured):
            cached.cache_clear()

    monkeypatch.setattr(calibration, "calibrate", calibrated)
    monkeypatch.setattr(timing, "call_seconds", timed)
    state.restart = restart
    restart()
    yield state
    restart()


def _neg():
    operand = torch.empty(3, device="meta")
    return timing.KernelCall(torch.ops.aten.neg.default, (operand,), {}, operand)


def test_built_in_figures_are_not_measured(device, tmp_path):
    assert cost_model(CPU, "builtin") == Roofline(profile_of(CPU))
    assert device.calibrations == 0
    assert not list(tmp_path.iterdir())


def test_a_roofline_is_calibrated_once(device):
    costs = cost_model(CPU, "roofline")
    assert costs == Roofline(PROFILE)
    assert cost_model(CPU, "roofline") is costs
    device.restart()
    assert cost_model(CPU, "roofline") == costs
    assert device.calibrations == 1


def test_calls_are_measured_once(device):
    costs = cost_model(CPU, "measured")
    assert isinstance(costs, MeasuredCosts)
    assert cost_model(CPU, "measured") is costs
    assert costs.roofline == Roofline(PROFILE)
    assert costs.call_seconds(_neg()) == 4.0
    device.restart()
    assert cost_model(CPU, "measured").call_seconds(_neg()) == 4.0
    assert (device.calibrations, device.timings) == (1, 1)


def test_another_folder_or_number_of_threads_is_another_measurement(device, monkeypatch, tmp_path):
    cost_model(CPU, "roofline")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    cost_model(CPU, "roofline")
    monkeypatch.setenv("BWSK_FX_CACHE", str(tmp_path / "other"))
    cost_model(CPU, "roofline")
    assert device.calibrations == 3


def test_uncertain_figures_are_warned_of_and_not_written(device, tmp_path):
    device.steady = False
    with pytest.warns(UserWarning, match="cpu is so busy"):
        assert cost_model(CPU, "roofline") == Roofline(PROFILE)
    assert not list(tmp_path.iterdir())


def test_an_unknown_kind_is_refused_with_those_there_are():
    with pytest.raises(PlanError, match="costs is 'guess': expected one of 'builtin', 'roofline', 'measured'"):
        cost_model(CPU, "guess")
    assert COSTS == ("builtin", "roofline", "measured")
