"""A fused model against the model itself: the same bits in exact mode, and an error wherever that is impossible."""

import copy
import functools
import gc
import weakref
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

import bwsk_fx
from bwsk_fx.errors import BwskError, PlanError, RegionError
from bwsk_fx.measure import saved_for_backward
from bwsk_fx.reversible import ReversibleRegion

WIDTH = 8


def _linear() -> nn.Linear:
    return nn.Linear(WIDTH, WIDTH)


def _fuse(model: nn.Module, *inputs: Tensor, granularity: str = "whole", faith: str = "exact", budget: float = 0.0):
    return bwsk_fx.fuse_regions(bwsk_fx.capture(model, inputs), budget, faith=faith, granularity=granularity)


def _regions(model: nn.Module) -> list[ReversibleRegion]:
    return [module for module in model.modules() if isinstance(module, ReversibleRegion)]


class Small(nn.Module):
    """Two linear maps, and what a test puts between them."""

    def __init__(self, between=torch.sin, after=torch.cos) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = _linear(), _linear()
        self.between, self.after = between, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.second(self.between(self.first(x))))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def check(train_step, assert_same_bits):
    """Return a function that fuses a model and asserts equal bits; it returns the fused model."""

    def compare(model: nn.Module, *inputs: Tensor, dtype=None, loss_of=None, **options) -> nn.Module:
        fused = _fuse(model, *inputs, **options)
        expected = train_step(model, inputs, dtype, loss_of)
        assert_same_bits(train_step(fused, inputs, dtype, loss_of), expected)
        assert all(region.program for region in _regions(fused)) and _regions(fused)
        return fused

    return compare


# -- ViT, bit for bit -------------------------------------------------------------------------------------------------

BF16, FP16 = torch.bfloat16, torch.float16


