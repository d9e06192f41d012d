"""Graph modules that share everything but their graph."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx, nn

_MEMBERS = ("_modules", "_parameters", "_buffers")


def with_graph(original: fx.GraphModule, graph: fx.Graph, modules: Mapping[str, nn.Module]) -> fx.GraphModule:
    """Return a graph module that runs `graph` on the very modules, parameters and buffers of `original`.

    Mode, metadata and forward pre-hooks come along; the `state_dict` keys and their order stay.

    Args:
        original: The graph module to share with.
        graph: The new graph.
        modules: Further modules that it calls, by name; they own no parameters or buffers.
    """
    root = nn.Module()
    _share(original, root)
    root._modules.update(modules)
    result = fx.GraphModule(root, graph, class_name=type(original).__name__)
    # fx copies what the graph calls, under bare modules on the way; take the original tree instead.
    _share(root, result)
    result._non_persistent_buffers_set = set(original._non_persistent_buffers_set)
    result._forward_pre_hooks.update(original._forward_pre_hooks)
    result._forward_pre_hooks_with_kwargs.update(original._forward_pre_hooks_with_kwargs)
    result.training = original.training
    result.meta.update(original.meta)
    return result


def _share(source: nn.Module, target: nn.Module) -> None:
    for kind in _MEMBERS:
        getattr(target, kind).clear()
        getattr(target, kind).update(getattr(source, kind))
