"""A training run on a CUDA device, in fp16 as published; run with `pytest -m gpu`."""

import pytest
import torch

from bwsk_fx.training.config import Experiment, Mode
from bwsk_fx.training.experiments import train

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    from bwsk_fx.training.config import RunConfig
    from bwsk_fx.training.quiet import quiet

    output = tmp_path_factory.mktemp("gpu") / "out"
    with quiet():
        report = train(RunConfig(output, experiments=(Experiment.SCRATCH,), epochs=3))
    return {Mode(name.rpartition("-")[2]): result for name, result in report.results.items()}


def test_it_runs_in_half_precision_on_the_device(results):
    for result in results.values():
        assert result["configuration"]["precision"] == "fp16"
        assert result["environment"]["device"] == torch.cuda.get_device_name()
        assert result["nan_count"] <= 3  # the scaler's first guesses are too large


def test_every_mode_learns(results):
    accuracies = [result["test_metric"] for result in results.values()]
    assert min(accuracies) > 0.3
    assert max(accuracies) - min(accuracies) < 0.1


def test_analyzed_has_the_losses_of_conventional(results):
    assert results[Mode.ANALYZED]["loss_curve"] == results[Mode.CONVENTIONAL]["loss_curve"]


def test_reversible_keeps_less_and_allocates_less(results):
    ours, conventional = results[Mode.REVERSIBLE], results[Mode.CONVENTIONAL]
    assert ours["saved_for_backward_bytes"] < 0.65 * conventional["saved_for_backward_bytes"]
    assert ours["peak_activation_bytes"] < conventional["peak_activation_bytes"]
