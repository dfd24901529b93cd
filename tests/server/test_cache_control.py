"""Tiers behind a server: an index that survives a restart, control over it, and identities that never meet."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

from served import CONFIG, eventually, served

SYSTEM = {"role": "system", "content": "You are a careful assistant and answer in short sentences. " * 8}
ASK = {"messages": [SYSTEM, {"role": "user", "content": "What is 2 + 2?"}], "max_tokens": 4, "seed": 1}


def test_a_prefix_comes_back_after_restarts_of_worker_and_server(tmp_path: Path) -> None:
    config = replace(CONFIG, use=(f"kvcache/disk:path={tmp_path},fetch=always",))
    with served(config=config) as s, s.client() as c:
        first = c.post("/v1/chat/completions", json=ASK).json()
        assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        found = c.post("/admin/cache/lookup", json={"messages": [SYSTEM]})
        assert found.status_code == 200, found.text
        eventually(lambda: c.post("/admin/cache/lookup", json={"messages": [SYSTEM]}).json()["result"]["disk"] > 50)
        os.kill(s.supervisor.pid, signal.SIGKILL)
        again = c.post("/v1/chat/completions", json=ASK).json()
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 50
        assert again["choices"] == first["choices"]
    with served(config=config) as s, s.client() as c:
        third = c.post("/v1/chat/completions", json=ASK).json()
        assert third["usage"]["prompt_tokens_details"]["cached_tokens"] > 50
        assert third["choices"] == first["choices"]
        text = {"messages": [SYSTEM]}
        assert c.post("/admin/cache/pin", json=text).json()["result"] > 0
        assert c.post("/admin/cache/unpin", json=text).json()["result"] > 0
        assert c.post("/admin/cache/lookup", json={**text, "key": "somebody else"}).json()["result"]["disk"] == 0
        stats = c.get("/admin/cache").json()
        assert "lab-8m" in stats
        assert c.post("/admin/cache/clear", json={}).json()["result"] > 0
        assert c.post("/admin/cache/lookup", json=text).json()["result"]["disk"] == 0


def test_without_tiers_control_says_so() -> None:
    with served() as s, s.client() as c:
        r = c.post("/admin/cache/lookup", json={"prompt": "x"})
        assert r.status_code == 400
        assert "kvcache/disk" in r.json()["error"]["message"]
        assert c.post("/admin/cache/lookup", json={}).json()["error"]["param"] == "prompt"
        assert c.get("/admin/cache").json() == {}
