"use strict";
// The dashboard. Everything that comes from the server is shown as text: nodes are made by `make`, and no markup is ever parsed.
// The address of the page is never read, so a link cannot make it do anything.

const $ = (id) => document.getElementById(id);
const KEY = "paceline-key";
const EVERY = 1000, KEPT = 120, WINDOW = 60, OPERATORS_EVERY = 60000, OPERATORS_RETRY = 10000; // ms, samples, seconds, ms, ms

/** An element with attributes and children; strings become text. */
function make(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children.map((child) => (typeof child === "number" ? String(child) : child)));
  return made;
}

function drawn(name, attributes = {}) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function put(id, text) {
  const node = typeof id === "string" ? $(id) : id;
  if (node.textContent !== text) node.textContent = text;
}

// ---- numbers

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const few = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });
const short = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });
const number = (x) => (Math.abs(x) >= 100 ? whole : few).format(x);
const percent = (x) => `${x > 0 && x < 0.0995 ? (100 * x).toFixed(1) : Math.round(100 * x)} %`;

function duration(s) {
  if (s < 1e-3) return `${number(1e6 * s)} µs`;
  if (s < 1) return `${number(1e3 * s)} ms`;
  if (s < 120) return `${few.format(s)} s`;
  if (s < 7200) return `${Math.round(s / 60)} min`;
  return s < 172800 ? `${Math.round(s / 3600)} h` : `${Math.round(s / 86400)} d`;
}

const age = (s) => (s < 2 ? "just now" : `${duration(Math.round(s))} ago`);

function bytes(n) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let i = 0;
  while (n >= 1024 && i < units.length - 1) { n /= 1024; i++; }
  return `${number(n)} ${units[i]}`;
}

// ---- the server

class Refused extends Error {
  constructor(status, message) { super(message); this.status = status; }
}

/** A route of this server. Throws Refused with what the server says is wrong; asks for a key when it wants one. */
async function call(route, options = {}) {
  const headers = { ...options.headers };
  const key = sessionStorage.getItem(KEY);
  if (key) headers["authorization"] = `Bearer ${key}`;
  const answer = await fetch(route, { ...options, headers, cache: "no-store", credentials: "omit", redirect: "error" });
  if (answer.ok) return answer;
  const said = await answer.json().catch(() => ({}));
  const message = said.error?.message ?? `the server answered ${answer.status}`;
  if (answer.status === 401) askForKey(key ? message : "");
  throw new Refused(answer.status, message);
}

const get = async (route) => (await call(route)).json();

const wantsKey = document.documentElement.dataset.keys === "required";

function askForKey(problem = "") {
  put("key-problem", problem);
  $("forget").hidden = !sessionStorage.getItem(KEY);
  if (!$("key-dialog").open) $("key-dialog").showModal();
  $("key").focus();
}

function setUpKey() {
  $("change-key").hidden = !wantsKey;
  $("change-key").addEventListener("click", () => askForKey());
  $("forget").addEventListener("click", () => {
    sessionStorage.removeItem(KEY);
    location.reload();
  });
  $("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const key = $("key").value.trim();
    if (!/^[\x21-\x7e]+$/.test(key)) return put("key-problem", "a key has visible ASCII characters only");
    sessionStorage.setItem(KEY, key);
    $("key").value = "";
    $("key-dialog").close();
    refresh();
  });
}

const locked = () => $("key-dialog").open || (wantsKey && !sessionStorage.getItem(KEY));

// ---- live figures

let samples = []; // {time, models}, oldest first
let plans = {};

const chosen = () => $("model").value;

async function poll() {
  if (document.hidden || locked()) return;
  try {
    const now = await get("stats");
    samples.push(now);
    samples = samples.slice(-KEPT - 1);
    show(now);
    showAge();
    banner("");
  } catch (error) {
    put("state", "not reached");
    $("state").className = "state failed";
    if (error.status !== 401) banner(error instanceof Refused ? error.message : "The server cannot be reached.");
  }
}

function banner(text) {
  put("banner", text);
  $("banner").hidden = !text;
}

