// The one place that talks to the server: its failures are told apart here.

let key = sessionStorage.getItem("key") ?? "";

export function setKey(value) {
  key = value;
  sessionStorage.setItem("key", value);
}

export function hasKey() {
  return key !== "";
}

/** An answer that is an error. `status` is that of HTTP. */
export class ServerError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** Fetch a path of this server, and throw what its answer says where that is an error. */
export async function request(path, options = {}) {
  const headers = { ...options.headers };
  if (key) headers.Authorization = `Bearer ${key}`;
  const response = await fetch(path, { ...options, headers }).catch(away);
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  const message = body?.error?.message ?? `The server answered with status ${response.status}.`;
  if (response.status === 401) document.dispatchEvent(new CustomEvent("key-needed", { detail: message }));
  throw new ServerError(response.status, message);
}

export function post(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  return request(path, { method: "POST", headers, body: JSON.stringify(body), signal });
}

function away(error) {
  if (error.name === "AbortError") throw error;
  throw new Error("The server is away: it has stopped, or cannot be reached. Start it, then send again.");
}

/** Yield the data of server-sent events, as text. */
export async function* serverEvents(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ; ) {
    const { value, done } = await reader.read().catch(away);
    if (done) return;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events)
      for (const line of event.split("\n")) if (line.startsWith("data: ")) yield line.slice(6);
  }
}

let card = null;

/** Return what the server says of its model. It is asked again after `forgetModel`: the page may be older than
 * the server that runs now. */
export async function findModel(signal) {
  if (!card) {
    card = (await (await request("v1/models", { signal })).json()).data[0];
    document.getElementById("model").textContent = card.id;
  }
  return card;
}

export function forgetModel() {
  card = null;
}
