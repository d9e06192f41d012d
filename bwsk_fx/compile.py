"""The `torch.compile` backend: AOTAutograd traces the joint graph, the planner partitions it, Inductor runs the halves.

    torch.compile(model, backend="bwsk_fx", options={"budget": 0.1})

`options` are those of `fuse_regions`; `compiler` is `inductor` unless it says `eager`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from bwsk_fx import _torch_private as private
from bwsk_fx.compile_report import CompileReport, add_report, last_report, reports
from bwsk_fx.dynamo_graphs import name_modules
from bwsk_fx.errors import PlanError
from bwsk_fx.planner import choose
from bwsk_fx.planning.calibration import cost_model
from bwsk_fx.planning.compiled import compile_graph, unboxed
from bwsk_fx.planning.joint import is_tangent, read_joint, wrap_outputs
from bwsk_fx.planning.layouts import run
from bwsk_fx.planning.options import PlanOptions, plan_options
from bwsk_fx.planning.program import Program
from bwsk_fx.planning.prospect import Prospect
from bwsk_fx.planning.sizes import inline_sizes, is_symbolic, sizes_in_arguments
from bwsk_fx.planning.trace import Traced, decompositions_on
from bwsk_fx.planning.writes import Writes, take_writes

__all__ = ["CompileReport", "Partitioner", "backend", "last_report", "reports"]

aten = torch.ops.aten
# The others are about CUDA graphs, which would write the next step's results over what this one returned.
_MODES = (None, "default", "max-autotune-no-cudagraphs")


def backend(
    graph: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile one graph of Dynamo's; registered as `bwsk_fx`.

    Args:
        graph: The graph.
        example_inputs: Fake tensors.
        mode: Of Inductor's: `"default"`, or `"max-autotune-no-cudagraphs"`.
        options: As for `fuse_regions`; `compiler` is `inductor` by default.

    Raises:
        PlanError: An option or the mode is unknown, a size depends on data, or no plan fits.
    """
    if mode not in _MODES:
        known = ", ".join(map(repr, _MODES[1:]))
        raise PlanError(f'mode is {mode!r}: backend="bwsk_fx" has the modes {known}; its options are {_known()}')
    return _Compilation(graph, plan_options(**{"compiler": "inductor", **(options or {})}), mode).run(example_inputs)


def _known() -> str:
    return ", ".join(sorted((*PlanOptions.__dataclass_fields__, "tier")))


