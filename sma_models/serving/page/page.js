"use strict";
// Writes with the server's own /v1/completions, with "activations": every entry is one byte and what it activated.
const get = (id) => document.getElementById(id);
const BAR = 3, STEP = 4;  // pixels: height of a layer's bar, and from one bar to the next
let layers = [], entries = [], counts = [], spans = [];
let choice = -1, here = -1, running = null;
let start = 0;  // entry that holds the first byte of a character that is not complete

const colour = (layer) => `hsl(${Math.round(360 * layer / Math.max(layers.length, 1))} 70% var(--bar-lightness))`;
const headers = () => {
  const key = get("key").value;
  return key ? { Authorization: `Bearer ${key}` } : {};
};
const tell = (text, trouble = false) => {
  get("status").textContent = text;
  get("status").className = trouble ? "trouble" : "";
};

// "layers.0.activate" is "layer 0" where that names one thing only.
const labels = (names) => {
  const short = names.map((name) => name.replace(/^layers\.(\d+)\.[^[]*/, "layer $1"));
  return new Set(short).size === short.length ? short : names;
};

async function refuse(response) {
  let message = `${response.status} ${response.statusText}`;
  try { message = (await response.json()).error.message; } catch { /* no error of this server */ }
  throw new Error(message);
}

async function describe() {
  const response = await fetch("v1/models", { headers: headers() });
  if (!response.ok) await refuse(response);
  const model = (await response.json()).data[0];
  layers = labels(model.layers);
  get("model").textContent = `${model.id}: ${layers.length} ${layers.length === 1 ? "layer decides" : "layers decide"} which bytes to work on.`;
  get("max_tokens").max = model.max_tokens;
  choice = -1;
  const all = ["no layer", ...layers].map((label, i) => {
    const item = document.createElement("div"), input = document.createElement("input"), text = document.createElement("label");
    item.className = "choice";
    Object.assign(input, { type: "radio", name: "layer", id: `layer${i - 1}`, value: String(i - 1), checked: i === 0 });
    text.htmlFor = input.id;
    if (i > 0) {
      const mark = document.createElement("i");
      mark.style.background = colour(i - 1);
      text.append(mark);
    }
    text.append(label, " ", document.createElement("small"));
    item.append(input, text);
    return item;
  });
  const legend = get("choices").querySelector("legend");
  get("choices").replaceChildren(legend, ...all);
  get("text").style.lineHeight = `calc(1.5em + ${STEP * layers.length + 4}px)`;
}

function clear() {
  entries = []; spans = []; counts = layers.map(() => 0); here = -1; start = 0;
  get("text").replaceChildren();
  get("layers").replaceChildren();
}

// A byte is shown as it is, control characters in caret notation, what is no UTF-8 as a number.
const VISIBLE = /^[^\p{C}\p{Z}\p{M}]$/u;
function glyph(bytes) {
  if (bytes.length === 1) {
    const byte = bytes[0];
    if (byte === 10) return ["↵\n", "odd"];
    if (byte === 9) return ["→\t", "odd"];
    if (byte >= 32 && byte < 127) return [String.fromCharCode(byte), ""];
    if (byte < 128) return [`^${String.fromCharCode(byte ^ 64)}`, "odd"];
  }
  try {
    const text = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(new Uint8Array(bytes));
    if (VISIBLE.test(text)) return [text, ""];
    return [/^\p{M}$/u.test(text) ? `◌${text}` : `U+${text.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`, "odd"];
  } catch { return null; }
}

const length = (byte) => (byte < 0x80 ? 1 : byte >= 0xc2 && byte < 0xe0 ? 2 : byte >= 0xe0 && byte < 0xf0 ? 3 : byte >= 0xf0 && byte < 0xf5 ? 4 : 0);
function put(i, text, kind) {
  spans[i].textContent = text;
  if (kind) spans[i].classList.add(kind);
}

// Shows what is complete of the bytes from "start" on.
function settle(final) {
  while (start < entries.length) {
    const size = length(entries[start].token);
    const bytes = entries.slice(start, start + size).map((entry) => entry.token);
    const whole = size > 0 && bytes.length === size ? glyph(bytes) : null;
    const broken = size === 0 || bytes.slice(1).some((byte) => byte < 0x80 || byte >= 0xc0) || (bytes.length === size && whole === null) || final;
    if (whole !== null) {
      put(start, ...whole);
      for (let i = 1; i < size; i += 1) put(start + i, "·", "odd");
      start += size;
    } else if (broken) {
      put(start, `\\x${entries[start].token.toString(16).padStart(2, "0")}`, "odd");
      start += 1;
    } else {
      return;
    }
  }
}

function add(entry, prompt) {
  const span = document.createElement("span"), bars = [];
  entry.active.forEach((active, layer) => {
    if (!active) return;
    counts[layer] += 1;
    bars.push([colour(layer), STEP * (layers.length - 1 - layer)]);
  });
  span.style.paddingBottom = `${STEP * layers.length}px`;
  span.style.backgroundImage = bars.map(([c]) => `linear-gradient(${c}, ${c})`).join(",") || "none";
  span.style.backgroundSize = `100% ${BAR}px`;
  span.style.backgroundPosition = bars.map(([, up]) => `0 calc(100% - ${up}px)`).join(",");
  if (prompt) span.classList.add("prompt");
  span.textContent = "…";
  entries.push(entry);
  spans.push(span);
  if (choice >= 0) span.classList.toggle("lit", entry.active[choice]);
  get("text").append(span);
}

function rates() {
  layers.forEach((_, i) => {
    get(`layer${i}`).parentNode.querySelector("small").textContent = entries.length ? `${Math.round(100 * counts[i] / entries.length)} %` : "";
  });
}

function show(i) {
  if (i < 0 || i >= spans.length) return;
  if (here >= 0) spans[here].classList.remove("here");
  here = i;
  spans[i].classList.add("here");
  const entry = entries[i], active = entry.active.filter(Boolean).length;
  get("where").textContent = `byte ${entry.position}: 0x${entry.token.toString(16).padStart(2, "0")}, active in ${active} of ${layers.length} layers`;
  get("layers").replaceChildren(...layers.map((label, layer) => {
    const item = document.createElement("li");
    item.className = entry.active[layer] ? "on" : "";
    item.textContent = `${label}: ${entry.active[layer] ? "active" : "inactive"}, confidence ${entry.confidence[layer].toFixed(2)}`;
    return item;
  }));
}

// The events of a stream, one object after the other.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n\n");
    rest = lines.pop();
    for (const line of lines) {
      const data = line.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function write(signal) {
  await describe();
  clear();
  const prompt = get("prompt").value, read = new TextEncoder().encode(prompt).length;
  const request = { prompt, stream: true, activations: true };
  for (const name of ["max_tokens", "temperature", "top_p"]) request[name] = Number(get(name).value);
  if (get("seed").value) request.seed = Number(get("seed").value);
  const response = await fetch("v1/completions", {
    method: "POST", signal, headers: { "Content-Type": "application/json", ...headers() }, body: JSON.stringify(request),
  });
  if (!response.ok) await refuse(response);
  let reason = null;
  for await (const event of events(response)) {
    if (event.error) throw new Error(event.error.message);
    const [piece] = event.choices;
    piece.activations.forEach((entry) => add(entry, entry.position < read));
    settle(false);
    rates();
    reason = piece.finish_reason ?? reason;
    tell(`${Math.max(entries.length - read, 0)} bytes`);
  }
  settle(true);
  tell(`${Math.max(entries.length - read, 0)} bytes, ended by ${reason}`);
}

get("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  running?.abort();
  const own = running = new AbortController();
  get("write").disabled = true;
  get("stop").disabled = false;
  tell("waiting");
  try {
    await write(own.signal);
  } catch (error) {
    settle(true);
    if (error.name === "AbortError") tell(`stopped after ${entries.length} bytes`);
    else tell(error.message, true);
  } finally {
    if (running === own) {
      running = null;
      get("write").disabled = false;
      get("stop").disabled = true;
    }
  }
});
get("stop").addEventListener("click", () => running?.abort());
get("choices").addEventListener("change", (event) => {
  choice = Number(event.target.value);
  spans.forEach((span, i) => span.classList.toggle("lit", choice >= 0 && entries[i].active[choice]));
});
get("text").addEventListener("mouseover", (event) => { if (event.target.parentNode === get("text")) show(spans.indexOf(event.target)); });
get("text").addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!step || !spans.length) return;
  event.preventDefault();
  show(Math.min(Math.max(here + step, 0), spans.length - 1));
  spans[here].scrollIntoView({ block: "nearest" });
});
describe().catch((error) => { get("model").textContent = `${error.message}. A key may be given below.`; });
