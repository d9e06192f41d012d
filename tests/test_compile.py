"""The torch.compile backend: gradients, masks, what is kept, and what is refused."""

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

import bwsk_fx
from bwsk_fx import _torch_private as private
from bwsk_fx.errors import PlanError
from bwsk_fx.measure import saved_for_backward

BUDGETS = (0.0, 0.2, float("inf"))


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model: nn.Module, **options) -> nn.Module:
    return torch.compile(model, backend="bwsk_fx", options=options, dynamic=False, fullgraph=True)


def step(run: nn.Module, model: nn.Module, inputs: dict, dtype: torch.dtype | None = None) -> dict:
    model.zero_grad()
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        loss = run(**inputs)["loss"]
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {"loss": loss.detach()} | {name: gradient.clone() for name, gradient in gradients.items()}


def distance(found: dict, exact: dict) -> float:
    return sum(float((found[name].double() - exact[name]).square().sum()) for name in exact) ** 0.5


def in_float64(found: dict) -> dict:
    return {name: value.double() for name, value in found.items()}


class Convolutions(nn.Module):
    """Batch norms in train mode, in eval mode, and with frozen weights."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8).eval(), nn.SiLU()),
            *(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8).requires_grad_(False), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        )

    def forward(self, pixel_values, labels):
        return {"loss": nn.functional.cross_entropy(self.body(pixel_values), labels)}


def test_the_backend_is_registered():
    assert "bwsk_fx" in torch._dynamo.list_backends()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("make", ["vit", "dropout", "convolutions"])
def test_exact_plans_have_eagers_bits(make_vit, make_images, assert_same_bits, make, dtype):
    torch.manual_seed(0)
    models = {"vit": make_vit, "dropout": lambda: make_vit(hidden_dropout_prob=0.1), "convolutions": Convolutions}
    model, inputs = models[make](), make_images()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = step(model, model, inputs, dtype)
    updated = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(state)
    found = step(compiled(model, compiler="eager", faith="exact"), model, inputs, dtype)
    assert_same_bits(found, expected)
    # Batch norms count once, although some of them run twice.
    assert_same_bits(dict(model.state_dict()), updated)


@pytest.mark.parametrize("budget", BUDGETS)
def test_rounded_plans_are_as_near_to_float64_as_eager(make_vit, make_images, budget):
    model, inputs = make_vit(), make_images()
    wide = make_vit().double()
    exact = step(wide, wide, inputs | {"pixel_values": inputs["pixel_values"].double()})
    expected = step(model, model, inputs, torch.bfloat16)
    found = step(compiled(model, compiler="eager", budget=budget), model, inputs, torch.bfloat16)
    assert distance(found, exact) <= 1.5 * distance(expected, exact)


def test_generated_code_keeps_what_the_plan_says(make_vit, make_images):
    model, inputs = make_vit(), make_images()
    expected = step(model, model, inputs)
    fast = compiled(model, budget=0.2)
    found = step(fast, model, inputs)
    assert distance(found, in_float64(expected)) < 1e-5
    plan = bwsk_fx.compile.last_report().plan
    assert plan.kept_bytes < 0.5 * plan.conventional_bytes
    saved = saved_for_backward(fast, inputs, None)
    # Integers that Dynamo's graph returns beside the loss are not planned.
    assert plan.kept_bytes <= saved <= 1.02 * plan.kept_bytes + 1024


@pytest.mark.parametrize("budget", BUDGETS)
def test_dropout_draws_one_mask_for_both_passes(budget):
    """The gradient of a sum of kept elements is the mask itself."""

    class Masked(nn.Module):
        def forward(self, x):
            return {"loss": torch.nn.functional.dropout(x.exp(), 0.5).sum()}

    x = torch.randn(64, 64, requires_grad=True)
    run = compiled(Masked(), budget=budget, compiler="eager")
    torch.manual_seed(3)
    run(x)["loss"].backward()
    torch.manual_seed(3)
    torch.testing.assert_close(x.grad, torch.nn.functional.dropout(x.detach().exp(), 0.5))


def test_graph_breaks_give_a_report_each(make_vit):
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            x = self.first(x).tanh()
            torch._dynamo.graph_break()
            return self.second(x).tanh()

    model, x = Broken(), torch.randn(4, 8)
    torch.compile(model, backend="bwsk_fx", options={"compiler": "eager"})(x).sum().backward()
    first, second = bwsk_fx.compile.reports()[-2:]
    assert [len(report.graph.graph.find_nodes(op="placeholder")) for report in (first, second)] == [3, 3]
    assert first.graph is not second.graph and first.plan and second.plan
    assert model.first.weight.grad is not None


def test_inductor_takes_the_planner_as_its_partitioner(make_vit, make_images):
    model = make_vit()
    # Its first call changes its configuration.
    model(**make_images())
    partitioner = bwsk_fx.compile.Partitioner(budget=0.2)
    torch._dynamo.utils.counters.clear()
    with torch._inductor.config.patch(custom_partitioner_fn=partitioner, force_disable_caches=True):
        fast = torch.compile(model, dynamic=True, fullgraph=True)
        for size in (7, 4):
            inputs = make_images(size)
            assert distance(step(fast, model, inputs), in_float64(step(model, model, inputs))) < 1e-5
    assert graphs_compiled() == 1
    plan = bwsk_fx.compile.last_report().plan
    assert plan.kept_bytes < 0.6 * plan.conventional_bytes


def test_partitioners_are_named_by_their_options():
    names = {
        bwsk_fx.compile.Partitioner(budget, faith=faith, compiler="eager").uuid()
        for budget in (0, 0.1)
        for faith in ("exact", "rounded")
    }
    assert len(names) == 4
    assert bwsk_fx.compile.Partitioner(0.1).uuid() == bwsk_fx.compile.Partitioner(0.1).uuid()


def test_partitioners_are_named_by_what_is_in_their_plan(tmp_path):
    plan = tmp_path / "plan.json"
    names = set()
    for content in ("{}", '{"regions": []}'):
        plan.write_text(content)
        names.add(bwsk_fx.compile.Partitioner(plan=str(plan)).uuid())
    assert len(names) == 2


def test_inductors_mode_holds_for_both_halves(monkeypatch):
    seen = []
    original = private.compile_boxed

    def compile_boxed(*args):
        seen.append(torch._inductor.config.max_autotune)
        return original(*args)

    monkeypatch.setattr(private, "compile_boxed", compile_boxed)
    for mode in ("default", "max-autotune-no-cudagraphs"):
        x = torch.randn(8, requires_grad=True)
        torch.compile(lambda x: x.sin().exp(), backend="bwsk_fx", mode=mode)(x).sum().backward()
    assert seen == [False, False, True, True]


def test_inference_has_no_plan(make_vit, make_images):
    model, inputs = make_vit().eval(), make_images()
    with torch.no_grad():
        found = compiled(model, compiler="eager")(**inputs)
        torch.testing.assert_close(found["logits"], model(**inputs)["logits"], rtol=0, atol=0)
    assert bwsk_fx.compile.last_report().plan is None


def graphs_compiled() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(("dynamic", "graphs"), [(True, 1), (None, 2)])
def test_one_graph_serves_all_batch_sizes(make_vit, make_images, assert_same_bits, dynamic, graphs):
    model = make_vit(hidden_dropout_prob=0.1)
    # Its first call changes its configuration.
    model(**make_images())
    fast = torch.compile(model, backend="bwsk_fx", options={"compiler": "eager", "faith": "exact"}, dynamic=dynamic)
    torch._dynamo.utils.counters.clear()
    # A batch of three would have the size of the channels, and be as constant as they are.
    for size in (7, 4, 9, 2, 7):
        assert_same_bits(step(fast, model, make_images(size)), step(model, model, make_images(size)))
    assert graphs_compiled() == graphs


def test_generated_code_serves_all_batch_sizes(make_vit, make_images):
    model = make_vit(num_hidden_layers=1)
    model(**make_images())
    fast = torch.compile(model, backend="bwsk_fx", options={"budget": 0.5}, dynamic=True)
    torch._dynamo.utils.counters.clear()
    for size in (7, 4):
        inputs = make_images(size)
        expected = step(model, model, inputs)
        assert distance(step(fast, model, inputs), in_float64(expected)) < 1e-5
        with torch.no_grad():
            torch.testing.assert_close(fast(**inputs)["logits"], model(**inputs)["logits"])
    # One for training, one for inference.
    assert graphs_compiled() == 2


class Sized(nn.Module):
    """Sizes among the results, in arithmetic, in views of the results, and of two dimensions."""

    def forward(self, x, weight):
        batch, length, _ = x.shape
        hidden = torch.relu((x @ weight).view(batch * length, -1)).sin()
        masked = nn.functional.dropout(hidden, 0.5).view(batch, length, -1).transpose(0, 1)
        return {"loss": (masked * batch / (length + 1)).sum(), "masked": masked, "twice": 2 * batch}


@pytest.mark.parametrize("options", [{"compiler": "eager", "faith": "exact"}, {"compiler": "eager"}, {"budget": 0.5}])
def test_sizes_are_computed_where_they_are_read(options):
    model = Sized()
    run = torch.compile(model, backend="bwsk_fx", options=options, dynamic=True, fullgraph=True)
    torch._dynamo.utils.counters.clear()
    for batch, length in ((5, 6), (3, 8), (9, 2)):
        results = []
        for own in (run, model):
            torch.manual_seed(0)
            x, weight = torch.randn(batch, length, 8).requires_grad_(), torch.randn(8, 16, requires_grad=True)
            found = own(x, weight)
            found["loss"].backward()
            results.append((found["masked"], found["loss"], torch.tensor(found["twice"]), x.grad, weight.grad))
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other)
            assert one.stride() == other.stride()
    assert graphs_compiled() == 1
    shapes = [value.shape for value in bwsk_fx.compile.last_report().plan.values]
    assert any(5 in shape or 30 in shape for shape in shapes)
    assert all(type(size) is int for shape in shapes for size in shape)


def test_a_size_that_depends_on_data_is_refused():
    def kept(x):
        return x[x > 0].sin().sum()

    run = torch.compile(kept, backend="bwsk_fx")
    with (
        torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True),
        pytest.raises((BackendCompilerFailed, PlanError), match=r"the size of index .*depends on data(.|\n)*test_comp"),
    ):
        run(torch.randn(8, requires_grad=True))


def test_a_bound_on_memory_is_kept(make_vit, make_images):
    model, inputs = make_vit(), make_images()
    step(compiled(model, compiler="eager", activation_fraction=0.4), model, inputs)
    plan = bwsk_fx.compile.last_report().plan
    assert plan.kept_bytes <= 0.4 * plan.conventional_bytes


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"mode": "reduce-overhead"}, "mode is 'reduce-overhead'"),
        ({"options": {"budgets": 0.1}}, "there is no option 'budgets'"),
        ({"options": {"faith": "exact"}}, "compiler='inductor' does not give"),
        ({"options": {"compiler": "eager", "memory": "1KiB"}}, "needs at least"),
    ],
)
def test_what_cannot_be_done_is_said(make_vit, make_images, keywords, message):
    run = torch.compile(make_vit(), backend="bwsk_fx", **keywords)
    with pytest.raises((BackendCompilerFailed, PlanError), match=message):
        run(**make_images(7))


def test_an_applied_model_keeps_its_plan(make_vit, make_images, assert_same_bits):
    model, inputs = make_vit(), make_images()
    expected = step(model, model, inputs)
    bwsk_fx.apply(model, "reversible", faith="exact")
    assert_same_bits(step(torch.compile(model, backend="bwsk_fx"), model, inputs), expected)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"bwsk_fx.apply has planned this model"):
        compiled(model)(**inputs)


def test_trainer_trains_a_compiled_model(make_vit, make_images, tmp_path):
    from transformers import Trainer, TrainingArguments

    images = make_images(8)
    samples = [{name: value[place] for name, value in images.items()} for place in range(8)]
    arguments = TrainingArguments(
        str(tmp_path), use_cpu=True, max_steps=3, per_device_train_batch_size=4, report_to=[], save_strategy="no"
    )
    losses = []
    for is_compiled in (False, True):
        model = make_vit()
        if is_compiled:
            model.compile(backend="bwsk_fx", options={"compiler": "eager", "faith": "exact"}, dynamic=False)
        losses.append(Trainer(model, arguments, train_dataset=samples).train().training_loss)
    assert losses[0] == losses[1]
    assert bwsk_fx.compile.last_report().plan is not None
