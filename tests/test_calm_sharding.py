"""Axes for several devices: the optimum by brute force, data parallelism and Megatron's plan where each wins."""

import copy
import json
import pickle
import random
from collections import Counter
from io import StringIO
from itertools import product

import pytest
import torch
from torch import nn

import bwsk_fx
from bwsk_fx import calm_sharding
from bwsk_fx.calm_choices import PARTIAL, REPLICATED, Choice, Need, Problem, Task
from bwsk_fx.calm_cost import Cost, Growth
from bwsk_fx.calm_sharding import change, returned, solve
from bwsk_fx.errors import RuleError
from bwsk_fx.report.calm_sharding import Stretch, folded

LAYERS, HIDDEN, WIDE, HEADS, TOKENS, FLOAT = 2, 32, 64, 4, 17, 4


@pytest.fixture(scope="module")
def report_of(make_vit, make_images):
    def report_of(**sizes):
        return bwsk_fx.analyze_calm(bwsk_fx.capture(make_vit(num_hidden_layers=LAYERS, **sizes), make_images()))

    return report_of


@pytest.fixture(scope="module")
def report(report_of):
    return report_of()


def _kinds(sharding, direction: str) -> Counter:
    return Counter(each.kind for each in sharding.collectives if each.direction == direction)


# -- the search -------------------------------------------------------------------------------------------------------


def _growth(value: int) -> Growth:
    return Growth((value, value, value))


def _random_problem(draw: random.Random, count: int) -> Problem:
    """A random DAG whose nodes can run replicated, along either of two axes, or into summands."""
    tasks, users = [], [[] for _ in range(count)]
    for index in range(count):
        sources = sorted(draw.sample(range(index), min(index, draw.randint(1, 2))))
        learns = draw.random() < 0.8
        choices = [Choice("", tuple(Need(source, REPLICATED, REPLICATED) for source in sources), REPLICATED)]
        for axis in (0, 1):
            for result in draw.sample([axis, 1 - axis, PARTIAL], draw.randint(0, 2)):
                needs = tuple(
                    draw.choice([Need(source, axis, axis), Need(source, REPLICATED, PARTIAL)]) for source in sources
                )
                gradients = (("weight", draw.randint(0, 9)),) if learns else ()
                choices.append(Choice(f"axis{axis}", needs, result, (), gradients, draw.choice([0, 0, 3])))
        for source in sources:
            users[source].append(index)
        flops, moved = _growth(draw.choice([0, 1])), _growth(draw.randint(0, 5))
        tensors = (((draw.randint(1, 30),), 1),)
        tasks.append(Task(f"n{index}", "", tuple(choices), tensors, learns, Cost(flops, moved), ()))
    return Problem(tuple(Task(**{**vars(task), "users": tuple(users[index])}) for index, task in enumerate(tasks)), ())


def _sent(problem: Problem, choices, devices: int, batch: int) -> int:
    """What an assignment sends, times n²: each tensor goes into each form once, and each kind of gradient back once."""
    n = devices
    factor = {"": 0, "all-reduce": 2 * (n - 1) * n, "reduce-scatter": (n - 1) * n, "all-gather": (n - 1) * n}
    factor["all-to-all"] = n - 1
    total, done = 0, set()
    for index, choice in enumerate(choices):
        total += sum(size for _, size in choice.gradients) * factor["all-reduce"]
        total += choice.gathered * batch * (factor["all-gather"] + factor["reduce-scatter"])
        for need in choice.needs:
            task, form = problem.tasks[need.task], choices[need.task].result
            size = task.tensors[0][0][0]
            if (need.task, "forward", need.form) not in done:
                total += size * factor[change(form, need.form)]
            if task.learns and (need.task, "backward", need.gradient) not in done:
                total += size * factor[change(need.gradient, returned(form))]
            done |= {(need.task, "forward", need.form), (need.task, "backward", need.gradient)}
        if choice.result == PARTIAL and not problem.tasks[index].users:
            total += problem.tasks[index].tensors[0][0][0] * factor["all-reduce"]
    return total


def _least(problem: Problem, devices: int, batch: int) -> int:
    allowed = []
    for task in problem.tasks:
        sharded = task.choices[1:]
        allowed.append(sharded if sharded and task.cost.flops.at(batch) else task.choices)
    return min(_sent(problem, choices, devices, batch) for choices in product(*allowed))


@pytest.mark.parametrize("devices", [2, 3, 5])
def test_no_assignment_sends_less(devices):
    draw = random.Random(devices)
    for _ in range(100):
        problem = _random_problem(draw, draw.randint(2, 7))
        found = solve(problem, devices, 2)
        assert found.exact
        assert round(found.total_bytes * devices**2) == _least(problem, devices, 2)


