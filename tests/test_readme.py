"""The commands of the README, and where its results stand; `test_docs.py` runs its code."""

from __future__ import annotations

import re
from pathlib import Path

README = (Path(__file__).parent.parent / "README.md").read_text()


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
