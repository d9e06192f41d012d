"""Dropout under `torch.compile`: the backward pass has the masks of the forward pass, whatever runs again."""

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch.nn import functional as F

import bwsk_fx

BF16 = torch.bfloat16
BOUND = 1.5
BUDGETS = (0.0, 0.1, 0.2, 0.5, float("inf"))
# Generated code at one of the budgets by default.
GENERATED = [pytest.param(budget, marks=() if budget == 0.2 else pytest.mark.slow) for budget in BUDGETS]
SEED = 5


@pytest.fixture(autouse=True)
def _compiled_anew():
    """Code from a store could be that of another plan."""
    torch._dynamo.reset()
    with inductor_config.patch(fx_graph_cache=False), functorch_config.patch(enable_autograd_cache=False):
        yield
    torch._dynamo.reset()


# -- gradients with the masks replayed ---------------------------------------------------------------------------------


class Chain(nn.Module):
    """Dropout of an input, of what is cheap to compute, of a product, and of another dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 5)
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = F.dropout(x, 0.1, self.training)
        x = x + F.dropout(self.down(F.dropout(F.gelu(self.up(self.norm(x))), 0.1, self.training)), 0.1, self.training)
        x = F.dropout(F.dropout(x.exp(), 0.1, self.training).log1p(), 0.1, self.training)
        return {"loss": F.cross_entropy(self.head(x), labels)}


def _chain() -> tuple[nn.Module, dict[str, Tensor]]:
    return Chain(), {"x": torch.randn(64, 16), "labels": torch.arange(64) % 5}


def _bert() -> tuple[nn.Module, dict[str, Tensor]]:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    rates = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    config = transformers.BertConfig(**sizes, **rates, vocab_size=50, max_position_embeddings=16, num_labels=5)
    config._attn_implementation = "eager"
    tokens = torch.randint(3, 50, (8, 16))
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": torch.arange(8) % 5}
    return transformers.BertForSequenceClassification(config), inputs


MODELS: dict[str, Callable[[], tuple[nn.Module, dict[str, Tensor]]]] = {"chain": _chain, "bert": _bert}
# Word, position and type embeddings as one; per layer scores, attention's output and the MLP's; the pooled token.
DROPOUTS = {"chain": 5, "bert": 8}


@contextmanager
def _dropout_by(function: Callable[..., Tensor]) -> Iterator[None]:
    original = F.dropout
    F.dropout = function
    try:
        yield
    finally:
        F.dropout = original


def _recording(masks: list[Tensor]) -> Callable[..., Tensor]:
    """Return a dropout that draws as dropout does and appends its masks to a list."""
    original = F.dropout

    def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        scaled = original(torch.ones_like(x), p, training)
        masks.append(scaled != 0)
        return x * scaled

    return dropout


def _replaying(masks: list[Tensor]) -> Callable[..., Tensor]:
    left = list(masks)

    def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return x * left.pop(0) / (1.0 - p)

    return dropout


def _step(model: nn.Module, inputs: dict[str, Tensor], dtype: torch.dtype | None = None, seed: int = SEED) -> dict:
    """Return the loss and the gradients."""
    model.zero_grad()
    torch.manual_seed(seed)
    with torch.autocast("cpu", dtype=dtype or BF16, enabled=dtype is not None):
        loss = model(**inputs)["loss"]
    loss.backward()
    return {"loss": loss.detach()} | {name: parameter.grad for name, parameter in model.named_parameters()}


def _distance(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """Return how far gradients are from the exact ones; Inductor sums the loss, a float, less precisely than eager."""
    assert found.keys() == exact.keys()
    squares = [(found[name].double() - exact[name]).square().sum() for name in exact if name != "loss"]
    return float(sum(squares)) ** 0.5


class Replay:
    """A model, eager's step with its masks on record, and the step in float64 with these masks."""

    def __init__(self, name: str, dtype: torch.dtype | None) -> None:
        torch.manual_seed(0)
        self.dtype, (self.model, self.inputs) = dtype, MODELS[name]()
        self.model.train()
        masks: list[Tensor] = []
        with _dropout_by(_recording(masks)):
            self.eager = _step(copy.deepcopy(self.model), self.inputs, dtype)
        assert len(masks) == DROPOUTS[name]
        wide = {name: value.double() if value.is_floating_point() else value for name, value in self.inputs.items()}
        with _dropout_by(_replaying(masks)):
            self.exact = _step(copy.deepcopy(self.model).double(), wide)

    def error(self, step: dict[str, Tensor]) -> float:
        """Return the distance of the gradients from those in float64, in units of eager's."""
        return _distance(step, self.exact) / _distance(self.eager, self.exact)

    def assert_as_near_as_eager(self, step: dict[str, Tensor]) -> None:
        torch.testing.assert_close(step["loss"], self.eager["loss"], rtol=1e-5, atol=0.0)
        assert self.error(step) <= BOUND

    def compiled(self, backend: str = "bwsk_fx", **options: object) -> dict[str, Tensor]:
        model = copy.deepcopy(self.model)
        # A compiled model's copy would not be compiled.
        model.compile(backend=backend, options=options or None, fullgraph=True)
        return _step(model, self.inputs, self.dtype)