class _Compilation:
    """One graph on its way through AOTAutograd, whose compilers are called after its partitioner."""

    def __init__(self, graph: fx.GraphModule, options: PlanOptions, mode: str | None) -> None:
        self._graph, self._options, self._mode = graph, options, mode or "default"
        self._program: Program | None = None

    def run(self, inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compile the graph for the sizes that Dynamo gives, numbers or symbols."""
        tensors = [value for value in inputs if isinstance(value, Tensor)]
        return private.compile_joint(
            self._graph,
            inputs,
            partition=self._partition,
            forward=self._forward,
            backward=self._backward,
            inference=self._inference,
            decompositions=decompositions_on(tensors),
        )

    def _partition(
        self,
        joint: fx.GraphModule,
        _: Sequence[Any],
        *,
        num_fwd_outputs: int,
        static_lifetime_input_indices: Sequence[int] | None = None,
        **__: Any,
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        static = static_lifetime_input_indices or ()
        program, writes = _planned(joint, num_fwd_outputs, static, self._options, self._statistics(joint))
        self._program = program
        add_report(CompileReport(self._graph, self._options, program.plan, program.forward, program.backward))
        return _flat_forward(program, writes), _flat_backward(program)

    def _statistics(self, joint: fx.GraphModule) -> list[int]:
        """Return the places of floating-point buffers: a batch norm in another graph may change them, unseen.

        PyTorch's batch norm does not count up the version of its running statistics, by which autograd would tell.
        """
        sources = [private.dynamo_source(node) for node in self._graph.graph.find_nodes(op="placeholder")]
        found = []
        for place, node in enumerate(joint.graph.find_nodes(op="placeholder")):
            index = None if is_tangent(node) else private.place_in_dynamos_graph(node)
            value = node.meta["val"]
            if index is not None and isinstance(value, Tensor) and value.is_floating_point():
                found += [place] * ("_buffers[" in sources[index])
        return found

    def _forward(self, module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        return self._compiled(module, "forward pass")

    def _backward(self, module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        program = self._program
        assert program is not None  # AOTAutograd partitions first.
        if self._options.compiler == "eager":
            # The planned module frees what it has read; one with a placeholder per tensor could not.
            return private.boxed(lambda given: program.run_backward(_sizes_last(program, given)))
        return self._compiled(module, "backward pass")

    def _inference(self, module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        add_report(CompileReport(self._graph, self._options, None, None, None))
        return self._compiled(module, "graph")

    def _compiled(self, module: fx.GraphModule, what: str) -> Callable[..., Any]:
        if self._options.compiler == "inductor":
            with private.inductor_mode(self._mode):
                compiled = compile_graph(module.graph, what)
            return private.boxed(lambda inputs: compiled(inputs))

        def eager(inputs: list[Tensor]) -> Any:
            given = list(inputs)
            inputs.clear()
            return run(module, *given)

        return private.boxed(eager)


_InductorPartitioner: Any = private.inductor_partitioner()


class Partitioner(_InductorPartitioner):
    """The planner as Inductor's own partitioner, for `backend="inductor"`: its `config.custom_partitioner_fn`.

    Inductor has taken operators such as layer norm apart by then, so that fewer values can be inverted than by
    `backend="bwsk_fx"`. Its caches stay on: the partitioner has a name made of its options and of bwsk-fx's files.

    Args:
        budget: As for `fuse_regions`.
        **options: Likewise.

    Raises:
        PlanError: An option is unknown or out of range.
    """

    def __init__(self, budget: float | None = None, **options: Any) -> None:
        self.options = plan_options(budget, **{"compiler": "inductor", **options})

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        """Partition a joint graph; called by Inductor."""
        static = kwargs.get("static_lifetime_input_indices") or ()
        outputs = kwargs["num_fwd_outputs"]
        program, writes = _planned(gm, outputs, static, self.options, _frozen_vectors(gm, outputs, static))
        add_report(CompileReport(gm, self.options, program.plan, program.forward, program.backward))
        return private.retraced(_flat_forward(program, writes)), private.retraced(_flat_backward(program))

    def uuid(self) -> str:
        """Return what tells this partitioner from any other."""
        files = sorted(Path(__file__).parent.rglob("*.py"))
        contents = b"".join(file.read_bytes() for file in files)
        plan = Path(self.options.plan).read_bytes() if self.options.plan else b""
        return hashlib.sha256(contents + plan + str(self.options).encode()).hexdigest()


def _frozen_vectors(joint: fx.GraphModule, outputs: int, static: Sequence[int]) -> list[int]:
    """Return the places of vectors without a gradient: running statistics, which a batch norm elsewhere may change.

    What Dynamo calls an input, and so what is a buffer, is not known to a partitioner of Inductor's.
    """
    returned: Any = joint.graph.output_node().args[0]
    gradients = returned[outputs:]
    values = [_placeholder_values(joint)[place] for place in static]
    vectors = (
        place
        for place, value in zip(static, values, strict=True)
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() == 1
    )
    return [place for place in vectors if place < len(gradients) and gradients[place] is None]


def _planned(
    joint: fx.GraphModule, outputs: int, static: Sequence[int], options: PlanOptions, unsure: Sequence[int] = ()
) -> tuple[Program, Writes]:
    """Plan a joint graph of AOTAutograd's, given how many outputs and which parameters and buffers it has.

    Inputs that are `unsure` may be others by the time of the backward pass, although the graph does not change them.
    """
    with sizes_in_arguments():
        writes = take_writes(joint, outputs)
        prospect = _prospect(joint, outputs + len(writes.copied), static, sorted({*writes.rewritten, *unsure}), options)
        return _chosen(prospect, options), writes


def _prospect(
    joint: fx.GraphModule, outputs: int, static: Sequence[int], rewritten: Sequence[int], options: PlanOptions
) -> Prospect:
    inline_sizes(joint.graph)
    _require_no_constants(joint)
    name_modules(joint.graph)
    wrap_outputs(joint.graph, outputs)
    sizes = [place for place, value in enumerate(_placeholder_values(joint)) if is_symbolic(value)]
    read = read_joint(joint, outputs, [*static, *sizes], rewritten)
    device = next(node.meta["val"].device for node in read.primals if isinstance(node.meta["val"], Tensor))
    traced = Traced(read, (True,) * len(read.tangents))
    return Prospect("of the compiled graph", options, traced, cost_model(device, options.costs))


def _chosen(prospect: Prospect, options: PlanOptions) -> Program:
    """Return the program that is right for the options; the graph is a region by itself."""
    if options.plan is not None:
        return prospect.from_file(options.plan, prospect.region)
    if not options.bounds_memory:
        return prospect.within_budget()
    (index,) = choose([prospect.candidates], options, 0)
    return prospect.candidates[index]


def _placeholder_values(module: fx.GraphModule) -> list[Any]:
    return [node.meta["val"] for node in module.graph.find_nodes(op="placeholder")]


def _flat_forward(program: Program, writes: Writes) -> fx.GraphModule:
    """Return the forward half as AOTAutograd wants it: outputs, what the backward pass reads, and sizes at the end."""
    graph = fx.Graph()
    at: dict[fx.Node, fx.Node] = {}
    copied: Any = graph.graph_copy(program.forward.graph, at)
    outputs, kept = copied
    primals = graph.find_nodes(op="placeholder")
    returned = writes.append(graph, primals, outputs)
    graph.output((*returned, *kept, *(primals[index] for index in program.static)))
    return fx.GraphModule(nn.Module(), graph, class_name="CompiledForward")


def _flat_backward(program: Program) -> fx.GraphModule:
    """Return the backward half with a placeholder for each value that it reads, sizes first."""
    flat = unboxed(program.backward.graph, program.forward.graph)
    placeholders = flat.find_nodes(op="placeholder")
    first = next(node for node in flat.nodes if node.op != "placeholder")
    for node in sorted(placeholders, key=lambda node: not is_symbolic(node.meta["val"])):
        first.prepend(node)
    return fx.GraphModule(nn.Module(), flat, class_name="CompiledBackward")


def _sizes_last(program: Program, given: list[Any]) -> list[Any]:
    """Put sizes, which AOTAutograd has in front, behind the tensors that are saved."""
    primals = _placeholder_values(program.forward)
    sizes = sum(is_symbolic(primals[index]) for index in program.static)
    if not sizes:
        return given
    first_tangent = len(given) - len(program.tangents)
    ordered = [*given[sizes:first_tangent], *given[:sizes], *given[first_tangent:]]
    given.clear()
    return ordered


def _require_no_constants(joint: fx.GraphModule) -> None:
    for node in joint.graph.find_nodes(op="get_attr"):
        held = getattr(joint, str(node.target))
        if held.numel() > 1:
            raise PlanError(
                f"the graph holds a constant tensor of sizes {tuple(held.shape)} ({node.target}): register it as a "
                "buffer of the model, so that it is an input"
            )
