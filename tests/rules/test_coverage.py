"""Every operator module of `torch.nn` and every core ATen operator has a rule; what has none is listed here."""

import inspect

import torch
from torch import nn

from bwsk_fx.rules.registry import registered_rules, rule_of
from bwsk_fx.rules.single import call_of

CONTAINERS = {"Container", "Module", "ModuleDict", "ModuleList", "ParameterDict", "ParameterList", "Sequential"}
ABSTRACT = {"RNNBase", "RNNCellBase"}
WRAPPERS = {"DataParallel"}

# Operators that a forward pass calls with no tensor whose values could be erased.
WITHOUT_OPERANDS = {"arange", "empty", "empty_strided", "full", "scalar_tensor"}


def _operator_modules():
    for name, kind in inspect.getmembers(nn, inspect.isclass):
        lazy = name.startswith("Lazy")  # becomes its plain twin at its first call
        if issubclass(kind, nn.Module) and not lazy and name not in CONTAINERS | ABSTRACT | WRAPPERS:
            yield kind


def test_every_operator_module_has_a_rule():
    rules = registered_rules()
    without = [
        kind.__name__
        for kind in _operator_modules()
        if not any(base in rules and base.forward is kind.forward for base in kind.__mro__ if hasattr(base, "forward"))
    ]
    assert without == []


def test_every_core_aten_operator_has_a_rule():
    packets = [getattr(torch.ops.aten, name) for name in dir(torch.ops.aten)]
    overloads = [
        getattr(packet, name) for packet in packets if hasattr(packet, "overloads") for name in packet.overloads()
    ]
    core = [overload for overload in overloads if torch.Tag.core in overload.tags]
    assert len(core) > 150
    without = {
        overload.overloadpacket.__name__ for overload in core if rule_of(call_of(overload, (), {}, None)) is None
    }
    forward = {name for name in without if not (name.endswith("_backward") or name.startswith("sym_"))}
    assert forward <= WITHOUT_OPERANDS
