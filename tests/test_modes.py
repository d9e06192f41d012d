"""`apply` in place: whatever trains, saves and wraps models goes on working, and nothing is bypassed silently."""

import copy
import functools
import inspect
import warnings
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import bwsk_fx
from bwsk_fx import modes
from bwsk_fx.errors import BwskError, CaptureError, PlanError, RegionError
from bwsk_fx.modes import applied, apply
from bwsk_fx.reversible import ReversibleRegion


@pytest.fixture(scope="module")
def make_vit(make_vit):
    """One layer is enough here."""
    return functools.partial(make_vit, num_hidden_layers=1)


@pytest.fixture
def captures():
    """Count how often a model is captured."""
    with patch.object(modes, "captured", wraps=modes.captured) as spy:
        yield spy


def _regions(model: nn.Module) -> list[ReversibleRegion]:
    return [module for module in applied(model).rewritten.modules() if isinstance(module, ReversibleRegion)]


def _ran_reversibly(model: nn.Module) -> bool:
    return applied(model).rewritten is not None and all(region.program for region in _regions(model))


class Tiny(nn.Module):
    """A model with a parameter and a buffer of its own, and arguments of every kind."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scale = nn.Parameter(torch.randn(8))
        self.register_buffer("shift", torch.randn(8))
        self.linear, self.act = nn.Linear(8, 8), nn.Tanh()

    def forward(self, x: Tensor, factor: float = 1.0, negate: bool = False, name: str | None = None) -> Tensor:
        y = self.act(self.linear(x * self.scale + self.shift)) * factor
        return -y if negate or name == "minus" else y


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


# -- the round trip ---------------------------------------------------------------------------------------------------


def test_there_and_back(make_vit, make_images, train_step, assert_same_bits):
    model = make_vit()
    cls, keys, names = type(model), list(model.state_dict()), set(vars(model))
    expected = train_step(model, make_images())
    for mode in ("analyzed", "reversible", "analyzed"):
        assert apply(model, mode, faith="exact") is model
        assert applied(model).mode == mode
        assert isinstance(model, cls) and type(model).__name__ == cls.__name__ and type(model) is not cls
        assert type(model).__module__ == cls.__module__ and type(model).__doc__ == cls.__doc__
        assert list(model.state_dict()) == keys
        assert_same_bits(train_step(model, make_images()), expected)
        assert bool(_regions(model)) == (mode == "reversible")
    apply(model, "conventional")
    assert type(model) is cls and applied(model) is None and set(vars(model)) == names
    assert_same_bits(train_step(model, make_images()), expected)


def test_signature_and_output_type(make_vit, make_images):
    model = make_vit()
    signature, output = inspect.signature(model.forward), model(**make_images())
    apply(model)
    assert inspect.signature(model.forward) == signature
    found = model(**make_images())
    assert type(found) is type(output) and list(found) == list(output)
    assert not hasattr(type(model).forward, "__wrapped__")


def test_equal_models_share_a_class(make_vit):
    one, other = apply(make_vit()), apply(make_vit())
    assert type(one) is type(other) and applied(one) is not applied(other)


def test_options_are_checked_before_anything_changes(make_vit):
    model = make_vit()
    for options, error, text in [
        ({"mode": "fast"}, RegionError, "mode is 'fast': expected one of 'conventional', 'analyzed', 'reversible'"),
        ({"budget": -1}, PlanError, "budget is -1"),
        ({"faith": "some"}, PlanError, "faith is 'some'"),
        ({"granularity": "layer"}, PlanError, "granularity is 'layer'"),
    ]:
        with pytest.raises(error, match=text):
            apply(model, **options)
        assert applied(model) is None


def test_options_reach_the_regions(make_vit, make_images):
    model = apply(make_vit(), budget=0.25, faith="exact", granularity="whole")
    model(**make_images()).loss.backward()
    (region,) = _regions(model)
    assert (region.name, region.options.budget, region.options.faith) == ("whole", 0.25, "exact")


# -- when it captures -------------------------------------------------------------------------------------------------


def test_one_capture_for_each_kind_of_input(make_vit, make_images, captures):
    model = apply(make_vit())
    assert captures.call_count == 0
    for batch in (3, 2, 1, 3):
        model(**make_images(batch)).loss.backward()
    assert captures.call_count == 1
    model(pixel_values=make_images()["pixel_values"]).logits.sum().backward()
    assert captures.call_count == 2
    model.eval()
    model(**make_images()).loss.backward()
    assert captures.call_count == 3
    model.train()
    model(**make_images()).loss.backward()
    assert captures.call_count == 3


def test_no_capture_without_gradients(make_vit, make_images, captures):
    model, twin = apply(make_vit(hidden_dropout_prob=0.5).eval()), make_vit(hidden_dropout_prob=0.5).eval()
    with torch.no_grad():
        assert torch.equal(model(**make_images()).logits, twin(**make_images()).logits)
    assert captures.call_count == 0


def test_a_single_sample_first(make_vit, make_images, train_step, assert_same_bits):
    model, twin = apply(make_vit(), faith="exact"), make_vit()
    for batch in (1, 3):
        assert_same_bits(train_step(model, make_images(batch)), train_step(twin, make_images(batch)))


def test_a_submodule_in_another_mode(make_vit, make_images, train_step, assert_same_bits):
    """Dropout inside attention is a number of the graph, not of a leaf module."""
    dropout = {"attention_probs_dropout_prob": 0.5, "hidden_dropout_prob": 0.1}
    model, twin = apply(make_vit(**dropout), faith="exact"), make_vit(**dropout)
    losses = []
    for training in (True, False, True):
        for candidate in (model, twin):
            candidate.vit.layers[0].attention.train(training)
        expected = train_step(twin, make_images())
        assert_same_bits(train_step(model, make_images()), expected)
        losses.append(expected["loss"])
    assert not torch.equal(losses[0], losses[1])


def test_a_replaced_head_is_trained(make_vit, make_images, captures):
    model = apply(make_vit())
    model(**make_images()).loss.backward()
    model.classifier = nn.Linear(32, 5)
    model(**make_images()).loss.backward()
    assert captures.call_count == 2
    assert model.classifier.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("mode", ["analyzed", "reversible"])
def test_replaced_weights_are_used(x, train_step, assert_same_bits, mode):
    model, twin = apply(Tiny(), mode, faith="exact"), Tiny()
    train_step(model, [x])
    state = {name: torch.randn_like(value) for name, value in twin.state_dict().items()}
    model.load_state_dict({name: value.clone() for name, value in state.items()}, assign=True)
    twin.load_state_dict(state)
    assert_same_bits(train_step(model, [x]), train_step(twin, [x]))
    for candidate in (model, twin):
        candidate.to(torch.float64)
    assert_same_bits(train_step(model, [x.double()]), train_step(twin, [x.double()]))


# -- arguments --------------------------------------------------------------------------------------------------------


def test_constants_are_part_of_the_kind(x, captures):
    model, twin = apply(Tiny(), faith="exact"), Tiny()
    for kwargs in ({}, {"factor": 2.0}, {"factor": 2}, {"negate": True}, {"name": "minus"}, {"factor": 2.0}):
        assert torch.equal(model(x, **kwargs), twin(x, **kwargs))
    assert captures.call_count == 5
    assert torch.equal(model(x, 3.0), twin(x, 3.0))


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, others: object = None) -> Tensor:
        return self.linear(x).sin()


@pytest.mark.parametrize(
    "other", [[1], {"a": 1}, (torch.ones(4, 8),), object()], ids=["list", "dict", "tuple", "object"]
)
def test_arguments_of_other_kinds_are_refused(x, other):
    with pytest.raises(CaptureError, match=rf"^argument 'others' is a {type(other).__name__}: a rewritten model takes"):
        apply(Listed())(x, others=other)


def test_positional_collections_are_refused(x):
    class Many(Listed):
        def forward(self, *xs: Tensor) -> Tensor:
            return self.linear(xs[0]).sin()

    with pytest.raises(CaptureError, match=r"this forward method takes \*xs: pass its inputs by keyword"):
        apply(Many())(x)


def test_a_failed_capture_leaves_the_model_as_it_was(x):
    class Branches(Listed):
        def forward(self, x: Tensor, others: object = None) -> Tensor:
            y = self.linear(x)
            return y.sin() if y.sum() > 0 else y.cos()

    model = apply(Branches())
    rewritten = type(model)
    with pytest.raises(BwskError, match="cannot capture Branches"):
        model(x)
    assert type(model) is rewritten and applied(model).rewritten is None
    apply(model, "conventional")
    model(x).sum().backward()
    assert model.linear.weight.grad is not None


# -- what others do with models ---------------------------------------------------------------------------------------


def test_save_and_load(make_vit, make_images, tmp_path):
    model = apply(make_vit())
    model(**make_images()).loss.backward()
    model.save_pretrained(tmp_path)
    loaded = type(make_vit()).from_pretrained(tmp_path)
    assert applied(loaded) is None and type(loaded).__name__ in (tmp_path / "config.json").read_text()
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


def test_deep_copies_capture_themselves(make_vit, make_images, captures):
    model = apply(make_vit(), budget=0.25)
    model(**make_images()).loss.backward()
    model.zero_grad()
    twin = copy.deepcopy(model)
    assert type(twin) is type(model) and applied(twin).plan == applied(model).plan
    twin(**make_images()).loss.backward()
    assert captures.call_count == 2 and _ran_reversibly(twin)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.fixture
def accelerator():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    # The state is one per process, and trainers of other tests have made theirs.
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(mixed_precision="bf16", cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_accelerate(make_vit, make_images, accelerator):
    model, twin = apply(make_vit(), faith="exact"), make_vit()
    prepared = accelerator.prepare(model)
    loss = prepared(**make_images()).loss
    accelerator.backward(loss)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = twin(**make_images()).loss
    expected.backward()
    assert _ran_reversibly(model)
    assert torch.equal(loss, expected)
    assert all(torch.equal(model.get_parameter(name).grad, one.grad) for name, one in twin.named_parameters())


def test_accelerate_unwraps_to_the_mode(make_vit, make_images, accelerator):
    model = accelerator.unwrap_model(accelerator.prepare(apply(make_vit())), keep_fp32_wrapper=False)
    model(**make_images()).loss.backward()
    assert _ran_reversibly(model)


def test_trainer(make_vit, make_images, tmp_path):
    from transformers import Trainer, TrainingArguments

    losses = []
    for mode in ("conventional", "reversible"):
        model = apply(make_vit(hidden_dropout_prob=0.1), mode, faith="exact")
        images = make_images(6)
        data = [{name: value[row] for name, value in images.items()} for row in range(6)]
        arguments = TrainingArguments(
            tmp_path, max_steps=2, per_device_train_batch_size=4, use_cpu=True, report_to=[], disable_tqdm=True, seed=0
        )
        losses.append(Trainer(model, arguments, train_dataset=data).train().training_loss)
    assert losses[0] == losses[1]
    assert _ran_reversibly(model)


def test_distributed_data_parallel(make_vit, make_images, train_step, tmp_path):
    model, twin = apply(make_vit(), faith="exact"), make_vit()
    expected = train_step(twin, make_images())
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(model)
        wrapped(**make_images()).loss.backward()
    finally:
        torch.distributed.destroy_process_group()
    assert _ran_reversibly(model)
    assert all(torch.equal(one.grad, expected[name]) for name, one in model.named_parameters())


def test_replicas_are_refused(make_vit, make_images):
    model = apply(make_vit())
    model._is_replica = True
    with pytest.raises(RegionError, match=r"cannot run under nn.DataParallel; use DistributedDataParallel"):
        model(**make_images())


def test_explaining_a_mode(make_vit, make_images):
    model = apply(make_vit())
    model(**make_images()).loss.backward()
    assert [entry.region for entry in bwsk_fx.explain_saved(model).regions] == [r.name for r in _regions(model)]


def test_hooks_on_the_model_run_once(make_vit, make_images, train_step, assert_same_bits):
    found = []
    for mode in ("conventional", "reversible"):
        model = make_vit()
        model.register_forward_pre_hook(
            lambda _, args, kwargs: (args, kwargs | {"pixel_values": 2 * kwargs["pixel_values"]}), with_kwargs=True
        )
        apply(model, mode, tier="exact") if mode == "reversible" else None
        found.append(train_step(model, make_images()))
    assert_same_bits(*found)
    assert _ran_reversibly(model)


def test_a_checkpoint_around_a_model_sees_the_same_in_both_of_its_runs(make_vit, make_images, assert_same_bits):
    """The first run captures and plans, the second one does not."""
    found = []
    for mode in ("conventional", "reversible"):
        model = apply(make_vit(), mode, **({"tier": "exact"} if mode == "reversible" else {}))
        loss = checkpoint(lambda model=model: model(**make_images()).loss, use_reentrant=False)
        loss.backward()
        found.append({"loss": loss.detach()} | {name: one.grad for name, one in model.named_parameters()})
    assert_same_bits(*found)


# -- taking a mode back -----------------------------------------------------------------------------------------------


@pytest.fixture
def make_gpt2():
    """One layer, without dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    def make() -> nn.Module:
        torch.manual_seed(0)
        sizes = {"vocab_size": 32, "n_positions": 16, "n_embd": 32, "n_layer": 1, "n_head": 2}
        quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 31}
        return GPT2LMHeadModel(GPT2Config(**sizes, **quiet, use_cache=False))

    return make