@pytest.fixture(scope="module")
def vits(make_vit, make_images):
    """Return a function for a model and its graph, captured once."""

    @functools.cache
    def build(attention: str, dropout: float, dtype: torch.dtype | None = None):
        model = make_vit(attention, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
        with torch.autocast("cpu", dtype=dtype or BF16, enabled=dtype is not None):
            return model, bwsk_fx.capture(model, make_images())

    return build


@pytest.mark.parametrize(
    ("dtype", "dropout", "attention", "granularity", "budget"),
    [
        (None, 0.0, "sdpa", "block", 0.0),
        (None, 0.2, "eager", "block", 0.25),
        (None, 0.2, "sdpa", "whole", 0.1),
        (None, 0.0, "eager", "s-run", 0.0),
        (BF16, 0.0, "sdpa", "block", 0.0),
        (BF16, 0.0, "eager", "block", 1.0),
        (BF16, 0.2, "sdpa", "s-run", 0.25),
        (BF16, 0.2, "eager", "whole", 0.0),
        (BF16, 0.2, "sdpa", "block", 0.1),
        (FP16, 0.0, "sdpa", "whole", 1.0),
        (FP16, 0.2, "eager", "block", 0.25),
        (FP16, 0.0, "sdpa", "s-run", 0.1),
    ],
)
def test_vit(vits, make_images, train_step, assert_same_bits, dtype, dropout, attention, granularity, budget):
    # Eager attention casts to `query.dtype`, so that its graph belongs to one autocast state.
    model, graph = vits(attention, dropout, dtype if attention == "eager" else None)
    fused = bwsk_fx.fuse_regions(graph, budget, faith="exact", granularity=granularity)
    for batch in (3, 1) if granularity == "block" else (3,):
        inputs = make_images(batch)
        expected = train_step(model, inputs, dtype)
        assert_same_bits(train_step(fused, inputs, dtype), expected)
    assert all(region.program for region in _regions(fused))


def test_vit_in_half_precision_throughout(make_vit, make_images, train_step, assert_same_bits):
    model = make_vit()
    fused = bwsk_fx.fuse_regions(bwsk_fx.capture(model, make_images()), faith="exact")
    train_step(fused, make_images())
    model.to(BF16)
    inputs = make_images() | {"pixel_values": make_images()["pixel_values"].to(BF16)}
    expected = train_step(model, inputs)
    assert expected["vit.embeddings.cls_token"].dtype is BF16
    assert_same_bits(train_step(fused, inputs), expected)


def _freeze_block(model):
    model.vit.layers[1].requires_grad_(False)


def _freeze_all_but_head(model):
    model.vit.requires_grad_(False)


def _freeze_some(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("bias" not in name and "fc2" not in name)


@pytest.mark.parametrize(
    ("freeze", "granularity"),
    [
        (_freeze_some, "block"),
        (_freeze_some, "whole"),
        (_freeze_block, "block"),
        (_freeze_block, "s-run"),
        (_freeze_all_but_head, "block"),
    ],
)
def test_frozen_parameters(vits, make_images, train_step, assert_same_bits, freeze, granularity):
    model, graph = vits("sdpa", 0.0)
    fused = bwsk_fx.fuse_regions(graph, faith="exact", granularity=granularity)
    train_step(fused, make_images())
    freeze(model)
    expected = train_step(model, make_images())
    assert any(expected[name] is None for name, _ in model.named_parameters())
    assert_same_bits(train_step(fused, make_images()), expected)
    model.requires_grad_(True)
    assert_same_bits(train_step(fused, make_images()), train_step(model, make_images()))


@pytest.mark.parametrize("granularity", ["block", "whole"])
def test_pixels_get_a_gradient(vits, make_images, train_step, granularity):
    (model, graph), inputs = vits("sdpa", 0.0), make_images()
    fused = bwsk_fx.fuse_regions(graph, faith="exact", granularity=granularity)
    gradients = []
    for candidate in (model, fused):
        pixels = inputs["pixel_values"].clone().requires_grad_()
        train_step(candidate, inputs | {"pixel_values": pixels})
        gradients.append(pixels.grad)
    assert gradients[0].abs().sum() > 0
    assert torch.equal(*gradients)


def test_channels_last_pixels(vits, make_images, train_step, assert_same_bits):
    (model, graph), inputs = vits("sdpa", 0.0), make_images()
    fused = bwsk_fx.fuse_regions(graph, faith="exact")
    train_step(fused, inputs)
    inputs["pixel_values"] = inputs["pixel_values"].to(memory_format=torch.channels_last)
    assert_same_bits(train_step(fused, inputs), train_step(model, inputs))


def test_gradients_accumulate_over_micro_batches(vits, make_images):
    model, graph = vits("sdpa", 0.0)
    fused = bwsk_fx.fuse_regions(graph, faith="exact")
    sums = []
    for candidate in (model, fused):
        candidate.zero_grad()
        for batch in (3, 2, 3):
            (candidate(**make_images(batch))["loss"] * 1024.0).backward()
        sums.append([parameter.grad.clone() for parameter in candidate.parameters()])
    assert all(map(torch.equal, *sums))


def test_forwards_interleave(vits, make_images):
    model, graph = vits("sdpa", 0.2)
    fused = bwsk_fx.fuse_regions(graph, faith="exact")
    gradients = []
    for candidate in (model, fused):
        candidate.zero_grad()
        torch.manual_seed(0)
        first, second = candidate(**make_images(3))["loss"], candidate(**make_images(2))["loss"]
        first.backward()
        second.backward()
        gradients.append([parameter.grad.clone() for parameter in candidate.parameters()])
    assert all(map(torch.equal, *gradients))


def test_eval_and_no_grad_run_the_subgraph(make_vit, make_images):
    model = make_vit(hidden_dropout_prob=0.5, num_hidden_layers=1)
    fused = bwsk_fx.fuse_regions(bwsk_fx.capture(model, make_images()))
    model.eval()
    with torch.no_grad():
        assert torch.equal(fused(**make_images())["logits"], model(**make_images()).logits)
    with torch.inference_mode():
        assert torch.equal(fused(**make_images())["logits"], model(**make_images()).logits)
    assert not any(region.program for region in _regions(fused))


def test_mode_switches_after_fusing(make_vit, make_images, train_step, assert_same_bits):
    model = make_vit(hidden_dropout_prob=0.5, num_hidden_layers=1)
    fused = bwsk_fx.fuse_regions(bwsk_fx.capture(model, make_images()), faith="exact")
    seen = []
    for training in (True, False, True):
        model.train(training)
        fused.train(training)
        seen.append(train_step(model, make_images()))
        assert_same_bits(train_step(fused, make_images()), seen[-1])
    assert not torch.equal(seen[0]["loss"], seen[1]["loss"])


def test_dropout_probability_changes_after_fusing(make_vit, make_images, train_step, assert_same_bits):
    model = make_vit(hidden_dropout_prob=0.1, num_hidden_layers=1)
    fused = bwsk_fx.fuse_regions(bwsk_fx.capture(model, make_images()), faith="exact")
    before = train_step(fused, make_images())
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.9
    expected = train_step(model, make_images())
    assert not torch.equal(expected["loss"], before["loss"])
    assert_same_bits(train_step(fused, make_images()), expected)


@pytest.mark.parametrize("granularity", ["block", "whole"])
def test_weights_replaced_after_fusing(make_vit, make_images, train_step, assert_same_bits, granularity):
    fused = bwsk_fx.fuse_regions(bwsk_fx.capture(make_vit(), make_images()), faith="exact", granularity=granularity)
    train_step(fused, make_images())
    other = make_vit()
    nn.init.normal_(other.vit.embeddings.cls_token)
    nn.init.normal_(other.classifier.weight)
    fused.load_state_dict({name: value.clone() for name, value in other.state_dict().items()}, assign=True)
    assert_same_bits(train_step(fused, make_images()), train_step(other, make_images()))


def test_a_deep_copy_is_independent_and_trains(vits, make_images, train_step, assert_same_bits):
    fused = bwsk_fx.fuse_regions(vits("sdpa", 0.0)[1], faith="exact")
    expected = train_step(fused, make_images())
    twin = copy.deepcopy(fused)
    assert list(twin.state_dict()) == list(fused.state_dict())
    fused.zero_grad()
    assert_same_bits(train_step(twin, make_images()), expected)
    assert all(parameter.grad is None for parameter in fused.parameters())
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert_same_bits(train_step(fused, make_images()), expected)


# -- graphs that ask for trouble --------------------------------------------------------------------------------------


class Tied(Small):
    def __init__(self) -> None:
        super().__init__()
        self.second.weight = self.first.weight


class CalledTwice(Small):
    def forward(self, x: Tensor) -> Tensor:
        return self.first(self.first(x).sin()).cos()


@pytest.mark.parametrize("model_class", [Tied, CalledTwice])
def test_tied_weights_in_one_region(check, x, model_class):
    check(model_class(), x)


def test_tied_weights_across_regions(check, x):
    model = nn.Sequential(Small(), Small(), Small())
    model[2].first.weight = model[0].second.weight
    check(model, x.requires_grad_(), granularity="block")


def _untied_double(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model).double()
    for module in twin.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.detach())
    return twin


@pytest.mark.parametrize("model_class", [Tied, CalledTwice])
def test_tied_weights_under_autocast_are_summed_in_full_precision(train_step, model_class):
    """Eager adds the two gradients in half precision, as its cache holds one cast; a region loses less."""
    generator = torch.Generator().manual_seed(0)
    model, x = model_class(), torch.randn(64, WIDTH, generator=generator)
    exact = train_step(copy.deepcopy(model).double(), [x.double()])["first.weight"]
    fused = train_step(_fuse(model, x), [x], BF16)["first.weight"]
    eager = train_step(model, [x], BF16)["first.weight"]
    assert (fused - exact).norm() <= (eager - exact).norm()
    assert (fused - exact).norm() <= 0.02 * exact.norm()


class Outputs(nn.Module):
    """A region with a list of outputs."""

    def __init__(self, outputs) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = _linear(), _linear()
        self.outputs = outputs

    def forward(self, x: Tensor) -> list[Tensor]:
        return list(self.outputs(self, self.first(x)))


def _weighted(outputs: list[Tensor]) -> Tensor:
    return sum((index + 1) * output.float().sin().sum() for index, output in enumerate(outputs))


OUTPUTS = {
    "several": lambda m, h: (h.sin(), m.second(h), h.exp()),
    "one twice": lambda m, h: (m.second(h), h, h),
    "views": lambda m, h: (h, h.view(-1), h.t(), h[1:], m.second(h).t()),
    "a split": lambda m, h: (*m.second(h).chunk(2, dim=-1), h.sin()),
    "integers": lambda m, h: (m.second(h).sin(), h.argmax(-1)),
    "detached": lambda m, h: (m.second(h).sin(), h.detach()),
    "equal expressions": lambda m, h: (h.sin(), h.sin(), m.second(h)),
}


@pytest.mark.parametrize("outputs", OUTPUTS.values(), ids=OUTPUTS)
def test_outputs(x, outputs):
    model = Outputs(outputs)
    fused = _fuse(model, x)
    results = []
    for candidate in (model, fused):
        candidate.zero_grad()
        found = candidate(x)
        _weighted([output for output in found if output.requires_grad]).backward()
        results.append((found, [parameter.grad.clone() for parameter in candidate.parameters()]))
    (expected, gradients), (outputs_found, found_gradients) = results
    assert [output.requires_grad for output in outputs_found] == [output.requires_grad for output in expected]
    assert [output.stride() for output in outputs_found] == [output.stride() for output in expected]
    assert all(map(torch.equal, expected, outputs_found))
    assert all(map(torch.equal, gradients, found_gradients))


def test_an_unused_output_leaves_its_parameters_alone(x):
    """Optimizers decay a parameter whose gradient is zero, and skip one that has none."""
    model = Outputs(lambda m, h: (h.sin(), m.second(h)))
    fused = _fuse(model, x)
    first, _ = fused(x)
    first.sum().backward()
    found = [None if parameter.grad is None else parameter.grad.clone() for parameter in fused.parameters()]
    model.zero_grad()
    model(x)[0].sum().backward()
    assert found[2:] == [None, None] == [parameter.grad for parameter in model.second.parameters()]
    assert all(map(torch.equal, found[:2], (parameter.grad for parameter in model.first.parameters())))


def test_an_output_that_is_the_input(check, x):
    class Identity(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.nothing, self.linear, self.drop = nn.Identity(), _linear(), nn.Dropout(0.0)

        def forward(self, x: Tensor) -> list[Tensor]:
            return [self.drop(self.nothing(x)), self.linear(x.sin())]

    model = Identity()
    fused = check(model, x.requires_grad_(), loss_of=_weighted)
    x.grad = None
    _weighted(fused(x)).backward()
    found, x.grad = x.grad, None
    _weighted(model(x)).backward()
    assert torch.equal(found, x.grad)


class Join(nn.Module):
    """A block of two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.children_too = _linear(), nn.Identity()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.children_too(self.linear(x) * y)


class InPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2.0)


class MutatedBetweenBlocks(nn.Module):
    """The second block writes into a copy that the first returned, which the third reads beside the original."""

    def __init__(self, copied) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Outputs(copied), InPlace(), Join()])

    def forward(self, x: Tensor) -> Tensor:
        original, other = self.blocks[0](x)
        return self.blocks[2](original, self.blocks[1](other))


@pytest.mark.parametrize(
    "copied",
    [lambda m, h: (m.second(h), m.second(h).clone()), lambda m, h: (h.sin(), h.sin()), lambda m, h: (h, h.clone())],
    ids=["clone of an equal", "computed twice", "clone"],
)
def test_a_copy_stays_a_copy(check, x, copied):
    check(MutatedBetweenBlocks(copied), x, granularity="block")


@pytest.mark.parametrize(
    "loss_of",
    [lambda y: y.t()[1:].sum(), lambda y: y.sum(), lambda y: y.t().contiguous().sin().sum(), lambda y: y[::2].sum()],
    ids=["transposed", "expanded", "transposed copy", "strided"],
)
def test_gradients_of_any_layout(check, x, loss_of):
    check(Small(), x, loss_of=loss_of)


@pytest.mark.parametrize(
    "layout", [lambda x: x.t().contiguous().t(), lambda x: x.repeat(1, 2)[:, ::2], lambda x: x[:1].expand(5, WIDTH)]
)
def test_inputs_of_any_layout(check, x, layout):
    check(Small(), layout(x))


DRAWS = {
    "dropout": lambda x: F.dropout(x, 0.3),
    "dropout on a transposed tensor": lambda x: F.dropout(x.t(), 0.3).t(),
    "uniform": lambda x: x * torch.empty_like(x).uniform_(),
    "normal": lambda x: x + torch.empty_like(x).normal_(),
    "exponential": lambda x: x * torch.empty_like(x).exponential_(),
    "rand_like": lambda x: x * torch.rand_like(x),
    "gumbel": lambda x: F.gumbel_softmax(x),
    "alpha dropout": lambda x: F.alpha_dropout(x, 0.3),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_equal_random_calls_draw_twice(check, x, draw):
    check(Small(lambda h: draw(h) + draw(h).sin(), draw), x)


class Towers(nn.Module):
    """Two unconnected stretches whose dropouts alternate."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right, self.join = _linear(), _linear(), nn.ModuleList([Join()])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        left, right = F.dropout(self.left(x), 0.5), F.dropout(self.right(y), 0.5)
        left, right = F.dropout(left.sin(), 0.5), F.dropout(right.sin(), 0.5)
        return self.join[0](left, right)


def test_regions_keep_the_order_of_random_draws(check, x):
    check(Towers(), x, x.cos(), granularity="block")


def test_an_empty_batch(x):
    model = Small(lambda h: F.dropout(F.gelu(h), 0.1))
    fused = _fuse(model, x)
    fused(x[:0].requires_grad_()).sum().backward()
    assert [parameter.grad.abs().sum().item() for parameter in fused.parameters()] == [0.0] * 4


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_torch_encoder_layers(check, dropout):
    torch.manual_seed(0)
    layers = [nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout, batch_first=True) for _ in range(2)]
    check(nn.Sequential(nn.Sequential(*layers), Small()), torch.randn(2, 5, WIDTH), granularity="whole")


@pytest.mark.parametrize("need_weights", [True, False])
def test_a_leaf_that_returns_a_tuple(check, need_weights):
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.small = nn.MultiheadAttention(WIDTH, 2, batch_first=True), Small()

        def forward(self, x: Tensor) -> Tensor:
            return self.small(self.attention(x, x, x, need_weights=need_weights)[0])

    torch.manual_seed(0)
    check(Attention(), torch.randn(2, 5, WIDTH))


def test_leaf_parameters_do_not_share_gradients(x):
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.flat = (nn.Parameter(torch.ones(5, WIDTH)) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return (x + self.one + self.two + self.flat) * 1.0

    fused = _fuse(Sum(), x)
    fused(x).sum().backward()
    assert len({parameter.grad.data_ptr() for parameter in fused.parameters()}) == 3


# -- which regions share a program ------------------------------------------------------------------------------------


class Scale(nn.Module):
    """A leaf whose attributes decide what it computes."""

    def __init__(self, **attributes) -> None:
        super().__init__()
        vars(self).update(attributes)

    def forward(self, x: Tensor) -> Tensor:
        for name, value in list(vars(self).items()):
            if name in ("scale", "_scale"):
                x = x * (sum(value.values() if isinstance(value, dict) else value) if hasattr(value, "pop") else value)
        return x


def _blocks(*between: nn.Module) -> nn.Module:
    return nn.Sequential(*(Small(middle) for middle in between))


def _programs(fused: nn.Module) -> int:
    return len({id(region.program) for region in _regions(fused)})


SETTINGS = {
    "number": ({"scale": 2.0}, {"scale": 3.0}),
    "private": ({"_scale": 2.0}, {"_scale": 3.0}),
    "type": ({"scale": 1}, {"scale": True}),
    "list": ({"scale": [1.0, 2.0]}, {"scale": [1.0, 3.0]}),
    "dict": ({"scale": {"by": 2.0}}, {"scale": {"by": 3.0}}),
}


@pytest.mark.parametrize(("one", "other"), SETTINGS.values(), ids=SETTINGS)
def test_blocks_share_a_program_where_all_settings_agree(check, x, one, other):
    x.requires_grad_()
    equal = check(_blocks(Scale(**one), Scale(**copy.deepcopy(one))), x, granularity="block")
    assert _programs(equal) == 1
    unequal = check(_blocks(Scale(**one), Scale(**other)), x, granularity="block")
    assert _programs(unequal) == 2


def test_settings_are_read_anew(x, train_step, assert_same_bits):
    model = _blocks(Scale(scale=[2.0]), Scale(scale=[2.0]))
    fused = _fuse(model, x, granularity="block")
    train_step(fused, [x])
    model[0].between.scale.append(1.0)
    assert_same_bits(train_step(fused, [x]), train_step(model, [x]))
    model[1].between._scale = 3.0
    assert_same_bits(train_step(fused, [x]), train_step(model, [x]))


def test_a_parametrization_registered_after_fusing_counts(x, train_step, assert_same_bits):
    model = Small()
    fused = _fuse(model, x)
    train_step(fused, [x])
    nn.utils.parametrize.register_parametrization(model.first, "weight", Small(torch.sin))
    expected = train_step(model, [x])
    assert any("parametrizations" in name for name in expected)
    assert_same_bits(train_step(fused, [x]), expected)


def test_equal_layers_of_a_leaf_with_children(check):
    torch.manual_seed(0)
    layers = (nn.TransformerEncoderLayer(WIDTH, 2, 16, rate, batch_first=True) for rate in (0.1, 0.5))
    x = torch.randn(2, 5, WIDTH, requires_grad=True)
    fused = check(nn.Sequential(*(nn.Sequential(layer, Small()) for layer in layers)), x, granularity="block")
    assert _programs(fused) == 2


class ThreeMaps(nn.Module):
    def __init__(self, order: list[int], tied: tuple[int, int]) -> None:
        super().__init__()
        maps = [nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3)]
        maps[tied[1]].weight = maps[tied[0]].weight
        # Two of them under one name, so that modules and calls come in different orders.
        self.outer = nn.ModuleDict({"a": nn.ModuleList([maps[order[0]], maps[order[2]]]), "b": maps[order[1]]})

    def forward(self, x: Tensor) -> Tensor:
        first, last = self.outer["a"]
        return last(self.outer["b"](first(x).sin()).sin()).sin()


@pytest.mark.parametrize(("one", "other"), [((0, 0), (0, 0)), ((0, 1), (1, 2)), ((0, 1), (0, 2))])
def test_tied_weights_tell_blocks_apart(check, x, one, other):
    torch.manual_seed(0)
    model = nn.Sequential(ThreeMaps([0, 1, 2], one), ThreeMaps([0, 1, 2], other), ThreeMaps([2, 0, 1], one))
    check(model, x.requires_grad_(), granularity="block")


def test_module_order_does_not_matter(check, x):
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c, self.a, self.b = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.a(x).sin()).sin()).sin()

    torch.manual_seed(0)
    fused = check(nn.Sequential(Flat(), ThreeMaps([0, 1, 2], (0, 0))), x.requires_grad_(), granularity="block")
    assert _programs(fused) == 1


