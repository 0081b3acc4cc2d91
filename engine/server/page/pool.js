// The view of the block pool: connects, keeps the last minutes, and shows one moment of them.

import { ServerError, findModel, post, request, serverEvents } from "./api.js";
import { element } from "./markdown.js";
import { drawChart } from "./pool_chart.js";
import { CACHED, Grid, KINDS, requestColor } from "./pool_grid.js";
import { History, PoolModel } from "./pool_model.js";
import { showNumbers, showRequests, showTable, tell } from "./pool_panels.js";

const $ = (id) => document.getElementById(id);
const RETRY = [500, 1000, 2000, 5000]; // milliseconds before another attempt to connect
const HIDDEN = 60_000; // milliseconds in a hidden tab after which it disconnects

const live = new PoolModel();
const recorded = new History();
const grid = new Grid($("grid"));
let shown = live; // the model that is drawn: the live one, or one of the past
let pausedAt = null; // the time that is shown; null: now
let connection = null;
let leaving = null;

// -- the connection --------------------------------------------------------------------------------------

export function openPool() {
  if (!connection) connect();
  refresh();
}

async function connect() {
  const mine = (connection = new AbortController());
  for (let attempt = 0; connection === mine; attempt++) {
    try {
      const response = await request("kv_cache/events", { signal: mine.signal });
      for await (const data of serverEvents(response)) {
        attempt = 0;
        receive(JSON.parse(data), data.length);
      }
      throw new Error("The server has ended the stream: it stops, or its engine has failed.");
    } catch (error) {
      if (connection !== mine) return;
      setStatus("bad", error instanceof ServerError ? `refused: ${error.status}` : "reconnecting");
      showProblem(error.message);
      if (error instanceof ServerError && error.status < 500 && error.status !== 429) return void (connection = null);
    }
    await new Promise((resolve) => setTimeout(resolve, RETRY[Math.min(attempt, RETRY.length - 1)]));
  }
}

function receive(report, size) {
  if (!live.apply(report)) throw new Error("A report is missing: connecting again.");
  recorded.add(live, report, size);
  showProblem("");
  setStatus(pausedAt === null ? "live" : "", pausedAt === null ? "live" : "paused");
  if (pausedAt !== null) return void drawTimeline();
  tell(report, live);
  if (!$("pool").hidden) grid.flash(report);
  refresh();
}

document.addEventListener("visibilitychange", () => {
  clearTimeout(leaving);
  if (!document.hidden) return void (connection === null && live.number !== null && connect());
  leaving = setTimeout(() => {
    connection?.abort();
    connection = null;
    setStatus("", "asleep");
  }, HIDDEN);
});

function setStatus(kind, text) {
  $("pool-status").className = `badge ${kind}`;
  if ($("pool-status").textContent !== text) $("pool-status").textContent = text;
}

const problems = { stream: "", samples: "" };

function showProblem(text, of = "stream") {
  problems[of] = text;
  text = problems.stream || problems.samples;
  $("pool-error").hidden = !text;
  if ($("pool-error").textContent !== text) $("pool-error").textContent = text;
}

// -- what is shown ---------------------------------------------------------------------------------------

let frame = null;

function refresh() {
  frame ??= requestAnimationFrame(() => {
    frame = null;
    if ($("pool").hidden || shown.number === null) return;
    grid.update(shown);
    const counts = shown.counts();
    showNumbers(counts);
    showRequests(shown, grid.selected, select);
    showTable(shown, grid.selected, point);
    $("pool-about").textContent = `${counts.size} blocks of ${shown.blockSize} tokens`;
    $("pool-empty").hidden = counts.used + counts.cached + shown.requests.size > 0 || pausedAt !== null;
    $("grid").setAttribute("aria-label", summary(counts));
    describe();
    drawTimeline();
  });
}

function summary({ size, used, cached, shared, swapped, states }) {
  const requests = `${states.running} running, ${states.waiting} waiting, ${states.swapped} swapped out`;
  return `${size} blocks: ${used} used, ${shared} of them shared, ${cached} cached; ${swapped} in the swap space; ${requests}`;
}

