"""Modules of a plan as Inductor's code: the same values, layouts, aliases, masks and memory as the modules themselves."""

import copy
import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace

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
from bwsk_fx.planning.compiled import compile_with_inductor
from bwsk_fx.planning.options import PlanOptions
from bwsk_fx.planning.program import Program
from bwsk_fx.planning.prospect import Prospect, build_program
from bwsk_fx.reversible import ReversibleRegion

BF16 = torch.bfloat16
BOUND = 1.5


@pytest.fixture(autouse=True)
def _without_stored_graphs():
    """Generate the code anew, or a change of ours would not show; what g++ made of equal code may be used again."""
    with config.patch(fx_graph_cache=False):
        yield


def _compiled(program: Program, name: str = "small") -> Program:
    forward, backward = compile_with_inductor(program.forward, program.backward, name)
    return replace(program, forward=forward, backward=backward)


def _build(function: Callable, static=(), faith: str = "exact", **inputs: Tensor) -> Program:
    return build_program(function, inputs, static, PlanOptions(0.0, faith), "small")


def _run(program: Program, inputs) -> tuple:
    """Return outputs, kept values and gradients of a run from seed 0."""
    inputs = [tensor.detach() for tensor in inputs]
    torch.manual_seed(0)
    with torch.no_grad():
        outputs, kept = program.forward(*inputs)
        tangents = [layout.applied_to(torch.randn(layout.shape, dtype=layout.dtype)) for layout in program.tangents]
        residuals = [*kept, *(inputs[index] for index in program.static), *tangents]
        gradients = program.backward(residuals)
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


# -- small functions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("mlp", None), ("residual", BF16), ("attention", BF16), ("dropout", None), ("views", None)],
)
def test_generated_code_does_what_the_modules_do(plan, functions, inputs_of, name, dtype):
    function = getattr(functions, name)
    program = plan(function, 0.0, "rounded", dtype)
    inputs = [*inputs_of(function).values()]
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype is None else {"rtol": 2e-2, "atol": 2e-2}
    _assert_alike(_run(_compiled(program), inputs), _run(program, inputs), **tolerance)


def test_the_modules_stay_readable(plan, functions):
    program = plan(functions.mlp)
    before = program.forward.code, program.backward.code
    compiled = _compiled(program)
    assert (program.forward.code, program.backward.code) == before
    assert "residuals.pop(0)" in before[1]
    assert "cpp_fused" in compiled.forward.code
    assert "args.clear()" in compiled.backward.code and "del buf" in compiled.backward.code


def test_what_shares_memory_shares_it_still():
    x = torch.randn(4, 8, requires_grad=True)
    program = _build(lambda x: [x, x.t(), y := x.sin(), y, y.t(), y[1:], (y * 2).sin()], x=x)
    runs = [_run(one, [x]) for one in (program, _compiled(program))]
    _assert_alike(*runs)
    groups = []
    for outputs, kept, _ in runs:
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
    program = _build(lambda x, y: [x.t(), y[0]], x=x, y=y)
    compiled = _compiled(program)
    _assert_alike(_run(compiled, [x, y]), _run(program, [x, y]))
    assert compiled.forward.code == compiled.backward.code == ""
    assert compiled.forward(x, y)[0][0].data_ptr() == x.data_ptr()


def test_outputs_of_every_sort():
    x = torch.randn(4, 8, requires_grad=True)
    function = lambda x: [x > 0, x.argmax(-1), x.exp().sum(), x.cumsum(0), x.sum(0, keepdim=True).expand(4, 8)]  # noqa: E731
    program = _build(function, x=x)
    _assert_alike(_run(_compiled(program), [x]), _run(program, [x]))


@pytest.mark.parametrize(
    "part", [lambda y: y[:, :2].square(), lambda y: y.chunk(2, dim=-1)[0] * y.chunk(2, dim=-1)[1]], ids=["some", "all"]
)
def test_a_kept_part_holds_what_it_holds_in_the_module(part):
    x, w = torch.randn(4, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    program = _build(lambda x, w: [part(x @ w)], static=[1], x=x, w=w)
    held = []
    for one in (program, _compiled(program)):
        _, kept = one.forward(x.detach(), w.detach())
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
        held.append(sum(storages.values()))
    assert held[0] == held[1] == program.plan.kept_bytes


def test_compiling_is_blind_to_autocast_and_leaves_the_generator_alone(plan, functions, inputs_of):
    program, inputs = plan(functions.dropout), [*inputs_of(functions.dropout).values()]
    before = torch.get_rng_state()
    with torch.autocast("cpu", BF16):
        compiled = _compiled(program)
    assert torch.equal(torch.get_rng_state(), before)
    found = _run(compiled, inputs)
    assert found[0][0].dtype is torch.float32
    _assert_alike(found, _run(program, inputs))


# -- writes inside Inductor: a mask that is drawn, a gradient that is scattered ----------------------------------------


def test_masks_are_read_after_they_are_drawn():
    def function(x: Tensor, w: Tensor) -> list[Tensor]:
        weights = torch.ops.aten._safe_softmax(x, -1)
        return [F.dropout(F.dropout(weights, 0.2) @ w, 0.5), weights]

    x, w = torch.randn(12, 17, 17, requires_grad=True), torch.randn(12, 17, 8, requires_grad=True)
    program = _build(function, static=[1], x=x, w=w)
    assert sum(node.name.startswith("pack_bits") for node in program.forward.graph.nodes) == 2
    _assert_alike(_run(_compiled(program), [x, w]), _run(program, [x, w]), rtol=1e-4, atol=1e-5)


def test_gradients_are_read_after_they_are_scattered():
    x, w = torch.randn(2, 3, 16, 16, requires_grad=True), torch.randn(4, 3, 3, 3, requires_grad=True)
    program = _build(lambda x, w: [F.max_pool2d(F.conv2d(x, w, padding=1).relu(), 2)], static=[1], x=x, w=w)
    _assert_alike(_run(_compiled(program), [x, w]), _run(program, [x, w]), rtol=1e-4, atol=1e-4)


# -- errors ------------------------------------------------------------------------------------------------------------


def test_a_missing_cpp_compiler_is_reported(plan, functions):
    program = plan(functions.chain)
    with config.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}):
        with pytest.raises(PlanError) as failure:
            _compiled(program, "block 7")
    message = str(failure.value)
    assert "the forward pass of region block 7" in message
    assert "use compiler='eager'" in message and "\n" not in message
    assert "no-such-compiler" in message


