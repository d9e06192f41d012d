"""The commands of the README, and where its results stand; `test_docs.py` runs its code."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_commands_are_single_blocks_that_pin_torch_first():
    commands = dict(re.findall(r"<!-- command: (\w+) -->\n```sh\n(.*?)\n```", README, re.DOTALL))
    assert set(commands) == {"run", "test"}
    for command in commands.values():
        assert re.search(r'pip install "torch==[\d.]+" -e ', command)
    assert commands["run"].endswith(".venv/bin/bwsk-fx train")
    assert commands["test"].endswith(".venv/bin/pytest -n auto")


def test_the_place_for_results_is_marked():
    assert README.count("<!-- results:begin -->") == README.count("<!-- results:end -->") == 1
    assert README.index("<!-- results:begin -->") < README.index("<!-- results:end -->")


def _command(name: str) -> Any:
    from typer.main import get_command

    from bwsk_fx.cli import app

    return get_command(app).commands[name]


def test_commands_and_options_that_the_text_names_are_there():
    codes = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", README)
    commands = [code.split()[1:] for code in codes if code.startswith("bwsk-fx ")]
    assert {command[0] for command in commands} == {"inspect", "calm", "train"}
    for name, *words in commands:
        # What the command does not take is left over.
        context = _command(name).make_context(name, list(words), resilient_parsing=True)
        assert not context.args
    known = {option for name in ("inspect", "calm", "train") for each in _command(name).params for option in each.opts}
    named = {word for code in codes if code.startswith("--") for word in code.split() if word.startswith("--")}
    assert len(named) > 5
    assert named <= known


def test_files_that_the_text_names_are_there():
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert len(links) > 20
    assert [link for link in links if not (ROOT / link).exists()] == []
    (programs,) = re.findall(r"The programs are in `benchmarks/` \((.*?)\), the figures", README, re.DOTALL)
    scripts = re.findall(r"(\w+\.py)", programs)
    assert len(scripts) > 5
    assert [script for script in scripts if not (ROOT / "benchmarks" / script).is_file()] == []


def test_the_counts_of_the_text_are_those_of_the_study():
    ratios = json.loads((ROOT / "tests" / "data" / "published_sk_ratios.json").read_text())
    counts = re.search(r"(\d+) S and (\d+) K of ViT-base's (\d+)", README)
    assert counts
    vit = ratios["models"]["vit-base"]
    assert list(map(int, counts.groups())) == [vit["s"], vit["k"], vit["leaf_modules"]]
