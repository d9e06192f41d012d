"""What `mkdocs build` does beside rendering: a source tree for the API pages, the page of benchmarks, fence titles."""

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
PICTURES = "images/benchmarks"
LONG_TABLE = 20
NO_RUN = re.compile(r"^```python no-run: (.+)$", re.MULTILINE)
TORCHRUN = re.compile(r"^```python torchrun$", re.MULTILINE)


def on_config(config: Any) -> None:
    """Copy package and passes into one tree, from which the docstrings are read."""
    shutil.rmtree(SOURCE, ignore_errors=True)
    shutil.copytree(ROOT / "bwsk_fx", SOURCE / "bwsk_fx", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "passes", SOURCE / "bwsk_fx" / "passes", ignore=shutil.ignore_patterns("__pycache__"))


def on_files(files: Any, config: Any) -> None:
    """Add the page of benchmarks and its pictures, made from the result files."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, "benchmarks.md", content=benchmarks_page(RESULTS)))
    for picture in _pictures(RESULTS):
        name = f"{PICTURES}/{picture.relative_to(RESULTS).as_posix()}"
        files.append(File.generated(config, name, abs_src_path=str(picture)))


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Show on the page how a block of code is run, or why the tests do not run it."""
    markdown = TORCHRUN.sub('```python title="Under torchrun --nproc-per-node 2"', markdown)
    return NO_RUN.sub(lambda found: f'```python title="Not run by the tests: {found.group(1)}"', markdown)


def benchmarks_page(results: Path) -> str:
    """Return the page that shows every result file as a table under its device's name.

    Args:
        results: Folder of the JSON files that the programs in `benchmarks/` write.
    """
    files = [(json.loads(path.read_text(encoding="utf-8")), path) for path in sorted(results.rglob("*.json"))]
    files.sort(key=lambda pair: pair[0]["question"])
    lines = ["# Benchmarks", "", *_introduction()]
    for question, group in groupby(files, key=lambda pair: pair[0]["question"]):
        lines += [f"## {question}", "", *_purpose(question)]
        for content, path in group:
            lines += [*_result(content, path.relative_to(results)), ""]
    return "\n".join(lines)


def _introduction() -> Iterator[str]:
    yield "Made from the files in `benchmarks/results/` when this site is built. Each file is what one program in"
    yield "`benchmarks/` wrote on the device that is named; times of different devices, or of different runs, do not"
    yield "compare. What the figures count is said by the program's `--help` and in the first lines of its source."
    yield ""


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
    settings = ", ".join(f"{name} {_setting(value)}" for name, value in content["settings"].items() if value != [])
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
    if isinstance(value, (list, dict)):
        return f"`{json.dumps(value)}`"
    return str(value).replace("|", "\\|").replace("\n", " ")


def _setting(value: Any) -> str:
    return " / ".join(map(_cell, value)) if isinstance(value, list) else _cell(value)


def _pictures(results: Path) -> list[Path]:
    return [path for path in sorted(results.rglob("*.png")) if path.with_suffix(".json").exists()]