def test_equal_vit_layers_share_a_program(make_vit, make_images, train_step):
    fused = bwsk_fx.fuse_regions(bwsk_fx.capture(make_vit(num_hidden_layers=3), make_images()))
    train_step(fused, make_images())
    programs = _regions(fused)[0]._programs
    assert (len(_regions(fused)), _programs(fused), len(programs.prospects)) == (5, 3, 3)
    train_step(fused, make_images(2))
    train_step(fused, make_images())
    assert len(programs.prospects) == 6


# -- autograd ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def fused(x) -> nn.Module:
    return _fuse(Small(), x)


def test_a_retained_graph_runs_twice(fused, x):
    loss = fused(x).sin().sum()
    loss.backward(retain_graph=True)
    once = [parameter.grad.clone() for parameter in fused.parameters()]
    loss.backward()
    assert all(
        torch.equal(2 * first, parameter.grad) for first, parameter in zip(once, fused.parameters(), strict=True)
    )
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("victim", ["weight", "input", "output"])
def test_writing_into_what_is_kept_raises(x, victim):
    model = _fuse(Small(after=torch.exp), x)
    clone = x.clone().requires_grad_(False)
    output = model(clone)
    loss = (output * 1.0).sum()
    with torch.no_grad():
        {"weight": model.second.weight, "input": clone, "output": output}[victim].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_no_second_derivative(fused, x):
    (gradient,) = torch.autograd.grad(fused(x).sum(), fused.first.weight, retain_graph=True)
    assert not gradient.requires_grad
    with pytest.raises(RegionError, match="region whole: reversible regions have no second derivative"):
        torch.autograd.grad(fused(x).sum(), fused.first.weight, create_graph=True)
    with pytest.raises(RegionError, match="no second derivative"):
        fused(x).sum().backward(create_graph=True)


