"""Every private PyTorch symbol still does what bwsk-fx uses it for.

To cover a new function of `bwsk_fx._torch_private`, add a function of the same name with the `@check` decorator; a
function without one fails `test_private_function[its name]`.
"""

from __future__ import annotations

import copy
import inspect
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from bwsk_fx import _torch_private as private

CHECKS: dict[str, Callable[[], None]] = {}
FUNCTIONS = sorted(
    name
    for name, function in inspect.getmembers(private, inspect.isfunction)
    if function.__module__ == private.__name__ and not name.startswith("_")
)


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__] = function
    return function


@pytest.mark.parametrize("name", FUNCTIONS)
def test_private_function(name):
    assert name in CHECKS, f"add a @check function '{name}' to tests/test_torch_private.py"
    try:
        CHECKS[name]()
    except Exception as error:
        error.add_note(f"bwsk_fx._torch_private.{name} does not work with torch {torch.__version__}")
        raise


def test_nothing_is_checked_that_is_gone():
    assert set(CHECKS) <= set(FUNCTIONS)


def test_a_moved_symbol_is_reported_with_function_and_version(monkeypatch):
    monkeypatch.setattr(private, "fake_mode", lambda: torch.no_such_symbol)
    with pytest.raises(AttributeError, match="no_such_symbol") as failure:
        test_private_function("fake_mode")
    assert failure.value.__notes__ == [f"bwsk_fx._torch_private.fake_mode does not work with torch {torch.__version__}"]


# De facto public, and documented by PyTorch.
PUBLIC_UNDERSCORES = ("_pytree", "_python_dispatch")
PRIVATE = re.compile(
    rf"\b(?:from|import) torch[\w.]*\.(?!{'|'.join(PUBLIC_UNDERSCORES)})_\w+"
    rf"|\bfrom torch[\w.]* import .*\b(?!{'|'.join(PUBLIC_UNDERSCORES)})_\w+"
    r"|\btorch\._(?!_|ops\b)\w+"
)


def test_private_symbols_are_used_nowhere_else():
    root = Path(private.__file__).parent
    found = {
        f"{path.name}: {match.group()}"
        for path in [*root.rglob("*.py"), *(root.parent / "passes").rglob("*.py")]
        if path.name != "_torch_private.py"
        for match in PRIVATE.finditer(path.read_text())
    }
    assert not found


def test_the_pattern_finds_private_symbols():
    for line in ("from torch._functorch import config", "import torch._dynamo", "torch._C._set_grad_enabled(True)"):
        assert PRIVATE.search(line)
    for line in ("from torch.utils import _pytree as pytree", "from torch import nn", "x._torch"):
        assert not PRIVATE.search(line)


@check
def effects_announced():
    found = []
    with private.effects_announced(found.append):
        torch.linalg.inv(torch.eye(2))
    assert found == ["aten::_linalg_check_errors"]


@check
def swapped_parameters():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    before = model[0].weight
    with private.swapped_parameters(model, {"0.weight": torch.eye(2)}):
        assert torch.equal(model(torch.ones(1, 2)), torch.ones(1, 2))
    assert model[0].weight is model[1].weight is before


@check
def fake_mode():
    mode = private.fake_mode()
    with mode:
        assert type(torch.empty(2)).__name__ == "FakeTensor"
    assert mode.shape_env is not None
    module = nn.Linear(2, 2)
    fakes = {name: private.fake_tensor(mode, tensor) for name, tensor in module.named_parameters()}
    with mode, private.swapped_parameters(module, fakes):
        assert module.to(torch.float32).weight is fakes["weight"]


@check
def without_fake_mode():
    with private.fake_mode():
        with private.without_fake_mode():
            assert torch.ones(3).sum().item() == 3
        assert hasattr(torch.ones(3), "fake_mode")


@check
def fake_tensor():
    mode = private.fake_mode()
    first = private.fake_tensor(mode, torch.ones(3, 4), dynamic_dims=(0,))
    second = private.fake_tensor(mode, torch.ones(3), dynamic_dims=(0,))
    assert isinstance(first.shape[0], torch.SymInt)
    assert isinstance(first.shape[1], int)
    assert first.shape[0].node.expr == second.shape[0].node.expr
    assert (first.shape[0] == 1).node.expr.free_symbols, "a batch of one is not ruled out"


