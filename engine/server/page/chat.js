// The chat.

import { findModel, forgetModel, post, serverEvents } from "./api.js";
import { element, render } from "./markdown.js";

const $ = (id) => document.getElementById(id);
const FIELDS = ["temperature", "top_p", "max_tokens", "seed"];
const OWN_DEFAULTS = { temperature: 0.7, top_p: 0.95 }; // for models that bring no settings of their own
const SUGGESTIONS = [
  "Explain paging in an operating system in three sentences.",
  "Write a Python function that reverses a linked list.",
  "What is a KV cache, and why does it grow?",
];

let messages = []; // {role, content, box}
let running = null; // the controller of the answer that is being written
let settings = JSON.parse(localStorage.getItem("settings") ?? "{}");

// -- the conversation ----------------------------------------------------------------------------------

function makeBox(role, text = "") {
  const body = element("div", { className: role === "assistant" ? "body markdown" : "body" });
  const foot = element("div", { className: "foot" });
  const box = element("div", { className: `message ${role}` }, body, foot);
  if (role === "assistant") body.append(render(text));
  else body.textContent = text;
  $("log").append(box);
  box.scrollIntoView({ block: "end" });
  return box;
}

export function showError(text) {
  const box = element("div", { className: "message error", role: "alert", textContent: text });
  $("log").append(box);
  box.scrollIntoView({ block: "end" });
  return box;
}

function button(text, action, label = text) {
  const made = element("button", { type: "button", className: "quiet", textContent: text, ariaLabel: label });
  made.addEventListener("click", action);
  return made;
}

/** Show the buttons of a message, which act on the conversation up to it. */
function addButtons(message) {
  const foot = message.box.querySelector(".foot");
  const copy = button("Copy", () => navigator.clipboard?.writeText(message.content), "Copy the message");
  if (message.role === "user") foot.replaceChildren(button("Edit", () => edit(message), "Edit the message"), copy);
  else foot.append(button("Regenerate", () => regenerate(message), "Write another answer"), copy);
}

/** Remove a message and all that follow it. */
function cutAt(message) {
  stop();
  for (const removed of messages.splice(messages.indexOf(message))) removed.box.remove();
  for (const error of $("log").querySelectorAll(".message.error")) error.remove();
}

function regenerate(message) {
  cutAt(message);
  answer();
}

function edit(message) {
  const { box } = message;
  const body = box.querySelector(".body");
  const field = element("textarea", { value: message.content, rows: 3, ariaLabel: "Edited message" });
  const close = () => (editor.remove(), (body.hidden = false), (box.querySelector(".foot").hidden = false));
  const save = () => {
    const text = field.value.trim();
    if (!text) return;
    cutAt(message);
    say(text);
  };
  const editor = element("div", {}, field, element("div", { className: "row" }, button("Cancel", close), button("Send", save)));
  field.addEventListener("keydown", (event) => {
    if (event.key === "Escape") close();
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) (event.preventDefault(), save());
  });
  body.hidden = box.querySelector(".foot").hidden = true;
  box.append(editor);
  field.focus();
}

function say(text) {
  const message = { role: "user", content: text, box: makeBox("user", text) };
  addButtons(message);
  messages.push(message);
  answer();
}

// -- an answer -----------------------------------------------------------------------------------------

function setRunning(controller) {
  running = controller;
  $("send").textContent = controller ? "Stop" : "Send";
}

function stop() {
  running?.abort();
  setRunning(null);
}

async function body(signal) {
  const card = await findModel(signal);
  if (!card.has_chat_template)
    throw new Error("This model has no chat template, so it cannot chat. It continues texts: /v1/completions.");
  const sampling = Object.keys(card.default_sampling_params).length ? {} : { ...OWN_DEFAULTS };
  for (const name of FIELDS) if (settings[name] !== undefined) sampling[name] = settings[name];
  const said = messages.map(({ role, content }) => ({ role, content }));
  if (settings.system) said.unshift({ role: "system", content: settings.system });
  return { model: card.id, stream: true, stream_options: { include_usage: true }, ...sampling, messages: said };
}