def test_function_transforms_are_refused(fused, x):
    weights = dict(fused.named_parameters())

    def loss(weights):
        return torch.func.functional_call(fused, weights, (x,)).sum()

    for transform in (torch.func.grad(loss), torch.func.vjp, torch.func.jacrev(loss)):
        with pytest.raises(RegionError, match=r"region whole was called inside a torch.func transform"):
            transform(loss, weights) if transform is torch.func.vjp else transform(weights)
    with pytest.raises(RegionError, match=r"torch.func transform"):
        torch.func.vmap(fused)(x[None])


def test_functional_call_without_a_transform(fused, x):
    weights = {name: (parameter * 2).detach().requires_grad_() for name, parameter in fused.named_parameters()}
    torch.func.functional_call(fused, weights, (x,)).sum().backward()
    reference = Small()
    reference.load_state_dict({name: weight.detach() for name, weight in weights.items()})
    reference(x).sum().backward()
    assert all(torch.equal(weights[name].grad, parameter.grad) for name, parameter in reference.named_parameters())
    assert all(parameter.grad is None for parameter in fused.parameters())


def test_forward_mode_is_refused_or_right(fused, x):
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(RuntimeError, match=r"jvp|forward"):
            fused(dual)
        with torch.no_grad():
            found = forward_ad.unpack_dual(fused(dual)).tangent
    assert torch.equal(found, torch.func.jvp(Small(), (x,), (torch.ones_like(x),))[1])