@check
def python_kernels():
    mode = private.fake_mode()
    x = private.fake_tensor(mode, torch.ones(3, 2, 4, 5), dynamic_dims=(0,))
    with mode, private.python_kernels():
        product = torch.matmul(x, x.transpose(2, 3))
    assert product.shape[0].node.expr == x.shape[0].node.expr


def _linear(x: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
    return [torch.relu(x @ weight)]


@check
def trace_joint():
    inputs = [torch.randn(3, 4, requires_grad=True), torch.randn(4, 5, requires_grad=True)]
    with torch.autocast("cpu", torch.bfloat16):
        joint = private.trace_joint(_linear, inputs, {torch.ops.aten.relu.default: lambda x: x.clamp(min=0)})
    assert len(joint.graph.find_nodes(op="placeholder")) == 3
    targets = [node.target for node in joint.graph.nodes]
    assert targets.count(torch.ops.aten.mm.default) == 3
    assert torch.ops.aten.relu.default not in targets
    assert torch.ops.aten.clamp.default in targets
    tangent = torch.ones(3, 5, dtype=torch.bfloat16)
    grouped = len(inspect.signature(joint.forward).parameters) == 2
    output, *gradients = pytree.tree_leaves(joint(inputs, [tangent]) if grouped else joint(*inputs, tangent))
    with torch.autocast("cpu", torch.bfloat16):
        expected = _linear(*inputs)[0]
    assert torch.equal(output, expected)
    for gradient, other in zip(gradients, torch.autograd.grad(expected, inputs, tangent), strict=True):
        assert torch.equal(gradient, other)


@check
def merge_common_subexpressions():
    graph = fx.Graph()
    x = graph.placeholder("x")
    twice = [graph.call_function(torch.ops.aten.exp.default, (x,)) for _ in range(2)]
    random = [graph.call_function(torch.ops.aten.bernoulli.default, (x,)) for _ in range(2)]
    graph.output((*twice, *random))
    merged = [node.target for node in private.merge_common_subexpressions(graph).nodes]
    assert merged.count(torch.ops.aten.exp.default) == 1
    assert merged.count(torch.ops.aten.bernoulli.default) == 2


@check
def without_autocast():
    square = torch.ones(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert (square @ square).dtype == torch.bfloat16
        with private.without_autocast():
            assert (square @ square).dtype == torch.float32
        assert (square @ square).dtype == torch.bfloat16


def _size() -> torch.SymInt:
    """One more than twice a symbolic size that is 3."""
    return 2 * private.fake_tensor(private.fake_mode(), torch.ones(3), dynamic_dims=(0,)).shape[0] + 1


@check
def undisturbed():
    mode = private.fake_mode()
    x = private.fake_tensor(mode, torch.ones(3), dynamic_dims=(0,))
    with private.undisturbed(mode), mode:
        assert x.shape[0] == 3
        x.sum().item()
    assert not mode.shape_env.guards and not mode.shape_env.pending_fresh_unbacked_symbols
    with mode:
        x.sum().item()
    assert mode.shape_env.pending_fresh_unbacked_symbols
    with private.undisturbed(None):
        pass


@check
def expression_of():
    size = _size()
    assert private.expression_of(size) == private.expression_of(size - 1) + 1 != private.expression_of(size + 1)


@check
def symbols_in():
    size = _size()
    assert private.symbols_in(size) == private.symbols_in(size * size)
    assert len(private.symbols_in(size)) == 1


@check
def hint_of():
    size = _size()
    assert (private.hint_of(size), type(private.hint_of(size))) == (7, int)
    assert private.symbols_in(size), "the size is no number now"


@check
def evaluate():
    size = _size()
    (symbol,) = private.symbols_in(size)
    assert private.evaluate(private.expression_of(size // 4), {symbol: 10}) == 5
    graph = fx.Graph()
    value = private.evaluate(private.expression_of(size), {symbol: fx.Proxy(graph.placeholder("size"))})
    graph.output(value.node)
    assert fx.GraphModule(nn.Module(), graph)(10) == 21


@check
def inside_function_transform():
    seen = []

    def square(x: torch.Tensor) -> torch.Tensor:
        seen.append(private.inside_function_transform())
        return x * x

    torch.func.grad(square)(torch.tensor(2.0))
    torch.func.vmap(square)(torch.ones(2))
    assert seen == [True, True]
    assert not private.inside_function_transform()


class _Releasing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        private.release_saved_tensors(ctx)
        with pytest.raises(RuntimeError):
            _ = ctx.saved_tensors
        return gradient * 2


@check
def release_saved_tensors():
    leaf = torch.ones(2, requires_grad=True)
    _Releasing.apply(leaf).sum().backward()
    assert torch.equal(leaf.grad, torch.full((2,), 2.0))


@check
def shares_storage():
    x = torch.ones(2, 3)
    assert private.shares_storage(x, x[0])
    assert not private.shares_storage(x, x.clone())


@check
def is_fake():
    x = torch.ones(2)
    assert private.is_fake(private.fake_tensor(private.fake_mode(), x)) and not private.is_fake(x)


@check
def storage_key():
    x = torch.ones(2, 3)
    assert private.storage_key(x) == private.storage_key(x[0]) != private.storage_key(x.clone())


@check
def after_deepcopy():
    graph_module = torch.fx.symbolic_trace(torch.nn.Identity())
    private.after_deepcopy(graph_module).append(lambda twin: twin.meta.update(copied=True))
    assert copy.deepcopy(graph_module).meta == {"copied": True} and not graph_module.meta


@check
def operators():
    assert private.operators("_weight_norm", "_no_such_operator", "_C._nn.max_unpool2d")
    assert len(private.operators("_weight_norm", "_no_such_operator", "_C._nn.max_unpool2d")) == 2


def _softmax_with_dropout(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    weights = torch.ops.aten._safe_softmax(x, -1)
    mask = torch.ops.aten.bernoulli.p(torch.empty_like(weights), 0.5)
    return (weights * (mask / 0.5)).sin(), weights, (x + 1).t().clone()


def _traced_for_inductor() -> tuple[fx.GraphModule, list[torch.Tensor]]:
    graph = fx.Graph()
    graph.output(graph.call_function(_softmax_with_dropout, (graph.placeholder("x"),)))
    with private.fake_mode():
        inputs = [torch.empty(17, 17)]
    return private.trace_for_inductor(fx.GraphModule(nn.Module(), graph), inputs), inputs


@check
def trace_for_inductor():
    module, _ = _traced_for_inductor()
    targets = [node.target for node in module.graph.nodes if node.op == "call_function"]
    assert all(isinstance(target, torch._ops.OpOverload) for target in targets)
    assert torch.ops.aten._safe_softmax.default not in targets
    assert torch.ops.aten.bernoulli.p in targets


@check
def compile_boxed():
    from torch._inductor import config

    with config.patch(fx_graph_cache=False):
        compiled = private.compile_boxed(*_traced_for_inductor())
    x = torch.randn(17, 17)
    box = [x]
    torch.manual_seed(0)
    found = compiled(box)
    assert box == []
    torch.manual_seed(0)
    for one, another in zip(found, _softmax_with_dropout(x), strict=True):
        torch.testing.assert_close(one, another)
        assert one.stride() == another.stride()


@check
def inductor_mode():
    from torch._inductor import config

    assert not config.max_autotune
    with private.inductor_mode("default"):
        assert not config.max_autotune
    with private.inductor_mode("max-autotune-no-cudagraphs"):
        assert config.max_autotune
    assert not config.max_autotune


@check
def generated_code():
    compiled = private.compile_boxed(*_traced_for_inductor())
    assert "args.clear()" in private.generated_code(compiled)
    assert private.generated_code(lambda inputs: ()) == ""


@contextmanager
def _group_of_one() -> Iterator[str]:
    from torch import distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dist.group.WORLD.group_name
    finally:
        dist.destroy_process_group()


@check
def all_reduce_sum():
    x = torch.arange(6.0).view(2, 3).t()
    with _group_of_one() as group:
        assert torch.equal(total := private.all_reduce_sum(x, group), x)
    assert not private.shares_storage(total, x)


@check
def reduce_scatter_sum():
    x = torch.arange(6.0).view(2, 3)
    with _group_of_one() as group:
        assert all(torch.equal(private.reduce_scatter_sum(x, dim, group, 1), x) for dim in range(2))


@check
def all_gather():
    x = torch.arange(6.0).view(2, 3)
    with _group_of_one() as group:
        assert all(torch.equal(private.all_gather(x, dim, group, 1), x) for dim in range(2))


@check
def is_collective():
    assert private.is_collective(torch.ops._c10d_functional.all_reduce.default)
    assert private.is_collective(torch.ops._c10d_functional.wait_tensor.default)
    assert not private.is_collective(torch.ops.aten.mm.default) and not private.is_collective(torch.relu)


@check
def compile_joint() -> None:
    seen: list[str] = []

    def partition(joint: fx.GraphModule, inputs: object, *, num_fwd_outputs: int, **rest: object) -> object:
        from torch._functorch.partitioners import default_partition

        seen.append(f"{num_fwd_outputs} output")
        assert "static_lifetime_input_indices" in rest
        return default_partition(joint, inputs, num_fwd_outputs=num_fwd_outputs, **rest)

    def compiler(name: str) -> Callable[..., Callable[..., object]]:
        def run(module: fx.GraphModule, inputs: object) -> Callable[..., object]:
            seen.append(name)
            return private.boxed(lambda given: module(*given))

        return run

    def backend(graph: fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
        return private.compile_joint(
            graph,
            inputs,
            partition=partition,
            forward=compiler("forward"),
            backward=compiler("backward"),
            inference=compiler("inference"),
            decompositions={},
        )

    torch._dynamo.reset()
    x = torch.ones(3, requires_grad=True)
    torch.compile(lambda x: x.sin().sum(), backend=backend)(x).backward()
    assert torch.equal(x.grad, torch.ones(3).cos())
    assert seen == ["1 output", "forward", "backward"]


@check
def dynamo_source() -> None:
    found: list[str] = []

    def backend(graph: fx.GraphModule, inputs: object) -> fx.GraphModule:
        found.extend(map(private.dynamo_source, graph.graph.find_nodes(op="placeholder")))
        return graph

    torch._dynamo.reset()
    torch.compile(nn.Sequential(nn.Linear(2, 2)), backend=backend)(torch.ones(1, 2))
    assert sum("['0']._parameters['weight']" in source for source in found) == 1
    graph = fx.Graph()
    assert private.dynamo_source(graph.placeholder("x")) == ""


@check
def trace_artifact() -> None:
    seen: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "artifact" in record.metadata:
                seen.append(str(record.metadata["artifact"]["name"]) + record.payload)

    def no_payload() -> str:
        raise AssertionError("nothing is made where no trace is written")

    log, handler = logging.getLogger("torch.__trace"), Handler()
    with patch.object(log, "handlers", []):
        private.trace_artifact("unseen", "string", no_payload)
    level = log.level
    log.setLevel(logging.DEBUG)
    try:
        with patch.object(log, "handlers", [handler]):
            private.trace_artifact("plan", "json", lambda: "{}")
    finally:
        log.setLevel(level)
    assert seen == ["plan{}"]


@check
def boxed() -> None:
    assert private.boxed(lambda given: given)._boxed_call


def _joint_of(function, *inputs: torch.Tensor) -> fx.GraphModule:
    """Return the joint graph that `compile_joint` partitions."""
    from torch._functorch.partitioners import default_partition

    seen: list[fx.GraphModule] = []

    def partition(joint, joint_inputs, **options):
        seen.append(copy.deepcopy(joint))
        return default_partition(joint, joint_inputs, num_fwd_outputs=options["num_fwd_outputs"])

    def backend(graph, inputs):
        run = lambda module, _: private.boxed(lambda given: module(*given))  # noqa: E731
        halves = {"partition": partition, "forward": run, "backward": run, "inference": run}
        return private.compile_joint(graph, inputs, **halves, decompositions={})

    torch._dynamo.reset()
    torch.compile(function, backend=backend)(*inputs)
    return seen[0]


@check
def mutated_inputs() -> None:
    def function(x: torch.Tensor, count: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        y = x * count.clone() * kept
        count.add_(1.0)
        return y

    inputs = torch.ones(2, requires_grad=True), torch.ones(2), torch.ones(2)
    joint = _joint_of(function, *inputs)
    (place,) = private.mutated_inputs(joint)
    assert torch.equal(inputs[1], torch.full((2,), 2.0))
    placeholder = joint.graph.find_nodes(op="placeholder")[place]
    assert [user.target for user in placeholder.users].count(torch.ops.aten.add.Tensor) == 1
    placeholder.meta["desc"] = None
    with pytest.raises(LookupError, match="args"):
        private.mutated_inputs(joint)


@check
def place_in_dynamos_graph() -> None:
    joint = _joint_of(lambda x, y: x * y, torch.ones(2, requires_grad=True), torch.ones(2))
    places = [private.place_in_dynamos_graph(node) for node in joint.graph.find_nodes(op="placeholder")]
    assert places == [0, 1, None]


class _CountsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, count):
        ctx.count = count
        return x.sin()

    @staticmethod
    def backward(ctx, gradient):
        ctx.count.add_(1.0)
        return gradient, None


@check
def runs_in_backward() -> None:
    joint = _joint_of(_CountsBackward.apply, torch.ones(2, requires_grad=True), torch.ones(2))
    late = [node.target for node in joint.graph.nodes if private.runs_in_backward(node)]
    assert torch.ops.aten.copy_.default in late and torch.ops.aten.sin.default not in late


@check
def inductor_partitioner() -> None:
    seen: list[str] = []

    class Partitioner(private.inductor_partitioner()):
        def __call__(self, gm: fx.GraphModule, joint_inputs: object, **kwargs: object) -> object:
            from torch._functorch.partitioners import default_partition

            seen.extend(sorted(kwargs))
            return default_partition(gm, joint_inputs, num_fwd_outputs=kwargs["num_fwd_outputs"])

        def uuid(self) -> str:
            return "check"

    torch._dynamo.reset()
    x = torch.ones(3, requires_grad=True)
    with torch._inductor.config.patch(custom_partitioner_fn=Partitioner(), force_disable_caches=True):
        torch.compile(lambda x: x.sin().sum())(x).backward()
    torch.testing.assert_close(x.grad, torch.ones(3).cos())
    assert {"num_fwd_outputs", "static_lifetime_input_indices"} <= set(seen)


@check
def retraced() -> None:
    graph = fx.Graph()
    operand = graph.placeholder("primals_1")
    operand.meta["val"] = private.fake_tensor(private.fake_mode(), torch.ones(3))
    graph.output((graph.call_function(torch.nn.functional.gelu, (operand,)),))
    module = private.retraced(fx.GraphModule(nn.Module(), graph))
    assert [node.name for node in module.graph.find_nodes(op="placeholder")] == ["primals_1"]
    assert all(isinstance(n.target, torch._ops.OpOverload) for n in module.graph.nodes if n.op == "call_function")


@check
def data_dependent_errors():
    for ask in (bool, float, torch.nonzero):
        with private.fake_mode(), pytest.raises(private.data_dependent_errors()):
            found = ask(torch.ones(3).sum())
            bool(found.sum() > 0)


@check
def global_module_hooks() -> None:
    from torch.nn.modules import module

    registering = (
        module.register_module_forward_pre_hook,
        module.register_module_forward_hook,
        module.register_module_full_backward_pre_hook,
        module.register_module_full_backward_hook,
    )
    hooks = [lambda *_: None for _ in registering]
    before = private.global_module_hooks()
    handles = [register(hook) for register, hook in zip(registering, hooks, strict=True)]
    try:
        assert set(private.global_module_hooks()) - set(before) == set(hooks)
    finally:
        for handle in handles:
            handle.remove()
    assert private.global_module_hooks() == before


@check
def noisy_loggers() -> None:
    assert all(name in logging.Logger.manager.loggerDict for name in private.noisy_loggers())


@check
def is_custom_operator():
    @torch.library.custom_op("bwsk_tests::is_custom_operator", mutates_args=())
    def custom(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    assert private.is_custom_operator(torch.ops.bwsk_tests.is_custom_operator.default)
    assert not any(map(private.is_custom_operator, (torch.ops.aten.sin.default, torch.sin, custom)))


@check
def autograd_functions_announced():
    class Identity(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    bound, seen = Identity.apply, []
    with private.autograd_functions_announced(seen.append):
        bound(torch.ones(1))
        Identity.apply(torch.ones(1))
    bound(torch.ones(1))
    assert seen == [Identity, Identity]


@check
def is_managed_by_fsdp1() -> None:
    from torch import distributed as dist
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for use_orig_params in (True, False):
            wrapped = FullyShardedDataParallel(
                nn.Linear(2, 2), device_id=torch.device("cpu"), use_orig_params=use_orig_params
            )
            assert _seen_inside(wrapped.module, wrapped) == [True]
        sharded, plain = fully_shard(nn.Linear(2, 2)), nn.Linear(2, 2)
        assert _seen_inside(sharded, sharded) + _seen_inside(plain, plain) == [False, False]
    finally:
        dist.destroy_process_group()


def _seen_inside(module: nn.Module, outer: nn.Module) -> list[bool]:
    """Ask from within a training step, when parameters are gathered."""
    seen, forward = [], module.forward
    module.forward = lambda x: [seen.append(private.is_managed_by_fsdp1(module)), forward(x)][1]
    outer(torch.ones(1, 2)).sum().backward()
    return seen
