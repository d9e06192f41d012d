"""bwsk-fx: label what operators preserve or erase, and rebuild activations in the backward pass."""

from bwsk_fx import accelerate, compile
from bwsk_fx.calm import analyze_calm
from bwsk_fx.capture import capture
from bwsk_fx.certify import certify
from bwsk_fx.certify_axes import certify_axes
from bwsk_fx.modes import Applied, applied, apply, restore
from bwsk_fx.passes.fuse_regions import fuse_regions
from bwsk_fx.passes.type_nodes import type_nodes
from bwsk_fx.provenance import erasure_budget, trace_back
from bwsk_fx.report.comparison import compare_rulesets
from bwsk_fx.report.difference import compare_graphs
from bwsk_fx.report.export.dot import to_dot
from bwsk_fx.report.export.model_explorer import model_explorer_data
from bwsk_fx.report.export.networks import save_graphml, to_networkx
from bwsk_fx.report.export.svg import save_svg
from bwsk_fx.report.frontier import plan_frontier
from bwsk_fx.report.html.page import save_html
from bwsk_fx.report.modules import summarize_modules
from bwsk_fx.report.saved import explain_saved, save_plan
from bwsk_fx.report.summary import summarize
from bwsk_fx.rules.user import rule

__all__ = [
    "Applied",
    "accelerate",
    "analyze_calm",
    "applied",
    "apply",
    "capture",
    "certify",
    "certify_axes",
    "compile",
    "compare_graphs",
    "compare_rulesets",
    "erasure_budget",
    "explain_saved",
    "fuse_regions",
    "model_explorer_data",
    "plan_frontier",
    "restore",
    "rule",
    "save_graphml",
    "save_html",
    "save_plan",
    "save_svg",
    "summarize",
    "summarize_modules",
    "to_dot",
    "to_networkx",
    "trace_back",
    "type_nodes",
]

accelerate.register_on_import()