def test_a_search_that_drops_states_says_so(monkeypatch, report):
    exact = report.sharding(2, 64)
    monkeypatch.setattr(calm_sharding, "LIMIT", 1)
    hurried = report.sharding(2, 2)
    assert exact.exact and not hurried.exact
    # Plans that keep to one axis are found all the same.
    assert report.sharding(2, 64).total_bytes == exact.total_bytes
    assert "too many forms at once" in _printed(hurried)


def test_what_each_device_sends():
    """Ring algorithms and the pairwise exchange, for a tensor of one byte on four devices."""
    rates = {kind: rate(4) / 16 for kind, rate in calm_sharding.UNITS.items()}
    assert rates == {"all-reduce": 1.5, "reduce-scatter": 0.75, "all-gather": 0.75, "all-to-all": 3 / 16}


def test_costs_are_quadratic_in_the_batch():
    assert [Growth((4, 9, 16)).at(batch) for batch in (1, 2, 7)] == [1, 4, 49]
    assert Growth((5, 7, 9)).at(100) == 201


# -- what nodes can do ------------------------------------------------------------------------------------------------


def _task(report, name: str) -> Task:
    return next(task for task in report.problem.tasks if task.name == name)


class Pieces(nn.Module):
    """One projection whose result is cut into pieces of equal or different sizes."""

    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        self.linear, self.sizes = nn.Linear(8, sum(sizes)), sizes

    def forward(self, x):
        first, second = self.linear(x).split(self.sizes, -1)
        return first.sum() + second.sum()


@pytest.mark.parametrize(("sizes", "even"), [([8, 8], True), ([4, 8], False)])
def test_equal_pieces_can_be_sharded_alike(sizes, even):
    report = bwsk_fx.analyze_calm(bwsk_fx.capture(Pieces(sizes), (torch.randn(2, 8),)))
    choices = {choice.axis for choice in _task(report, "split").choices}
    assert choices == ({"", "batch", "feature"} if even else {"", "batch"})


def test_only_the_outermost_part_of_a_merged_axis_keeps_its_shards(report):
    """Heads and their features become features: shards of the former are shards of the result, of the latter not."""
    (merged,) = [task for task in report.problem.tasks if task.name == "reshape_1"]
    attention = _task(report, "scaled_dot_product_attention")
    head = next(choice.result for choice in attention.choices if choice.axis == "head")
    assert [choice.needs[0].form for choice in merged.choices if choice.axis == "feature"] == [head]


def test_queries_can_be_sharded_if_keys_are_gathered(report):
    choices = {choice.axis: choice for choice in _task(report, "scaled_dot_product_attention").choices}
    assert choices["token"].gathered == 2 * TOKENS * HIDDEN * FLOAT
    assert choices["head"].gathered == 0