@pytest.fixture(scope="module")
def replays() -> Callable[..., Replay]:
    return cache(Replay)


@pytest.mark.parametrize("dtype", [None, BF16])
@pytest.mark.parametrize("name", MODELS)
def test_other_masks_would_be_noticed(replays, name, dtype):
    replay = replays(name, dtype)
    assert replay.error(_step(copy.deepcopy(replay.model), replay.inputs, dtype, seed=SEED + 1)) > 50 * BOUND


@pytest.mark.parametrize("dtype", [None, BF16])
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_the_masks_that_were_drawn(replays, name, budget, dtype):
    replay = replays(name, dtype)
    replay.assert_as_near_as_eager(replay.compiled(compiler="eager", budget=budget))


@pytest.mark.parametrize("budget", GENERATED)
@pytest.mark.parametrize("name", ["chain", pytest.param("bert", marks=pytest.mark.slow)])
def test_so_are_those_of_generated_code(replays, name, budget):
    replay = replays(name, None)
    replay.assert_as_near_as_eager(replay.compiled(compiler="inductor", budget=budget))


@pytest.mark.parametrize(("budget", "rule"), [(0.0, "packed mask"), (0.2, "replayed draw")])
def test_masks_are_kept_as_bits_or_drawn_again(replays, budget, rule):
    replays("bert", None).compiled(compiler="eager", budget=budget)
    assert rule in {value.rule for value in bwsk_fx.compile.last_report().plan.values}


# -- which elements each pass drops ------------------------------------------------------------------------------------

# A mask of so many bits is larger than the state of a generator, and worth drawing again.
WIDTH = 256
HALF_OF_ALL = pytest.approx(0.5, abs=0.02)


def _matrix() -> Tensor:
    """Return a random matrix that is far from singular."""
    return torch.randn(WIDTH, WIDTH, dtype=torch.float64) / (2 * WIDTH**0.5) + torch.eye(WIDTH)


def _dropped(function: Callable[..., Tensor], **parameters: Tensor) -> tuple[Tensor, Tensor]:
    """Return which elements of `hidden` the forward and the backward pass of `hidden(...) @ last` took as dropped.

    Matrices are square: the output tells `hidden`, and so does the gradient of `last`, which is `hidden.T @ tangent`.
    """
    tangent = _matrix()
    torch.manual_seed(SEED)
    output = function(**parameters)
    output.backward(tangent)
    last = parameters["last"]
    forward = torch.linalg.solve(last.detach(), output.detach(), left=False)
    backward = torch.linalg.solve(tangent, last.grad, left=False).T
    return tuple(hidden.abs() < 1e-6 for hidden in (forward, backward))


def _two_dropouts(x: Tensor, first: Tensor, second: Tensor, last: Tensor) -> Tensor:
    x = F.dropout((x @ first).exp(), 0.5) @ second
    return F.dropout((x / 8).exp(), 0.5) @ last


