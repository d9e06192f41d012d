"use strict";
// Text reaches the page as text nodes only, never as markup.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const LABELS = ["S", "K", "GRAY"];
  const LETTERS = { S: "S", K: "K", GRAY: "G" };
  const ACTIONS = { keep: "kept", recompute: "recomputed", invert: "inverted" };
  const WORDS = { S: "S · preserves", K: "K · erases", GRAY: "GRAY · unknown" };
  const BEHAVIOURS = { MAP: "↓ passes", JOIN: "↓ joined", REDUCE: "Σ reduced", BARRIER: "▮ barrier" };
  const FIRST_SIGHT = 36;
  const FIRST_ROWS = 250;

  function el(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name === "class") made.className = value;
      else if (name === "on") for (const [event, run] of Object.entries(value)) made.addEventListener(event, run);
      else made.setAttribute(name, value);
    }
    made.append(...children.filter((child) => child !== null && child !== undefined).map((child) => (child instanceof Node ? child : String(child))));
    return made;
  }

  function bytes(count) {
    for (const [unit, size] of [["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 2 ** 10]]) {
      if (count >= size) return `${(count / size).toFixed(2)} ${unit}`;
    }
    return `${count} B`;
  }

  const number = (value) => value.toLocaleString("en-US", { maximumFractionDigits: 1 });
  const percent = (share) => `${(100 * share).toFixed(1)} %`;
  const count = (howMany, noun) => `${number(howMany)} ${noun}${howMany === 1 ? "" : "s"}`;
  const shape = (sizes) => sizes.join("×") || "scalar";
  const tail = (path) => path.split("/").pop();
  const badge = (node) => el("span", { class: `badge ${node.label}${node.counted ? "" : " hollow"}`, title: node.rationale }, LETTERS[node.label]);
  const regionName = (place) => (place < 0 ? "" : data.regions[place].name);
  const parity = (region) => (region < 0 ? "" : region % 2 ? "odd" : "even");
  const nodeLink = (place) => el("button", { type: "button", class: "link mono", on: { click: () => select(place, true) } }, data.nodes[place].name);

  // What follows from the data.
  data.nodes.forEach((node, place) => Object.assign(node, { place, users: [], saved: [] }));
  data.nodes.forEach((node) => node.inputs.forEach((input) => data.nodes[input].users.push(node.place)));
  data.saved.forEach((value) => value.node >= 0 && data.nodes[value.node].saved.push(value));
  const planned = data.saved.length > 0;
  const axes = [...new Set(data.nodes.flatMap((node) => Object.keys(node.axes)))].sort((one, other) => (other === "batch") - (one === "batch"));
  const state = { query: "", labels: new Set(LABELS), structure: true, axis: axes[0] || "", selected: -1, current: null };

  // ---- header
  function writeHeader() {
    const { summary, totals } = data;
    const size = data.batch === null ? "sizes in bytes are for one sample" : `sizes in bytes are for a batch of ${data.batch}`;
    byId("subtitle").textContent = `A torch.fx graph whose operators are labelled by what they do to their input: ${count(data.nodes.length, "node")}, of which ${number(summary.total)} are counted; ${summary.ruleset} ruleset. In shapes B is the batch; ${size}.`;
    const counts = { S: summary.s, K: summary.k, GRAY: summary.gray };
    for (const label of LABELS) {
      if (!counts[label]) continue;
      const part = el("span", { class: label }, `${label} ${counts[label]} (${percent(counts[label] / summary.total)})`);
      part.style.flex = `${counts[label]} 1 0`;
      byId("labels").append(part);
    }
    byId("labels").setAttribute("aria-label", LABELS.map((label) => `${counts[label]} ${label}`).join(", "));
    const tile = (value, words) => byId("tiles").append(el("div", {}, el("b", {}, value), el("span", {}, words)));
    if (summary.erased_elements) tile(number(summary.erased_elements), `elements erased per sample${summary.unmeasured ? `, and unknown amounts by ${summary.unmeasured} K` : ""}`);
    if (data.regions.length) tile(data.regions.length, "reversible regions");
    if (totals) {
      tile(`${bytes(totals.conventional_bytes)} → ${bytes(totals.kept_bytes)}`, `kept for the backward pass (${percent(totals.kept_bytes / (totals.conventional_bytes || 1))} of eager's)`);
      tile(`${totals.overhead >= 0 ? "+" : "−"}${percent(Math.abs(totals.overhead))}`, "modelled time of a step, beside eager's");
    }
    byId("notes").hidden = !data.notes.length;
    if (data.notes.length) byId("notes").append(el("p", {}, el("b", {}, "Left out on this page")), ...data.notes.map((note) => el("p", {}, note)));
  }

  // ---- tree
  const items = new Map();
  function asItem(child, parent) {
    if (typeof child === "number") {
      const item = { node: data.nodes[child], parent, depth: parent.depth + 1 };
      items.set(child, item);
      return item;
    }
    const group = { group: child, parent, depth: parent ? parent.depth + 1 : 0, open: false };
    group.items = child.children.map((one) => asItem(one, group));
    const places = group.items.flatMap((item) => (item.node ? [item.node.region] : item.regions));
    group.regions = [...new Set(places)];
    group.size = group.items.reduce((sum, item) => sum + (item.node ? 1 : item.size), 0);
    group.kept = group.items.reduce((sum, item) => sum + (item.node ? kept(item.node) : item.kept), 0);
    return group;
  }
  const kept = (node) => node.saved.reduce((sum, value) => sum + (value.action === "keep" ? value.bytes : 0), 0);
  const root = asItem(data.tree, null);
  const filtering = () => state.query !== "" || state.labels.size < LABELS.length || !state.structure;
  const isOpen = (group) => (state.query ? !group.folded : group.open);

  function openAtFirst() {
    root.open = true;
    let rows = 1 + root.items.length;
    const queue = root.items.filter((item) => item.group);
    while (queue.length) {
      const group = queue.shift();
      if (rows + group.items.length > FIRST_SIGHT) continue;
      group.open = true;
      rows += group.items.length;
      queue.push(...group.items.filter((item) => item.group));
    }
  }

  function passes(node) {
    if (!node.counted ? !state.structure : !state.labels.has(node.label)) return false;
    if (!state.query) return true;
    node.text ??= [node.name, node.operator, node.target, modulePath(node.place)].join("\n").toLowerCase();
    return state.query.split(/\s+/).every((word) => node.text.includes(word));
  }

  function modulePath(place) {
    const parent = items.get(place).parent;
    return parent.group.path;
  }

  function match(item) {
    if (item.node) item.matches = passes(item.node) ? 1 : 0;
    else item.matches = item.items.reduce((sum, one) => sum + match(one), 0);
    return item.matches;
  }

  function visible(item, rows = []) {
    if (!item.matches) return rows;
    rows.push(item);
    if (item.group && isOpen(item)) item.items.forEach((one) => visible(one, rows));
    return rows;
  }

  let rows = [];
  function draw() {
    rows = visible(root);
    rows.forEach((item, place) => {
      item.row ??= item.node ? nodeRow(item) : groupRow(item);
      const region = regionOf(item);
      const before = place ? regionOf(rows[place - 1]) : -1;
      const after = place + 1 < rows.length ? regionOf(rows[place + 1]) : -1;
      const begins = region >= 0 && region !== before;
      item.row.className = `row${planned ? "" : " unplanned"} ${item.group ? "group" : item.node.counted ? "" : "structure"} ${parity(region)}${begins ? " begins" : ""}${region >= 0 && region !== after ? " ends" : ""}`;
      const chip = item.row.querySelector(".chip");
      if (chip) chip.hidden = !begins;
      if (item.group) {
        item.row.setAttribute("aria-expanded", String(isOpen(item)));
        item.row.querySelector(".caret").textContent = isOpen(item) ? "▾" : "▸";
      }
    });
    byId("tree").replaceChildren(...rows.map((item) => item.row));
    byId("nothing").hidden = rows.length > 0;
    if (!rows.includes(state.current)) focusable(rows[0]);
    byId("found").textContent = filtering() ? `${number(root.matches)} of ${count(data.nodes.length, "node")}` : "";
  }

  const regionOf = (item) => (item.node ? item.node.region : item.regions.length === 1 ? item.regions[0] : -1);

  function redraw() {
    match(root);
    draw();
  }

  function focusable(item) {
    if (state.current?.row) state.current.row.tabIndex = -1;
    state.current = item ?? null;
    if (item) item.row.tabIndex = 0;
  }

  // Within a module, what its path says already is left away, so that names fit.
  function shortName(node) {
    const prefix = `${modulePath(node.place).replaceAll(".", "_")}_`;
    return prefix.length > 1 && node.name.startsWith(prefix) ? `…${node.name.slice(prefix.length)}` : node.name;
  }

  function name(item, words, ...more) {
    const cell = el("span", { class: "name" }, el("span", { class: "caret" }), el("span", { class: item.node ? "mono" : "", title: item.node ? item.node.name : item.group.path }, words), ...more);
    cell.style.paddingLeft = `${8 + 14 * item.depth}px`;
    return cell;
  }

  function rowOf(item, label, ...cells) {
    const row = el("div", { role: "treeitem", "aria-level": item.depth + 1, tabindex: "-1", "aria-label": label }, ...cells);
    row.addEventListener("click", () => activate(item));
    return row;
  }

  function chipOf(item) {
    const region = regionOf(item);
    return region < 0 ? null : el("span", { class: "chip", title: `reversible region ${regionName(region)}` }, `↺ ${regionName(region)}`);
  }

  function nodeRow(item) {
    const { node } = item;
    const first = node.results[0];
    const shown = first ? `${shape(first.shape)}${node.results.length > 1 ? ` (+${node.results.length - 1})` : ""}` : "";
    const label = `${node.name}, ${node.operator}, ${WORDS[node.label]}${node.region < 0 ? "" : `, region ${regionName(node.region)}`}`;
    const cells = [
      name(item, shortName(node), chipOf(item)),
      el("span", {}, badge(node)),
      el("span", { title: node.target }, node.operator),
      el("span", { class: "mono", title: first ? `${shape(first.shape)} ${first.dtype}` : "" }, shown),
      el("span", { class: "number" }, node.results.length ? bytes(node.bytes) : ""),
    ];
    if (planned) cells.push(el("span", {}, ...[...new Set(node.saved.map((value) => value.action))].map(action)));
    cells.push(item.axis = el("span", {}));
    writeAxis(item);
    const row = rowOf(item, label, ...cells);
    row.dataset.place = node.place;
    return row;
  }

  function groupRow(item) {
    const { group } = item;
    const parent = item.parent?.group.path;
    const words = item.parent ? (parent && group.path.startsWith(`${parent}.`) ? group.path.slice(parent.length + 1) : group.path) : data.title;
    const bar = el("span", { class: "mini", title: LABELS.map((label) => `${label} ${group.counts[label]}`).join(", ") });
    for (const label of LABELS.filter((one) => group.counts[one])) {
      const part = el("span", { class: label }, `${LETTERS[label]} ${group.counts[label]}`);
      part.style.flexGrow = group.counts[label];
      bar.append(part);
    }
    const cells = [name(item, words, chipOf(item)), bar, el("span", { class: "plain", title: group.class }, group.class), el("span", { class: "plain" }, count(item.size, "node")), el("span", {})];
    if (planned) cells.push(el("span", { class: "plain" }, item.kept ? `kept ${bytes(item.kept)}` : ""));
    cells.push(el("span", {}));
    const row = rowOf(item, `module ${group.path || data.title}, ${group.class}, ${item.size} nodes`, ...cells);
    row.dataset.module = group.path;
    return row;
  }

  const action = (kind) => el("span", { class: `action ${kind}` }, ACTIONS[kind]);
  const behaviour = (kind) => el("span", { class: `behaviour ${kind}` }, BEHAVIOURS[kind]);

  function writeAxis(item) {
    const fact = item.node.axes[state.axis];
    item.axis.replaceChildren(...(fact ? [behaviour(fact.behaviour)] : []));
    item.axis.title = fact ? fact.reason : "";
  }

  function activate(item) {
    if (item.node) select(item.node.place, false);
    else {
      if (state.query) item.folded = isOpen(item);
      else item.open = !item.open;
      draw();
    }
    focusable(item);
    item.row.focus({ preventScroll: true });
  }

  function move(place) {
    const item = rows[Math.max(0, Math.min(rows.length - 1, place))];
    focusable(item);
    item.row.focus();
    item.row.scrollIntoView({ block: "nearest" });
  }

  function onTreeKey(event) {
    const item = state.current;
    const at = rows.indexOf(item);
    if (at < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
    const open = item.group && isOpen(item);
    const keys = {
      ArrowDown: () => move(at + 1),
      ArrowUp: () => move(at - 1),
      Home: () => move(0),
      End: () => move(rows.length - 1),
      PageDown: () => move(at + 15),
      PageUp: () => move(at - 15),
      Enter: () => activate(item),
      " ": () => activate(item),
      ArrowRight: () => (open ? move(at + 1) : item.group && activate(item)),
      ArrowLeft: () => (open ? activate(item) : item.parent && move(rows.indexOf(item.parent))),
    };
    if (!keys[event.key]) return;
    event.preventDefault();
    keys[event.key]();
  }

  // ---- panel
  function select(place, reveal) {
    if (state.selected >= 0) items.get(state.selected).row?.setAttribute("aria-selected", "false");
    state.selected = place;
    const item = items.get(place);
    if (reveal) {
      if (!passes(item.node)) showAll();
      for (let up = item.parent; up; up = up.parent) Object.assign(up, { open: true, folded: false });
      redraw();
    }
    item.row.setAttribute("aria-selected", "true");
    writePanel(item);
    if (reveal) {
      focusable(item);
      item.row.scrollIntoView({ block: "center" });
      byId("graph").scrollIntoView({ block: "start" });
      byId("panel").focus({ preventScroll: true });
    }
  }

  function showAll() {
    state.query = byId("search").value = "";
    state.structure = true;
    LABELS.forEach((label) => state.labels.add(label));
    byId("verdicts").querySelectorAll("button").forEach((button) => button.setAttribute("aria-pressed", "true"));
  }

  const erased = ({ elements, bits, expected }) =>
    [elements === undefined ? null : `${number(elements)} elements`, bits === undefined ? null : `${number(bits)} bits`].filter(Boolean).join(" and ") + ` per sample${expected ? ", on average" : ""}`;

  function witness({ kind, names, elements, bytes: size }) {
    const amounts = [elements === undefined ? null : count(elements, "element"), size === undefined ? null : bytes(size)].filter(Boolean);
    const words = { nothing: "nothing: the output alone rebuilds the input", unstated: "not stated by this ruleset" };
    return (words[kind] || `${kind}: ${names.join(", ")}`) + (amounts.length ? ` (${amounts.join(", ")} per sample)` : "");
  }

  function writePanel({ node }) {
    const facts = el("dl");
    const fact = (term, ...contents) => contents.length && facts.append(el("dt", {}, term), el("dd", {}, ...contents));
    const list = (parts) => (parts.length ? [el("ul", {}, ...parts.map((part) => el("li", {}, part)))] : ["none"]);
    fact("operator", el("code", {}, node.operator), node.target === node.operator ? "" : ` (${node.target})`);
    fact("module", modulePath(node.place) || "(the model itself)");
    fact("why", node.rationale);
    if (node.witness) fact("witness", witness(node.witness));
    if (node.domain) fact("holds where", node.domain);
    if (node.erasure) fact("erased", erased(node.erasure));
    fact("rule", el("code", {}, node.rule), `, confidence ${node.confidence}${node.counted ? "" : "; not counted"}`);
    if (node.source) fact("source", el("code", {}, node.source));
    fact("results", ...list(node.results.map((one) => `${shape(one.shape)} ${one.dtype}, ${bytes(one.bytes)}`)));
    if (node.region >= 0) fact("region", `↺ ${regionName(node.region)}`);
    if (node.saved.length) fact("backward pass", ...list(node.saved.map((value) => el("span", {}, action(value.action), ` ${bytes(value.bytes)} ${value.operator}, ${value.why} (region ${regionName(value.region)})`))));
    fact("inputs", ...list(node.inputs.map(nodeLink)));
    fact("users", ...list(node.users.map(nodeLink)));
    for (const [axis, { behaviour: kind, reason }] of Object.entries(node.axes)) fact(`${axis} axis`, behaviour(kind), ` ${reason}`);
    byId("panel").replaceChildren(el("h3", { class: "mono" }, node.name), el("div", { class: "verdict" }, badge(node), ` ${WORDS[node.label]}`), facts);
    byId("panel").scrollTop = 0;
  }

  // ---- filters
  function toggle(words, classes, pressed, change) {
    const button = el("button", { type: "button", class: classes, "aria-pressed": String(pressed) }, words);
    button.addEventListener("click", () => {
      const now = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", String(now));
      change(now);
    });
    return button;
  }

  const put = (set, value, wanted) => (wanted ? set.add(value) : set.delete(value));

  function writeGraphTools() {
    const { summary } = data;
    const counts = { S: summary.s, K: summary.k, GRAY: summary.gray };
    const buttons = LABELS.map((label) => toggle(`${label} ${counts[label]}`, label, true, (now) => (put(state.labels, label, now), redraw())));
    buttons.push(toggle(`not counted ${data.nodes.length - summary.total}`, "", true, (now) => ((state.structure = now), redraw())));
    byId("verdicts").append(...buttons);
    byId("search").addEventListener("input", (event) => {
      state.query = event.target.value.trim().toLowerCase();
      everyGroup(root, (group) => (group.folded = false));
      redraw();
    });
    byId("search").addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === "ArrowDown") {
        event.preventDefault();
        const first = rows.findIndex((item) => item.node);
        if (first >= 0) move(first);
      }
    });
    const all = (open) => () => (everyGroup(root, (group) => Object.assign(group, { open: open || group === root, folded: !open && group !== root })), draw());
    byId("unfold").addEventListener("click", all(true));
    byId("fold").addEventListener("click", all(false));
    byId("reset").addEventListener("click", () => (showAll(), redraw()));
    byId("tree").addEventListener("keydown", onTreeKey);
    document.addEventListener("keydown", (event) => {
      if (event.key === "/" && !/^(INPUT|SELECT|TEXTAREA)$/.test(document.activeElement.tagName)) {
        event.preventDefault();
        byId("search").focus();
      } else if (event.key === "Escape" && document.activeElement === byId("search")) {
        byId("search").value = "";
        byId("search").dispatchEvent(new Event("input"));
      } else if (event.key === "Escape" && byId("panel").contains(document.activeElement)) state.current?.row.focus();
    });
  }

  function everyGroup(group, change) {
    change(group);
    group.items.filter((item) => item.group).forEach((item) => everyGroup(item, change));
  }

  // ---- tables
  function table(target, columns, allRows, options = {}) {
    const own = { sort: options.sort ?? null, descending: true, limit: FIRST_ROWS, filter: () => true };
    const heads = columns.map((column) => {
      const head = el("th", { scope: "col", class: column.number ? "number" : "", "aria-sort": "none" }, el("button", { type: "button" }, column.head));
      head.firstChild.addEventListener("click", () => {
        own.descending = own.sort === column ? !own.descending : Boolean(column.number);
        own.sort = column;
        redrawTable();
      });
      return head;
    });
    const body = el("tbody");
    target.replaceChildren(el("thead", {}, el("tr", {}, ...heads)), body);
    function redrawTable() {
      const found = allRows.filter(own.filter);
      if (own.sort) {
        const { value } = own.sort;
        const way = own.descending ? -1 : 1;
        found.sort((one, other) => way * (own.sort.number ? value(one) - value(other) : String(value(one)).localeCompare(String(value(other)))));
      }
      heads.forEach((head, place) => head.setAttribute("aria-sort", columns[place] !== own.sort ? "none" : own.descending ? "descending" : "ascending"));
      body.replaceChildren(...found.slice(0, own.limit).map((row) => el("tr", {}, ...columns.map((column) => el("td", { class: column.number ? "number" : column.class ?? "" }, column.cell ? column.cell(row) : column.value(row))))));
      options.after?.(found, own);
    }
    redrawTable();
    return { own, redraw: redrawTable };
  }

  function writeSaved() {
    byId("saved").hidden = !planned;
    if (!planned) return;
    const columns = [
      { head: "value", value: (row) => row.name, class: "soft mono" },
      { head: "size", value: (row) => row.bytes, cell: (row) => bytes(row.bytes), number: true },
      { head: "how", value: (row) => ACTIONS[row.action], cell: (row) => action(row.action) },
      { head: "why", value: (row) => row.why + (row.sources.length ? ` from ${row.sources.join(", ")}` : ""), class: "soft long" },
      { head: "producer", value: (row) => (row.node < 0 ? "" : data.nodes[row.node].name), cell: (row) => (row.node < 0 ? "" : nodeLink(row.node)) },
      { head: "operator", value: (row) => row.operator, class: "soft" },
      { head: "shape", value: (row) => shape(row.shape), class: "mono" },
      { head: "dtype", value: (row) => row.dtype },
      { head: "region", value: (row) => regionName(row.region) },
      { head: "source", value: (row) => row.source, cell: (row) => el("span", { title: row.source }, tail(row.source)), class: "mono" },
    ];
    const wanted = new Set(Object.keys(ACTIONS));
    let words = [];
    const text = (row) => (row.text ??= columns.map((column) => column.value(row)).join("\n").toLowerCase());
    const more = byId("saved-more");
    const saved = table(byId("saved-table"), columns, data.saved, {
      sort: columns[1],
      after: (found, own) => {
        const size = found.reduce((sum, row) => sum + (row.action === "keep" ? row.bytes : 0), 0);
        byId("saved-found").textContent = `${number(found.length)} of ${count(data.saved.length, "value")}; ${bytes(size)} kept`;
        more.hidden = found.length <= own.limit;
        more.textContent = `Show all ${number(found.length)}`;
      },
    });
    saved.own.filter = (row) => wanted.has(row.action) && words.every((word) => text(row).includes(word));
    for (const kind of Object.keys(ACTIONS)) {
      const howMany = data.saved.filter((row) => row.action === kind).length;
      byId("actions").append(toggle(`${ACTIONS[kind]} ${number(howMany)}`, kind, true, (now) => (put(wanted, kind, now), saved.redraw())));
    }
    byId("saved-search").addEventListener("input", (event) => {
      words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
      saved.redraw();
    });
    more.addEventListener("click", () => ((saved.own.limit = Infinity), saved.redraw()));
    if (data.totals.outside_bytes) byId("outside").textContent = `Between regions PyTorch keeps ${bytes(data.totals.outside_bytes)} besides.`;
    saved.redraw();
  }

  // ---- rewrite
  function writeRewrite() {
    const { rewrite } = data;
    byId("rewrite").hidden = rewrite === null;
    byId("region-lead").hidden = rewrite === null;
    if (rewrite === null) return;
    const fused = data.regions.reduce((sum, region) => sum + region.nodes.length, 0);
    byId("rewrite-lead").textContent = `${count(rewrite.before, "node")} before, ${rewrite.after} after: ${fused} went into ${count(rewrite.calls, "region")}, each of which is one call and one node per result; ${rewrite.before - fused} stayed as they were.`;
    byId("steps").append(...rewrite.steps.map((step) => ("region" in step ? regionStep(step.region) : keptStep(step.nodes))));
  }

  function lazily(details, fill) {
    details.addEventListener("toggle", () => details.open && details.childElementCount === 1 && details.append(...fill()));
    return details;
  }

  const links = (places) => places.flatMap((place, at) => [at ? ", " : "", nodeLink(place)]);
  const operators = (places) => el("ol", {}, ...places.map((place) => el("li", {}, badge(data.nodes[place]), " ", nodeLink(place), ` ${data.nodes[place].operator}`)));

  function keptStep(places) {
    const summary = el("summary", {}, `${count(places.length, "node")} unchanged: ${places.slice(0, 4).map((place) => data.nodes[place].name).join(", ")}${places.length > 4 ? ", …" : ""}`);
    return lazily(el("details", {}, summary), () => [operators(places)]);
  }

  function regionStep(place) {
    const region = data.regions[place];
    const counts = LABELS.map((label) => [label, region.nodes.filter((node) => data.nodes[node].counted && data.nodes[node].label === label).length]).filter((pair) => pair[1]);
    const plan = region.plan ? `, keeps ${bytes(region.plan.kept)} of eager's ${bytes(region.plan.conventional)}` : "";
    const summary = el("summary", {}, el("b", {}, `↺ ${region.name}`), ` ${count(region.nodes.length, "node")} (${counts.map((pair) => pair.join(" ")).join(", ")}) became 1 call with ${count(region.outputs.length, "result")}${plan}`);
    return lazily(el("details", { class: parity(place) }, summary), () => [
      el("div", { class: "before-after" },
        el("div", {}, el("h4", {}, `Before: ${count(region.nodes.length, "node")}`), operators(region.nodes)),
        el("div", {}, el("h4", {}, `After: 1 call and ${count(region.outputs.length, "result")}`), el("p", {}, el("code", {}, `reversible_regions.${region.name}`), el("br"), `options: ${region.options}`), el("p", {}, "reads ", ...links(region.inputs)), el("p", {}, "returns ", ...links(region.outputs)))),
    ]);
  }

  // ---- axes
  function writeAxes() {
    byId("axes").hidden = byId("axis-choice").hidden = !axes.length;
    if (!axes.length) return;
    byId("axis").append(...axes.map((axis) => el("option", { value: axis }, axis)));
    byId("axis").addEventListener("change", (event) => {
      state.axis = event.target.value;
      items.forEach((item) => item.axis && writeAxis(item));
      writeColumns();
      writeAxisTable();
    });
    writeAxisTable();
  }

  function writeAxisTable() {
    const { axis } = state;
    const found = data.nodes.filter((node) => node.axes[axis]);
    const having = (...kinds) => found.filter((node) => kinds.includes(node.axes[axis].behaviour)).length;
    byId("axis-name").textContent = axis + (axis === "batch" ? " (axis 0 of the inputs)" : "");
    byId("axis-lead").textContent = `${count(found.length, "node")} carry it. It passes ${having("MAP", "JOIN")} shard by shard, is reduced by ${having("REDUCE")}, and ${having("BARRIER")} wait for all of it${having("REDUCE", "BARRIER") ? ":" : "."}`;
    const columns = [
      { head: "node", value: (node) => node.name, cell: (node) => nodeLink(node.place) },
      { head: "operator", value: (node) => node.operator },
      { head: "what happens", value: (node) => node.axes[axis].behaviour, cell: (node) => behaviour(node.axes[axis].behaviour) },
      { head: "why", value: (node) => node.axes[axis].reason },
      { head: "module", value: (node) => modulePath(node.place) },
    ];
    const waiting = found.filter((node) => ["REDUCE", "BARRIER"].includes(node.axes[axis].behaviour));
    byId("axis-table").parentElement.hidden = !waiting.length;
    table(byId("axis-table"), columns, waiting, { after: (_, own) => (own.limit = Infinity) });
  }

  function writeColumns() {
    const heads = ["module or node", "verdict", "operator", "result", "size", ...(planned ? ["backward"] : []), state.axis ? `${state.axis} axis` : ""];
    byId("columns").className = `row head${planned ? "" : " unplanned"}`;
    byId("columns").replaceChildren(...heads.map((head) => el("span", { class: head === "size" ? "number" : "" }, head)));
  }

  writeHeader();
  writeGraphTools();
  writeSaved();
  writeRewrite();
  writeAxes();
  writeColumns();
  openAtFirst();
  redraw();
  byId("panel").append(el("p", {}, "Select an operator to see its verdict, why it holds, what it erases, where it comes from, and what it feeds."));
  for (const section of document.querySelectorAll("main > section:not([hidden])")) {
    byId("sections").append(el("a", { href: `#${section.id}` }, section.getAttribute("aria-label")));
  }
})();
