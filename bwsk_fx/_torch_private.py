"""Every private PyTorch symbol that bwsk-fx uses, behind one function each.

`tests/test_torch_private.py` calls each of them, so that a PyTorch release that moves one fails with its name.
"""

from __future__ import annotations

import hashlib
import operator
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path
from threading import RLock
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

# Recording and tracing put functions of their own into PyTorch's classes and tables. Two threads that do so at once
# would take them off in the wrong order, and leave one there for good.
ONE_AT_A_TIME = RLock()


def inductor_partitioner() -> type:
    """Return the class that Inductor's `config.custom_partitioner_fn` has to be an instance of."""
    from torch._inductor.custom_graph_pass import CustomPartitionerFn

    return CustomPartitionerFn


@contextmanager
def swapped_parameters(module: nn.Module, tensors: dict[str, torch.Tensor]) -> Iterator[None]:
    """Let `module` see `tensors` in place of its parameters and buffers, tied ones included."""
    from torch.nn.utils.stateless import _reparametrize_module

    # Last in, first out: a module at two paths is met twice, and its own tensors come out with the first.
    with _reparametrize_module(module, tensors, tie_weights=True, stack_weights=True):
        yield


def fake_mode() -> Any:
    """Return a fresh `FakeTensorMode` with a symbolic shape environment, in which no size is 0 or 1 by assumption."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    mode = FakeTensorMode(shape_env=ShapeEnv(specialize_zero_one=False), allow_non_fake_inputs=True)
    # `Module.to` cannot exchange tensors that anybody has weak references to, not even for themselves.
    mode.fake_tensor_converter.meta_converter.tensor_memo = {}  # type: ignore[assignment]
    return mode


def without_fake_mode() -> AbstractContextManager[Any]:
    """Return a context in which the running `FakeTensorMode` is off."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    return unset_fake_temporarily()