@pytest.mark.parametrize(
    "register", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]
)
def test_hooks_on_leaf_modules_are_refused(fused, x, register):
    fused(x)
    handle = getattr(fused.first, register)(lambda *_: None)
    with pytest.raises(RegionError, match="module first carries forward or backward hooks"):
        fused(x)
    handle.remove()
    fused(x).sum().backward()


def test_hooks_inside_a_leaf_are_refused():
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, 0.0, batch_first=True)
    x = torch.randn(2, 3, WIDTH)
    fused = _fuse(nn.ModuleDict({"a": nn.Sequential(layer, _linear())})["a"], x)
    layer.linear1.register_forward_hook(lambda *_: None)
    with pytest.raises(RegionError, match=r"module 0.linear1 carries"):
        fused(x)


def test_parameter_hooks_run(fused, x):
    seen = []
    fused.first.weight.register_hook(seen.append)
    fused(x).sum().backward()
    assert torch.equal(seen[0], fused.first.weight.grad)


def test_a_failing_build_leaves_the_model_as_it_was(fused, x, train_step, assert_same_bits):
    weights = list(fused.parameters())
    with (
        patch("bwsk_fx.planning.prospect.solve", side_effect=PlanError("none")),
        pytest.raises(PlanError, match="none"),
    ):
        fused(x)
    assert all(before is after for before, after in zip(weights, fused.parameters(), strict=True))
    assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    assert_same_bits(train_step(fused, [x]), train_step(Small(), [x]))


