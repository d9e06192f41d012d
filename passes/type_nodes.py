"""Typing: every node gets a verdict."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import fx

from bwsk_fx._side_effects import kept_parametrizations
from bwsk_fx.arguments import require_graph
from bwsk_fx.errors import RuleError
from bwsk_fx.passes.pipeline import Pass, PassResult, verify
from bwsk_fx.rules import published, sound
from bwsk_fx.rules.registry import Call
from bwsk_fx.rules.user import Overrides, load_entry_points, overridden
from bwsk_fx.verdict import Verdict

RULESETS: Mapping[str, Callable[[Call], Verdict]] = {"sound": sound.verdict, "published": published.verdict}


@dataclass(frozen=True)
class TypeNodes(Pass):
    """Sets `node.meta["bwsk"]`, a `Verdict`, on every node; typing again replaces all verdicts.

    Attributes:
        ruleset: `"sound"`, labels as claims about executable inverses, or `"published"`, the table of the study.
        overrides: Verdicts of the user's own; see `type_nodes`.
    """

    name: ClassVar[str] = "type-nodes"
    ruleset: str = "sound"
    overrides: Overrides = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.ruleset, str) or self.ruleset not in RULESETS:
            raise RuleError(f"there is no ruleset '{self.ruleset}'; the rulesets are {', '.join(RULESETS)}")
        if not isinstance(self.overrides, Mapping):
            raise RuleError(
                f"the overrides are a {type(self.overrides).__name__}: expected a mapping from what is meant to what "
                "holds there"
            )

    def run(self, graph_module: fx.GraphModule) -> PassResult:
        """Type all nodes; the nodes themselves stay as they are."""
        load_entry_points()
        dynamic: set[fx.Node] = set()
        with kept_parametrizations(graph_module):
            self._type(graph_module, dynamic)
        for node, verdict in overridden(graph_module, self.overrides, dynamic).items():
            node.meta["bwsk"] = replace(verdict, ruleset=self.ruleset)
        return PassResult(graph_module, False)

    def _type(self, graph_module: fx.GraphModule, dynamic: set[fx.Node]) -> None:
        memory: dict[Hashable, Any] = {}
        for node in graph_module.graph.nodes:
            call = sound.call_at(graph_module, node, dynamic, memory)
            try:
                if sound.is_dynamic(call):
                    dynamic.add(node)
                node.meta["bwsk"] = RULESETS[self.ruleset](call)
            except Exception as error:
                raise RuleError(_explain(call, error)) from error


def type_nodes(graph: fx.GraphModule, ruleset: str = "sound", overrides: Overrides | None = None) -> fx.GraphModule:
    """Give every node of a captured graph a verdict, as `node.meta["bwsk"]`.

    Args:
        graph: A graph from `bwsk_fx.capture`; it is changed in place, and can be typed again.
        ruleset: `"sound"` or `"published"`.
        overrides: Verdicts of your own, at confidence 1.0: what is meant (a module class, a function, the path of a
            leaf module, the name of a node, or a `bwsk_fx.rules.Matching`) to `"K"`, `"GRAY"`, an `Undo`, a rule or a
            `Verdict`. S needs an inverse, which is tried on random operands of the node's shapes.

    Returns:
        The same graph.

    Raises:
        RuleError: The ruleset is unknown, a rule failed, or an override matches nothing or does not hold.
    """
    require_graph(graph)
    step = TypeNodes(ruleset, overrides or {})
    verify(graph, f"before pass '{step.name}'")
    return step.run(graph).graph_module


def _explain(call: Call, error: Exception) -> str:
    node: Any = call.node
    place = f" at {node.stack_trace.splitlines()[0]}" if node.stack_trace else ""
    return (
        f"the typing rule of node '{node.name}' ({node.format_node()}){place} failed: {type(error).__name__}: {error}"
    )