def _disagreement(**compiling: object) -> float:
    """Return the share of elements that one pass drops and the other does not."""
    torch.manual_seed(0)
    parameters = {name: _matrix().requires_grad_() for name in inspect.signature(_two_dropouts).parameters}
    forward, backward = _dropped(torch.compile(_two_dropouts, fullgraph=True, **compiling), **parameters)
    assert (float(forward.double().mean()), float(backward.double().mean())) == (HALF_OF_ALL, HALF_OF_ALL)
    return float((forward != backward).double().mean())


@pytest.mark.parametrize("budget", BUDGETS)
def test_both_passes_drop_the_same_elements(budget):
    assert _disagreement(backend="bwsk_fx", options={"compiler": "eager", "budget": budget}) == 0


@pytest.mark.parametrize("budget", GENERATED)
def test_both_passes_of_generated_code_drop_the_same_elements(budget):
    assert _disagreement(backend="bwsk_fx", options={"budget": budget}) == 0


@pytest.mark.parametrize("budget", GENERATED)
@pytest.mark.parametrize("is_eagers", [False, True])
def test_both_passes_drop_the_same_elements_under_inductors_own_backend(is_eagers, budget):
    partitioner = bwsk_fx.compile.Partitioner(budget)
    with inductor_config.patch(custom_partitioner_fn=partitioner, fallback_random=is_eagers):
        assert _disagreement(backend="inductor") == 0


# PyTorch's own partitioner, up to 2.13 at least, may run random operators again where its memory budget is below one,
# and saves their generator's state for checkpoints alone (pytorch/pytorch#190758). Masks that have nothing to do with
# each other differ in half of their elements. Where this is no longer so, these tests fail, and docs are out of date.

PEERS = ("aot_eager_decomp_partition", pytest.param("inductor", marks=pytest.mark.slow))


@contextmanager
def _memory_budget(budget: float, is_eagers: bool) -> Iterator[None]:
    """Set PyTorch's memory budget, and whether Inductor has masks of its own or eager's."""
    with (
        functorch_config.patch(activation_memory_budget=budget),
        inductor_config.patch(fallback_random=is_eagers),
    ):
        yield


@pytest.mark.parametrize("is_eagers", [False, True])
@pytest.mark.parametrize("backend", PEERS)
def test_pytorchs_partitioner_has_one_mask_without_a_memory_budget(backend, is_eagers):
    with _memory_budget(1.0, is_eagers):
        assert _disagreement(backend=backend) == 0


@pytest.mark.parametrize(("budget", "is_eagers"), [(0.0, False), (0.0, True), (0.5, True), (0.9, True)])
@pytest.mark.parametrize("backend", PEERS)
def test_pytorchs_partitioner_has_two_masks_with_a_memory_budget(backend, budget, is_eagers):
    with _memory_budget(budget, is_eagers):
        assert _disagreement(backend=backend) == HALF_OF_ALL


@pytest.mark.parametrize("is_eagers", [False, True])
@pytest.mark.parametrize("backend", PEERS)
def test_pytorchs_partitioner_has_two_masks_of_a_single_dropout(backend, is_eagers):
    x = torch.randn(64, 64, requires_grad=True)
    with _memory_budget(0.5, is_eagers):
        kept = torch.compile(lambda x: F.dropout(x.exp(), 0.5), backend=backend, fullgraph=True)(x)
        kept.sum().backward()
    assert float(((kept == 0) != (x.grad == 0)).double().mean()) == HALF_OF_ALL


@pytest.mark.parametrize("backend", PEERS)
def test_a_memory_budget_gives_bert_other_gradients(replays, backend):
    replay = replays("bert", None)
    with _memory_budget(1.0, is_eagers=True):
        replay.assert_as_near_as_eager(replay.compiled(backend))
    torch._dynamo.reset()
    with _memory_budget(0.5, is_eagers=True):
        found = replay.compiled(backend)
    # The forward pass drew eager's masks, and the backward pass others.
    torch.testing.assert_close(found["loss"], replay.eager["loss"], rtol=1e-5, atol=0.0)
    assert _distance(found, replay.exact) > 0.05 * _distance(dict.fromkeys(found, torch.zeros(())), replay.exact)
