"""What the README and the documentation show as Python code runs as it is written."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parent.parent
README = "README.md"
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
# They compile, train, certify or plan for longer than the fast tests have time for.
SLOW = {"docs/calm.md", "docs/compile.md", "docs/planning.md", "docs/training.md", "docs/typing.md"}
# How many blocks of a page are shown without being run; each says why in its fence.
NOT_RUN = {"docs/parallel.md": 2, "docs/training.md": 1}
NO_RUN = re.compile(r"python no-run: \S.*")
TORCHRUN = "python torchrun"
CODE = r"^\s*((import|from|def|class) \w|(.*\W)?bwsk_fx\.[\w.]+\()"


def _tokens(page: str, kind: str) -> list[Token]:
    parser = MarkdownIt().enable("table")
    return [token for token in parser.parse((ROOT / page).read_text()) if token.type == kind]


def _fences(page: str, info: str) -> list[Token]:
    return [token for token in _tokens(page, "fence") if token.info.strip() == info]


def _run(page: str) -> dict[str, Any]:
    """Run the blocks of a page in order, as one module; tracebacks name the lines of the page."""
    names: dict[str, Any] = {"__name__": "docs_page"}
    torch.manual_seed(0)
    for block in _fences(page, "python"):
        assert block.map
        code = "\n" * (block.map[0] + 1) + block.content
        exec(compile(code, page, "exec", dont_inherit=True), names)
    return names


def _with(info: str) -> list[str]:
    return [page for page in PAGES if _fences(page, info)]


def _marked(page: str) -> Any:
    return pytest.param(page, marks=pytest.mark.slow) if page in SLOW else page


def test_the_quickstart_labels_and_trains(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = _run(README)
    assert "GRAY" in capsys.readouterr().out
    assert all(parameter.grad is not None for parameter in names["model"].parameters())


@pytest.mark.parametrize("page", [_marked(page) for page in _with("python")])
def test_the_blocks_of_a_page_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _run(page)


@pytest.mark.slow
@pytest.mark.parametrize("page", _with(TORCHRUN))
def test_the_blocks_of_a_page_run_in_two_processes(page, tmp_path):
    script = tmp_path / "page.py"
    script.write_text("\n".join(block.content for block in _fences(page, TORCHRUN)))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("page", [README, *PAGES])
def test_every_python_block_runs_or_says_why_not(page):
    blocks = [token.info.strip() for token in _tokens(page, "fence") if re.match(r"py|$", token.info.strip())]
    left_out = [info for info in blocks if info not in ("python", TORCHRUN)]
    assert not [info for info in left_out if not NO_RUN.fullmatch(info)]
    assert len(left_out) == NOT_RUN.get(page, 0)
    indented = [token.content for token in _tokens(page, "code_block")]
    assert not [code for code in indented if re.search(CODE, code, re.MULTILINE)]


@pytest.fixture
def hooks():
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_benchmarks_have_a_table_per_result_file_under_the_name_of_its_device(hooks):
    page = hooks.result_tables(hooks.RESULTS)
    files = list(hooks.RESULTS.rglob("*.json"))
    for path in files:
        content = json.loads(path.read_text())
        heading = f"### {content['device']}: {path.relative_to(hooks.RESULTS).with_suffix('').as_posix()}\n"
        section = page.split(heading)[1].split("\n##")[0]
        assert len(re.findall(r"^ *\|", section, re.MULTILINE)) == len(content["rows"]) + 2
        assert f"torch {content['torch']}, transformers {content['transformers']}" in section
    assert page.count("\n### ") == len(files) > 0
    assert page in hooks.on_page_markdown((ROOT / "docs" / "benchmarks.md").read_text())


def test_benchmarks_show_what_a_file_says(hooks, tmp_path):
    rows = [
        {"variant": "a|b", "ms": 12.3456, "kept": None, "agree": True},
        {"variant": "c", "ms": 12345.6, "max": 2, "kept": {"x": [1], "y": []}},
    ]
    content = {
        "question": "made-up",
        "device": "Device 9",
        "torch": "1",
        "transformers": "2",
        "settings": {"n": [1, 2]},
    }
    (tmp_path / "made-up-cpu.json").write_text(json.dumps(content | {"rows": rows}))
    page = hooks.result_tables(tmp_path)
    assert "### Device 9: made-up-cpu\n\ntorch 1, transformers 2. Settings: n 1 / 2.\n" in page
    assert "| variant | ms | kept | agree | max |\n|---|--:|---|--:|--:|\n" in page
    assert "| a\\|b | 12.3 |  | yes |  |\n| c | 12346 | 2 entries |  | 2 |\n" in page


def test_a_result_file_of_another_form_is_an_error_that_names_it(hooks, tmp_path):
    (tmp_path / "odd.json").write_text('{"question": "odd", "device": "none"}')
    with pytest.raises(ValueError, match=r"^odd\.json has no 'torch': expected what benchmarks/common\.py writes$"):
        hooks.result_tables(tmp_path)


def test_the_site_says_how_a_block_is_run(hooks):
    page = "```python no-run: needs a GPU\nx\n```\n```python torchrun\ny\n```\n```python\nz\n```"
    titles = re.findall(r"^```python.*$", hooks.on_page_markdown(page), re.MULTILINE)
    assert titles[0] == '```python title="Not run by the tests: needs a GPU"'
    assert titles[1] == '```python title="Under torchrun --nproc-per-node 2"'
    assert titles[2] == "```python"


def _entry(package: ModuleType, name: str) -> str:
    """Return how a page names an object; `bwsk_fx.capture` is a module to whoever reads the source."""
    module = f"{package.__name__}.{name}"
    return f"{module}.{name}" if getattr(getattr(package, name), "__module__", "") == module else module


def test_every_public_name_has_an_entry():
    import bwsk_fx

    pages = "\n".join((ROOT / page).read_text() for page in PAGES if page.startswith("docs/api/"))
    entries = Counter(re.findall(r"^::: (\S+)$", pages, re.MULTILINE))
    assert {_entry(bwsk_fx, name) for name in bwsk_fx.__all__} <= entries.keys()
    assert max(entries.values()) == 1
