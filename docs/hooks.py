"""What `mkdocs build` does beside rendering: a source tree for the API pages, tables of benchmarks, fence titles."""

from __future__ import annotations

import ast
import json
import re
import shutil
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SOURCE = ROOT / "build" / "docs-source"
KEYS = ("question", "device", "torch", "transformers", "settings", "rows")
PLACE = "<!-- results -->"
ZOO_PLACE = "<!-- zoo -->"
PICTURES = "images/benchmarks"
LONG_TABLE = 20
LONG_LIST = 10
NO_RUN = re.compile(r"^```python no-run: (.+)$", re.MULTILINE)
TORCHRUN = re.compile(r"^```python torchrun$", re.MULTILINE)


def on_startup(**_: Any) -> None:
    """Make the folder of the source tree: mkdocstrings, configured before this hook, drops a folder not there."""
    SOURCE.mkdir(parents=True, exist_ok=True)


def on_config(config: Any) -> None:
    """List the decisions, and copy package and passes into one tree, from which the docstrings are read."""
    decisions = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    section = next(item for item in config.nav if "Decisions" in item)
    section["Decisions"] = [f"decisions/{path.name}" for path in decisions]
    shutil.rmtree(SOURCE, ignore_errors=True)
    shutil.copytree(ROOT / "bwsk_fx", SOURCE / "bwsk_fx", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "passes", SOURCE / "bwsk_fx" / "passes", ignore=shutil.ignore_patterns("__pycache__"))


def on_files(files: Any, config: Any) -> None:
    """Add the pictures that lie beside the result files."""
    from mkdocs.structure.files import File

    for picture in sorted(path for path in RESULTS.rglob("*.png") if path.with_suffix(".json").exists()):
        name = f"{PICTURES}/{picture.relative_to(RESULTS).as_posix()}"
        files.append(File.generated(config, name, abs_src_path=str(picture)))


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the tables of the benchmarks on their page, and show how blocks are run, or why the tests do not run them."""
    if PLACE in markdown:
        markdown = markdown.replace(PLACE, result_tables(RESULTS))
    if ZOO_PLACE in markdown:
        markdown = markdown.replace(ZOO_PLACE, zoo_table(RESULTS / "zoo-cpu.json"))
    markdown = TORCHRUN.sub('```python title="Under torchrun --nproc-per-node 2"', markdown)
    return NO_RUN.sub(lambda found: f'```python title="Not run by the tests: {found.group(1)}"', markdown)


def result_tables(results: Path) -> str:
    """Return every result file as a table under its device's name, by question, as Markdown.

    Args:
        results: Folder of the JSON files that the programs in `benchmarks/` write.

    Raises:
        ValueError: A file is not what they write.
    """
    files = [(_read(path), path) for path in sorted(results.rglob("*.json"))]
    files.sort(key=lambda pair: pair[0]["question"])
    lines = []
    for question, group in groupby(files, key=lambda pair: pair[0]["question"]):
        lines += [f"## {question}", "", *_purpose(question)]
        for content, path in group:
            lines += [*_result(content, path.relative_to(results)), ""]
    return "\n".join(lines)


def zoo_table(path: Path) -> str:
    """Return the results of `benchmarks/zoo.py` as a table, and below it what was refused, as Markdown.

    Args:
        path: The result file.
    """
    rows = _read(path)["rows"]
    lines = [
        "| model | architecture | nodes | published | sound | batch | kept | exact | at 0 | at 0.1 | error | bits |",
        f"|---|---|{'--:|' * 9}---|",
    ]
    lines += [f"| {' | '.join(_zoo_cells(row))} |" for row in rows]
    refused = [row for row in rows if row["refused"]]
    lines += ["", *(f"* {row['model']} ({row['route']}): {_cell(row['refused'])}" for row in refused)]
    return "\n".join(lines)


def _zoo_cells(row: dict[str, Any]) -> Iterator[str]:
    yield f"**{row['model']}**" if row["study"] else row["model"]
    yield row["architecture"]
    yield from (_cell(row[name]) for name in ("nodes", "published", "sound", "batch"))
    yield "" if row["kept MiB"] is None else f"{row['kept MiB']:.2f} MiB"
    for name in ("exact, budget 0", "budget 0", "budget 0.1"):
        yield "" if row[name] is None else f"{row[name]:.0%}"
    yield "" if row["error"] is None else f"{row['error']:.2f}"
    yield _cell(row["bits"])


def _read(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    missing = [key for key in KEYS if key not in content]
    if missing:
        raise ValueError(f"{path.name} has no {missing[0]!r}: expected what benchmarks/common.py writes")
    return content


def _purpose(question: str) -> Iterator[str]:
    program = ROOT / "benchmarks" / f"{question.replace('-', '_')}.py"
    if program.exists():
        purpose = (ast.get_docstring(ast.parse(program.read_text(encoding="utf-8"))) or "").partition("\n\n")[0]
        yield f"{' '.join(purpose.split())} `python benchmarks/{program.name}`"
        yield ""


def _result(content: dict[str, Any], path: Path) -> Iterator[str]:
    yield f"### {content['device']}: {path.with_suffix('').as_posix()}"
    yield ""
    versions = f"torch {content['torch']}, transformers {content['transformers']}"
    settings = ", ".join(f"{name} {_cell(value)}" for name, value in content["settings"].items() if value != [])
    yield f"{versions}. Settings: {settings}."
    yield ""
    table = list(_table(content["rows"]))
    if len(content["rows"]) > LONG_TABLE:
        yield f'??? note "{len(content["rows"])} rows"'
        yield ""
        table = [f"    {line}" for line in table]
    yield from table
    picture = path.with_suffix(".png")
    if (RESULTS / picture).exists():
        yield ""
        yield f"![{content['question']} on {content['device']}]({PICTURES}/{picture.as_posix()})"


def _table(rows: list[dict[str, Any]]) -> Iterator[str]:
    names = list(dict.fromkeys(name for row in rows for name in row))
    numeric = {name for name in names if any(isinstance(row.get(name), (int, float)) for row in rows)}
    yield f"| {' | '.join(names)} |"
    yield f"|{'|'.join('--:' if name in numeric else '---' for name in names)}|"
    for row in rows:
        yield f"| {' | '.join(_cell(row.get(name)) for name in names)} |"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    if isinstance(value, dict) or (isinstance(value, list) and len(value) > LONG_LIST):
        return f"{len(value)} entries"
    if isinstance(value, list):
        return " / ".join(map(_cell, value))
    return str(value).replace("|", "\\|").replace("\n", " ")