function show(now) {
  offer(Object.keys(now.models));
  const model = now.models[chosen()] ?? {};
  put("state", now.state === "draining" ? now.state : (model.state ?? "unknown"));
  $("state").className = `state ${model.state === "ready" ? "ready" : model.state === "failed" ? "failed" : ""}`;
  put("server", `version ${now.version} · up ${duration(Math.round(now.uptime))}`);
  if (!model.totals) {
    for (const id of ["generation-rate", "prompt-rate", "running", "waiting", "kv", "hits", "restarts", "preemptions"]) put(id, "–");
    return put("requests", "");
  }
  const { totals } = model;
  put("running", number(model.running));
  put("waiting", number(model.waiting));
  put("kv", percent(model.kv_used));
  gauge("kv-gauge", model.kv_used);
  const looked = totals.prefix_cache_queries;
  put("hits", looked ? percent(totals.prefix_cache_hits / looked) : "–");
  gauge("hits-gauge", looked ? totals.prefix_cache_hits / looked : 0);
  put("restarts", number(model.restarts));
  put("preemptions", number(totals.num_preemptions));
  const failed = totals.request_failures ? `, ${whole.format(totals.request_failures)} failed` : "";
  put("requests", `${short.format(totals.request_success)} answered${failed} · ${short.format(totals.generation_tokens)} tokens generated`);
  rates("generation", "generation_tokens");
  rates("prompt", "prompt_tokens");
  latencies(model);
}

function gauge(id, share) {
  const value = (100 * Math.min(1, share)).toFixed(1);
  $(id).setAttribute("aria-valuenow", value);
  $(id).firstElementChild.setAttribute("width", value);
}

function offer(names) {
  const select = $("model"), had = select.value;
  if ([...select.options].map((o) => o.value).join("\n") === names.join("\n")) return;
  select.replaceChildren(...names.map((name) => make("option", { value: name }, name)));
  if (names.includes(had)) select.value = had;
  planOf();
}

/** Tokens per second between successive samples, drawn from right to left. */
function rates(id, name) {
  const points = [];
  for (let i = 1; i < samples.length; i++) {
    const [a, b] = [samples[i - 1], samples[i]];
    const [was, is] = [a.models[chosen()]?.totals?.[name], b.models[chosen()]?.totals?.[name]];
    points.push(was === undefined || is === undefined || is < was ? 0 : (is - was) / Math.max(1e-3, b.time - a.time));
  }
  const last = points.slice(-3);
  put(`${id}-rate`, last.length ? number(last.reduce((sum, x) => sum + x, 0) / last.length) : "–");
  put(`${id}-peak`, points.length ? `peak ${number(Math.max(...points))}` : "");
  chart($(`${id}-chart`), points);
}

function chart(svg, points) {
  const width = KEPT - 1, height = 50, top = Math.max(1, ...points) * 1.08;
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("preserveAspectRatio", "none");
  const at = points.map((y, i) => `${width - (points.length - 1 - i)},${(height - (height * y) / top).toFixed(2)}`);
  if (!at.length) return;
  const line = drawn("polyline", { class: "line", points: at.join(" ") });
  const area = drawn("polygon", { class: "area", points: [`${width - points.length + 1},${height}`, ...at, `${width},${height}`].join(" ") });
  svg.replaceChildren(area, line);
}

/** p50, p90 and p99 of the last minute; of all the time where nothing came in it. */
function latencies(model) {
  const newest = samples[samples.length - 1];
  const before = samples.find((s) => newest.time - s.time <= WINDOW)?.models[chosen()];
  let all = false;
  for (const name of ["ttft", "itl"]) {
    const recent = less(model.latency[name], before?.latency?.[name]);
    const counts = count(recent) ? recent : model.latency[name];
    all ||= count(counts) > 0 && counts !== recent;
    [0.5, 0.9, 0.99].forEach((q, i) => put($(name).cells[i + 1], quantile(counts, q)));
  }
  put("window", all ? "since the start" : "last minute");
}

const count = (buckets) => buckets["+Inf"] ?? 0;

function less(now, before) {
  if (!before || count(before) > count(now)) return now;
  return Object.fromEntries(Object.entries(now).map(([le, n]) => [le, n - (before[le] ?? 0)]));
}