function drawTimeline() {
  if (!recorded.segments.length) return;
  const { start, end } = recorded;
  const at = pausedAt ?? end;
  drawChart($("chart"), recorded.samples, at);
  const scrub = $("scrub");
  scrub.value = end > start ? Math.round((1000 * (at - start)) / (end - start)) : 1000;
  const text = pausedAt === null ? "live" : `−${(end - at).toFixed(1)} s`;
  $("when").textContent = text;
  scrub.setAttribute("aria-valuetext", pausedAt === null ? "live" : `${(end - at).toFixed(1)} seconds ago`);
}

function select(id) {
  grid.selected = grid.selected === id ? null : id;
  refresh();
}

function point(place) {
  grid.hovered = place;
  grid.drawSoon();
  describe();
}

// -- the past --------------------------------------------------------------------------------------------

function goTo(time) {
  if (!recorded.segments.length) return;
  pausedAt = Math.min(Math.max(time, recorded.start), recorded.end);
  const { model, last } = recorded.at(pausedAt);
  shown = model;
  grid.flashes = [];
  if (last) grid.model = model;
  if (last) grid.flash(last);
  setStatus("", "paused");
  $("pause").textContent = "Live";
  $("pause").setAttribute("aria-pressed", true);
  refresh();
}

function goLive() {
  pausedAt = null;
  shown = live;
  $("pause").textContent = "Pause";
  $("pause").setAttribute("aria-pressed", false);
  setStatus("live", "live");
  refresh();
}

$("pause").addEventListener("click", () => (pausedAt === null ? goTo(recorded.end) : goLive()));
$("scrub").addEventListener("input", () => {
  const { start, end } = recorded;
  goTo(start + ((end - start) * $("scrub").value) / 1000);
});
$("back").addEventListener("click", () => goTo(recorded.beside(pausedAt ?? recorded.end, -1)));
$("forward").addEventListener("click", () => goTo(recorded.beside(pausedAt ?? recorded.end, 1)));

// -- blocks under the pointer ------------------------------------------------------------------------------

function describe() {
  const place = grid.hovered;
  const size = place && shown.pools[place.medium].size;
  if (!place || place.block >= size) {
    $("tip").hidden = true;
    return;
  }
  const { medium, block } = place;
  const { kind, references } = grid.look(medium, block);
  const owners = shown.owners(medium).get(block) ?? [];
  const where = medium === "GPU" ? `Block ${block}` : `Block ${block} of the swap space`;
  const lines = [kind === "used" ? `used, ${references} ${references === 1 ? "reference" : "references"}` : kind];
  const hash = shown.pools[medium].hashes[block];
  if (hash) lines.push(`found by ${hash}`);
  for (const { request: held, sequence, position, filled } of owners.slice(0, 4))
    lines.push(`${held.id}: sequence ${sequence}, position ${position}, ${filled}/${shown.blockSize} tokens`);
  if (owners.length > 4) lines.push(`and ${owners.length - 4} more`);
  const text = `${where}: ${lines.join("; ")}`;
  if ($("block-detail").textContent !== text) $("block-detail").textContent = text;
  if (!grid.places) return;
  $("tip").replaceChildren(element("b", { textContent: where }), ...lines.flatMap((l, i) => (i ? [element("br"), l] : [l])));
  $("tip").hidden = $("grid").matches(":hover, :focus-visible") === false;
  const [x, y] = grid.corner(place);
  const { cell, width } = grid.places;
  $("tip").style.left = `${Math.min(Math.max(8, x + cell + 16), Math.max(8, width - 260))}px`;
  $("tip").style.top = `${y + cell + 8}px`;
}

function placeOf(event) {
  const box = $("grid").getBoundingClientRect();
  return grid.blockAt(event.clientX - box.left, event.clientY - box.top);
}

