"""What goes wrong is said by the library's own errors: which class, what is wrong, where, and the way out."""

from __future__ import annotations

import ast
import math
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import bwsk_fx
from bwsk_fx import compile_report, errors
from bwsk_fx.cli import app
from bwsk_fx.errors import (
    BwskError,
    CaptureError,
    PassError,
    PlanError,
    RegionError,
    RuleError,
)

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
LIBRARY = Path(bwsk_fx.__file__).parent


class _Model(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 2))


class _Branch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


class _Hooked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        y.register_hook(lambda gradient: 2 * gradient)
        return y.sin()


class _Pair(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x[0] + y


def _graph(typed: bool = False) -> torch.fx.GraphModule:
    graph = bwsk_fx.capture(_Model(), X)
    return bwsk_fx.type_nodes(graph) if typed else graph


def _fused(**options: object) -> torch.fx.GraphModule:
    return bwsk_fx.fuse_regions(_graph(), granularity="whole", **options)


def _stepped() -> torch.fx.GraphModule:
    fused = _fused()
    fused(X).sum().backward()
    return fused


def _without_a_module() -> torch.fx.GraphModule:
    graph = _graph()
    del graph._modules["0"]
    return graph


def _on_meta() -> torch.Tensor:
    with torch.device("meta"):
        model = _Model()
    return bwsk_fx.apply(model, granularity="whole")(X.to("meta"))


def _differentiated_twice() -> None:
    x = X.clone().requires_grad_()
    torch.autograd.grad(_fused()(x).sum(), x, create_graph=True)


def _without_reports() -> None:
    with patch.object(compile_report, "_REPORTS", deque()):
        bwsk_fx.compile.last_report()


def _backward_hooked() -> nn.Module:
    model = nn.Sequential(_Model(), nn.Tanh())
    model[0].register_full_backward_hook(lambda *_: None)
    return model


def _applied_inside() -> nn.Module:
    return nn.Sequential(bwsk_fx.apply(_Model()), nn.Tanh())


def _program() -> torch.export.ExportedProgram:
    return torch.export.export(_Model(), (X,))


Wrong = tuple[Callable[[], object], type[BwskError], tuple[str, ...]]

CAPTURE: dict[str, Wrong] = {
    "a name": (lambda: bwsk_fx.capture("vit", X), CaptureError, ("a str", "nn.Module")),
    "a function": (lambda: bwsk_fx.capture(torch.sin, X), CaptureError, ("nn.Module",)),
    "a class": (lambda: bwsk_fx.capture(nn.Linear, X), CaptureError, ("the class Linear", "nn.Linear(4, 4)")),
    "an exported program": (lambda: bwsk_fx.capture(_program(), X), CaptureError, ("exported", "from_program")),
    "a compiled model": (
        lambda: bwsk_fx.capture(torch.compile(_Model()), X),
        CaptureError,
        ("torch.compile", "_orig_mod"),
    ),
    "an applied model": (
        lambda: bwsk_fx.capture(bwsk_fx.apply(_Model()), X),
        CaptureError,
        ("this _Model", "bwsk_fx.restore"),
    ),
    "an applied part": (lambda: bwsk_fx.capture(_applied_inside(), X), CaptureError, ("submodule '0'", "restore")),
    "no inputs": (lambda: bwsk_fx.capture(_Model(), None), CaptureError, ("NoneType", "a tensor, a sequence")),
    "a number": (lambda: bwsk_fx.capture(_Model(), 3), CaptureError, ("are a int", "mapping of keyword")),
    "a text": (lambda: bwsk_fx.capture(_Model(), "abc"), CaptureError, ("are a str",)),
    "too many inputs": (
        lambda: bwsk_fx.capture(_Model(), (X, X)),
        CaptureError,
        ("do not fit _Model.forward", "too many"),
    ),
    "an unknown input": (lambda: bwsk_fx.capture(_Model(), {"y": X}), CaptureError, ("do not fit", "'input'")),
    "a tuple of tensors": (
        lambda: bwsk_fx.capture(_Pair(), ((X, X), X)),
        CaptureError,
        ("input 'x'", "single tensors"),
    ),
    "another width": (
        lambda: bwsk_fx.capture(_Model(), X[:, :3]),
        CaptureError,
        ("cannot capture _Model", "reduction dim"),
    ),
    "another device": (lambda: bwsk_fx.capture(_Model(), X.to("meta")), CaptureError, ("meta", "cpu")),
    "a branch on data": (lambda: bwsk_fx.capture(_Branch(), X), CaptureError, ("test_errors.py", "x.sum() > 0")),
    "a tensor hook": (
        lambda: bwsk_fx.capture(_Hooked(), X),
        CaptureError,
        ("test_errors.py", "register_hook", "is_leaf"),
    ),
    "a backward hook": (
        lambda: bwsk_fx.capture(_backward_hooked(), X),
        CaptureError,
        ("module '0' (_Model)", "is_leaf"),
    ),
    "is_leaf": (lambda: bwsk_fx.capture(_Model(), X, is_leaf=3), CaptureError, ("is_leaf is a int",)),
}

GRAPHS: dict[str, Wrong] = {
    f"{function.__name__} of a model": (
        lambda function=function, rest=rest: function(_Model(), *rest),
        PassError,
        ("the graph is a _Model", "bwsk_fx.capture"),
    )
    for function, rest in [
        (bwsk_fx.analyze_calm, ()),
        (bwsk_fx.certify, (X,)),
        (bwsk_fx.certify_axes, (X,)),
        (bwsk_fx.compare_rulesets, ()),
        (bwsk_fx.compare_graphs, (None,)),
        (bwsk_fx.erasure_budget, ()),
        (bwsk_fx.fuse_regions, ()),
        (bwsk_fx.model_explorer_data, ()),
        (bwsk_fx.plan_frontier, ({"input": X},)),
        (bwsk_fx.save_graphml, ("x",)),
        (bwsk_fx.save_html, ("x",)),
        (bwsk_fx.save_svg, ("x",)),
        (bwsk_fx.summarize, ()),
        (bwsk_fx.to_dot, ()),
        (bwsk_fx.to_networkx, ()),
        (bwsk_fx.trace_back, ("x",)),
        (bwsk_fx.type_nodes, ()),
    ]
}

LABELS: dict[str, Wrong] = {
    "a missing module": (lambda: bwsk_fx.type_nodes(_without_a_module()), PassError, ("Node _0", "nonexistent")),
    "a graph of fx": (
        lambda: bwsk_fx.type_nodes(torch.fx.symbolic_trace(_Model())),
        PassError,
        ("input_1", "PropagateValues"),
    ),
    "a ruleset": (lambda: bwsk_fx.type_nodes(_graph(), "foo"), RuleError, ("'foo'", "sound, published")),
    "a list of rulesets": (lambda: bwsk_fx.type_nodes(_graph(), ["sound"]), RuleError, ("sound, published",)),
    "an override": (lambda: bwsk_fx.type_nodes(_graph(), overrides={"no": "K"}), RuleError, ("'no'", "matches no")),
    "a list of overrides": (lambda: bwsk_fx.type_nodes(_graph(), overrides=["K"]), RuleError, ("a list", "mapping")),
    "no labels": (lambda: bwsk_fx.summarize(_graph()), RuleError, ("node 'input_1'", "type_nodes")),
    "a node's name": (
        lambda: bwsk_fx.trace_back(_graph(True), "_9"),
        RuleError,
        ("no node '_9'", "print(graph.graph)"),
    ),
    "a node's number": (lambda: bwsk_fx.trace_back(_graph(True), 3), RuleError, ("a int", "its name")),
    "inputs of certify": (lambda: bwsk_fx.certify(_graph(), (X, X)), CaptureError, ("(input)", "too many")),
    "no inputs of certify": (lambda: bwsk_fx.certify(_graph(), None), CaptureError, ("NoneType",)),
    "a width in certify": (
        lambda: bwsk_fx.certify(_graph(), X[:, :3]),
        CaptureError,
        ("node '_0'", "test_errors.py:", "3x3 and 4x4"),
    ),
    "a width in certify_axes": (lambda: bwsk_fx.certify_axes(_graph(), X[:, :3]), CaptureError, ("3x3 and 4x4",)),
    "dtypes by name": (
        lambda: bwsk_fx.certify(_graph(), X, dtypes=["float32"]),
        RuleError,
        ("'float32'", "torch.float32"),
    ),
    "integer dtypes": (lambda: bwsk_fx.certify(_graph(), X, dtypes=[torch.int64]), RuleError, ("torch.int64",)),
    "axes of a fused graph": (lambda: bwsk_fx.certify_axes(_fused(), X), RuleError, ("before fuse_regions",)),
    "a rule without target": (lambda: bwsk_fx.rule(examples=[]), RuleError, ("needs a target", "example")),
    "a depth": (lambda: bwsk_fx.to_dot(_graph(True), depth=-1), RuleError, ("depth is -1", "at least 0")),
    "node data": (lambda: bwsk_fx.model_explorer_data(_graph(True), "x"), RuleError, ("'x'", "erased_bits")),
}

PLANS: dict[str, Wrong] = {
    "NaN": (lambda: _fused(budget=math.nan), PlanError, ("budget is nan", "0.0 or more")),
    "a negative budget": (lambda: _fused(budget=-1), PlanError, ("budget is -1",)),
    "a budget in words": (lambda: _fused(budget="big"), PlanError, ("budget is 'big'",)),
    "a true budget": (lambda: _fused(budget=True), PlanError, ("budget is True",)),
    "a faith": (lambda: _fused(faith="blind"), PlanError, ("faith is 'blind'", "'rounded', 'exact'")),
    "a tier": (lambda: _fused(tier="best"), PlanError, ("tier is 'best'", "'balanced'")),
    "a list of tiers": (lambda: _fused(tier=["exact"]), PlanError, ("tier is ['exact']",)),
    "a tier and a budget": (lambda: _fused(tier="exact", budget=0.1), PlanError, ("stands for a budget",)),
    "a granularity": (
        lambda: bwsk_fx.fuse_regions(_graph(), granularity="layer"),
        PlanError,
        ("'layer'", "'block', 's-run', 'whole'"),
    ),
    "costs": (lambda: _fused(costs="free"), PlanError, ("costs is 'free'", "'measured'")),
    "a compiler": (lambda: _fused(compiler="gcc"), PlanError, ("compiler is 'gcc'", "'inductor'")),
    "inductor and exact": (lambda: _fused(compiler="inductor", faith="exact"), PlanError, ("use 'rounded'",)),
    "a size": (lambda: _fused(memory="1.5 GiBs"), PlanError, ("'1.5 GiBs'", "'1.5GiB'")),
    "no memory": (lambda: _fused(memory=0), PlanError, ("memory is 0", "above zero")),
    "too little memory": (lambda: _fused(memory=1)(X), PlanError, ("within 1 B", "at least")),
    "a fraction": (lambda: _fused(activation_fraction=1.5), PlanError, ("1.5", "above 0 up to 1")),
    "two bounds": (lambda: _fused(memory=1, activation_fraction=0.5), PlanError, ("give one of them",)),
    "an option": (lambda: _fused(bugdet=0.1), PlanError, ("'bugdet'", "budget")),
    "inverses in words": (lambda: _fused(inverses="no"), PlanError, ("inverses is 'no'", "True or False")),
    "a plan's number": (lambda: _fused(plan=3), PlanError, ("plan is 3", "save_plan")),
    "no plan": (lambda: _fused(plan="/no/such.json")(X), PlanError, ("/no/such.json", "cannot be read")),
    "a folder as plan": (lambda: _fused(plan=str(LIBRARY))(X), PlanError, ("cannot be read", "directory")),
    "a plan into nowhere": (lambda: bwsk_fx.save_plan(_stepped(), "/no/p"), PlanError, ("/no/p", "cannot be written")),
    "budgets": (
        lambda: bwsk_fx.plan_frontier(_graph(), {"input": X}, granularity="whole", budgets=[-1]),
        PlanError,
        ("budget is -1",),
    ),
    "inputs without names": (
        lambda: bwsk_fx.plan_frontier(_graph(), X, granularity="whole"),
        CaptureError,
        ("a Tensor", "by name"),
    ),
}

REGIONS: dict[str, Wrong] = {
    "a mode": (lambda: bwsk_fx.apply(_Model(), "fast"), RegionError, ("'fast'", "'analyzed', 'reversible'")),
    "a name": (lambda: bwsk_fx.apply("vit"), RegionError, ("a str", "nn.Module")),
    "a class": (lambda: bwsk_fx.apply(nn.Linear), RegionError, ("the class Linear",)),
    "a compiled model": (lambda: bwsk_fx.apply(torch.compile(_Model())), RegionError, ("torch.compile", "_orig_mod")),
    "a scripted model": (lambda: bwsk_fx.apply(torch.jit.script(_Model())), RegionError, ("torch.jit",)),
    "a list": (lambda: bwsk_fx.apply(_Pair())([X, X], X), CaptureError, ("argument 'x' is a list", "numbers")),
    "no blocks": (lambda: bwsk_fx.apply(nn.Linear(4, 4))(X), RegionError, ("no node", "'whole'")),
    "the meta device": (_on_meta, RegionError, ("region whole", "meta device", "plan_frontier")),
    "restore": (lambda: bwsk_fx.restore(_Model()), RegionError, ("_Model", "apply first")),
    "restore of a text": (lambda: bwsk_fx.restore("x"), RegionError, ("a str",)),
    "no regions": (lambda: bwsk_fx.explain_saved(_Model()), RegionError, ("no reversible regions", "apply")),
    "no step": (lambda: bwsk_fx.explain_saved(_fused()), RegionError, ("no region has run", "run one")),
    "another width": (lambda: _fused()(X[:, :3]), PlanError, ("region whole", "node '_0'", "reduction dim")),
    "create_graph": (
        _differentiated_twice,
        RegionError,
        ("no second derivative", "create_graph=True"),
    ),
    "no report": (_without_reports, PlanError, ("nothing has been compiled", "call")),
}

FILES: dict[str, Wrong] = {
    "an HTML page": (lambda: bwsk_fx.save_html(_graph(True), "/no/x.html"), BwskError, ("/no/x.html", "folder")),
    "a picture": (lambda: bwsk_fx.save_svg(_graph(True), "/no/x.svg"), BwskError, ("/no/x.svg", "folder")),
    "GraphML": (lambda: bwsk_fx.save_graphml(_graph(True), "/no/x.xml"), BwskError, ("/no/x.xml", "folder")),
}
ROWS = {
    f"{what}: {name}": row
    for what, rows in (
        ("capture", CAPTURE),
        ("graph", GRAPHS),
        ("labels", LABELS),
        ("plan", PLANS),
        ("region", REGIONS),
        ("file", FILES),
    )
    for name, row in rows.items()
}


@pytest.mark.parametrize(("call", "kind", "fragments"), ROWS.values(), ids=ROWS)
def test_what_is_wrong_is_said(call, kind, fragments):
    with pytest.raises(BwskError) as raised:
        call()
    assert type(raised.value) is kind
    assert [fragment for fragment in fragments if fragment not in str(raised.value)] == []


# -- the command line -------------------------------------------------------------------------------------------------

DIGITS = "vit-tiny-digits"
COMMANDS: dict[str, tuple[list[str], str]] = {
    "no program": (["inspect", "no.pt2"], "'no.pt2': no such file"),
    "half a program": (["inspect", "half.pt2"], "cannot be loaded by torch.export.load"),
    "no module": (["inspect", "no_such_module:model"], "no_such_module"),
    "no factory": (["inspect", "json:nothing"], "nothing"),
    "a factory of no model": (["inspect", "os:getpid"], "returns int"),
    "half a configuration": (["inspect", "half"], "half"),
    "a configuration of the wrong type": (["inspect", "wrong"], "wrong"),
    "a filter": (["inspect", DIGITS, "--filter", "x"], "--filter 'x' is not read"),
    "a shape": (["inspect", DIGITS, "--input", "a"], "--input 'a' is not read"),
    "a shape beyond memory": (["inspect", "torch.nn:ReLU", "--input", "99999999999999,9"], "cannot be made"),
    "speed": (["calm", DIGITS, "--speed", "3"], "--speed is for --devices"),
    "an axis": (["calm", DIGITS, "--axis", "zz"], "no axis 'zz'"),
    "no run file": (["train", "--config", "no.yaml"], "no.yaml"),
    "a list as run file": (["train", "--config", "list.yaml"], "must hold a mapping"),
    "no YAML": (["train", "--config", "bad.yaml"], "is not YAML"),
    "epochs in words": (["train", "--config", "words.yaml"], "epochs"),
    "a negative budget": (["train", "--budget", "-1"], "--budget must be at least 0, not -1"),
    "no data": (["train", "--data", "/no/such"], "/no/such"),
    "a setting": (["train", "--trainer", "x"], "KEY=VALUE"),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.export.save(_program(), "whole.pt2")
    whole = Path("whole.pt2").read_bytes()
    Path("half.pt2").write_bytes(whole[: len(whole) // 2])
    for name, text in (("half", '{"model_type":'), ("wrong", '{"model_type": "vit", "hidden_size": "big"}')):
        Path(name).mkdir()
        Path(name, "config.json").write_text(text)
    for name, text in (("list", "[1]"), ("bad", "a: ["), ("words", "epochs: many")):
        Path(f"{name}.yaml").write_text(text)
    return tmp_path


@pytest.mark.parametrize(("words", "fragment"), COMMANDS.values(), ids=COMMANDS)
def test_commands_fail_with_one_line(folder, words, fragment):
    before = sorted(folder.rglob("*"))
    result = CliRunner().invoke(app, words)
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code in (1, 2)
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    assert fragment in lines[0] and "Traceback" not in result.output
    assert sorted(folder.rglob("*")) == before


# -- every raise ------------------------------------------------------------------------------------------------------

HIERARCHY = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, BwskError)}
BUILT_IN = {
    ("planning/compiled.py", "TypeError"),  # the call of a function that AOTAutograd calls
    ("planning/figures.py", "ValueError"),  # caught where the file of figures is read
    ("report/calm.py", "KeyError"),  # looking an axis up by name, like a mapping
    ("report/calm_sharding.py", "KeyError"),
    ("rules/round_trip.py", "ValueError"),  # a false claim, which becomes a note
    ("rules/composition.py", "UndecomposableError"),
    ("rules/decomposition.py", "UndecomposableError"),
    ("inspection/factories.py", "ImportError"),  # caught where factories are imported
    ("training/values.py", "ConstructorError"),  # YAML's own, caught where files are read
    ("planning/solve.py", "KeyboardInterrupt"),  # the user's
    ("planning/timing.py", "AssertionError"),  # never reached
    ("inspection/exported.py", "AssertionError"),
    ("_torch_private.py", "AssertionError"),
    ("_torch_private.py", "LookupError"),  # caught where the writes of a graph are read
    ("cli.py", "Exit"),
    ("console.py", "Exit"),
}
# Functions that make an error, and names of caught ones that go on.
MAKERS = {"_unknown_release", "_unwritable", "error", "failure", "call"}


def _raised(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and node.exc is not None:
            function = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            while isinstance(function, ast.Subscript):
                function = function.value.value
            yield function.attr if isinstance(function, ast.Attribute) else function.id


def test_every_raise_is_of_the_hierarchy_or_a_documented_exception():
    folders = (LIBRARY, Path(bwsk_fx.passes.__file__).parent)
    files = {(folder, path) for folder in folders for path in folder.rglob("*.py")}
    found = {
        (str(path.relative_to(folder)), name) for folder, path in files for name in _raised(ast.parse(path.read_text()))
    }
    assert len(found) > 60
    others = {(path, name) for path, name in found if name not in HIERARCHY | MAKERS}
    assert others == BUILT_IN


def test_every_public_function_has_a_row():
    silent = {"Applied", "accelerate", "applied", "compile", "summarize_modules"}
    used = "\n".join(Path(__file__).read_text().splitlines())
    assert {name for name in bwsk_fx.__all__ if f"bwsk_fx.{name}" not in used} <= silent
