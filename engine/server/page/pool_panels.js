// Numbers, requests, a block table and events: what stands around the grid.

import { element } from "./markdown.js";
import { KINDS, requestColor } from "./pool_grid.js";

const $ = (id) => document.getElementById(id);
const MAX_EVENTS = 60;

function percent(part, whole) {
  return whole ? `${((100 * part) / whole).toFixed(part && part < whole ? 1 : 0)}%` : "–";
}

function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export function showNumbers(counts) {
  const { size, used, cached, saved, filled, slots, queries, hits, preemptions, states } = counts;
  const numbers = [
    ["Blocks in use", `${used}`, `of ${size}`],
    ["Cached", `${cached}`, ""],
    ["Free", `${size - used - cached}`, ""],
    ["Saved by sharing", `${saved}`, saved === 1 ? "block" : "blocks"],
    ["Slots unfilled", slots ? percent(slots - filled, slots) : "0%", "in use"],
    ["Prefix hits", percent(hits, queries), ""],
    ["Run · wait · swapped", `${states.running} · ${states.waiting + states.preempted} · ${states.swapped}`, ""],
    ["Preemptions", `${preemptions}`, ""],
  ];
  const parent = $("numbers");
  if (!parent.children.length) parent.append(...numbers.map(([label], i) => makeNumber(label, i === 0)));
  numbers.forEach(([, value, unit], i) => {
    const box = parent.children[i].querySelector("b");
    setText(box.firstChild, value);
    setText(box.lastChild, unit);
  });
  const [usedBar, cachedBar] = parent.querySelectorAll(".meter i");
  usedBar.style.width = `${(100 * used) / Math.max(1, size)}%`;
  cachedBar.style.width = `${(100 * cached) / Math.max(1, size)}%`;
}

function makeNumber(label, hasMeter) {
  const value = element("b", {}, element("output"), element("small"));
  const box = element("div", { className: "number" }, element("span", { textContent: label }), value);
  const bars = ["used", "cached"].map((className) => element("i", { className }));
  if (hasMeter) box.append(element("div", { className: "meter" }, ...bars));
  return box;
}

const ORDER = ["running", "swapped", "preempted", "waiting", "pinned"];
const MAX_REQUESTS = 200;

/** List the requests; rows are kept, so that focus stays. */
export function showRequests(model, selected, select) {
  const list = $("requests");
  const requests = [...model.requests.values()].sort((a, b) => ORDER.indexOf(a.status) - ORDER.indexOf(b.status));
  setText($("request-count"), requests.length ? `${requests.length}` : "");
  const rows = new Map([...list.children].map((row) => [row.dataset.id, row]));
  requests.slice(0, MAX_REQUESTS).forEach((request, i) => {
    const row = rows.get(request.id) ?? makeRow(request, select);
    rows.delete(request.id);
    const [, , state, what] = row.firstChild.children;
    setText(state, request.status);
    state.className = `state ${request.status}`;
    setText(what, describe(request));
    row.firstChild.setAttribute("aria-pressed", request.id === selected);
    row.firstChild.firstChild.style.background = requestColor(request.color);
    if (list.children[i] !== row) list.insertBefore(row, list.children[i] ?? null);
  });
  for (const row of rows.values()) row.remove();
}

function makeRow({ id }, select) {
  const button = element(
    "button",
    { type: "button", title: id },
    element("i"),
    element("span", { className: "name", textContent: shortened(id) }),
    element("span"),
    element("span", { className: "what" }),
  );
  button.addEventListener("click", () => select(id));
  const row = element("li", {}, button);
  row.dataset.id = id;
  return row;
}

/** Shorten what a server has drawn: chatcmpl-0123456789abcdef-0 becomes chatcmpl-0123456789… */
function shortened(id) {
  return id.length > 24 ? `${id.slice(0, 19)}…${id.slice(-2)}` : id;
}

