"""The HTML page in a headless Chromium: folding, searching, selecting, sorting, the rewrite, by mouse and keyboard."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from playwright.sync_api import sync_playwright
from torch import nn

import bwsk_fx

HOSTILE = "<script>alert(1)</script>"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# As root, without a GPU and with a small /dev/shm, as in containers; the pages are the test's own.
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")
PATIENCE = 180_000  # ms; a browser that shares two busy cores is slow, not broken


@pytest.fixture(scope="module")
def browser():
    executable = next(filter(None, map(shutil.which, NAMES)), None)
    if executable is None:
        pytest.skip(f"there is no Chromium: none of {', '.join(NAMES)} is on the path")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=FLAGS, timeout=PATIENCE)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def vit(browser, make_vit, make_images, tmp_path_factory):
    """The page of a rewritten ViT, and the names of its nodes before and after."""
    graph = bwsk_fx.capture(make_vit(), make_images(3))
    bwsk_fx.type_nodes(graph)
    reversible = bwsk_fx.fuse_regions(graph, budget=0.1)
    path = tmp_path_factory.mktemp("html") / "vit.html"
    bwsk_fx.save_html(reversible, path, make_images(3), title="tiny")
    return SimpleNamespace(path=path, before=_names(graph), after=_names(reversible))


def _names(graph) -> list[str]:
    return [node.name for node in graph.graph.nodes]


def _open(browser, path, **options):
    page = browser.new_page(viewport={"width": 1400, "height": 900}, **options)
    page.set_default_timeout(PATIENCE)
    problems: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("dialog", lambda dialog: (problems.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.as_uri())
    data = json.loads(page.text_content("#data"))
    return SimpleNamespace(page=page, problems=problems, requests=requests, data=data)


@pytest.fixture
def opened(browser, vit):
    found = _open(browser, vit.path)
    yield found
    found.page.close()
    assert found.problems == []


def _rows(page) -> list[str]:
    return page.locator("#tree [data-place]").evaluate_all("rows => rows.map(row => row.dataset.place)")


def _focused(page) -> str:
    return page.evaluate("document.activeElement.getAttribute('aria-label') ?? document.activeElement.id")


def _module(page, path: str):
    return page.locator(f'#tree [data-module="{path}"]')


def _node(opened, name: str):
    place = next(place for place, node in enumerate(opened.data["nodes"]) if node["name"] == name)
    return opened.page.locator(f'#tree [data-place="{place}"]')


def test_it_opens_without_network_and_shows_the_counts(opened):
    page, data = opened.page, opened.data
    assert [url for url in opened.requests if not url.startswith("file:")] == []
    assert page.title() == "tiny · bwsk-fx"
    assert page.get_attribute("#labels", "aria-label") == f"{data['summary']['s']} S, {data['summary']['k']} K, 0 GRAY"
    assert page.locator("#sections a").all_text_contents() == ["Graph", "Saved values", "Memory", "Rewrite", "Axes"]
    assert page.locator("#notes").is_hidden()
    # The letter says it as well as the colour.
    letter = _node(opened, "vit_layernorm").locator(".badge").text_content()
    assert letter == "S"


def test_folded_modules_are_not_in_the_document_until_they_are_unfolded(opened):
    page = opened.page
    _module(page, "vit.layers.0").click()
    page.click("#fold")
    # What is folded away again is gone as well.
    assert _node(opened, "vit_layers_0_mlp_fc1").count() == 0
    _module(page, "vit").click()
    _module(page, "vit.layers.0").click()
    assert _node(opened, "vit_layers_0_mlp_fc1").count() == 0
    _module(page, "vit.layers.0.mlp").click()
    assert _node(opened, "vit_layers_0_mlp_fc1").is_visible()
    assert _module(page, "vit.layers.0.mlp").get_attribute("aria-expanded") == "true"
    page.click("#unfold")
    assert _rows(page) == [str(place) for place in range(len(opened.data["nodes"]))]


def test_search_finds_names_operators_and_modules(opened):
    page, nodes = opened.page, opened.data["nodes"]
    for words, wanted in (
        ("LAYERS_1_mlp", [node["name"] for node in nodes if "layers_1_mlp" in node["name"]]),
        ("layernorm  layers.1", ["vit_layers_1_layernorm_before", "vit_layers_1_layernorm_after"]),
        ("dropout", [node["name"] for node in nodes if node["operator"] == "Dropout"]),
    ):
        page.fill("#search", words)
        assert [nodes[int(place)]["name"] for place in _rows(page)] == wanted
        assert page.text_content("#found") == f"{len(wanted)} of {len(nodes)} nodes"
    page.fill("#search", "nothing like it")
    assert page.locator("#nothing").is_visible()
    page.click("#reset")
    assert len(_rows(page)) > 5


def test_verdicts_filter_rows(opened):
    page, nodes = opened.page, opened.data["nodes"]
    page.click("#unfold")
    page.click("#verdicts button.S")
    page.click("#verdicts button:has-text('not counted')")
    shown = [nodes[int(place)] for place in _rows(page)]
    assert len(shown) == opened.data["summary"]["k"]
    assert {node["label"] for node in shown} == {"K"}
    page.click("#verdicts button.S")
    assert len(_rows(page)) == opened.data["summary"]["total"]


def test_a_click_shows_the_node_and_its_links_lead_on(opened):
    page = opened.page
    page.click("#unfold")
    _node(opened, "vit_layers_0_mlp_activation_fn").click()
    panel = page.text_content("#panel")
    node = next(one for one in opened.data["nodes"] if one["name"] == "vit_layers_0_mlp_activation_fn")
    for words in (
        node["rationale"],
        "K · erases",
        "GELUActivation",
        node["source"],
        "B×17×64 float32",
        "bits per sample",
    ):
        assert words in panel
    assert page.locator("#panel dd:text-is('↺ vit_layers_0')").count() == 1
    page.click("#fold")
    page.click("#panel dd button:has-text('vit_layers_0_mlp_fc2')")
    assert page.text_content("#panel h3") == "vit_layers_0_mlp_fc2"
    assert _node(opened, "vit_layers_0_mlp_fc2").get_attribute("aria-selected") == "true"
    page.click("#panel dd button:has-text('vit_layers_0_mlp_activation_fn')")
    assert page.locator('#tree [aria-selected="true"]').count() == 1


def test_a_link_to_a_node_that_is_filtered_away_shows_it(opened):
    page = opened.page
    page.fill("#search", "activation_fn")
    _node(opened, "vit_layers_0_mlp_activation_fn").click()
    page.click("#panel dd button:has-text('vit_layers_0_mlp_fc1')")
    assert page.input_value("#search") == ""
    assert _node(opened, "vit_layers_0_mlp_fc1").is_visible()


def test_the_keyboard_does_what_the_mouse_does(opened):
    page = opened.page
    keys = page.keyboard
    page.locator("#tree [tabindex='0']").focus()
    assert _focused(page).startswith("module tiny,")
    keys.press("ArrowDown")
    assert _focused(page).startswith("pixel_values, input")
    keys.press("Enter")
    assert page.text_content("#panel h3") == "pixel_values"
    page.click("#fold")
    page.locator("#tree [tabindex='0']").focus()
    keys.press("End")
    assert _focused(page).startswith("output, output")
    while not _focused(page).startswith("module vit,"):
        keys.press("ArrowUp")
    keys.press("ArrowRight")
    assert _module(page, "vit").get_attribute("aria-expanded") == "true"
    keys.press("ArrowRight")
    assert _focused(page).startswith("module vit.embeddings,")
    keys.press("ArrowLeft")
    keys.press("ArrowLeft")
    assert _module(page, "vit").get_attribute("aria-expanded") == "false"
    keys.press("/")
    assert _focused(page) == "Search name, operator or module"
    keys.type("cls_token")
    keys.press("Enter")
    keys.press("Enter")
    assert page.text_content("#panel h3") == "vit_embeddings_cls_token"
    # Out of the tree with one press: rows other than the current one are no stops.
    keys.press("Tab")
    assert page.evaluate("!document.getElementById('tree').contains(document.activeElement)")


def test_saved_values_are_sorted_and_filtered(opened):
    page, saved = opened.page, opened.data["saved"]
    table = page.locator("#saved-table")

    def column(place: int) -> list[str]:
        return table.locator(f"tbody tr td:nth-child({place})").all_text_contents()

    names = [value["name"] for value in sorted(saved, key=lambda value: -value["bytes"])]
    assert len(names) > 20
    assert column(1) == names
    table.locator("th button:has-text('size')").click()
    assert table.locator("th[aria-sort='ascending']").text_content() == "size"
    assert column(1)[0] == min(saved, key=lambda value: value["bytes"])["name"]
    table.locator("th button:has-text('operator')").click()
    operators = column(6)
    assert operators == sorted(operators, key=str.lower)
    page.click("#actions button.keep")
    assert set(column(3)) == {"recomputed", "inverted"} & {*column(3)}
    page.click("#actions button.keep")
    page.fill("#saved-search", "vit_layers_1 kept")
    kept = [
        value
        for value in saved
        if value["action"] == "keep" and opened.data["regions"][value["region"]]["name"] == "vit_layers_1"
    ]
    assert len(column(1)) == len(kept) > 3
    assert page.text_content("#saved-found").startswith(f"{len(kept)} of {len(saved)} values; ")


def _unfolded(page, step):
    """Click the summary of a step of the rewrite, and wait for what it holds."""
    assert step.locator("li").count() == 0
    step.locator("summary").click()
    step.locator("li").first.wait_for()
    return [step.locator(part).all_text_contents() for part in ("li button", "p:last-child button")]


def test_the_rewrite_shows_each_node_before_and_after(opened, vit):
    page = opened.page
    steps = page.locator("#steps > details")
    unchanged = steps.filter(has_not_text="↺")
    regions = steps.filter(has_text="↺")
    assert page.locator("#sections a:text-is('Rewrite')").get_attribute("href") == "#rewrite"
    stayed = [name for place in range(unchanged.count()) for name in _unfolded(page, unchanged.nth(place))[0]]
    gone: list[str] = []
    results: list[str] = []
    for place in range(regions.count()):
        region = regions.nth(place)
        before, returned = _unfolded(page, region)
        name = opened.data["regions"][place]["name"]
        assert region.locator("h4").all_text_contents() == [
            f"Before: {len(before)} nodes",
            f"After: 1 call and {len(returned)} result" + "s" * (len(returned) > 1),
        ]
        assert region.locator("code").text_content() == f"reversible_regions.{name}"
        gone += before
        results += returned
    # A region is one call that the model had not, and a node per result that has the name of the one it replaces.
    assert regions.count() == len(set(vit.after) - set(vit.before)) > 1
    assert stayed == [name for name in vit.before if name in vit.after and name not in results]
    assert gone == [name for name in vit.before if name not in vit.after or name in results]
    assert len(results) >= regions.count()
    lead = page.text_content("#rewrite-lead")
    assert lead.startswith(f"{len(vit.before)} nodes before, {len(vit.after)} after: {len(gone)} went into")
    assert lead.endswith(f"{len(stayed)} stayed as they were.")


def test_a_node_of_the_rewrite_leads_to_its_row(opened):
    page = opened.page
    region = page.locator("#steps > details:has-text('vit_layers_1')")
    _unfolded(page, region)
    assert "reads add_2" in region.text_content()
    region.locator("li button:text-is('vit_layers_1_mlp_fc1')").click()
    assert page.text_content("#panel h3") == "vit_layers_1_mlp_fc1"
    assert _node(opened, "vit_layers_1_mlp_fc1").get_attribute("aria-selected") == "true"


def test_the_axis_can_be_chosen(opened):
    page, nodes = opened.page, opened.data["nodes"]
    assert page.locator("#axis-table tbody tr").count() == 1
    page.click("#unfold")
    softmax = _node(opened, "scaled_dot_product_attention")
    assert softmax.locator(".behaviour").text_content() == "↓ passes"
    page.select_option("#axis", "token")
    kinds = [node["axes"].get("token", {}).get("behaviour") for node in nodes]
    assert page.locator("#axis-table tbody tr").count() == kinds.count("BARRIER") + kinds.count("REDUCE") > 1
    assert softmax.locator(".behaviour").text_content() == "▮ barrier"


def test_dark_and_light_follow_the_system(browser, vit):
    colours = set()
    for scheme in ("light", "dark"):
        found = _open(browser, vit.path, color_scheme=scheme)
        colours.add(found.page.evaluate("getComputedStyle(document.body).backgroundColor"))
        found.page.close()
    assert colours == {"rgb(255, 255, 255)", "rgb(20, 24, 29)"}


def test_hostile_names_are_text(browser, make_vit, make_images, tmp_path):
    graph = bwsk_fx.capture(make_vit(), make_images(3))
    bwsk_fx.type_nodes(graph)
    for node in graph.graph.nodes:
        if node.op == "call_module":
            node.name = f"{HOSTILE}<img src=x onerror=alert(2)>{node.name}"
            node.meta["nn_module_stack"] = {"": ("", nn.Module), f"m.{HOSTILE}": ("", type(HOSTILE, (), {}))}
            node.stack_trace = f'File "{HOSTILE}", line 3, in forward'
    bwsk_fx.save_html(graph, tmp_path / "page.html", title=HOSTILE)
    found = _open(browser, tmp_path / "page.html")
    page = found.page
    assert page.text_content("h1") == HOSTILE
    page.click("#unfold")
    page.locator(f'#tree [data-place]:has-text("{HOSTILE}")').first.click()
    assert page.text_content("#panel h3").startswith(f"{HOSTILE}<img src=x onerror=alert(2)>vit_")
    assert f"{HOSTILE}:3" in page.text_content("#panel")
    assert page.locator("script").count() == 2
    assert page.locator("img").count() == 0
    assert "not rewritten" in page.text_content("#notes")
    assert page.locator("#sections a").all_text_contents() == ["Graph", "Axes"]
    # What the page had started would have run, or been refused, before two frames were drawn.
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    assert found.problems == []
    page.close()


class _Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.tanh = nn.Linear(4, 4), nn.Tanh()

    def forward(self, x):
        return self.tanh(self.linear(x)) * 2 + 1


def _repeated(graph, times: int):
    """Run what a graph runs so many times over; to capture a model of that length takes ten times as long."""
    nodes = graph.graph
    (first,) = nodes.find_nodes(op="placeholder")
    calls = [node for node in nodes.nodes if node.op not in ("placeholder", "output")]
    last = calls[-1]
    with nodes.inserting_before(nodes.output_node()):
        for _ in range(times - 1):
            made = {first: last}
            for node in calls:
                made[node] = nodes.node_copy(node, made.__getitem__)
            last = made[calls[-1]]
    nodes.output_node().args = (last,)
    graph.recompile()
    return graph


def test_two_thousand_nodes_are_usable(browser, tmp_path):
    graph = _repeated(bwsk_fx.capture(_Block(), torch.randn(2, 4)), 500)
    bwsk_fx.type_nodes(graph)
    bwsk_fx.save_html(graph, tmp_path / "page.html")
    found = _open(browser, tmp_path / "page.html")
    assert len(found.data["nodes"]) == 500 * 4 + 2
    found.page.click("#unfold")
    assert len(_rows(found.page)) == len(found.data["nodes"])
    found.page.fill("#search", "tanh")
    assert len(_rows(found.page)) == 500
    assert found.problems == []
    found.page.close()
