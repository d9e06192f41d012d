"""`bwsk-fx inspect`: its options, what it shows, and what it writes."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bwsk_fx.console import errors_as_lines, make_console, quiet, status
from bwsk_fx.errors import InspectError
from bwsk_fx.train_command import Faith

# Everything heavy (torch, transformers, rich tables) is imported inside the command, so that --help is quick.
if TYPE_CHECKING:
    from bwsk_fx.inspection.shown import Wanted

_COLUMNS = 100
_WHAT, _SHOWN, _FILES = "The model", "What is shown", "Files"


class Ruleset(StrEnum):
    """Which rules label the operators."""

    SOUND = "sound"
    PUBLISHED = "published"


def _flag(name: str, words: str) -> Any:
    return typer.Option(name, metavar="", rich_help_panel=_SHOWN, help=words)


def _file(name: str, words: str) -> Any:
    return typer.Option(name, metavar="<file>", show_default=False, rich_help_panel=_FILES, help=words)


def _size(words: str, otherwise: str = "the model's") -> Any:
    return typer.Option(min=1, metavar="<int>", show_default=otherwise, rich_help_panel=_WHAT, help=words)


Model = Annotated[
    str,
    typer.Argument(
        help="A model on the Hub, a folder with a config.json, [b]vit-base[/b] or [b]vit-tiny-digits[/b], "
        "[b]module:factory[/b], or a [b].pt2[/b] file of torch.export (only of people you trust)."
    ),
]
RulesetOption = Annotated[Ruleset, typer.Option(rich_help_panel=_WHAT, help="Which rules label the operators.")]
Inputs = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        metavar="<shape>",
        show_default=False,
        rich_help_panel=_WHAT,
        help="Input of the model, such as [b]2,3,224,224[/b] or [b]x=2,77:int64[/b]. Repeatable.",
    ),
]
Filters = Annotated[
    list[str] | None,
    typer.Option(
        "--filter",
        metavar="<key=glob>",
        show_default=False,
        rich_help_panel=_SHOWN,
        help="List the nodes with this [b]verdict[/b], [b]operator[/b] or [b]module[/b], such as "
        "[b]verdict=K[/b] or [b]module='encoder.*'[/b]; the tables of operators and of hot spots are about them. "
        "Repeatable.",
    ),
]
Other = Annotated[
    str | None,
    typer.Option(
        "--diff",
        metavar="<model>",
        show_default=False,
        rich_help_panel=_SHOWN,
        help="Show how another model differs, by module path and operator.",
    ),
]
Node = Annotated[
    str | None,
    typer.Option(
        metavar="<name>",
        show_default=False,
        rich_help_panel=_SHOWN,
        help="Also follow this node of the graph back to the inputs, or to what erases them.",
    ),
]
Top = Annotated[
    int, typer.Option(min=1, metavar="<int>", rich_help_panel=_SHOWN, help="Number of hot spots, where most is erased.")
]
Depth = Annotated[
    int | None,
    typer.Option(
        min=0,
        metavar="<int>",
        show_default="3, and single nodes in --dot",
        rich_help_panel=_FILES,
        help="Fold [b]--svg[/b] and [b]--dot[/b] to so many parts of a module's path.",
    ),
]
Calm = Annotated[bool, _flag("--calm", "Also show which axes can be split, and where not.")]
Compare = Annotated[bool, _flag("--compare", "Also set both rulesets side by side.")]
Certify = Annotated[bool, _flag("--certify", "Also run the inverse of every S operator, on random weights.")]
Erasure = Annotated[bool, _flag("--erasure", "Also show what is erased, layer by layer.")]
AsJson = Annotated[bool, _flag("--json", "Print JSON instead of tables.")]
Html = Annotated[Path | None, _file("--html", "Write one HTML page: graph, plans, memory, axes.")]
Budget = Annotated[
    float | None,
    typer.Option(
        metavar="<float>",
        show_default="0.0",
        rich_help_panel=_FILES,
        help="Extra time that the plans of [b]--html[/b] may spend, as a fraction of a step.",
    ),
]
FaithOption = Annotated[
    Faith | None,
    typer.Option(
        show_default="rounded",
        rich_help_panel=_FILES,
        help="Gradients under the plans of [b]--html[/b]: bit-identical, or equal up to rounding.",
    ),
]
Svg = Annotated[Path | None, _file("--svg", "Write a picture of the modules.")]
Dot = Annotated[Path | None, _file("--dot", "Write the graph for Graphviz.")]
GraphMl = Annotated[Path | None, _file("--graphml", "Write the graph for Gephi, yEd, Cytoscape or networkx.")]
Explorer = Annotated[Path | None, _file("--model-explorer", "Write node data for Google's Model Explorer.")]
ImageSize = Annotated[int | None, _size("Height and width of the images.")]
Layers = Annotated[int | None, _size("Number of transformer blocks.")]
BatchSize = Annotated[int | None, _size("Samples per batch while capturing.", "2")]


def inspect(
    model: Model,
    ruleset: RulesetOption = Ruleset.SOUND,
    inputs: Inputs = None,
    image_size: ImageSize = None,
    layers: Layers = None,
    batch_size: BatchSize = None,
    filters: Filters = None,
    diff: Other = None,
    top: Top = 10,
    erasure: Erasure = False,
    node: Node = None,
    compare: Compare = False,
    calm: Calm = False,
    certify: Certify = False,
    as_json: AsJson = False,
    html: Html = None,
    budget: Budget = None,
    faith: FaithOption = None,
    svg: Svg = None,
    dot: Dot = None,
    depth: Depth = None,
    graphml: GraphMl = None,
    model_explorer: Explorer = None,
) -> None:
    """Label every operator of a model: preserved (S), erased (K) or unknown (GRAY).

    Only the architecture is read, not the weights, unless the model is a .pt2 file.

    Example: [b]bwsk-fx inspect vit-base --erasure --svg vit.svg[/b]
    """
    with errors_as_lines(), quiet():
        from bwsk_fx.inspection import shown
        from bwsk_fx.inspection.sources import Request

        overrides = given(image_size=image_size, num_hidden_layers=layers)
        request = Request(batch_size, overrides, tuple(inputs or ()))
        flags = {"calm": calm, "compare": compare, "certify": certify, "erasure": erasure}
        extra = frozenset(name for name, asked in flags.items() if asked)
        wanted = shown.Wanted(model, ruleset.value, extra, node, tuple(filters or ()), diff, top)
        files = given(html=html, svg=svg, dot=dot, graphml=graphml, model_explorer=model_explorer)
        drawing = {"depth": depth, "plan": _plan(html, budget, faith)}
        with status(f"capturing {model}"):
            reports, remarks = _reports(wanted, request, files, drawing)
        _show(wanted, reports, as_json)
        for remark in remarks:
            typer.echo(remark, err=True)


def given(**options: Any) -> dict[str, Any]:
    """Return the options that were given."""
    return {name: value for name, value in options.items() if value is not None}


def _plan(html: Path | None, budget: float | None, faith: Faith | None) -> Any:
    from bwsk_fx.planning.options import PlanOptions

    options = given(budget=budget, faith=faith and faith.value)
    if options and html is None:
        raise InspectError(f"--{next(iter(options))} is for the plans of --html, which is missing")
    return PlanOptions(**options)


def _reports(
    wanted: Wanted, request: Any, files: dict[str, Path], drawing: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    import torch

    from bwsk_fx.inspection import shown, written

    # The same weights every time, and so the same certificates.
    torch.manual_seed(0)
    source, reports = shown.reports(wanted, request)
    return reports, written.write(written.Subject(source.graph, source.inputs, wanted.model, **drawing), files)


def _show(wanted: Wanted, reports: dict[str, Any], as_json: bool) -> None:
    from bwsk_fx.inspection import shown

    if as_json:
        typer.echo(shown.as_json(wanted, reports))
        return
    from rich.markup import escape

    console = make_console(columns=_COLUMNS)
    console.print(f"[b]{escape(wanted.model)}[/b] under the [b]{wanted.ruleset}[/b] ruleset")
    for place, report in enumerate(reports.values()):
        console.print(*([""] if place else []), report)