function describe({ sequences }) {
  const all = [...sequences.values()];
  const tokens = Math.max(0, ...all.map((sequence) => sequence.tokens));
  const blocks = new Set(all.flatMap(({ medium, table }) => table.filter((b) => b !== null).map((b) => `${medium}${b}`)));
  const outputs = all.length > 1 ? `${all.length} sequences, ` : "";
  return `${outputs}${tokens} tokens, ${blocks.size} ${blocks.size === 1 ? "block" : "blocks"}`;
}

export function showTable(model, selected, point) {
  const request = model.requests.get(selected);
  $("table-panel").hidden = !selected;
  if (!selected) return;
  const parent = $("block-table");
  if (!request) return parent.replaceChildren(element("p", { className: "dim", textContent: "This request has ended." }));
  const title = element("p", { className: "dim", textContent: request.id });
  const focused = document.activeElement?.dataset?.place;
  const rows = [...request.sequences.values()].flatMap(({ sequence, tokens, computed, medium, table }) => [
    element("p", { textContent: `Sequence ${sequence}: ${computed} of ${tokens} tokens computed, ${medium}` }),
    element("div", { className: "table-row" }, ...table.map((block) => chip(model, request, medium, block, point))),
  ]);
  parent.replaceChildren(title, ...rows);
  if (focused) parent.querySelector(`[data-place="${focused}"]`)?.focus();
}

function chip(model, request, medium, block, point) {
  if (block === null) return element("button", { type: "button", disabled: true, textContent: "–", title: "freed: outside of the window" });
  const references = model.pools[medium].references[block];
  const made = element("button", { type: "button", textContent: block });
  if (references > 1) made.append(element("sup", { textContent: `×${references}` }));
  made.style.borderColor = requestColor(request.color, references > 1 ? 1 : 0.4);
  made.style.background = requestColor(request.color, references > 1 ? 0.35 : 0.14);
  made.dataset.place = `${medium}${block}`;
  made.ariaLabel = `Block ${block}, ${references} ${references === 1 ? "reference" : "references"}`;
  for (const event of ["pointerenter", "focus"]) made.addEventListener(event, () => point({ medium, block }));
  for (const event of ["pointerleave", "blur"]) made.addEventListener(event, () => point(null));
  return made;
}

/** Add what a report tells to the list of events, the newest first. */
export function tell(report, model) {
  const list = $("events");
  const name = (sequence) => {
    const known = model.requestOf.get(sequence);
    return known ? shortened(known.id) : `sequence ${sequence}`;
  };
  const blocks = (count) => `${count} ${count === 1 ? "block" : "blocks"}`;
  const evicted = (report.happened ?? []).filter(({ type }) => type === "eviction").length;
  const lines = [];
  for (const { type, sequences = [], blocks: pairs = [] } of report.happened ?? []) {
    const who = name(sequences[0]);
    if (type === "fork") lines.push([type, `${who} forked: sequence ${sequences[1]} from ${sequences[0]}`]);
    if (type === "copy_on_write") lines.push([type, `${who} writes: block ${pairs[0][0]} copied to ${pairs[0][1]}`]);
    if (type === "prefix_hit") lines.push([type, `${who} found ${blocks(pairs.length)} in the cache`]);
    if (type === "swap_out") lines.push([type, `${who} preempted: ${blocks(pairs.length)} swapped out`]);
    if (type === "swap_in") lines.push([type, `${who} is back: ${blocks(pairs.length)} swapped in`]);
    if (type === "recompute") lines.push([type, `${who} preempted: to be computed again`]);
  }
  // One line for evictions that follow each other.
  const before = lines.length ? 0 : Number(list.firstChild?.dataset.evicted ?? 0);
  const total = before + evicted;
  if (evicted) lines.push(["eviction", `${blocks(total)} evicted from the cache`]);
  if (evicted && before) list.firstChild.remove();
  const time = new Date(1000 * report.time).toTimeString().slice(0, 8);
  for (const [type, text] of lines) {
    const dot = element("i");
    dot.style.background = KINDS[type].color;
    const line = element("li", {}, dot, element("span", { textContent: text }), element("time", { textContent: time }));
    if (type === "eviction") line.dataset.evicted = total;
    list.prepend(line);
  }
  while (list.children.length > MAX_EVENTS) list.lastChild.remove();
}
