"""Modules of a plan as Inductor's code: the same values, layouts, aliases, masks and memory as the modules have."""

import copy
import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, fx
from torch._inductor import config
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

import bwsk_fx
from bwsk_fx import _torch_private as private
from bwsk_fx.errors import PlanError
from bwsk_fx.measure import saved_for_backward
from bwsk_fx.planning.options import PlanOptions
from bwsk_fx.planning.program import Program
from bwsk_fx.planning.prospect import build_program
from bwsk_fx.reversible import ReversibleRegion

BF16 = torch.bfloat16
BOUND = 1.5


@pytest.fixture(autouse=True)
def _without_stored_graphs():
    """Generate the code anew, or a change of ours would not show; what g++ made of equal code may be used again."""
    with config.patch(fx_graph_cache=False):
        yield


def _build(
    function: Callable, static=(), dtype: torch.dtype | None = None, **inputs: Tensor
) -> tuple[Program, Program]:
    """Return the program of a function, run by its modules and by generated code."""
    with torch.autocast("cpu", dtype=dtype or BF16, enabled=dtype is not None):
        program = build_program(function, inputs, static, PlanOptions(compiler="inductor"), "small")
    return replace(program, compiler="eager"), program


def _run(program: Program, inputs) -> tuple:
    """Return outputs, kept values and gradients of a run from seed 0."""
    inputs = [tensor.detach() for tensor in inputs]
    torch.manual_seed(0)
    with torch.no_grad():
        outputs, kept = program.run_forward(*inputs)
        tangents = [layout.applied_to(torch.randn(layout.shape, dtype=layout.dtype)) for layout in program.tangents]
        residuals = [*kept, *(inputs[index] for index in program.static), *tangents]
        gradients = program.run_backward(residuals)
    assert residuals == []
    return outputs, kept, gradients


def _strides(tensor: Tensor) -> list[int]:
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


def _assert_alike(found: tuple, expected: tuple, **tolerance: float) -> None:
    for group, other in zip(found, expected, strict=True):
        for one, another in zip(group, other, strict=True):
            if another is None:
                assert one is None
            else:
                torch.testing.assert_close(one, another, **tolerance)
                assert _strides(one) == _strides(another)


def _assert_same_runs(programs: tuple[Program, Program], inputs, tolerance: float = 1e-5) -> None:
    modules, compiled = programs
    _assert_alike(_run(compiled, inputs), _run(modules, inputs), rtol=tolerance, atol=tolerance)


# -- small functions ---------------------------------------------------------------------------------------------------


@pytest.fixture
def small(functions, inputs_of):
    """Return a function for both programs of one of the functions, and its inputs."""

    def build(name: str, dtype: torch.dtype | None = None) -> tuple[tuple[Program, Program], list[Tensor]]:
        function = getattr(functions, name)
        inputs = inputs_of(function)
        return _build(function, range(1, len(inputs)), dtype, **inputs), [*inputs.values()]

    return build


@pytest.mark.parametrize(
    ("name", "dtype"), [("mlp", None), ("residual", BF16), ("attention", BF16), ("dropout", None), ("views", None)]
)
def test_generated_code_does_what_the_modules_do(small, name, dtype):
    programs, inputs = small(name, dtype)
    _assert_same_runs(programs, inputs, 1e-5 if dtype is None else 2e-2)


def test_the_modules_stay_readable(small):
    (_, compiled), inputs = small("mlp")
    before = compiled.forward.code, compiled.backward.code
    _run(compiled, inputs)
    assert (compiled.forward.code, compiled.backward.code) == before
    assert "residuals.pop(0)" in before[1]
    assert "cpp_fused" in compiled.run_forward.code
    assert "args.clear()" in compiled.run_backward.code and "del buf" in compiled.run_backward.code


def test_what_shares_memory_shares_it_still():
    x = torch.randn(4, 8, requires_grad=True)
    programs = _build(lambda x: [x, x.t(), y := x.sin(), y, y.t(), y[1:], (y * 2).sin()], x=x)
    _assert_same_runs(programs, [x])
    groups = []
    for outputs, kept, _ in (_run(program, [x]) for program in programs):
        tensors = [*outputs, *kept]
        first = [next(i for i, other in enumerate(tensors) if private.shares_storage(one, other)) for one in tensors]
        assert len(set(map(id, outputs))) == len(outputs)
        versions = [one._version for one in tensors]
        outputs[2].add_(1)
        groups.append((first, [one._version > before for one, before in zip(tensors, versions, strict=True)]))
    assert groups[0] == groups[1]
    assert groups[1][1][2:6] == [True] * 4


