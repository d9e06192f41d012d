"""The recorder behind `bwsk_fx.capture`: turns the torch calls of one run into fx nodes."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from threading import get_ident
from typing import Any

import sympy
import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from bwsk_fx import _torch_private as private
from bwsk_fx._calls import call_of, only_moves, require_recordable, set_grad_mode
from bwsk_fx._intercept import intercepted
from bwsk_fx._opaque import run_leaf
from bwsk_fx._side_effects import CHANGES, NOT_REPEATED, STAYS_OUTSIDE, changes_itself
from bwsk_fx._sizes import Sizes
from bwsk_fx._source_lines import current_source, is_users
from bwsk_fx._state_watch import WRITES, PythonDraws, StateWatch
from bwsk_fx.errors import CaptureError

_SQUEEZES = frozenset({"squeeze", "squeeze_"})
_TENSOR_HOOKS = frozenset({"register_hook", "register_post_accumulate_grad_hook", "retain_grad"})


def default_is_leaf(module: nn.Module) -> bool:
    """Whether `module` is recorded whole: one of `torch.nn`'s own operators, or a module without children."""
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    own = type(module).__module__.startswith(("torch.nn", "torch.ao.nn")) and not isinstance(module, containers)
    return own or not any(True for _ in module.children())


class Recorder(TorchFunctionMode):
    """Records torch calls on known tensors as nodes of `graph`, and leaf modules as `call_module` nodes."""

    def __init__(
        self,
        model: nn.Module,
        tensors: Mapping[str, torch.Tensor],
        originals: Mapping[str, torch.Tensor],
        is_leaf: Callable[[nn.Module], bool],
    ) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.constants: dict[str, torch.Tensor] = {}
        self.sizes = Sizes(self.graph)
        self.uses_dtype = False  # of an activation, as the constant argument of a call: autocast decides it
        self._dtypes_read: set[torch.dtype] = set()
        self._paths = {module: path for path, module in model.named_modules()}
        self._root = model
        self._is_leaf = is_leaf
        self._own = {id(tensor): name for name, tensor in tensors.items()}
        self._originals = originals
        self._nodes: dict[int, fx.Node] = {}
        self._alive: list[Any] = list(tensors.values())
        self._stack: dict[str, tuple[str, type]] = {}
        self._opaque = False
        self._taking: set[nn.Module] = set()  # leaves that are called with modules
        self._state = StateWatch(tensors)
        self._draws = PythonDraws()
        self.saved_tensor_hooks: list[str | None] = []  # where the model's code puts some on
        self.attributes_read: dict[tuple[str, str], None] = {}  # paths of modules and names
        self._untraceable = False
        self._hooks_tensors = False
        self._effect: str | None = None  # an operator that the call in progress has run for what it does
        self._grad_at_start = torch.is_grad_enabled()
        self._grad_switch: fx.Node | None = None

    # -- what the capture calls ---------------------------------------------------------------------------------

    def add_placeholder(self, name: str, fake: torch.Tensor) -> torch.Tensor:
        """Record an input; its symbolic sizes become known."""
        node = self.graph.placeholder(name)
        node.meta["val"] = fake.detach()
        self._remember(fake, node)
        self.sizes.add_placeholder(name, fake)
        return fake

    def finish(self, output: Any) -> None:
        """Record the model's result, rebuilding output classes such as Hugging Face's `ModelOutput`."""
        self._require_no_draws()
        self._follow_grad_mode(self._grad_at_start)
        result = self.graph.output(self._output(output))
        result.meta["val"] = None
        self.sizes.finish()

    def open_modules(self, path: str = "") -> Iterator[tuple[str, nn.Module]]:
        """Yield the modules whose own Python code is recorded, with their paths: all above the leaves."""
        module = self._root.get_submodule(path)
        yield path, module
        for name, child in module.named_children():
            if not self._is_leaf(child) or child in self._taking:
                yield from self.open_modules(f"{path}.{name}".lstrip("."))

    def constants_root(self) -> nn.Module:
        """Return a module that holds the tensors which the model uses but does not own."""
        root = nn.Module()
        for name, tensor in self.constants.items():
            root.register_buffer(name, tensor, persistent=False)
        for node in self.graph.nodes:
            if node.op in ("call_module", "get_attr") and node.target not in self.constants:
                _graft(root, self._root, node.target)
        return root

    def __enter__(self) -> Recorder:
        self._thread = get_ident()
        self._intercepted = ExitStack()
        self._intercepted.enter_context(
            intercepted(
                *(self._on_module, self._on_branch, self._on_read),
                *(self._anything_goes, self._on_hooks, self._on_untraceable),
            )
        )
        self._intercepted.enter_context(private.effects_announced(self._on_effect))
        super().__enter__()
        return self

    def __exit__(self, *exc_info: Any) -> None:
        super().__exit__(*exc_info)
        self._intercepted.__exit__(*exc_info)

    # -- what the run calls -------------------------------------------------------------------------------------

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run `func` on the fakes and record it when it yields or writes a tensor."""
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _TENSOR_HOOKS:
            self._require_no_hook(func.__name__)
        if getattr(func, "__name__", "") in _SQUEEZES:
            self.sizes.note_squeeze(*args, **kwargs)
        if self._opaque:
            self._untraceable |= func is torch.autograd.grad
            with self._state.during(func, args, kwargs):
                return func(*args, **kwargs)
        if getattr(func, "__self__", None) is torch.Tensor.dtype and is_users(sys._getframe(1)):
            self._note_dtype(args[0])
        self._require_no_draws()
        require_recordable(func)
        with self._as_a_whole():
            with self._state.during(func, args, kwargs):
                result = func(*args, **kwargs)
            writes = getattr(func, "__name__", "") == "__setitem__"
            yields = any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(result))
            if (writes or yields) and not only_moves(func, args, kwargs, result):
                self.uses_dtype |= any(
                    isinstance(leaf, torch.dtype) and leaf in self._dtypes_read
                    for leaf in pytree.tree_leaves((args, kwargs))
                )
                op, target, args = call_of(func, args)
                self._add(op, target, args, kwargs, result)
        return result

    def _require_no_hook(self, name: str) -> None:
        """Refuse hooks on tensors, which a graph of torch calls loses; a leaf goes on registering its own."""
        self._hooks_tensors = True
        if not self._opaque:
            raise CaptureError(
                f"{name} is called on a tensor outside a leaf module, and a graph of torch calls would lose the hook; "
                "let is_leaf name the module that calls it, or hook the model's result"
            )

    def _note_dtype(self, tensor: torch.Tensor) -> None:
        node = self._nodes.get(id(tensor))
        computed = node is not None and node.op not in ("placeholder", "get_attr")
        if computed and tensor.is_floating_point():
            self._dtypes_read.add(tensor.dtype)

    def _on_branch(self, expr: sympy.Basic, result: bool | int) -> None:
        if not self._opaque:
            self.sizes.note_branch(expr, result)

    def _on_module(self, original: Callable, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        path = self._paths.get(module)
        # A module made on the fly has no path: what it does is recorded call by call.
        if path is None or self._opaque:
            return original(module, *args, **kwargs)
        with self._entered(path, module):
            if module is self._root or not self._is_leaf(module) or self._opened(module, args, kwargs):
                return original(module, *args, **kwargs)
            return self._leaf(original, module, path, args, kwargs)

    def _opened(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> bool:
        """Whether a leaf is called with other modules, as DoRA's are: a node takes none, so its code is recorded."""
        takes = any(isinstance(leaf, nn.Module) for leaf in pytree.tree_leaves((args, kwargs)))
        if takes:
            self._taking.add(module)
        return takes

    def _leaf(self, original: Callable, module: nn.Module, path: str, args: tuple, kwargs: dict[str, Any]) -> Any:
        self._require_no_draws()
        self._hooks_tensors = False
        with self._as_a_whole():
            (result, opaque), changed = changes_itself(
                module, lambda: run_leaf(original, module, path, self._originals, args, kwargs, self.sizes.symbolic)
            )
            if opaque:
                self._state.note_buffers(path, module)
            node = self._add("call_module", path, args, kwargs, result, opaque)
        if self._hooks_tensors:
            node.meta[STAYS_OUTSIDE] = "registers hooks on tensors"
        elif changed is not None:
            node.meta.setdefault(STAYS_OUTSIDE, f"{CHANGES} {changed}")
        return result

    def _on_read(self, module: nn.Module, name: str) -> None:
        if not self._opaque and (path := self._paths.get(module)) is not None:
            self.attributes_read[path, name] = None

    def _anything_goes(self) -> bool:
        """Whether what runs now is not recorded: the inside of a node, or another thread."""
        return self._opaque or get_ident() != self._thread

    def _on_hooks(self) -> None:
        self.saved_tensor_hooks.append(current_source())

    def _on_untraceable(self) -> None:
        self._untraceable = True

    def _on_effect(self, operator: str) -> None:
        self._effect = operator

    def _require_no_draws(self) -> None:
        if self._draws.happened():
            raise CaptureError(
                "random numbers were drawn from Python's random or numpy.random before this call, and a graph would "
                "have them fixed; draw them with torch and choose with torch.where, or let is_leaf name the module"
            )

    @contextmanager
    def _as_a_whole(self) -> Iterator[None]:
        """While this lasts, what runs is the inside of one node."""
        self._opaque = True
        try:
            yield
        finally:
            self._opaque = False

    @contextmanager
    def _entered(self, path: str, module: nn.Module) -> Iterator[None]:
        before = self._stack
        self._stack = {**before, path: (path, type(module))}
        try:
            yield
        finally:
            self._stack = before

    # -- nodes --------------------------------------------------------------------------------------------------

    def _add(
        self, op: str, target: Any, args: tuple, kwargs: dict[str, Any], result: Any, opaque: bool = False
    ) -> fx.Node:
        self._follow_grad_mode(torch.is_grad_enabled())
        node = self._create(op, target, self._arguments(args), self._arguments(kwargs))
        node.meta["val"] = pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, result)
        if written := self._state.take():
            node.meta[WRITES] = written
        if opaque or self._untraceable or self._draws.happened():
            node.meta[STAYS_OUTSIDE] = NOT_REPEATED
        if self._effect is not None:
            node.meta[STAYS_OUTSIDE] = f"runs {self._effect}, which has an effect and no result"
        self._untraceable, self._effect = False, None
        self._bind_result(node, result)
        return node

    def _create(self, op: str, target: Any, args: tuple, kwargs: dict[str, Any] | None = None) -> fx.Node:
        node = self.graph.create_node(op, target, args, kwargs or {})
        node.stack_trace = current_source()
        node.meta["nn_module_stack"] = self._stack
        return node

    def _follow_grad_mode(self, enabled: bool) -> None:
        """Record that the model switched gradients off, or back to what the caller of the graph had."""
        if enabled != self._grad_at_start and self._grad_switch is None:
            self._grad_switch = self._create("call_function", set_grad_mode, (enabled,))
            self._grad_switch.meta["val"] = self._grad_at_start
        elif enabled == self._grad_at_start and self._grad_switch is not None:
            back = self._create("call_function", set_grad_mode, (self._grad_switch,))
            back.meta["val"], self._grad_switch = not enabled, None

    def _bind_result(self, node: fx.Node, result: Any) -> None:
        if isinstance(result, torch.Tensor):
            self._remember(result, node)
        elif isinstance(result, (tuple, list)):
            for index, item in enumerate(result):
                if any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(item)):
                    part = self._create("call_function", operator.getitem, (node, index))
                    part.meta["val"] = node.meta["val"][index]
                    self._bind_result(part, item)

    def _remember(self, tensor: torch.Tensor, node: fx.Node) -> None:
        self._nodes[id(tensor)] = node
        self._alive.append(tensor)  # an id stays ours only as long as its tensor lives

    def _arguments(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self._node_of(value)
        if isinstance(value, torch.SymInt):
            return self.sizes.argument(value.node.expr, value)
        if isinstance(value, (tuple, list)):
            items = [self._arguments(item) for item in value]
            if isinstance(value, torch.Size):  # takes no nodes
                return tuple(items)
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        if isinstance(value, dict):
            return {key: self._arguments(item) for key, item in value.items()}
        if isinstance(value, slice):
            return slice(*(self._arguments(part) for part in (value.start, value.stop, value.step)))
        if isinstance(value, (torch.SymFloat, torch.SymBool)):
            raise CaptureError(f"an operator receives a number computed from the batch size or from data: {value}")
        return value

    def _node_of(self, tensor: torch.Tensor) -> fx.Node:
        node = self._nodes.get(id(tensor))
        if node is None:
            node = self._attribute(tensor)
            self._remember(tensor, node)
        return node

    def _attribute(self, tensor: torch.Tensor) -> fx.Node:
        name = self._own.get(id(tensor))
        if name is None:
            if hasattr(tensor, "fake_mode"):
                raise CaptureError(
                    "an operator receives a tensor that no recorded call made; legacy constructors such as "
                    "torch.FloatTensor(3) are not recorded, torch.zeros(3) is"
                )
            name = f"_tensor_constant{len(self.constants)}"
            self.constants[name] = tensor
        node = self.graph.get_attr(name)
        node.meta["val"] = tensor.detach()
        return node

    # -- outputs ------------------------------------------------------------------------------------------------

    def _output(self, value: Any) -> Any:
        if isinstance(value, dict):
            items = {key: self._output(item) for key, item in value.items()}
            return items if type(value) is dict else self._mapping(type(value), items)
        if isinstance(value, (tuple, list)):
            parts = [self._output(item) for item in value]
            return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        if value is None or isinstance(value, (torch.Tensor, torch.SymInt, int, float, bool, str)):
            return self._arguments(value)
        raise CaptureError(
            f"its result holds an object of type '{type(value).__name__}'; results are made of tensors, numbers, "
            "mappings and sequences"
        )

    def _mapping(self, kind: type, items: dict[str, Any]) -> fx.Node:
        node = self.graph.call_function(kind, (), items)
        node.meta["val"] = None
        node.meta["nn_module_stack"] = {}
        return node


def _graft(root: nn.Module, source: nn.Module, path: str) -> None:
    """Make `root.path` the very object at `source.path`, with bare modules on the way."""
    *parents, name = path.split(".")
    for parent in parents:
        source = getattr(source, parent)
        if parent not in root._modules:
            root.add_module(parent, nn.Module())
        root = root._modules[parent]  # type: ignore[assignment]
    value = getattr(source, name)
    (root._modules if isinstance(value, nn.Module) else root._parameters)[name] = value
