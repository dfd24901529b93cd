"use strict";
// The figures that are polled, the plan, and the operators.

// ---- live figures

let samples = []; // {time, models}, oldest first
let planned = null; // the fingerprint of the plan that is shown

const chosen = () => $("model").value;

let polling = false;

async function poll() {
  if (document.hidden || locked() || polling) return;
  polling = true;
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
  } finally {
    polling = false;
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
  if ((model.fingerprint ?? "") !== planned) {
    planned = model.fingerprint ?? "";
    planOf();
  }
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
  put(`${id}-rate`, last.length ? rate(last.reduce((sum, x) => sum + x, 0) / last.length) : "–");
  put(`${id}-peak`, points.length ? `peak ${rate(Math.max(...points))}` : "");
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
  let plan;
  try {
    plan = (await get("plan"))[chosen()];
  } catch { return (planned = null); }
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

let found = null, foundAt = 0, work = "decode", operatorsTimer = 0, operatorsRun = 0;
const steps = (told) => told.steps ?? [];

async function operators() {
  clearTimeout(operatorsTimer);
  const mine = ++operatorsRun;
  let wait = OPERATORS_RETRY;
  const asked = chosen();
  if (!document.hidden && !locked() && asked) {
    try {
      const told = await get(`operators?model=${encodeURIComponent(asked)}`);
      if (mine !== operatorsRun) return; // asked again meanwhile
      found = told;
      foundAt = performance.now();
      if (!told.refused) wait = OPERATORS_EVERY;
    } catch (error) {
      if (mine !== operatorsRun) return;
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