def _traces(model: nn.Module) -> dict[str, set[str]]:
    """Every attribute, hook and class of every submodule that a mode could leave something in."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        name: {repr(type(module)), *vars(module), *(f"{kind}: {len(vars(module)[kind])}" for kind in hooks)}
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("mode", ["analyzed", "reversible"])
def test_a_restored_model_is_the_model_that_it_was(make_vit, make_images, train_step, assert_same_bits, tmp_path, mode):
    model, twin = make_vit(), make_vit()
    before, parameters = _traces(model), dict(model.named_parameters())
    train_step(apply(model, mode), make_images())
    assert bwsk_fx.restore(model) is model
    assert type(model) is type(twin) and model.forward.__func__ is type(twin).forward and applied(model) is None
    assert _traces(model) == before
    assert all(value is parameters[name] for name, value in model.named_parameters())
    copied = copy.deepcopy(model)
    assert type(copied) is type(twin)
    model.save_pretrained(tmp_path)
    loaded = type(twin).from_pretrained(tmp_path).train()
    expected = train_step(twin, make_images())
    for candidate in (model, copied, loaded):
        assert_same_bits(dict(candidate.state_dict()), dict(twin.state_dict()))
        assert_same_bits(train_step(candidate, make_images()), expected)


def test_a_restored_model_takes_another_mode(make_vit, make_images, train_step, assert_same_bits):
    model, twin = make_vit(), make_vit()
    for mode in ("reversible", "analyzed"):
        apply(model, mode, faith="exact")
        assert applied(model).mode == mode and applied(model).graph is None
        assert_same_bits(train_step(model, make_images()), train_step(twin, make_images()))
        assert applied(model).graph is not None
        bwsk_fx.restore(model)


def test_a_model_in_no_mode_cannot_be_restored(make_vit):
    model = make_vit()
    for _ in range(2):
        with pytest.raises(RegionError, match="this ViTForImageClassification is in no mode: put it into one"):
            bwsk_fx.restore(model)
        bwsk_fx.restore(apply(model))


def test_a_class_that_was_changed_since_is_not_thrown_away():
    """FSDP2 swaps the class of a model too."""
    model = apply(Tiny())
    model.__class__ = type("FSDPTiny", (type(model),), {})
    for take_back in (bwsk_fx.restore, apply):
        with pytest.raises(RegionError, match=r"class has become FSDPTiny since apply, as fully_shard does"):
            take_back(model)
    assert type(model).__name__ == "FSDPTiny" and applied(model).mode == "reversible"


def test_a_wrapper_of_the_forward_method_outlives_the_mode(make_vit, make_images, accelerator, captures):
    model, twin = make_vit(), make_vit()
    prepared = accelerator.prepare(apply(model))
    prepared(**make_images()).loss.backward()
    assert captures.call_count == 1
    bwsk_fx.restore(model)
    loss = prepared(**make_images()).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss, twin(**make_images()).loss)
    assert captures.call_count == 1
    apply(model)
    prepared(**make_images()).loss.backward()
    assert captures.call_count == 2 and _ran_reversibly(model)


@pytest.mark.parametrize("mode", ["conventional", "analyzed", "reversible"])
def test_weights_load_without_pickled_code_from_every_mode(make_vit, make_images, train_step, tmp_path, mode):
    model, twin = apply(make_vit(), mode), make_vit()
    train_step(model, make_images())
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    loaded = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert list(loaded) == list(twin.state_dict())
    assert all(torch.equal(value, loaded[name]) for name, value in twin.state_dict().items())


def test_a_reversible_language_model_generates(make_gpt2, train_step):
    tokens = torch.arange(8).reshape(2, 4)
    model, twin = apply(make_gpt2()), make_gpt2()
    for candidate in (model, twin):
        train_step(candidate.train(), {"input_ids": tokens, "labels": tokens})
    # A region of masks has nothing to keep.
    assert bwsk_fx.explain_saved(model).kept_bytes > 0
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "use_cache": True}
    found, expected = (one.eval().generate(tokens, **settings) for one in (model, twin))
    assert found.shape == (2, 9) and torch.equal(found, expected)


class Tempered(nn.Module):
    """A model whose Python code reads a number, reads another only to count, and keeps what it made in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.temperature, self.calls, self.scale = 1.0, 0, None

    def forward(self, x):
        if self.scale is None:
            self.scale = torch.ones(4)
        return self.second((self.first(x) / self.temperature).tanh() * self.scale).sin()


def test_an_attribute_that_python_code_reads_is_looked_at_in_every_step(captures):
    model = Tempered()
    twin, x = copy.deepcopy(model), torch.randn(3, 4)
    apply(model, faith="exact")
    for temperature, count in ((1.0, 1), (2.0, 2), (2.0, 2), (1.0, 3)):
        model.temperature = twin.temperature = temperature
        model.calls += 1  # nobody reads it
        before = captures.call_count
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert torch.equal(model(x), twin(x))
        with torch.no_grad():
            model(x)
        assert captures.call_count == count
        assert ["'temperature' of this Tempered has changed" in str(each.message) for each in caught] == [
            True for _ in range(count - max(before, 1))
        ]