def test_building_draws_no_random_numbers(x):
    fused = _fuse(Small(nn.Dropout(0.5)), x)
    torch.manual_seed(0)
    first = fused(x)
    torch.manual_seed(0)
    assert torch.equal(first, fused(x))


def test_what_was_kept_is_freed_by_the_backward_pass(x):
    model = _fuse(Small(), x)
    held = []

    def pack(tensor: Tensor) -> Tensor:
        held.append(weakref.ref(tensor.untyped_storage()))
        return tensor

    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()} | {x.data_ptr()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(x).sum()
    alive = [ref() for ref in held]
    inner = [ref for ref, storage in zip(held, alive, strict=True) if storage.data_ptr() not in weights]
    del alive
    assert inner and all(ref() is not None for ref in inner)
    loss.backward()
    gc.collect()
    assert all(ref() is None for ref in inner)


def test_a_part_of_a_split_is_kept_alone():
    class Gated(Small):
        def forward(self, x: Tensor) -> Tensor:
            value, gate = torch.cat([self.first(x), self.second(x)], dim=-1).chunk(2, dim=-1)
            return value * gate.sigmoid()

    x = torch.randn(32, WIDTH)
    model = Gated()
    fused = _fuse(model, x)
    fused(x)
    report = bwsk_fx.explain_saved(fused)
    assert saved_for_backward(fused, x) == report.kept_bytes == 3 * x.nbytes


# -- what a region may not hold ---------------------------------------------------------------------------------------


def test_a_norm_that_counts_is_refused_when_it_is_switched_to_train_mode_after_fusing(x):
    model = nn.Sequential(_linear(), nn.BatchNorm1d(WIDTH, momentum=None), _linear()).eval()
    fused = _fuse(model, x)
    fused(x).sum().backward()
    before = model[1].running_mean.clone()
    fused.train()
    with pytest.raises(BwskError, match=r"region whole cannot be traced"):
        fused(x)
    assert torch.equal(model[1].running_mean, before)


def test_batch_norm_switched_to_train_mode_after_fusing_updates_its_statistics(x):
    model = nn.Sequential(_linear(), nn.BatchNorm1d(WIDTH), _linear()).eval()
    expected, fused = copy.deepcopy(model).train(), _fuse(model, x)
    fused(x).sum().backward()
    assert model[1].num_batches_tracked == 0
    fused.train()
    assert torch.equal(fused(x), expected(x))
    assert all(map(torch.equal, model[1].buffers(), expected[1].buffers())) and model[1].num_batches_tracked == 1


def test_parameters_never_share_a_gradient(make_vit, make_images):
    # With one image the gradient of the position embeddings is that of the hidden states, and the class token's a part.
    model = bwsk_fx.apply(make_vit(num_hidden_layers=1), mode="reversible")
    model(**make_images(1)).loss.backward()
    storages = [parameter.grad.untyped_storage()._cdata for parameter in model.parameters()]
    assert len(storages) == len(set(storages)) > 10