def test_the_pass_that_cannot_be_compiled_is_named(plan, functions, monkeypatch):
    def fail_on_two(module: fx.GraphModule, inputs: list[Tensor]) -> Callable:
        if len(inputs) == 5:
            raise RuntimeError("no lowering for aten.unheard_of\nand pages more")
        return lambda inputs: ()

    monkeypatch.setattr(private, "compile_boxed", fail_on_two)
    with pytest.raises(PlanError, match=r"backward pass of region small \(RuntimeError: no lowering for \S+\); use"):
        _compiled(plan(functions.mlp))


# -- whole models ------------------------------------------------------------------------------------------------------


@pytest.fixture
def fuse(monkeypatch):
    """Return a function that fuses a graph's blocks, run by generated code or by the modules."""
    write = Prospect.program

    def compiled(self, solution):
        program = write(self, solution)
        if isinstance(program.forward, fx.GraphModule):
            self._programs[solution] = _compiled(program, self.region)
        return self._programs[solution]

    def fused(graph: fx.GraphModule, compiler: str, **options) -> fx.GraphModule:
        monkeypatch.setattr(Prospect, "program", compiled if compiler == "inductor" else write)
        return bwsk_fx.fuse_regions(graph, **options)

    return fused


def _programs(model: torch.nn.Module) -> list[Program]:
    return [module.program for module in model.modules() if isinstance(module, ReversibleRegion)]


def _relative_error(one: Tensor, another: Tensor) -> float:
    return ((one - another).norm() / another.norm()).item()


@pytest.mark.parametrize("dtype", [None, BF16])
def test_gradients_of_a_vit_are_as_good_as_eagers(make_vit, make_images, train_step, fuse, dtype):
    model, inputs = make_vit(), make_images(8)
    fused = fuse(bwsk_fx.capture(model, inputs), "inductor")
    exact = train_step(copy.deepcopy(model).double(), {name: _wide(value) for name, value in inputs.items()})
    errors = defaultdict(lambda: torch.zeros(2, dtype=torch.float64))
    for column, one in enumerate((fused, model)):
        for name, gradient in train_step(one, inputs, dtype).items():
            # Equal parameters of all layers are one kind.
            kind = ".".join(part for part in name.split(".") if not part.isdecimal())
            errors[kind][column] += (gradient.double() - exact[name]).square().sum()
    assert {kind for kind, (ours, eagers) in errors.items() if ours.sqrt() > BOUND * eagers.sqrt()} == set()
    assert all(not isinstance(program.forward, fx.GraphModule) for program in _programs(fused))
    kept = [saved_for_backward(one, inputs, dtype) for one in (fused, fuse(bwsk_fx.capture(model, inputs), "eager"))]
    assert kept[0] == kept[1] < 0.7 * saved_for_backward(model, inputs, dtype)


def _wide(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value


def test_dropout_of_a_vit_draws_eagers_masks(make_vit, make_images, train_step, fuse):
    model, inputs = make_vit("sdpa", hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2), make_images()
    fused = fuse(bwsk_fx.capture(model, inputs), "inductor")
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


def test_autograd_sees_through_a_compiled_region(fuse):
    model, x = Small(), torch.randn(5, 8)
    fused = fuse(bwsk_fx.capture(model, (x,)), "inductor", granularity="whole")
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
    """Eight products in a row: the residual of each is a quarter of the bound."""

    def function(x: Tensor, w: Tensor) -> list[Tensor]:
        for _ in range(8):
            x = (x @ w).sin()
        return [x]

    x, w = torch.randn(512, 64, requires_grad=True), torch.randn(64, 64, requires_grad=True)
    program = _build(function, static=[1], x=x, w=w)
    peaks = [
        _peak(lambda one=one: _run(one, [x, w]) and None, tmp_path / f"{index}.json")
        for index, one in enumerate((program, _compiled(program)))
    ]
    assert peaks[1] <= peaks[0]
    assert peaks[0] > program.plan.kept_bytes > 8 * x.nbytes