def test_what_only_passes_through_is_not_compiled():
    x, y = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8)
    programs = _build(lambda x, y: [x.t(), y[0]], x=x, y=y)
    _assert_same_runs(programs, [x, y])
    forward, backward = programs[1].run_forward, programs[1].run_backward
    assert forward.code == backward.code == ""
    assert forward(x, y)[0][0].data_ptr() == x.data_ptr()


def test_outputs_of_every_sort():
    x = torch.randn(4, 8, requires_grad=True)
    outputs = lambda x: [x > 0, x.argmax(-1), x.exp().sum(), x.cumsum(0), x.sum(0, keepdim=True).expand(4, 8)]  # noqa: E731
    _assert_same_runs(_build(outputs, x=x), [x])


def test_convolutions_keep_the_layouts_that_were_planned():
    x, w = torch.randn(2, 3, 16, 16, requires_grad=True), torch.randn(4, 3, 3, 3, requires_grad=True)
    programs = _build(lambda x, w: [F.max_pool2d(F.gelu(F.conv2d(x, w, padding=1)), 2)], static=[1], x=x, w=w)
    _assert_same_runs(programs, [x, w], 1e-4)


@pytest.mark.parametrize(
    "part",
    [
        lambda y: F.gelu(y[:, :2]),
        lambda y: F.gelu(y[:2]),
        lambda y: F.gelu(y.t()[1:]),
        lambda y: y.chunk(2, dim=-1)[0] * y.chunk(2, dim=-1)[1],
    ],
    ids=["columns", "rows", "rows of a view", "all"],
)
def test_a_kept_part_holds_what_it_holds_in_the_module(part):
    x, w = torch.randn(4, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    programs = _build(lambda x, w: [part(x @ w)], static=[1], x=x, w=w)
    _assert_same_runs(programs, [x, w])
    held = []
    for program in programs:
        _, kept = program.run_forward(x.detach(), w.detach())
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
        held.append(sum(storages.values()))
    assert held[0] == held[1] == programs[1].plan.kept_bytes


def test_compiling_is_blind_to_autocast_and_leaves_the_generator_alone(small):
    (modules, compiled), inputs = small("dropout")
    before = torch.get_rng_state()
    with torch.autocast("cpu", BF16):
        assert callable(compiled.run_forward)
    assert torch.equal(torch.get_rng_state(), before)
    assert _run(compiled, inputs)[0][0].dtype is torch.float32
    _assert_same_runs((modules, compiled), inputs)


def test_masks_are_read_after_they_are_drawn():
    def function(x: Tensor, w: Tensor) -> list[Tensor]:
        weights = torch.ops.aten._safe_softmax(x, -1)
        return [F.dropout(F.dropout(weights, 0.2) @ w, 0.5), weights]

    x, w = torch.randn(12, 17, 17, requires_grad=True), torch.randn(12, 17, 8, requires_grad=True)
    programs = _build(function, static=[1], x=x, w=w)
    assert programs[1].forward.code.count("aten.bernoulli.p") == 2
    _assert_same_runs(programs, [x, w], 1e-4)


def test_other_draws_are_eagers_too():
    x = torch.randn(4, 8, requires_grad=True)
    draws = lambda x: [x * torch.randn_like(x), x * torch.rand(8), x * torch.empty_like(x).exponential_()]  # noqa: E731
    _assert_same_runs(_build(draws, x=x), [x])


# -- errors ------------------------------------------------------------------------------------------------------------


def test_a_missing_cpp_compiler_is_reported(small):
    (_, compiled), _ = small("chain")
    broken = {"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}
    with config.patch(broken), pytest.raises(PlanError) as failure:
        assert compiled.run_forward
    message = str(failure.value)
    assert "the forward pass of region small" in message
    assert "use compiler='eager'" in message and "\n" not in message
    assert "no-such-compiler" in message


def test_the_pass_that_cannot_be_compiled_is_named(small, monkeypatch):
    def fail_on_backward(module: fx.GraphModule, inputs: list[Tensor]) -> Callable:
        if len(inputs) > 3:
            raise RuntimeError("no lowering for aten.unheard_of\nand pages more")
        return lambda inputs: ()

    monkeypatch.setattr(private, "compile_boxed", fail_on_backward)
    (_, compiled), inputs = small("mlp")
    assert len(inputs) == 3
    with pytest.raises(PlanError, match=r"backward pass of region small \(RuntimeError: no lowering for \S+\); use"):
        assert compiled.run_forward


def test_another_dtype_than_recorded_is_an_error(small):
    (_, compiled), _ = small("mlp")
    node = compiled.forward.graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default)[0]
    node.meta["val"] = node.meta["val"].half()
    with pytest.raises(
        PlanError, match=r"node mm \(aten.mm.default\) is \(4, 16\) torch.float32 there, and was recorded"
    ):
        assert compiled.run_forward


# -- whole models ------------------------------------------------------------------------------------------------------


def _relative_error(one: Tensor, another: Tensor) -> float:
    return ((one - another).norm() / another.norm()).item()


def _reseed(model: torch.nn.Module, seed: int) -> None:
    """Draw every parameter anew, norms and biases included, so that nothing is one or zero by construction."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
            parameter.add_(1.0 if "layernorm" in name and "weight" in name else 0.0)


def _wide(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}


@pytest.mark.parametrize("dtype", [None, pytest.param(BF16, marks=pytest.mark.slow)])
def test_gradients_of_a_vit_are_as_good_as_eagers(make_vit, make_images, train_step, dtype):
    model, inputs = make_vit(), make_images(8)
    graph = bwsk_fx.capture(model, inputs)
    fused = bwsk_fx.fuse_regions(graph, compiler="inductor")
    errors = defaultdict(lambda: torch.zeros(2, dtype=torch.float64))
    for seed in range(3):
        _reseed(model, seed)
        exact = train_step(copy.deepcopy(model).double(), _wide(inputs))
        for column, one in enumerate((fused, model)):
            found = train_step(one, inputs, dtype)
            # The loss is a single number, whose error is luck; equal parameters of all layers are one kind.
            for name, gradient in ((name, found[name]) for name, _ in model.named_parameters()):
                kind = ".".join(part for part in name.split(".") if not part.isdecimal())
                errors[kind][column] += (gradient.double() - exact[name]).square().sum()
    assert {kind for kind, (ours, eagers) in errors.items() if ours.sqrt() > BOUND * eagers.sqrt()} == set()
    programs = [module.program for module in fused.modules() if isinstance(module, ReversibleRegion)]
    assert programs and all("cpp_fused" in program.run_forward.code for program in programs)
    kept = [saved_for_backward(one, inputs, dtype) for one in (fused, bwsk_fx.fuse_regions(graph))]
    assert kept[0] == kept[1] < 0.7 * saved_for_backward(model, inputs, dtype)


def test_dropout_of_a_vit_draws_eagers_masks(make_vit, make_images, train_step):
    model, inputs = make_vit("sdpa", hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2), make_images()
    fused = bwsk_fx.fuse_regions(bwsk_fx.capture(model, inputs), compiler="inductor")
    expected = train_step(model, inputs)
    state = torch.get_rng_state()
    found = train_step(fused, inputs)
    assert torch.equal(torch.get_rng_state(), state)
    # The gradient of a key's bias is zero but for rounding.
    compared = [name for name in expected if not name.endswith("k_proj.bias")]
    assert len(compared) == len(expected) - 2
    assert {name for name in compared if not _relative_error(found[name], expected[name]) < 1e-4} == set()


class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.second(self.first(x).sin()).exp()
        return y, y.sum()


def test_autograd_sees_through_a_compiled_region():
    model, x = Small(), torch.randn(5, 8)
    fused = bwsk_fx.fuse_regions(bwsk_fx.capture(model, (x,)), granularity="whole", compiler="inductor")
    expected = torch.autograd.grad(model(x)[1], [*model.parameters()])
    y, total = fused(x)
    for _ in range(2):
        found = torch.autograd.grad(total, [*fused.parameters()], retain_graph=True)
        for one, another in zip(found, expected, strict=True):
            torch.testing.assert_close(one, another)
    y.detach().mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def _peak(step: Callable[[], None], path) -> int:
    """Return the most bytes allocated at a time beyond what was there, generated code included."""
    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    profiler.export_chrome_trace(str(path))
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event["name"] == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def test_backward_frees_what_it_has_used(tmp_path):
    """Six products in a row, whose gradients take the place of as many residuals of the same size."""

    def function(x: Tensor, *weights: Tensor) -> list[Tensor]:
        for weight in weights:
            x = (x @ weight).sin()
        return [x]

    inputs = {name: torch.randn(256, 256, requires_grad=True) for name in "xabcdef"}
    programs = _build(function, static=range(1, 7), **inputs)

    @torch.no_grad()
    def step(program: Program) -> None:
        (output,), kept = program.run_forward(*inputs.values())
        residuals = [*kept, *(list(inputs.values())[index] for index in program.static), output]
        del kept, output
        program.run_backward(residuals)

    size = inputs["x"].nbytes
    peaks = [_peak(partial(step, program), tmp_path / "trace.json") / size for program in programs]
    assert programs[1].plan.kept_bytes == 7 * size
    # Six residuals beside x, the output and one more.
    assert peaks == pytest.approx([8, 8], abs=0.5)
