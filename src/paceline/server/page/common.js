"use strict";
// What the parts of the dashboard share. Everything that comes from the server is shown as text: nodes are made by `make`, and no
// markup is ever parsed. The address of the page is never read, so a link cannot make it do anything.

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
const rate = (x) => (x >= 10 ? whole : few).format(x);
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
