"""Collectives of a step, counted by PyTorch's CommDebugMode, against a plan for Megatron written by hand."""

import pytest

LAYERS = 2


def _all_reduces(figures: dict) -> tuple[int, int]:
    kinds = {name.partition(" ")[2] for name in figures if name.startswith(("forward ", "backward "))}
    assert kinds == {"all_reduce"}
    return figures["forward all_reduce"], figures["backward all_reduce"]


def test_megatron_sums_twice_per_block(two_processes):
    assert _all_reduces(two_processes("tensor-megatron"))[0] == 2 * LAYERS


def test_the_derived_plan_has_the_collectives_of_megatron(two_processes):
    assert _all_reduces(two_processes("tensor-modules")) == _all_reduces(two_processes("tensor-megatron"))


def test_a_part_of_the_tokens_moves_as_much_as_a_sum(two_processes):
    figures = two_processes("tensor-sequence-regions")
    assert "forward all_reduce" not in figures
    # The first block gets all tokens from the embeddings, and the classifier wants all of the last.
    assert figures["forward reduce_scatter_tensor"] == figures["forward all_gather_into_tensor"] == 2 * LAYERS
    assert figures["backward reduce_scatter_tensor"] == 2 * LAYERS - 1


def test_keys_are_shared_out_with_their_queries(two_processes):
    # Queries, keys, values, output and the three gated Linears of each block.
    assert two_processes("tensor-llama-regions")["sharded"] == 7 * LAYERS


@pytest.mark.parametrize(
    "scenario", ["tensor-graph", "tensor-regions", "tensor-regions-exact", "tensor-regions-smallest"]
)
def test_a_rewritten_graph_sums_once_per_pair_and_pass(two_processes, scenario):
    # However little a region keeps: no sum over devices is ever run again.
    assert _all_reduces(two_processes(scenario)) == (2 * LAYERS, 2 * LAYERS)
