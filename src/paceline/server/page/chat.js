"use strict";
// The conversation: streamed, stoppable, shown as text.

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
