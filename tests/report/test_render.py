"""Reports outside of a terminal."""

from dataclasses import dataclass

import torch
from torch import nn

import bwsk_fx
from bwsk_fx.report.render import Printable, wrapped


@dataclass(frozen=True)
class _Table(Printable):
    def __rich__(self):
        from rich.table import Table

        table = Table("node", "what it does")
        table.add_row("<script>alert(1)</script> & more", "word " * 60)
        return table


def test_text_has_at_most_100_columns_and_no_escape_codes():
    text = str(_Table())
    assert max(map(len, text.splitlines())) == 100
    assert "\x1b" not in text
    assert text.count("word") == 60


def test_html_is_one_escaped_element():
    html = _Table()._repr_html_()
    assert html.startswith("<pre ") and html.rstrip().endswith("</pre>")
    assert "<script>" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; more" in html


def test_long_lines_break_at_spaces():
    lines = wrapped(["short", "word " * 40]).splitlines()
    assert lines[0] == "short"
    assert all(len(line) <= 100 for line in lines)
    assert " ".join(" ".join(lines[1:]).split()) == ("word " * 40).strip()


def test_every_report_of_a_graph_prints_in_100_columns_and_as_html():
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.LayerNorm(4)), nn.Linear(4, 9))
    inputs = torch.randn(2, 8)
    graph = bwsk_fx.type_nodes(bwsk_fx.capture(model, inputs))
    reports = [
        bwsk_fx.summarize(graph),
        bwsk_fx.erasure_budget(graph),
        bwsk_fx.compare_rulesets(graph),
        bwsk_fx.trace_back(graph, "_1"),
        bwsk_fx.certify(graph, inputs, adversarial=False),
        bwsk_fx.analyze_calm(graph),
        bwsk_fx.analyze_calm(graph).axes[0],
    ]
    for report in reports:
        assert max(map(len, str(report).splitlines())) <= 100, type(report).__name__
        assert report._repr_html_().startswith("<pre "), type(report).__name__