def data_dependent_errors() -> tuple[type[Exception], ...]:
    """Return what a `FakeTensorMode` raises when Python code asks for the value of a tensor."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    return DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode


_EFFECTS = frozenset({"aten::_linalg_check_errors", "aten::_print"})


@contextmanager
def effects_announced(on_effect: Callable[[str], None]) -> Iterator[None]:
    """Call `on_effect` with the name of each operator that runs for its side effect, which tracing wraps.

    Linear solvers raise on singular matrices by such an operator.
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    class Announcing(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
            if func.name() in _EFFECTS:
                on_effect(func.name())
            return func(*args, **(kwargs or {}))

    with Announcing():
        yield


def is_fake(tensor: torch.Tensor) -> bool:
    """Whether a tensor has sizes and a dtype, and no numbers."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor)


def python_kernels() -> AbstractContextManager[Any]:
    """Return a context in which operators that are made of others run by PyTorch's Python code, where there is any.

    It keeps sizes symbolic. Their C++ code makes numbers of some: in torch 2.11, matmul's does of the batch size.
    """
    from torch._dispatch.python import enable_python_dispatcher

    return enable_python_dispatcher()


def fake_tensor(mode: Any, tensor: torch.Tensor, dynamic_dims: Sequence[int] = ()) -> torch.Tensor:
    """Return the fake twin of `tensor`; equal sizes along `dynamic_dims` share one symbol."""
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

    sizes = [DimDynamic.DUCK if dim in dynamic_dims else DimDynamic.STATIC for dim in range(tensor.dim())]
    return mode.from_tensor(tensor, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))


_RESAMPLING = (
    *(f"{kind}{dims}d" for kind in ("upsample_nearest", "_upsample_nearest_exact") for dims in (1, 2, 3)),
    *("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d"),
    *("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "_upsample_lanczos2d_aa"),
)


def trace_joint(
    function: Callable[..., Any],
    inputs: Sequence[torch.Tensor],
    decompositions: Mapping[Any, Callable[..., Any]] | None = None,
) -> fx.GraphModule:
    """Trace forward and backward of `function` into one ATen joint graph with AOTAutograd.

    The graph's placeholders are `inputs` followed by one tangent per differentiable output; its output is the
    tuple of forward outputs and of gradients. The backward pass is traced without autocast, which is how
    `loss.backward()` runs outside an autocast block. `decompositions` replace ATen operators by their own calls.
    """
    from torch._functorch import config
    from torch._functorch.aot_autograd import aot_export_joint_simple

    with ONE_AT_A_TIME, config.patch(backward_pass_autocast="off"), _native_resampling():
        return aot_export_joint_simple(  # type: ignore[return-value]
            function, tuple(inputs), trace_joint=True, decompositions=dict(decompositions or {})
        )


@contextmanager
def _native_resampling() -> Iterator[None]:
    """Let operators that resample images run by their C++ code, as they do in eager execution.

    PyTorch has Python code for them, of other operators and with other last bits, which tracing prefers. Its tables
    are the process's.
    """
    from torch._C import DispatchKey

    packets = [getattr(torch.ops.aten, name) for name in _RESAMPLING if hasattr(torch.ops.aten, name)]
    overloads = [
        getattr(packet, name) for packet in packets for name in packet.overloads() if name in ("default", "vec")
    ]
    before = {overload: dict(overload.py_kernels) for overload in overloads}
    try:
        for overload in overloads:
            for key in (DispatchKey.Autograd, DispatchKey.CompositeImplicitAutograd):
                overload.py_kernels.pop(key, None)
            overload._dispatch_cache.clear()
        yield
    finally:
        for overload, kernels in before.items():
            overload.py_kernels.update(kernels)
            overload._dispatch_cache.clear()


def merge_common_subexpressions(graph: fx.Graph) -> fx.Graph:
    """Return a copy of `graph` in which equal, deterministic, side-effect-free calls appear once."""
    from torch._functorch.compile_utils import fx_graph_cse

    return fx_graph_cse(graph)


def without_autocast() -> AbstractContextManager[Any]:
    """Return a context in which autocast changes nothing on any device."""
    return torch._C._DisableAutocast()


@contextmanager
def undisturbed(mode: Any) -> Iterator[None]:
    """Let nothing that is done with the tensors of a fake mode add guards or symbols to what it is tracing."""
    if getattr(mode, "shape_env", None) is None:
        yield
        return
    with mode.shape_env.suppress_guards(), mode.shape_env.ignore_fresh_unbacked_symbols():
        yield


def expression_of(size: Any) -> Any:
    """Return the SymPy expression of a symbolic number; equal expressions are equal numbers."""
    return size.node.expr


def symbols_in(size: Any) -> set[Any]:
    """Return the SymPy symbols that a symbolic number depends on."""
    return set(size.node.expr.free_symbols)


def hint_of(size: Any) -> Any:
    """Return the number that a symbolic one was traced for, without tying it to that."""
    return size.node.hint


def evaluate(expression: Any, values: Mapping[Any, Any]) -> Any:
    """Return a SymPy expression for given values of its symbols: numbers, or proxies, which record the calls."""
    from torch.utils._sympy.interp import sympy_interp
    from torch.utils._sympy.reference import PythonReferenceAnalysis

    return sympy_interp(PythonReferenceAnalysis, dict(values), expression)


def inside_function_transform() -> bool:
    """Whether a `torch.func` transform (grad, vmap, jvp) is running."""
    return torch._C._are_functorch_transforms_active()


def global_module_hooks() -> tuple[Callable[..., Any], ...]:
    """Return the hooks that run around calls of every module of this process."""
    from torch.nn.modules import module

    tables = (
        module._global_forward_pre_hooks,
        module._global_forward_hooks,
        module._global_backward_pre_hooks,
        module._global_backward_hooks,
    )
    return tuple(hook for table in tables for hook in table.values())


def noisy_loggers() -> tuple[str, ...]:
    """Return the names of the loggers that write the traceback of an error which is raised anyway."""
    from torch._subclasses import fake_tensor

    return "torch.export", fake_tensor.log.name


def release_saved_tensors(ctx: Any) -> None:
    """Drop what `ctx` saved for the backward pass, unless the autograd graph is retained."""
    ctx.maybe_clear_saved_tensors()


def shares_storage(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors, fake ones included, are views of the same memory."""
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata


def after_deepcopy(graph_module: fx.GraphModule) -> list[Callable[[fx.GraphModule], object]]:
    """Return the functions that are called with each deep copy of a graph module, to be read and added to."""
    return graph_module._deepcopy_hooks


def storage_key(tensor: torch.Tensor) -> int:
    """Return what tells a tensor's memory, or a fake tensor's, from any other that is alive."""
    return tensor.untyped_storage()._cdata


def operators(*paths: str) -> tuple[Callable[..., Any], ...]:
    """Return private functions of `torch` by their paths (`"_weight_norm"`), those that this release has."""
    found = []
    for path in paths:
        try:
            found.append(operator.attrgetter(path)(torch))
        except AttributeError:
            continue
    return tuple(found)


def trace_for_inductor(module: fx.GraphModule, inputs: Sequence[torch.Tensor]) -> fx.GraphModule:
    """Trace a module of ATen calls and Python helpers into the ATen operators that Inductor takes.

    Random operators stay what they are. `inputs` are fake tensors of one mode. Source lines are carried over.
    """
    from torch._inductor import config
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx

    with config.patch(fallback_random=True), fx.traceback.preserve_node_meta():
        interpreter = fx.Interpreter(module, garbage_collect_values=False)
        return make_fx(interpreter.run, select_decomp_table(), tracing_mode="fake")(*inputs)


def compile_boxed(module: fx.GraphModule, inputs: Sequence[torch.Tensor]) -> Callable[[list[torch.Tensor]], Any]:
    """Let Inductor generate code for a module that `trace_for_inductor` returned.

    The result takes one list of tensors like `inputs`, empties it, and frees each after its last use. What it returns
    has the strides of the values in the module. Random operators run eagerly, in the module's order.
    """
    from torch._guards import TracingContext, detect_fake_mode, tracing
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner

    # A compilation that this one is part of would take the strides of these results for those of its own. Inductor's
    # cache of compiled graphs wants a context all the same.
    own = TracingContext(detect_fake_mode(list(inputs)))
    # CUDA graphs would write the next region's results over what this one keeps.
    changes = {"fallback_random": True, "triton.cudagraphs": False, "custom_partitioner_fn": _name_in_caches()}
    with config.patch(changes), _writes_before_reads(), tracing(own):
        output = module.graph.output_node()
        output.meta["user_visible_output_idxs"] = list(range(len(output.args[0])))  # type: ignore[arg-type]
        return compile_fx_inner(module, list(inputs))  # type: ignore[arg-type]


@cache
def _name_in_caches() -> Any:
    """Return a partitioner that is never called, whose name tells code made here from Inductor's for the same graph."""

    class Uncalled(inductor_partitioner()):  # type: ignore[misc]
        def __call__(self, *_: Any, **__: Any) -> Any:
            raise AssertionError("a half is not partitioned again")

        def __reduce__(self) -> Any:
            # The caches pickle what is in the configuration.
            return _name_in_caches, ()

        def uuid(self) -> str:
            return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()

    return Uncalled()


@contextmanager
def _writes_before_reads() -> Iterator[None]:
    """Let Inductor's scheduler remember which reads of a buffer follow a write into it.

    Up to PyTorch 2.13 it forgets some of them when it lines up two loops for a CPU, and reads a dropout mask before it
    is drawn, or a gradient before a max-pool scatters into it (pytorch/pytorch#185509).
    """
    from torch._inductor.dependencies import StarDep, WeakDep
    from torch._inductor.scheduler import SchedulerNode

    original = SchedulerNode.recompute_size_and_body

    def recompute(self: Any, *args: Any, **kwargs: Any) -> None:
        before, written = list(self.read_writes.reads), self.scheduler.mutation_real_name
        original(self, *args, **kwargs)
        renames = {written[read.name]: read.name for read in before if read.name in written}
        order = type(self.read_writes.reads)(read for read in before if isinstance(read, (StarDep, WeakDep)))
        self.set_read_writes(self.read_writes.rename(renames).with_read(order))

    SchedulerNode.recompute_size_and_body = recompute  # type: ignore[method-assign]
    try:
        yield
    finally:
        SchedulerNode.recompute_size_and_body = original  # type: ignore[method-assign]


def inductor_mode(mode: str) -> AbstractContextManager[Any]:
    """Return a context in which Inductor compiles as under `torch.compile(mode=...)`."""
    from torch._inductor import config, list_mode_options

    return config.patch(list_mode_options(mode))  # type: ignore[no-any-return]


def generated_code(compiled: Callable[..., Any]) -> str:
    """Return the source that Inductor generated for what `compile_boxed` returned; empty where it computes nothing."""
    return getattr(compiled, "source_code", "")


def all_reduce_sum(tensor: torch.Tensor, group: str) -> torch.Tensor:
    """Return the sum of a tensor over the devices of a process group, named, as a new tensor; graphs can hold it."""
    operators = torch.ops._c10d_functional
    return operators.wait_tensor(operators.all_reduce(tensor.contiguous(), "sum", group))


def reduce_scatter_sum(tensor: torch.Tensor, dim: int, group: str, size: int) -> torch.Tensor:
    """Return this device's part, along `dim`, of the sum of a tensor over the `size` devices of a process group."""
    operators = torch.ops._c10d_functional
    parts = torch.cat(tensor.chunk(size, dim)) if dim else tensor.contiguous()
    return operators.wait_tensor(operators.reduce_scatter_tensor(parts, "sum", size, group))


def all_gather(tensor: torch.Tensor, dim: int, group: str, size: int) -> torch.Tensor:
    """Return the parts of all `size` devices of a process group, joined along `dim`."""
    operators = torch.ops._c10d_functional
    parts = operators.wait_tensor(operators.all_gather_into_tensor(tensor.contiguous(), size, group))
    return torch.cat(parts.chunk(size), dim) if dim else parts


def is_collective(target: object) -> bool:
    """Whether an operator talks to other devices."""
    return getattr(target, "namespace", "") in ("_c10d_functional", "c10d_functional", "c10d")


@contextmanager
def autograd_functions_announced(on_call: Callable[[type], None]) -> Iterator[None]:
    """Call back with the class of each `autograd.Function` that is applied, by methods bound before as well."""
    from torch._functorch import utils

    original = utils.unwrap_dead_wrappers

    def announced(args: tuple[Any, ...]) -> tuple[Any, ...]:
        caller = sys._getframe(1)
        if caller.f_code is torch.autograd.Function.apply.__code__:
            on_call(caller.f_locals["cls"])
        return original(args)

    utils.unwrap_dead_wrappers = announced
    try:
        yield
    finally:
        utils.unwrap_dead_wrappers = original


def is_custom_operator(target: object) -> bool:
    """Whether a target is an operator that is not PyTorch's own, as `torch.library` registers."""
    return isinstance(target, torch._ops.OpOverload) and target.namespace not in ("aten", "prims")


def compile_joint(
    graph: fx.GraphModule,
    inputs: Sequence[Any],
    *,
    partition: Callable[..., tuple[fx.GraphModule, fx.GraphModule]],
    forward: Callable[..., Callable[..., Any]],
    backward: Callable[..., Callable[..., Any]],
    inference: Callable[..., Callable[..., Any]],
    decompositions: Mapping[Any, Callable[..., Any]],
) -> Callable[..., Any]:
    """Compile a graph of Dynamo's by AOTAutograd, with a partitioner and compilers of one's own.

    `partition` takes the joint graph, its inputs, `num_fwd_outputs` and `static_lifetime_input_indices`. The compilers
    take a graph of ATen calls with its fake inputs, and return what takes one list of tensors. The backward pass is
    traced without autocast, which is how `loss.backward()` runs outside an autocast block.
    """
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch import config

    compiler = aot_autograd(
        fw_compiler=forward,
        bw_compiler=backward,
        inference_compiler=inference,
        partition_fn=partition,
        decompositions=dict(decompositions),
    )
    with config.patch(backward_pass_autocast="off"):
        return compiler(graph, inputs)


def mutated_inputs(joint: fx.GraphModule) -> list[int]:
    """Return the places of the inputs of AOTAutograd's joint graph that get one of its outputs as their new value.

    A tensor subclass is several inputs, all of which count. Raises LookupError, with its name, where one is not found.
    """
    from torch._functorch._aot_autograd import descriptors

    written = [_whole(desc) for desc in pytree.tree_leaves(joint.graph.output_node().meta["desc"])]
    names = {desc.mutated_input for desc in written if isinstance(desc, descriptors.InputMutationAOTOutput)}
    inputs = [_whole(node.meta["desc"]) for node in joint.graph.find_nodes(op="placeholder")]
    if missing := names.difference(inputs):
        raise LookupError(", ".join(sorted(name.expr() for name in missing)))
    return [place for place, desc in enumerate(inputs) if desc in names]


def _whole(desc: Any) -> Any:
    """Return what AOTAutograd calls the tensor of whose subclass an input or output is a part."""
    while type(desc).__name__.startswith("Subclass"):
        desc = desc.base
    return desc


def place_in_dynamos_graph(placeholder: fx.Node) -> int | None:
    """Return which input of Dynamo's graph a placeholder of a joint graph is; None if it is no whole one."""
    return getattr(placeholder.meta.get("desc"), "idx", None)


def runs_in_backward(node: fx.Node) -> bool:
    """Whether AOTAutograd traced a node of a joint graph in the backward pass, whatever it depends on."""
    return node.meta.get("partitioner_tag") in ("is_backward", "must_be_in_backward")


def retraced(module: fx.GraphModule) -> fx.GraphModule:
    """Return a graph of ATen calls and Python helpers as one of ATen calls alone, its placeholders' names kept."""
    placeholders = module.graph.find_nodes(op="placeholder")
    inputs = [node.meta["val"] for node in placeholders]
    with without_autocast(), torch.no_grad():
        traced = trace_for_inductor(module, inputs)
    for own, node in zip(traced.graph.find_nodes(op="placeholder"), placeholders, strict=True):
        own.target = node.name
        own._rename(node.name)
    traced.recompile()
    return traced


def dynamo_source(placeholder: fx.Node) -> str:
    """Return the expression by which Dynamo finds what a placeholder of its graph passes in; empty without one."""
    source = getattr(placeholder, "_dynamo_source", None)
    if source is None:
        return ""
    # A method up to PyTorch 2.11.
    return source.name() if callable(source.name) else source.name


def trace_artifact(name: str, encoding: str, payload: Callable[[], str]) -> None:
    """Add a file to the structured trace that `tlparse` shows; nothing is made where no trace is written.

    `encoding` is `json` or `string`.
    """
    from torch._logging import trace_structured

    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": encoding}, payload_fn=payload)


def boxed(function: Callable[[list[torch.Tensor]], Any]) -> Callable[[list[torch.Tensor]], Any]:
    """Mark a function as one that takes its inputs in a list and empties it."""
    function._boxed_call = True  # type: ignore[attr-defined]
    return function


def is_managed_by_fsdp1(module: nn.Module) -> bool:
    """Whether `FullyShardedDataParallel` has put tensors of its own in place of a module's parameters.

    FSDP2 marks its modules in the same way, and leaves parameters what they are.
    """
    if not getattr(module, "_is_fsdp_managed_module", False):
        return False
    tensors = (*module._parameters.values(), *vars(module).values())
    return any(
        isinstance(tensor, torch.Tensor) and tensor.requires_grad and not isinstance(tensor, nn.Parameter)
        for tensor in tensors
    )
