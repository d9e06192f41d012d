"""FSDP2 with regions: three clipped steps of two micro-batches, half precision, kept bytes, and what is refused."""

import pytest

ACCUMULATED = ("fsdp-root-reshard-accumulated-regions", "fsdp-accelerate-blocks-accumulated-regions")
ACCUMULATED_TOO = tuple(
    f"fsdp-{one}-accumulated-regions" for one in ("root-gathered", "blocks-reshard", "blocks-gathered")
)
HALF = "fsdp-blocks-gathered-half-regions"
HALF_TOO = tuple(f"fsdp-{one}-half-regions" for one in ("root-reshard", "root-gathered", "blocks-reshard"))
KEPT = "fsdp-blocks-reshard-kept"
KEPT_TOO = tuple(f"fsdp-{one}-kept" for one in ("root-reshard", "root-gathered", "blocks-gathered"))


def _assert_same_training(figures):
    assert figures["loss_error"] < 1e-6
    assert figures["weight_error"] < 1e-6
    assert figures["regions"] > 0


def _assert_half_precision(figures):
    assert figures["same"]
    assert figures["rounded"] <= 1.5 * figures["plain"]
    assert figures["regions"] > 0


def _assert_kept_as_planned(figures):
    assert figures["kept"] == figures["wanted"] < 0.5 * figures["eager"]
    of_shards, of_whole = figures["planned"]
    assert of_shards == of_whole > 0


@pytest.mark.parametrize("scenario", ACCUMULATED)
def test_clipped_steps_of_accumulated_gradients_are_those_of_one_process(two_processes, scenario):
    _assert_same_training(two_processes(scenario))


def test_half_precision_has_the_bits_of_fsdp_without_regions(two_processes):
    _assert_half_precision(two_processes(HALF))


def test_a_process_keeps_what_its_share_of_the_batch_keeps_unsharded(two_processes):
    _assert_kept_as_planned(two_processes(KEPT))


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ACCUMULATED_TOO)
def test_clipped_steps_are_the_same_however_parameters_are_gathered(more_on_two_processes, scenario):
    _assert_same_training(more_on_two_processes(scenario))


@pytest.mark.slow
@pytest.mark.parametrize("scenario", HALF_TOO)
def test_half_precision_is_the_same_however_parameters_are_gathered(more_on_two_processes, scenario):
    _assert_half_precision(more_on_two_processes(scenario))


@pytest.mark.slow
@pytest.mark.parametrize("scenario", KEPT_TOO)
def test_kept_bytes_are_the_same_however_parameters_are_gathered(more_on_two_processes, scenario):
    _assert_kept_as_planned(more_on_two_processes(scenario))


@pytest.mark.parametrize(
    ("scenario", "words"),
    [
        ("blocks", ("'vit.layers.0' is sharded by itself", "inside the ViTForImageClassification", "apply_to_blocks")),
        ("late-blocks", ("'vit.layers.0' is sharded by itself", "fully_shard_blocks")),
        ("evaluated", ("'vit.embeddings' is sharded by itself", "fully_shard_blocks")),
        ("inner", ("'mlp' is sharded by itself", "or shard the ViTLayer and nothing inside")),
        # Whatever the policy, accelerate shards the embedding by itself.
        ("accelerate-root", ("'vit.embeddings.patch_embeddings' is sharded by itself", "apply_to_blocks")),
        ("forward", ("'vit.embeddings' has parameters in shards", "call the model itself")),
        ("flat", ("'vit.embeddings'", "FullyShardedDataParallel (FSDP1)", "use FSDP2")),
    ],
)
def test_shards_that_a_graph_would_read_past_are_refused(two_processes, scenario, words):
    refusal = two_processes(f"fsdp-{scenario}-refusal")["refusal"]
    assert refusal.startswith("RegionError: ")
    assert all(word in refusal for word in words), refusal