/** Of a cumulative histogram, by linear interpolation within the bucket, as Prometheus does it. */
function quantile(buckets, q) {
  const total = count(buckets);
  if (!total) return "–";
  const bounds = Object.keys(buckets).filter((le) => le !== "+Inf").sort((a, b) => a - b);
  let low = 0, below = 0;
  for (const le of bounds) {
    if (buckets[le] >= q * total) return duration(low + ((le - low) * (q * total - below)) / Math.max(1, buckets[le] - below));
    low = Number(le);
    below = buckets[le];
  }
  return `> ${duration(low)}`;
}

// ---- the plan

async function planOf() {
  try {
    plans = await get("plan");
  } catch { return; }
  const plan = plans[chosen()];
  if (!plan) {
    put("fingerprint", "");
    $("plan-notes").replaceChildren();
    return $("plan").replaceChildren(make("dt", {}, "Not loaded"), make("dd", {}, "It will be with the first request for it."));
  }
  const limits = plan.limits ?? {};
  const techniques = (plan.techniques ?? []).map((t) => make("span", { class: "chip" }, t));
  const rows = {
    Model: `${plan.model} (${plan.model_type}, ${short.format(plan.parameters)} parameters)`,
    Weights: `${plan.formats}, ${bytes(plan.weight_bytes)}`,
    Runs: `${plan.backend}${plan.isa ? ` on ${plan.isa}` : ""}, ${plan.threads} threads`,
    Context: `${whole.format(plan.context)} tokens`,
    "KV cache": `${plan.kv_dtype}, ${whole.format(plan.kv_tokens)} tokens, ${bytes(plan.kv_bytes)}`,
    Step: `at most ${limits.max_rows} rows, ${limits.max_seqs} sequences`,
    Techniques: techniques.length ? techniques : "none",
  };
  $("plan").replaceChildren(...Object.entries(rows).flatMap(([name, what]) => [make("dt", {}, name), make("dd", {}, ...[what].flat())]));
  put("fingerprint", plan.fingerprint);
  const refused = Object.entries(plan.refused ?? {}).map(([name, why]) => `${name}: ${why}`);
  const notes = (plan.notes ?? []).filter((note) => !refused.some((r) => note.startsWith(r.split(":")[0])));
  $("plan-notes").replaceChildren(...list("Refused", refused), ...list("Notes", notes));
}

const list = (title, items) => (items.length ? [make("h3", {}, title), make("ul", {}, ...items.map((i) => make("li", {}, i)))] : []);

// ---- operators

let found = null, foundAt = 0, work = "decode", operatorsTimer = 0;
const steps = (told) => told.steps ?? [];

async function operators() {
  clearTimeout(operatorsTimer);
  let wait = OPERATORS_RETRY;
  const asked = chosen();
  if (!document.hidden && !locked() && asked) {
    try {
      const told = await get(`operators?model=${encodeURIComponent(asked)}`);
      if (asked !== chosen()) return operators();
      found = told;
      foundAt = performance.now();
      if (!told.refused) wait = OPERATORS_EVERY;
    } catch (error) {
      found = { refused: error.message };
    }
    showOperators();
  }
  operatorsTimer = setTimeout(operators, wait);
}

function showOperators() {
  const all = steps(found);
  $("operators").hidden = !all.length;
  showAge();
  works(all.map((s) => s.work));
  const step = all.find((s) => s.work === work) ?? all[0];
  if (!step) return put("operators-note", "");
  const total = step.operators.reduce((sum, o) => sum + o.seconds, 0);
  $("operators").tBodies[0].replaceChildren(...step.operators.map((o) => make("tr", {},
    make("th", { scope: "row" }, o.name),
    make("td", { class: "n" }, number(o.calls)),
    make("td", { class: "n" }, duration(o.seconds)),
    make("td", {}, bar(o.seconds / total)),
    make("td", { class: "n" }, o.bytes ? number(o.bytes / o.seconds / 1e9) : "–"),
    make("td", { class: "n" }, o.flops ? number(o.flops / o.seconds / 1e9) : "–"),
    make("td", {}, o.bound ?? "–"),
    make("td", {}, o.share === null ? "–" : bar(o.share)),
  )));
  const beyond = step.operators.some((o) => o.share > 1);
  const peaks = Object.entries(found.peaks).map(([unit, rate]) => `${unit} ${number(rate / 1e9)} GFLOP/s`).join(", ");
  put("operators-note",
    `A step of ${step.rows === 1 ? "one row" : `${step.rows} rows`} after ${whole.format(step.context)} tokens of one sequence, ` +
    `${duration(total)} in operators, mean of ${step.n} steps. This machine: memory ${number(found.bandwidth / 1e9)} GB/s, ${peaks}.` +
    (beyond ? " Beyond 100 %: what it reads stays in a cache of the processor, or the limits were measured at a busy moment of the machine." : ""));
}