async function answer() {
  const mine = new AbortController();
  setRunning(mine);
  const message = { role: "assistant", content: "", box: makeBox("assistant") };
  message.box.classList.add("waiting");
  const shown = new Painter(message);
  const timer = new Timer();
  let failure = null;
  try {
    const response = await post("v1/chat/completions", await body(mine.signal), mine.signal);
    for await (const data of serverEvents(response)) {
      if (data === "[DONE]") continue;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      const delta = event.choices[0]?.delta ?? {};
      const thought = delta.reasoning_content ?? "";
      if (delta.content || thought) timer.token();
      message.content += delta.content ?? "";
      if (event.usage) timer.tokens = event.usage.completion_tokens;
      shown.update(thought);
    }
  } catch (error) {
    failure = error;
  }
  shown.finish();
  message.box.classList.remove("waiting");
  if (running !== mine) return message.box.remove(); // the conversation goes on without it
  if (mine.signal.aborted) message.stopped = true;
  else if (failure) {
    forgetModel();
    showError(failure.message);
  }
  settle(message, timer);
  setRunning(null);
}

/** Keep what was answered; where that is nothing, take the question back. */
function settle(message, timer) {
  if (message.content || message.box.querySelector(".thinking")) {
    message.box.querySelector(".foot").replaceChildren(timer.summary(message.stopped));
    messages.push(message);
    addButtons(message);
    return;
  }
  message.box.remove();
  const question = messages.pop();
  question.box.remove();
  if (!$("input").value) write(question.content);
}

/** Draws a message at most once a frame. */
class Painter {
  constructor(message) {
    this.message = message;
    this.thoughts = "";
    this.frame = null;
  }

  update(thought = "") {
    this.thoughts += thought;
    this.frame ??= requestAnimationFrame(() => this.draw());
  }

  draw() {
    this.frame = null;
    const scroll = $("scroll");
    const follows = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 120;
    const { box, content } = this.message;
    const body = box.querySelector(".body");
    if (this.thoughts) {
      const open = body.querySelector(".thinking")?.open ?? false;
      const thinking = element("details", { className: "thinking", open }, element("summary", { textContent: "Thinking" }));
      thinking.append(this.thoughts);
      body.replaceChildren(thinking, render(content));
    } else body.replaceChildren(render(content));
    if (content || this.thoughts) box.classList.remove("waiting");
    if (follows) scroll.scrollTop = scroll.scrollHeight;
  }

  finish() {
    if (this.frame !== null) cancelAnimationFrame(this.frame);
    this.draw();
  }
}

/** Measures an answer: seconds to the first token, and tokens a second after it. */
class Timer {
  constructor() {
    this.start = performance.now();
    this.first = this.last = null;
    this.tokens = 0;
    this.chunks = 0;
  }

  token() {
    this.last = performance.now();
    this.first ??= this.last;
    this.chunks++;
  }

  summary(stopped) {
    const parts = [];
    const count = this.tokens || this.chunks;
    if (this.first !== null) parts.push(`first token ${((this.first - this.start) / 1000).toFixed(2)} s`);
    if (count > 1 && this.last > this.first)
      parts.push(`${((count - 1) / ((this.last - this.first) / 1000)).toFixed(1)} tokens/s`);
    parts.push(`${count} ${count === 1 ? "token" : "tokens"}`);
    if (stopped) parts.push("stopped");
    return element("span", { className: "stats", textContent: parts.join(" · ") });
  }
}

// -- what is written, and the settings -----------------------------------------------------------------

function write(text) {
  const input = $("input");
  if (text !== undefined) input.value = text;
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight}px`;
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) return running.abort();
  const text = $("input").value.trim();
  if (!text) return;
  write("");
  say(text);
});
$("input").addEventListener("input", () => write());
$("input").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    if (!running) $("form").requestSubmit();
  }
});
$("reset").addEventListener("click", () => {
  stop();
  messages = [];
  $("log").replaceChildren();
  $("input").focus();
});
for (const text of SUGGESTIONS) $("suggestions").append(button(text, () => !running && say(text)));

const form = $("settings").querySelector("form");
$("open-settings").addEventListener("click", async () => {
  for (const name of ["system", ...FIELDS]) form.elements[name].value = settings[name] ?? "";
  $("settings").showModal();
  const defaults = (await findModel().catch(() => null))?.default_sampling_params ?? {};
  const known = Object.keys(defaults).length ? defaults : OWN_DEFAULTS;
  for (const name of FIELDS) form.elements[name].placeholder = known[name] ?? "not set";
});

/** Take over what the fields hold: as they change, since a dialog says that it was closed only some time after. */
function readSettings() {
  settings = {};
  for (const name of FIELDS) {
    const { value, valueAsNumber } = form.elements[name];
    if (value !== "" && Number.isFinite(valueAsNumber)) settings[name] = valueAsNumber;
  }
  if (form.elements.system.value.trim()) settings.system = form.elements.system.value.trim();
  localStorage.setItem("settings", JSON.stringify(settings));
}

form.addEventListener("input", readSettings);
$("clear-settings").addEventListener("click", () => {
  form.reset();
  readSettings();
});
