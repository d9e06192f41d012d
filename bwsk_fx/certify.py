"""Certification: run the inverse of every S node on real activations, and on operands that inverses tend to fail on."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from bwsk_fx.arguments import require_examples, require_graph
from bwsk_fx.capture import ExampleInputs, flat_arguments
from bwsk_fx.errors import BwskError, CaptureError, RuleError, first_line, place_of
from bwsk_fx.passes.type_nodes import type_nodes
from bwsk_fx.report.certificate import Certificates, NodeCertificate
from bwsk_fx.rules import sound
from bwsk_fx.rules.claims import Claim, Trial, claim_of
from bwsk_fx.rules.decomposition import untouched
from bwsk_fx.rules.registry import target_name
from bwsk_fx.rules.samples import ADVERSARIAL
from bwsk_fx.rules.user import OVERRIDE_RULE
from bwsk_fx.verdict import OVERRIDE, REFINED, UNKNOWN, Erasure, Label, Verdict

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def certify(
    graph: fx.GraphModule,
    example_inputs: ExampleInputs,
    *,
    dtypes: Sequence[torch.dtype] = DTYPES,
    adversarial: bool = True,
) -> Certificates:
    """Run the inverse of every S node of a graph, and correct the verdicts that do not hold.

    Each node is called with the activations that the example inputs lead to, and with large, tiny and repeated values
    and values near GELU's minimum in their place; norms also with scales near zero. Each call is repeated in every
    dtype. The graph's own dtype and float64 decide: an S node whose elements all come back is certified and has
    confidence 1.0; a node whose real activations its output does not determine becomes K; a node whose inverse
    rebuilds other values than there were becomes GRAY. `node.meta["bwsk"]` is updated, and its rationale says why.

    Args:
        graph: A captured graph; it is typed with the `sound` ruleset if it is not typed yet.
        example_inputs: What the graph is called with, as for `capture`. Weights and buffers are used as they are.
        dtypes: Dtypes to repeat the calls in, besides the graph's own.
        adversarial: Whether to try other values than the real activations.

    Returns:
        A certificate per S node: worst relative round-trip errors by dtype, condition numbers of linear maps, and
        what was demoted. It prints, and has `to_json`.

    Raises:
        RuleError: The graph is typed with a ruleset that names no inverses.
        CaptureError: The graph was captured for other inputs or another mode.
    """
    require_graph(graph)
    for dtype in dtypes:
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise RuleError(f"dtypes holds {dtype!r}: expected floating-point dtypes, such as torch.float32")
    if any("bwsk" not in node.meta for node in graph.graph.nodes):
        type_nodes(graph)
    if any(node.meta["bwsk"].ruleset != "sound" for node in graph.graph.nodes):
        raise RuleError('only the "sound" ruleset names inverses; type the graph with it and certify it again')
    inputs = bound_inputs(graph, example_inputs)
    certifier = _Certifier(graph, tuple(dtypes), tuple(ADVERSARIAL) if adversarial else (), _batch(inputs))
    run_without_trace(certifier, graph, inputs)
    for node, certificate in certifier.found.items():
        node.meta["bwsk"] = certificate.verdict
    return Certificates(tuple(certifier.found.values()))


class _Certifier(fx.Interpreter):
    """Runs a graph and certifies each S node on the way, with the values that reach it."""

    def __init__(
        self, graph: fx.GraphModule, dtypes: tuple[torch.dtype, ...], kinds: tuple[str, ...], batch: int
    ) -> None:
        super().__init__(graph)
        self._graph_module = graph
        self.found: dict[fx.Node, NodeCertificate] = {}
        self._dynamic = sound.dynamic_nodes(graph)
        self._dtypes = dtypes
        self._kinds = kinds
        self._batch = batch

    def run_node(self, n: fx.Node) -> Any:
        """Certify a node, then run it."""
        verdict: Verdict = n.meta["bwsk"]
        if (
            verdict.label is Label.S
            and verdict.counted
            and any(source in self._dynamic for source in n.all_input_nodes)
        ):
            with self._set_current_node(n):
                args, kwargs = self.fetch_args_kwargs_from_env(n)
            target: Any = self.fetch_attr(n.target) if n.op == "call_module" else n.target  # type: ignore[arg-type]
            claim = claim_of(n, target, args, kwargs, self._dynamic, verdict)
            claim = replace(claim, fixed=verdict.rule == OVERRIDE_RULE)
            self.found[n] = self._certificate(n, claim)
        return super().run_node(n)

    def _certificate(self, node: fx.Node, claim: Claim) -> NodeCertificate:
        own = claim.dtype
        others = [] if own is None else [dtype for dtype in self._dtypes if dtype is not own]
        trials = (claim.try_own(self._kinds), *(claim.try_in(dtype, self._kinds) for dtype in others))
        name = target_name(sound.call_at(self._graph_module, node, self._dynamic))
        return NodeCertificate(node.name, name, trials, _decided(claim.verdict, trials, self._batch))


def _decided(verdict: Verdict, trials: Sequence[Trial], batch: int) -> Verdict:
    """Return the verdict that the trials leave: certified, K or GRAY."""
    own = trials[0]
    for trial in (own, *(trial for trial in trials if trial.dtype == "float64")):
        if not trial.holds:
            return _demoted(verdict, Label.GRAY, None, UNKNOWN, f"its inverse fails in {trial.dtype}: {trial.failure}")
    if own.real is not None and own.real.lost:
        lost = own.real.lost / batch
        why = f"{lost:,.4g} elements per sample are not determined by the output in {own.dtype}"
        return _demoted(verdict, Label.K, Erasure(elements=lost), REFINED, why + _condition(own))
    worst = max((trip.error for trip in own.trips), default=0.0)
    rationale = f"{verdict.rationale}; certified with a worst relative error of {worst:.1e} in {own.dtype}"
    return replace(verdict, confidence=OVERRIDE, rationale=rationale)


def _demoted(verdict: Verdict, label: Label, erasure: Erasure | None, confidence: float, why: str) -> Verdict:
    return replace(
        verdict,
        label=label,
        witness=None,
        undo=None,
        domain=None,
        erasure=erasure,
        confidence=confidence,
        rationale=f"{verdict.rule}: demoted by certify, since {why}",
    )


def _condition(trial: Trial) -> str:
    number = trial.real.condition if trial.real is not None else None
    return "" if number is None else f"; the condition number of its map is {number:.1e}"


def run_without_trace(interpreter: fx.Interpreter, graph: fx.GraphModule, inputs: Mapping[str, Any]) -> None:
    """Run the interpreter of a graph, its guards first; buffers and random numbers are afterwards as they were."""
    with torch.no_grad(), torch.random.fork_rng(devices=()), untouched(graph):
        for hook in graph._forward_pre_hooks.values():
            hook(graph, (), inputs)
        names = [node.target for node in graph.graph.find_nodes(op="placeholder")]
        try:
            interpreter.run(*(inputs[name] for name in names), enable_io_processing=False)
        except BwskError:
            raise
        except Exception as error:
            cause = f"{place_of(error)}{type(error).__name__}: {first_line(error)}"
            raise CaptureError(f"the graph does not run on the example inputs: {cause}") from error


def bound_inputs(graph: fx.GraphModule, example_inputs: ExampleInputs) -> dict[str, Any]:
    """Return the graph's inputs by name; constants of the graph, which are no inputs, may be among the examples."""
    require_examples(example_inputs)
    names = {str(node.target) for node in graph.graph.find_nodes(op="placeholder")}
    if isinstance(example_inputs, Mapping):
        args, kwargs = (), {name: value for name, value in example_inputs.items() if name in names}
    else:
        args, kwargs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs), {}
    try:
        return flat_arguments(inspect.signature(graph.forward), args, kwargs)
    except TypeError as error:
        raise CaptureError(f"the example inputs do not fit the graph's inputs ({', '.join(names)}): {error}") from error


def _batch(inputs: Mapping[str, Any]) -> int:
    sizes = [value.shape[0] for value in inputs.values() if isinstance(value, Tensor) and value.dim()]
    return max(sizes, default=1)