/** The kinds of step to choose from; what has the focus keeps it. */
function works(names) {
  const group = $("works");
  if ([...group.children].map((b) => b.textContent).join() !== names.join()) {
    group.replaceChildren(...names.map((name) => {
      const button = make("button", { type: "button" }, name);
      button.addEventListener("click", () => { work = name; showOperators(); });
      return button;
    }));
  }
  for (const button of group.children) button.setAttribute("aria-pressed", String(button.textContent === work));
}

function showAge() {
  if (!found) return;
  const when = steps(found).length ? `measured ${age(found.age + (performance.now() - foundAt) / 1e3)}` : "";
  put("measured", [found.refused, when].filter(Boolean).join(" · "));
}

function bar(share) {
  const svg = drawn("svg", { viewBox: "0 0 100 8", preserveAspectRatio: "none", "aria-hidden": "true" });
  svg.append(drawn("rect", { width: String(100 * Math.min(1, share)), height: "8" }));
  return make("div", { class: share > 1 ? "bar beyond" : "bar" }, make("span", {}, percent(share)), svg);
}

// ---- chat

let messages = []; // of the conversation so far, without the system prompt
let running = null; // AbortController of the answer being streamed

function turn(role, text) {
  $("log").querySelector(".empty")?.remove();
  const body = make("div", { class: "text" }, text);
  const node = make("div", { class: `turn ${role}` }, make("h3", {}, role === "user" ? "You" : chosen()), body);
  $("log").append(node);
  return { node, body };
}

/** The body of the request. Throws Error for a field that cannot be read. */
function requestFor(history) {
  const body = { model: chosen(), stream: true, stream_options: { include_usage: true } };
  const system = $("system").value.trim();
  body.messages = system ? [{ role: "system", content: system }, ...history] : history;
  if ($("temperature").value !== "") body.temperature = Number($("temperature").value);
  if ($("max-tokens").value !== "") body.max_tokens = Number($("max-tokens").value);
  if ($("tools").value.trim()) {
    try { body.tools = JSON.parse($("tools").value); } catch { throw new Error("Tools: is not valid JSON"); }
  }
  return body;
}

/** The events of a stream as objects, until [DONE]. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("The connection was lost before the answer was complete.");
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").filter((l) => l.startsWith("data:")).map((l) => l.slice(5).trimStart()).join("\n");
      if (data === "[DONE]") return;
      if (data) yield JSON.parse(data);
    }
  }
}

/** An answer as it grows: text, folded thoughts, calls of tools, and its times. */
class Answer {
  constructor() {
    ({ node: this.node, body: this.body } = turn("assistant", ""));
    this.node.classList.add("busy");
    this.text = "";
    this.calls = [];
    this.start = performance.now();
    this.first = this.last = this.tokens = this.thoughts = this.shown = null;
    this.reason = "";
  }

  take(chunk) {
    if (chunk.error) throw new Error(chunk.error.message ?? "the server failed");
    if (chunk.usage) this.tokens = chunk.usage.completion_tokens;
    const choice = chunk.choices?.[0];
    if (!choice) return;
    const { content, reasoning_content: thought, tool_calls: calls } = choice.delta ?? {};
    if (content || thought || calls) {
      this.last = performance.now();
      this.first ??= this.last;
    }
    if (thought) this.think(thought);
    if (content) {
      this.text += content;
      this.body.append(content);
    }
    for (const part of calls ?? []) this.callPart(part);
    if (choice.finish_reason) this.reason = choice.finish_reason;
  }