$("grid").addEventListener("pointermove", (event) => point(placeOf(event)));
$("grid").addEventListener("pointerleave", () => point(null));
$("grid").addEventListener("click", (event) => {
  const place = placeOf(event);
  point(place);
  chooseOwner(place);
});

/** Select the next request that holds a block. */
function chooseOwner(place) {
  const owners = (place && shown.owners(place.medium).get(place.block)) ?? [];
  const ids = [...new Set(owners.map(({ request: held }) => held.id))];
  const next = ids[ids.indexOf(grid.selected) + 1] ?? null;
  if (next !== grid.selected) select(next ?? grid.selected);
}

$("grid").addEventListener("keydown", (event) => {
  const { columns } = grid.places ?? {};
  const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns };
  const { medium, block } = grid.hovered ?? { medium: "GPU", block: 0 };
  if (event.key === "Enter" || event.key === " ") chooseOwner(grid.hovered);
  else if (event.key === "Escape") (point(null), grid.selected && select(grid.selected));
  else if (event.key in steps) {
    let next = { medium, block: grid.hovered ? block + steps[event.key] : 0 };
    const sizes = { GPU: shown.pools.GPU.size, CPU: shown.pools.CPU.size };
    if (next.block >= sizes[medium] && medium === "GPU" && sizes.CPU) next = { medium: "CPU", block: 0 };
    else if (next.block < 0 && medium === "CPU") next = { medium: "GPU", block: sizes.GPU - 1 };
    next.block = Math.min(Math.max(0, next.block), sizes[next.medium] - 1);
    point(next);
  } else return;
  event.preventDefault();
});
$("deselect").addEventListener("click", () => grid.selected && select(grid.selected));
document.addEventListener("theme", () => (showLegend(), refresh()));
addEventListener("resize", () => refresh());

// -- legend, and requests to look at -----------------------------------------------------------------------

function showLegend() {
  const swatch = (color, text, label = "") => {
    const mark = element("i", { textContent: label });
    mark.style.background = color;
    return element("span", {}, mark, text);
  };
  const ring = ([, { color, text }]) => {
    const mark = element("i", { className: "ring" });
    mark.style.borderColor = color;
    return element("span", {}, mark, text);
  };
  const own = requestColor(0);
  $("legend").replaceChildren(
    swatch(`linear-gradient(to top, ${own} 60%, ${requestColor(0, 0.3)} 60%)`, "used, as full as it stands"),
    swatch(own, "shared, with references", "3"),
    swatch(requestColor(0, CACHED), "cached"),
    swatch("var(--raised)", "free"),
    ...Object.entries(KINDS).filter(([kind]) => kind !== "recompute").map(ring),
  );
}
showLegend();

/** Send requests that share a prefix and fork. */
async function sendSamples() {
  const buttons = [$("sample"), $("sample-again")];
  for (const button of buttons) button.disabled = true;
  showProblem("", "samples");
  try {
    const { id, max_model_len: longest } = await findModel();
    const times = Math.max(1, Math.min(6, Math.floor(longest / 200)));
    const shared = "You are a librarian. You name three books, and say in a friendly voice why. ".repeat(times);
    const sent = ["Rain?", "Where do cats go?", "Why is the sea salty?", "Who invented paper?"].map((question, i) =>
      post("v1/completions", { model: id, prompt: shared + question, max_tokens: 96, n: i % 2 ? 1 : 3, temperature: 1 }),
    );
    for (const { reason } of await Promise.allSettled(sent)) if (reason) throw reason;
  } catch (error) {
    showProblem(error.message, "samples");
  }
  for (const button of buttons) button.disabled = false;
}
$("sample").addEventListener("click", sendSamples);
$("sample-again").addEventListener("click", sendSamples);

/** For tests and for the console: what is shown, and where a block is drawn. */
window.blockPool = {
  state: () => shown.state(),
  recorded: () => recorded.samples.map(({ time }) => time),
  look: (medium, block) => grid.look(medium, block),
  corner: (medium, block) => [...grid.corner({ medium, block }), grid.places.cell],
};
