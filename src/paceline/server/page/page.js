"use strict";
// What starts when the page is open.

async function refresh() {
  await poll();
  operators();
}

setUpKey();
setUpChat();
$("model").addEventListener("change", () => {
  found = { refused: "" };
  showOperators();
  planned = null;
  if (samples.length) show(samples[samples.length - 1]);
  operators();
});
document.addEventListener("visibilitychange", () => { if (!document.hidden) refresh(); });
setInterval(poll, EVERY);
if (locked()) {
  put("state", "needs a key");
  askForKey();
} else refresh();
