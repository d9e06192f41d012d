"""Memory figures are checked against sizes that can be counted by hand, and against PyTorch's own tracker."""

import pytest
import torch
from torch import Tensor, nn

import bwsk_fx
from bwsk_fx.measure import (
    measure,
    optimizer_bytes,
    peak_live_bytes,
    saved_for_backward,
    saved_weight_copies,
    static_bytes,
)

FLOAT, HALF = 4, 2
BATCH, WIDTH, HIDDEN, CLASSES = 4, 8, 16, 3


class _KeepsTwice(torch.autograd.Function):
    """Saves a doubled copy in the forward pass and makes a large temporary in the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x * 2)
        return x + 1

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (doubled,) = ctx.saved_tensors
        large = doubled.new_ones(1000, *doubled.shape)
        return gradient * doubled * large.sum(0)


class _Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return _KeepsTwice.apply(x + self.weight).sum()


@pytest.fixture
def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(BATCH, WIDTH)


def _vit(layers: int, hidden: int, image_size: int):
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=3,
        intermediate_size=4 * hidden,
        image_size=image_size,
        num_labels=10,
    )
    return ViTForImageClassification(config).train()


def _images(batch: int, size: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(batch, 3, size, size), "labels": torch.arange(batch) % 10}


def test_saved_counts_each_storage_once_and_no_parameter(mlp, x):
    # The first linear keeps its input; ReLU and the second linear keep one and the same tensor.
    assert saved_for_backward(mlp, x) == FLOAT * (BATCH * WIDTH + BATCH * HIDDEN)


def test_saved_counts_weight_copies_under_autocast(mlp, x):
    inputs = HALF * (BATCH * WIDTH + BATCH * HIDDEN)
    # Only the second weight is needed: nobody asks for the gradient of x.
    weight_copy = HALF * HIDDEN * CLASSES
    assert saved_for_backward(mlp, x, torch.bfloat16) == inputs + weight_copy


def test_weight_copies_are_the_half_precision_weights_that_autograd_saves(mlp, x):
    assert saved_weight_copies(mlp, x, torch.bfloat16) == HALF * HIDDEN * CLASSES
    assert saved_weight_copies(mlp, x.requires_grad_(), torch.bfloat16) == HALF * HIDDEN * (WIDTH + CLASSES)
    assert saved_weight_copies(mlp, x) == 0


def test_weight_copies_follow_copies_of_copies_and_leave_batches_alone():
    class Copies(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(WIDTH))
            self.token = nn.Parameter(torch.ones(WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.token.expand(BATCH, WIDTH).clone()  # one for every sample
            return (tokens * self.weight.double().clone() * x).sum()

    # Saved: the second copy of the weight; the product of tokens and weight, the tokens and x are activations.
    assert saved_weight_copies(Copies(), torch.randn(BATCH, WIDTH)) == 2 * FLOAT * WIDTH


@pytest.mark.parametrize("mode", ["conventional", "analyzed", "reversible"])
def test_a_step_is_broken_down_in_every_mode(mode):
    model, inputs = _vit(layers=2, hidden=48, image_size=64), _images(2, 64)
    weights = [layer.weight for layer in model.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    if mode != "conventional":
        bwsk_fx.apply(model, mode=mode)
    single, half = measure(model, inputs), measure(model, inputs, torch.bfloat16)
    # Regions keep no cast that they can make again from the parameter.
    copies = 0 if mode == "reversible" else HALF * sum(weight.numel() for weight in weights)
    assert (single.weight_copy_bytes, half.weight_copy_bytes) == (0, copies)
    for memory in (single, half):
        assert memory.activation_bytes == memory.saved_bytes - memory.weight_copy_bytes > 0
        assert memory.parameter_bytes == memory.static_bytes == memory.gradient_bytes
        assert memory.parameter_bytes == FLOAT * sum(parameter.numel() for parameter in model.parameters())


def test_buffers_and_frozen_parameters_are_told_apart(x):
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH))
    model[0].weight.requires_grad_(False)
    memory = measure(model, x)
    assert memory.buffer_bytes == 2 * FLOAT * WIDTH + 8  # running mean and variance, and an int64 counter
    assert memory.parameter_bytes == FLOAT * (WIDTH * WIDTH + 3 * WIDTH)
    assert memory.gradient_bytes == FLOAT * 3 * WIDTH


def test_the_optimizers_state_is_counted(mlp, x):
    optimizer = torch.optim.AdamW(mlp.parameters())
    assert optimizer_bytes(optimizer) == 0
    mlp(x).sum().backward()
    optimizer.step()
    steps = FLOAT * len(list(mlp.parameters()))
    assert optimizer_bytes(optimizer) == 2 * static_bytes(mlp) + steps


def test_the_timeline_of_an_elementwise_step_by_hand():
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1000))

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.weight).sum()

    scalar, vector = FLOAT, FLOAT * 1000
    timeline = measure(Scale(), torch.randn(1000)).timeline
    forward = (vector, vector + scalar, scalar)  # product, loss, product freed
    assert timeline.live_bytes[:3] == forward
    assert timeline.forward_events == 3
    assert max(timeline.live_bytes) == 2 * scalar + vector
    assert timeline.live_bytes[-1] == vector  # the gradient stays


def test_saved_view_counts_its_whole_base():
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            return (x[0] * self.weight).sum()

    assert saved_for_backward(Head(), torch.randn(BATCH, WIDTH)) == FLOAT * BATCH * WIDTH


def test_saved_and_peak_see_custom_functions_and_the_backward_pass(x):
    model = _Custom()
    assert saved_for_backward(model, x) == FLOAT * BATCH * WIDTH
    assert peak_live_bytes(model, x) >= FLOAT * 1000 * BATCH * WIDTH


def test_peak_of_an_elementwise_step_by_hand():
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1000))

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.weight).sum()

    model, x = Scale(), torch.randn(1000)
    scalar, vector = FLOAT, FLOAT * 1000
    # Worst moment: the loss, its gradient of ones, and the gradient of the weight. The product is freed after the
    # sum, and the gradient of the product is an expanded view of the scalar.
    assert peak_live_bytes(model, x) == 2 * scalar + vector
    # Without the weight's gradient the worst moment is the product beside the loss.
    assert peak_live_bytes(model, x, count_gradients=False) == scalar + vector


def test_static_counts_tied_weights_once():
    tied = nn.Linear(WIDTH, WIDTH, bias=False)
    model = nn.Sequential(tied, nn.BatchNorm1d(WIDTH), tied)
    buffers = 2 * FLOAT * WIDTH + 8  # running mean and variance, and an int64 counter
    assert static_bytes(model) == FLOAT * (WIDTH * WIDTH + 2 * WIDTH) + buffers


def test_measuring_leaves_the_model_as_it_was(x):
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Dropout(0.5))
    gradient = torch.ones(WIDTH)
    model[0].bias.grad = gradient
    before, state = {key: value.clone() for key, value in model.state_dict().items()}, torch.get_rng_state()

    measure(model, x)

    assert model[0].bias.grad is gradient
    assert model[0].weight.grad is None
    assert torch.equal(torch.get_rng_state(), state)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_measure_agrees_with_its_parts(mlp, x):
    memory = measure(mlp, x, torch.bfloat16)
    assert memory.saved_bytes == saved_for_backward(mlp, x, torch.bfloat16)
    assert memory.peak_bytes == peak_live_bytes(mlp, x, torch.bfloat16)
    assert memory.peak_activation_bytes == peak_live_bytes(mlp, x, torch.bfloat16, count_gradients=False)
    assert memory.static_bytes == static_bytes(mlp)
    assert memory.saved_bytes < memory.peak_activation_bytes < memory.peak_bytes
    assert memory.weight_copy_bytes == saved_weight_copies(mlp, x, torch.bfloat16)
    assert max(memory.timeline.live_bytes) == memory.peak_bytes


def test_eager_vit_keeps_the_units_that_the_design_names():
    model, inputs = _vit(layers=6, hidden=192, image_size=224), _images(4, 224)
    unit = 4 * 197 * 192 * HALF
    assert saved_for_backward(model, inputs, torch.bfloat16) / unit / 6 == pytest.approx(24.2, abs=0.05)


def test_peak_equals_the_trackers_of_pytorch():
    from torch.distributed._tools.mem_tracker import MemTracker

    model, inputs = _vit(layers=2, hidden=48, image_size=64), _images(2, 64)
    ours = peak_live_bytes(model, inputs)
    tracker = MemTracker()
    tracker.track_external(model, *inputs.values())
    with tracker:
        model(**inputs).loss.backward()
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    before = static_bytes(model) + sum(tensor.nbytes for tensor in inputs.values())
    assert ours == peak["Total"] - before