class Gate(nn.Module):
    """A product of heads with the heads of its own projection, so that operand and result of that are made alike."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return x.view(-1, 2, 4) * self.linear(x).view(-1, 2, 4)


def test_a_sum_over_features_is_no_reshape():
    report = bwsk_fx.analyze_calm(bwsk_fx.capture(Gate(), (torch.randn(3, 8),)))
    assert [choice.result == PARTIAL for choice in _task(report, "linear").choices].count(True) == 1


# -- ViT --------------------------------------------------------------------------------------------------------------


def test_a_large_batch_is_sharded_by_samples(report, make_vit):
    sharding = report.sharding(4, 4 * 64)
    assert {place.axis for place in sharding.placements} == {"batch"}
    weights = sum(parameter.numel() for parameter in make_vit(num_hidden_layers=LAYERS).parameters()) * FLOAT
    assert sharding.parameter_bytes == sharding.backward_bytes == 2 * 3 / 4 * weights
    assert sharding.forward_bytes == 2 * 3 / 4 * FLOAT  # the loss
    (stretch,) = sharding.sequence
    assert stretch.axes == ("batch",)


def test_a_tiny_batch_with_large_weights_is_sharded_as_megatron_does(report):
    sharding = report.sharding(2, 2)
    assert sharding.exact
    for layer in range(LAYERS):
        block = f"vit_layers_{layer}"
        columns = [sharding.axis_of(f"{block}_attention_{name}_proj") for name in "qkvo"]
        assert columns == ["feature"] * 4
        assert [sharding.axis_of(f"{block}_mlp_{name}") for name in ("fc1", "activation_fn", "fc2")] == ["feature"] * 3
        assert sharding.axis_of(f"{block}_layernorm_before") == ""
    assert sharding.axis_of("scaled_dot_product_attention_1") == "head"
    # Two all-reduces per block and direction, of tokens × hidden each; q, k and v share one.
    activations = 2 * TOKENS * HIDDEN * FLOAT
    whole = [each.direction for each in sharding.collectives if (each.kind, each.bytes) == ("all-reduce", activations)]
    assert Counter(whole) == {"forward": 2 * LAYERS, "backward": 2 * LAYERS}
    assert sharding.parameter_bytes == 0


def test_neither_axis_wins_on_the_others_ground(report):
    """Weights count as well as activations: between the two extremes the cheaper one changes."""
    per_sample = report.sharding(2, 2).total_bytes / 2
    by_batch = report.sharding(2, 512).total_bytes
    assert report.sharding(2, 4).total_bytes <= 4 * per_sample * 1.01
    assert report.sharding(2, 4).total_bytes < by_batch < 512 * per_sample


def test_sizes_that_devices_do_not_divide_are_not_sharded(report_of):
    report = report_of(num_attention_heads=2, hidden_size=36)
    sharding = report.sharding(4, 4)
    sizes = {axis.axis: axis for axis in sharding.axes}
    assert sizes["head"].sizes == (2,) and not sizes["head"].divisible
    assert sizes["batch"].sizes == (4,) and sizes["batch"].divisible
    assert {place.axis for place in sharding.placements}.isdisjoint({"head", "token"})
    odd = report.sharding(4, 6)
    assert {place.axis for place in odd.placements}.isdisjoint({"batch", "head", "token"})
    assert "batch (6)" in _printed(odd)


def test_a_node_that_nothing_divides_is_replicated():
    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 7))
    sharding = bwsk_fx.analyze_calm(bwsk_fx.capture(model, (torch.randn(3, 7),))).sharding(2, 3)
    assert {place.axis for place in sharding.placements} == {""}
    assert sharding.total_bytes == 0
    # Forward 2 · 3 · 7 · 5 per layer, backward twice that, on each device.
    assert sharding.flops_per_device == 3 * 2 * (2 * 3 * 7 * 5)


def test_an_mlp_takes_one_all_reduce_each_way():
    model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64), nn.LayerNorm(64))
    sharding = bwsk_fx.analyze_calm(bwsk_fx.capture(model, (torch.randn(2, 3, 64),))).sharding(2, 2)
    found = [(each.kind, each.tensor, each.user, each.direction, each.bytes) for each in sharding.collectives]
    assert found == [
        ("all-reduce", "_0", "_1", "backward", 2 * 3 * 64 * 4),
        ("all-reduce", "_3", "_4", "forward", 2 * 3 * 64 * 4),
    ]
    assert sharding.seconds(bandwidth=1e6, flops=1e9) == (
        3 * 2 * (2 * 2 * 3 * 64 * 256) / 2 / 1e9,
        2 * (2 * 3 * 64 * 4) / 1e6,
    )


# -- the report -------------------------------------------------------------------------------------------------------


def _printed(sharding) -> str:
    from rich.console import Console

    console = Console(width=100, file=StringIO())
    console.print(sharding)
    return console.file.getvalue()


def test_sums_are_those_of_the_collectives(report):
    sharding = report.sharding(2, 2)
    contents = json.loads(json.dumps(sharding.to_json()))
    assert contents["total_bytes"] == sum(each["sent"] for each in contents["collectives"])
    assert contents["total_bytes"] == contents["forward_bytes"] + contents["backward_bytes"]
    stretches = contents["sequence"]
    assert sum(stretch["forward"] for stretch in stretches) == contents["forward_bytes"]
    assert sum(stretch["backward"] for stretch in stretches) == contents["backward_bytes"]
    assert [node for stretch in stretches for node in stretch["nodes"]] == [
        each["node"] for each in contents["placements"]
    ]
    with pytest.raises(KeyError, match="no node 'fc3'"):
        sharding.axis_of("fc3")


def test_the_table_fits_and_names_what_is_sent(report):
    text = _printed(report.sharding(2, 2))
    assert max(map(len, text.splitlines())) <= 100
    assert "feature, head" in text and "replicated" in text
    assert "not all sizes divisible by 2: channel (3), token (16, 17)" in text
    assert str(report.sharding(2, 64)).splitlines()[0] == "batch: pixel_values … cross_entropy"


def test_repeated_runs_are_folded():
    a, b = Stretch(("feature",), ("x", "y"), 1.0, 2.0), Stretch((), ("z",), 0.0, 0.0)
    end = Stretch(("class",), ("w",), 0.0, 0.0)
    assert folded([end, a, b, a, b, a, b, end]) == [(1, (end,)), (3, (a, b)), (1, (end,))]
    assert folded([]) == []


def test_reports_can_be_copied_and_pickled(report):
    expected = report.sharding(2, 2)
    assert copy.deepcopy(report).sharding(2, 2) == expected
    assert pickle.loads(pickle.dumps(report)).sharding(2, 2) == expected


def test_requests_that_make_no_sense(report):
    with pytest.raises(RuleError, match="at least 2 devices and 1 sample, not 1 and 4"):
        report.sharding(1, 4)
    with pytest.raises(RuleError, match="not 2 and 0"):
        report.sharding(2, 0)
    bare = type(report)(report.axes, report.nodes, report.unknown)
    with pytest.raises(RuleError, match="take the one that analyze_calm returns"):
        bare.sharding(2)
