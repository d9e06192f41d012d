"""What the README shows works as it is written."""

from __future__ import annotations

import re
from pathlib import Path

import torch

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_quickstart(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 3
    names: dict[str, object] = {}
    torch.manual_seed(0)
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "GRAY" in printed
    assert all(parameter.grad is not None for name, parameter in names["model"].named_parameters())


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