  think(text) {
    if (!this.thoughts) {
      this.thoughts = make("div", { class: "text" });
      this.body.before(make("details", {}, make("summary", {}, "Reasoning"), this.thoughts));
    }
    this.thoughts.append(text);
  }

  callPart(part) {
    const made = (this.calls[part.index ?? 0] ??= { id: "", type: "function", function: { name: "", arguments: "" } });
    made.id ||= part.id ?? "";
    made.function.name += part.function?.name ?? "";
    made.function.arguments += part.function?.arguments ?? "";
    this.shown ??= this.node.appendChild(make("pre", { "aria-label": "Tool calls" }));
    this.shown.textContent = JSON.stringify(this.calls.filter(Boolean), null, 2);
  }

  message() {
    const calls = this.calls.filter(Boolean);
    return { role: "assistant", content: this.text, ...(calls.length ? { tool_calls: calls } : {}) };
  }

  close(how) {
    this.node.classList.remove("busy");
    const said = [how || (this.reason && `finish: ${this.reason}`)];
    if (this.first !== null) said.unshift(`first token after ${duration((this.first - this.start) / 1e3)}`);
    if (this.tokens !== null) {
      said.unshift(`${whole.format(this.tokens)} tokens`);
      if (this.tokens > 1 && this.last > this.first) said.unshift(`${number((1e3 * (this.tokens - 1)) / (this.last - this.first))} tokens/s`);
    }
    put("last", said.filter(Boolean).join(" · "));
  }
}

async function send(text) {
  const history = [...messages, { role: "user", content: text }];
  const options = { method: "POST", headers: { "content-type": "application/json" } };
  try {
    options.body = JSON.stringify(requestFor(history));
  } catch (error) { return put("last", error.message); }
  $("prompt").value = "";
  put("last", "");
  turn("user", text);
  const answer = new Answer();
  const controller = (running = new AbortController());
  busy(true);
  try {
    const response = await call("v1/chat/completions", { ...options, signal: controller.signal });
    for await (const chunk of events(response.body)) {
      const log = $("log"), atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
      answer.take(chunk);
      if (atEnd) log.scrollTop = log.scrollHeight;
    }
    messages = [...history, answer.message()];
    answer.close("");
  } catch (error) {
    const stopped = controller.signal.aborted;
    if (answer.text || answer.calls.length) messages = [...history, answer.message()];
    else if (!stopped) $("prompt").value ||= text; // nothing came: it can be sent again
    if (!stopped) answer.node.append(make("p", { class: "problem", role: "alert" }, error.message));
    answer.close(stopped ? "stopped" : "failed");
  } finally {
    if (running === controller) {
      running = null;
      busy(false);
    }
    planOf();
  }
}

function busy(is) {
  $("send").hidden = is;
  $("stop").hidden = !is;
  $("log").setAttribute("aria-busy", String(is));
  $("log").scrollTop = $("log").scrollHeight;
  if (!is) $("prompt").focus();
}

function setUpChat() {
  const submit = () => {
    const text = $("prompt").value.trim();
    if (text && !running && chosen()) send(text);
  };
  $("composer").addEventListener("submit", (event) => { event.preventDefault(); submit(); });
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); submit(); }
  });
  $("stop").addEventListener("click", () => running?.abort());
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") running?.abort(); });
  $("clear").addEventListener("click", () => {
    running?.abort();
    messages = [];
    $("log").replaceChildren(make("p", { class: "empty" }, "Nothing said yet."));
    put("last", "");
    $("prompt").focus();
  });
}

// ---- together

async function refresh() {
  await poll();
  await planOf();
  operators();
}

setUpKey();
setUpChat();
$("model").addEventListener("change", () => {
  found = { refused: "" };
  showOperators();
  if (samples.length) show(samples[samples.length - 1]);
  planOf();
  operators();
});
document.addEventListener("visibilitychange", () => { if (!document.hidden) refresh(); });
setInterval(poll, EVERY);
if (locked()) {
  put("state", "needs a key");
  askForKey();
} else refresh();
