"""Losses and gradients of ten steps on several processes against those of one."""

import pytest

DOUBLE, SINGLE = 1e-10, 2e-5
BATCH = ("ddp", "ddp-regions", "ddp-accelerate-regions", "fsdp-root-regions-before", "fsdp-root-regions-after")
BLOCKS = ("fsdp-blocks", "fsdp-blocks-regions", "fsdp-accelerate-regions")
TENSOR = ("tensor-modules", "tensor-graph", "tensor-regions", "tensor-regions-smallest", "tensor-regions-exact")
# A square of patches and one token more divide by two at most.
SEQUENCE = ("tensor-sequence", "tensor-sequence-regions", "tensor-llama-regions", "tensor-numbers-regions")
SQUARE = ("ddp-tensor-regions", "fsdp-tensor-regions", "pipeline-tensor-regions")
LAYERS = ("pipeline", "pipeline-regions", "pipeline-1f1b-loss-regions")
FLOAT32 = ("ddp-regions", "fsdp-blocks-regions", "tensor-regions", "pipeline-regions")
SCENARIOS = [*((name, DOUBLE) for name in (*BATCH, *BLOCKS, *TENSOR, *LAYERS))]
SCENARIOS += [(f"{name}-float32", SINGLE) for name in FLOAT32]


def _assert_same(figures: dict, scenario: str, tolerance: float) -> None:
    assert figures["loss_error"] < tolerance
    assert figures["gradient_error"] < tolerance
    assert (figures["regions"] > 0) == ("regions" in scenario)


@pytest.mark.parametrize(("scenario", "tolerance"), [*SCENARIOS, *((name, DOUBLE) for name in SEQUENCE)])
def test_two_processes_train_as_one_does(two_processes, scenario, tolerance):
    _assert_same(two_processes(scenario), scenario, tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(("scenario", "tolerance"), [*SCENARIOS, *((name, DOUBLE) for name in SQUARE)])
def test_four_processes_train_as_one_does(four_processes, scenario, tolerance):
    _assert_same(four_processes(scenario), scenario, tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize(("scenario", "tolerance"), SCENARIOS)
def test_all_gpus_train_as_one_process_does(all_gpus, scenario, tolerance):
    _assert_same(all_gpus(scenario), scenario, tolerance)


def test_float32_rounds(two_processes):
    # Errors of exactly zero would mean that something is compared with itself.
    assert all(two_processes(f"{name}-float32")["gradient_error"] > 1e-9 for name in FLOAT32)


def test_shards_come_together_to_the_state_dict_of_the_model(two_processes):
    assert two_processes("tensor-state-dict")["same"]


@pytest.mark.parametrize(
    ("scenario", "words"),
    [
        ("tensor-mesh-refusal", ("PlanError", "the plan is for 1 devices")),
        ("tensor-sequence-refusal", ("PlanError", "17 positions of axis 'token'", "do not divide by 2")),
        ("tensor-fused-refusal", ("PlanError", "fused already", "tensor_parallel first")),
    ],
)
def test_what_cannot_take_effect_says_so(two_processes, scenario, words):
    refusal = two_processes(scenario)["refusal"]
    assert all(word in refusal for word in words), refusal
