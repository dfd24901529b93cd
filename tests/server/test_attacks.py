"""Attacks by what a request says; `attacks.py` lists all attacks and faults that are tested, with the place of each.

Each test here asks the real server with a real worker, and wants: the status and shape of an error, an event loop that is never held
up (`siege.unshaken`), nothing left behind, and memory that does not grow.
"""

from __future__ import annotations

import ast
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from attacks import WHERE
from served import CONFIG, Served, eventually, served
from siege import growth, is_error, post, unshaken

from paceline.server.api import routes
from paceline.server.keys import Record, digest, write
from paceline.server.models import Offer, open_front

TESTS = Path(__file__).resolve().parents[1]
SOURCE = TESTS.parent / "src" / "paceline"
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
Q: Any = [{"role": "user", "content": "hi"}]


def test_every_attack_has_its_test() -> None:
    assert sorted(WHERE) == list(range(1, 47))
    for number, (title, places) in WHERE.items():
        assert title
        for file, names in places.items():
            tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
            there = {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}
            assert set(names.split()) <= there, (number, file)


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served(bounds={"trust_chat_template": True, "template_timeout": 1.0}) as s, s.client() as c:
        assert post(c, TEXT, {"prompt": "x", "max_tokens": 2}).status_code == 200
        yield s


def quiet(s: Served) -> bool:
    return s.supervisor.n_live == 0 and s.supervisor.gauge.n_running == 0 and s.supervisor.gauge.kv_used == 0


def nested(n: int) -> Any:
    made: Any = 1
    for _ in range(n):
        made = {"a": made}
    return made


TOOL = {"type": "function", "function": {"name": "f"}}
HOSTILE: dict[str, tuple[str, dict[str, Any]]] = {
    "n": (CHAT, {"n": 5_000_000}),
    "n in completions": (TEXT, {"n": 129}),
    "n is negative": (TEXT, {"n": -1}),
    "prompts": (TEXT, {"prompt": ["x"] * 100_000}),
    "prompts times n": (TEXT, {"prompt": ["x"] * 257, "n": 16}),
    "top_logprobs": (CHAT, {"logprobs": True, "top_logprobs": 1 << 40}),
    "all logprobs": (TEXT, {"logprobs": -1}),
    "prompt_logprobs": (TEXT, {"prompt_logprobs": -1}),
    "prompt_logprobs huge": (TEXT, {"prompt_logprobs": 100_000}),
    "stop strings": (CHAT, {"stop": ["x"] * 500_000}),
    "a long stop string": (CHAT, {"stop": "x" * 1_000_000}),
    "empty stop": (TEXT, {"stop": [""]}),
    "bad_words": (TEXT, {"bad_words": ["x"] * 50_000}),
    "stop_token_ids": (TEXT, {"stop_token_ids": [1] * 1_000_000}),
    "stop_token_ids outside": (TEXT, {"stop_token_ids": [1 << 20]}),
    "prompt outside": (TEXT, {"prompt": [1 << 20]}),
    "prompt negative": (TEXT, {"prompt": [-1]}),
    "prompt beyond 64 bits": (TEXT, {"prompt": [1 << 70]}),
    "logit_bias outside": (TEXT, {"logit_bias": {"1048576": 1}}),
    "logit_bias negative": (TEXT, {"logit_bias": {"-1": 1}}),
    "logit_bias, much": (TEXT, {"logit_bias": {str(i): 1 for i in range(300_000)}}),
    "n_discard": (TEXT, {"n_discard": -1}),
    "variables": (CHAT, {"chat_template_kwargs": {"chat_template": "x", "tokenize": True, "messages": []}}),
    "variables nested": (CHAT, {"chat_template_kwargs": nested(400)}),
    "messages nested": (CHAT, {"messages": [{**Q[0], "x": nested(400)}]}),
    "no role": (CHAT, {"messages": [{}]}),
    "tools without name": (CHAT, {"tools": [{"type": "function", "function": {}}]}),
    "tools with a bad schema": (CHAT, {"tools": [{"type": "function", "function": {"name": "f", "parameters": 3}}]}),
    "many tools": (CHAT, {"tools": [TOOL] * 100_000}),
    "many parts": (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}] * 200_000}]}),
    "many messages": (CHAT, {"messages": Q * 200_000}),
    "many messages to count": ("/tokenize", {"messages": Q * 200_000}),
    "empty prompt": (TEXT, {"prompt": ""}),
    "no tokens": (TEXT, {"prompt": [[]]}),
    "embeds": (TEXT, {"prompt_embeds": "A" * 4_000_000}),
    "transfer": (CHAT, {"kv_transfer_params": {"tp_size": 1 << 30}}),
    "many unknown fields": (TEXT, {f"k{i}": 1 for i in range(300_000)}),
    "many tokens to decode": ("/detokenize", {"tokens": [5] * 3_000_000}),
    "tokens of the cache": ("/admin/cache/lookup", {"tokens": [1 << 70]}),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_bodies_are_refused_in_passing(server: Served, case: str) -> None:
    path, more = HOSTILE[case]
    base: dict[str, Any] = {CHAT: {"messages": Q}, TEXT: {"prompt": "x"}}.get(path, {})
    body = json.dumps({**base, **more}).encode()
    with server.client() as c:
        with unshaken(server):
            e = is_error(post(c, path, body), 400)
        assert e["type"] == "invalid_request_error"
        assert post(c, TEXT, {"prompt": "x", "max_tokens": 1}).status_code == 200
    eventually(lambda: quiet(server))


@pytest.mark.parametrize("value", [1 << 70, -(1 << 70), 1 << 63, -1, 1.5e308, -0.5])
def test_no_number_breaks_the_way_to_the_worker(server: Served, value: Any) -> None:
    """Every field that takes a number: it is refused or served, never a fault, and leaves nothing behind."""
    names = ("temperature top_p top_k min_p repetition_penalty presence_penalty frequency_penalty n seed max_tokens min_tokens "
             "logprobs prompt_logprobs truncate_prompt_tokens priority stop_token_ids logit_bias prompt best_of")  # fmt: skip
    lists: dict[str, Any] = {"stop_token_ids": [value], "prompt": [value], "logit_bias": {"5": value}}
    with server.client() as c:
        for name in names.split():
            r = post(c, TEXT, {"prompt": "x", "max_tokens": 2, name: lists.get(name, value)})
            assert r.status_code in (200, 400), (name, r.text)
        for text in ("1e999", "-1e999", "NaN", "Infinity"):
            is_error(post(c, TEXT, b'{"prompt": "x", "temperature": %s}' % text.encode()), 400)
    eventually(lambda: quiet(server))


BOMBS: dict[str, dict[str, Any]] = {
    "repetition": {"structured_outputs": {"regex": "((a{1,9999}){1,9999}){1,9999}"}},
    "groups": {"structured_outputs": {"regex": "(" * 5000 + "a" + ")" * 5000}},
    "backtracking": {"structured_outputs": {"regex": "(a+)+" * 2000}},
    "long choice": {"structured_outputs": {"choice": ["x" * 100] * 20_000}},
    "deep grammar": {"structured_outputs": {"grammar": "start: " + "(" * 50_000 + '"a"' + ")" * 50_000}},
    "deep schema": {"structured_outputs": {"json": nested(300)}},
    "references": {"structured_outputs": {"json": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}}},
    "many optional": {"structured_outputs": {"json": {
        "type": "object", "properties": {f"p{i}": {"enum": [f"v{j}" for j in range(30)]} for i in range(3000)}}}},
    "no text": {"structured_outputs": {"regex": ""}},
}  # fmt: skip


def test_compile_bombs_are_refused_beside_others(server: Served) -> None:
    stream = {"prompt": "Once", "max_tokens": 400, "ignore_eos": True, "seed": 5}
    with server.client() as c, server.client() as other:
        want = post(other, TEXT, stream).json()["choices"]
        found: list[Any] = []
        asking = threading.Thread(target=lambda: found.append(post(other, TEXT, stream).json()["choices"]))
        asking.start()
        with unshaken(server):
            for name, form in BOMBS.items():
                r = post(c, TEXT, {"prompt": "x", "max_tokens": 4, **form})
                assert r.status_code == 400 or (r.status_code == 200 and name in ("backtracking", "many optional")), (
                    name,
                    r.text,
                )
        asking.join(60)
        assert found == [want]
    assert server.supervisor.n_restarts == 0


@pytest.mark.parametrize(
    ("path", "body", "statuses"),
    [
        (TEXT, {"prompt": "word " * 1_500_000}, (400,)),
        (TEXT, {"prompt": "a" * 6_000_000}, (400,)),
        (TEXT, {"prompt": [5] * 2_000_000}, (400,)),
        (TEXT, {"prompt": ["word " * 800] * 200, "max_tokens": 1}, (200,)),
        (CHAT, {"messages": [*Q, {"role": "assistant", "content": "yes"}] * 2000 + Q}, (400,)),
        (CHAT, {"messages": Q, "documents": [{"text": "x"}] * 100_000, "max_tokens": 1}, (200, 400)),
        ("/tokenize", {"prompt": "a b " * 200_000, "return_token_strs": True}, (200,)),
        ("/detokenize", {"tokens": [300] * 1_000_000}, (200,)),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_long_texts_hold_nobody_up(server: Served, path: str, body: Any, statuses: tuple[int, ...]) -> None:
    raw = json.dumps(body).encode()
    with server.client() as c:
        with unshaken(server):
            r = post(c, path, raw)
        assert r.status_code in statuses, r.text[:300]
    eventually(lambda: quiet(server))


def test_templates_of_requests_are_bounded(server: Served) -> None:
    endless = (
        "{% for i in range(99999999) %}{% for j in range(99999999) %}{% endfor %}{% endfor %}",
        "{% set ns = namespace(x='a') %}{% for i in range(90) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{% include '/etc/passwd' %}",
        "{{ 'a' * 9999999999 }}",
        "{{ 9 ** (9 ** 9) }}",
    )
    with server.client() as c:
        for source in endless:
            with unshaken(server):
                is_error(post(c, CHAT, {"messages": Q, "chat_template": source}), 400)


class Counting(http.server.BaseHTTPRequestHandler):
    seen = 0

    def do_GET(self) -> None:
        type(self).seen += 1
        self.send_response(200)
        self.end_headers()


def test_media_are_refused_and_nothing_is_fetched(server: Served) -> None:
    listener = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Counting)
    threading.Thread(target=listener.serve_forever, daemon=True).start()
    port = listener.server_address[1]
    urls = (
        f"http://127.0.0.1:{port}/x.png", f"http://0x7f000001:{port}/", f"http://[::ffff:127.0.0.1]:{port}/", "file:///etc/passwd",
        "data:image/png;base64," + "A" * 1_000_000, "http://169.254.169.254/latest/meta-data/", "../../etc/passwd",
    )  # fmt: skip
    kinds = ("image_url", "input_audio", "video_url", "file", "image", "audio", "input_image", "input_file")
    try:
        with server.client() as c:
            for kind in kinds:
                for url in urls:
                    part = {"type": kind, kind: {"url": url, "data": url, "file_data": url}}
                    e = is_error(post(c, CHAT, {"messages": [{"role": "user", "content": [part]}]}), 400)
                    assert "messages[0].content[0]" in e["message"]
                    assert "root:" not in e["message"]
            ref = {"structured_outputs": {"json": {"$ref": f"http://127.0.0.1:{port}/schema"}}}
            is_error(post(c, TEXT, {"prompt": "x", **ref}), 400)
    finally:
        listener.shutdown()
        listener.server_close()
    assert Counting.seen == 0


def test_names_of_models_are_no_paths(server: Served) -> None:
    for name in (
        "../../../etc/passwd",
        "/etc/passwd",
        "lab-1m",
        "file:///etc/passwd",
        "lab-8m/../lab-1m",
        "\u0000",
        "x" * 100_000,
    ):
        with server.client() as c:
            e = is_error(post(c, TEXT, {"model": name, "prompt": "x"}), 404)
            assert e["code"] == "model_not_found"
            assert len(e["message"]) < 1000
    assert set(server.server.models.loaded) == {"lab-8m"}


def test_code_beside_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    import shutil

    from paceline import lab

    folder, trace = tmp_path / "model", tmp_path / "trace"
    shutil.copytree(lab.path("lab-1m"), folder)
    config = json.loads((folder / "config.json").read_text())
    own = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoTokenizer": ["evil.Tok", None]}
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": own}))
    for name in ("evil.py", "modeling_evil.py", "__init__.py", "sitecustomize.py"):
        (folder / name).write_text(f"open({str(trace)!r}, 'w')\nclass Config: pass\nModel = Tok = Config\n")
    front = open_front(Offer(("x",), str(folder), CONFIG))
    assert front.tokenizer is not None
    assert not trace.exists()


CODE = {"eval", "exec", "compile", "__import__"}


def test_no_code_is_made_of_data() -> None:
    """No eval, no pickle (also not through torch or NumPy), no unsafe YAML; the one compiler of code is Jinja's, in its sandbox."""
    found = []
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            if (
                name in CODE
                or name in ("torch.load", "yaml.load", "marshal.loads")
                or "pickle." in name
                or name.startswith("builtins.")
            ):
                found.append((str(path.relative_to(SOURCE)), name))
            if any(k.arg in ("allow_pickle", "trust_remote_code", "shell") for k in node.keywords):
                found.append((str(path.relative_to(SOURCE)), ast.unparse(node)))
    assert found == []


# ---- access

USER, ADMIN = "pk-" + "u" * 43, "pk-" + "a" * 43


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    path = tmp_path_factory.mktemp("keys") / "keys.json"
    rows = [Record("alice", digest(USER).hex(), 0), Record("bob", digest(USER + "b").hex(), 0),
            Record("root", digest(ADMIN).hex(), 0, admin=True)]  # fmt: skip
    write(path, rows)
    with served(access={"keys_file": str(path), "max_auth_failures": 10_000}) as s:
        yield s


def auth(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}", "content-type": "application/json"}


def test_every_route_is_guarded(keyed: Served) -> None:
    """Whatever routes there are: with the wrong key and without one 401 but for the public ones, 403 for administration."""
    with keyed.client() as c:
        for route in routes():
            path = route.path.replace("{model:path}", "lab-8m").replace("{fingerprint}", "x")
            path = "/".join("x" if part.startswith("{") else part for part in path.split("/"))
            public = route.public or path == "/"
            for headers in ({"content-type": "application/json"}, auth("pk-" + "x" * 43)):
                r = c.request(route.method, path, headers=headers)
                if public:
                    assert r.status_code == 200, path
                else:
                    is_error(r, 401)
            if route.admin:
                r = c.request(route.method, path, headers=auth(USER), content=b"{}")
                assert is_error(r, 403)["type"] == "permission_error"
        assert {r.path for r in routes() if r.public} <= {"/health", "/ready"}
        for path in ("/invocations", "/pause", "/collective_rpc", "/v1/load_lora_adapter", "/update_weights", "/admin/x",
                     "/slots", "/v1/files", "/docs", "/debug", "/static/../admin/load", "/props", "/lora-adapters"):  # fmt: skip
            is_error(c.post(path, content=b"{}"), 401, 404)
            is_error(c.post(path, headers=auth(USER), content=b"{}"), 403, 404, 405)


def test_only_administrators_name_paths() -> None:
    """A field that takes a place on this machine is on routes of administration alone."""
    for route in routes():
        names = set(route.body.__struct_fields__) if route.body is not None else set()
        if names & {"path", "lora_path", "file", "folder", "save_path", "directory", "adapter"}:
            assert route.admin, route.path


def test_identities_never_share_a_prefix(keyed: Served) -> None:
    secret = {"messages": [{"role": "user", "content": "My password is swordfish. " * 12}], "max_tokens": 2}

    def cached(key: str, **more: Any) -> int:
        with keyed.client(headers=auth(key)) as c:
            r = c.post(CHAT, json={**secret, **more}).json()
            return int(r["usage"]["prompt_tokens_details"]["cached_tokens"])

    assert cached(USER) == 0
    assert cached(USER) > 32
    assert cached(USER + "b") == 0
    assert cached(USER, cache_salt="mine") == 0  # narrows
    assert cached(USER, cache_salt="mine") > 32
    for guess in ("mine", "alice", "alice/mine", "/mine", "../alice"):
        assert cached(ADMIN, cache_salt=guess) == 0  # never widens
    with keyed.client(headers=auth(ADMIN)) as c:
        assert "cache_salt" in is_error(c.post(CHAT, json={**secret, "cache_salt": "a\0b"}), 400)["message"]


def test_reading_an_address_changes_nothing(server: Served) -> None:
    before = server.supervisor._ids, server.server.metrics.totals("lab-8m")
    with server.client() as c:
        for path in ("/?q=hello", "/?prompt=hello&submit=1", "/?model=x#q=hi"):
            assert c.get(path).status_code == 200
        for path in (CHAT, TEXT, "/admin/unload", "/admin/load", "/tokenize"):
            is_error(c.get(f"{path}?prompt=x"), 405)
            is_error(
                c.post(path, content=b"prompt=x", headers={"content-type": "application/x-www-form-urlencoded"}), 415
            )
            is_error(c.post(path, content=b'{"prompt": "x"}', headers={"content-type": "text/plain"}), 415)
    assert server.server.metrics.totals("lab-8m") == before[1]


def test_errors_tell_no_internals(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    from paceline.server.answer import Answer

    def broken(self: Any) -> None:
        raise KeyError(f"{__file__}: secret of {self!r}")

    told = []
    with server.client() as c:
        with monkeypatch.context() as m:
            m.setattr(Answer, "check", broken)
            for path, body in (
                (CHAT, {"messages": Q}),
                (TEXT, {"prompt": "x"}),
                (CHAT, {"messages": Q, "stream": True}),
            ):
                r = post(c, path, body)
                assert "req-" in is_error(r, 500)["message"]
                told.append(r.text)
        told += [
            post(c, path, {**({"messages": Q} if path == CHAT else {}), **more}).text for path, more in HOSTILE.values()
        ]
        for raw in (b"{", b"\xff", b"[" * 5000, b"{}", b'{"prompt": 1e999}'):
            told.append(post(c, TEXT, raw).text)
        told += [c.get("/nowhere").text, c.put(TEXT, json={}).text, c.get("/plan/" + "x" * 1000).text]
    for text in told:
        for word in (
            "Traceback",
            ".py",
            "paceline.",
            "/tmp",
            "/home",
            "/usr",
            "msgspec",
            "starlette",
            "KeyError",
            "object at 0x",
            "secret",
        ):
            assert word not in text, (word, text[:300])


# ---- too much at once


def test_a_full_queue_says_when_to_come_back() -> None:
    ask = {"prompt": "Once", "max_tokens": 900, "ignore_eos": True, "stream": True}
    with served(bounds={"max_queue": 3}) as s, s.client() as c:
        streams = [c.stream("POST", TEXT, json=ask) for _ in range(3)]
        opened = [stream.__enter__() for stream in streams]
        try:
            eventually(lambda: s.supervisor.n_live == 3)
            for body in ({**ask}, {**ask, "stream": False}, {"prompt": ["a", "b"], "max_tokens": 1}):
                r = post(c, TEXT, body)
                assert is_error(r, 503)["type"] == "overloaded"
                assert int(r.headers["retry-after"]) >= 1
            assert c.get("/health").status_code == 200
        finally:
            for stream in streams:
                stream.__exit__(None, None, None)
        assert all(r.status_code == 200 for r in opened)
        eventually(lambda: quiet(s))
        assert post(c, TEXT, {"prompt": "x", "max_tokens": 1}).status_code == 200


def test_the_clock_of_the_wall_may_jump(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    ask = {"prompt": "Once", "max_tokens": 200, "ignore_eos": True, "seed": 2}
    real = time.time
    with server.client() as c:
        want = post(c, TEXT, ask).json()["choices"]
        text, n = "", 0
        with c.stream("POST", TEXT, json={**ask, "stream": True}) as r:
            for line in r.iter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line[6:])["choices"][0]["text"]
                    n += 1
                if n == 5:
                    monkeypatch.setattr(time, "time", lambda: real() + 3e8)
                if n == 20:
                    monkeypatch.setattr(time, "time", lambda: 1.0)
        assert text == want[0]["text"]
        assert c.get("/health").status_code == 200


# ---- memory


def test_memory_does_not_grow(server: Served) -> None:
    bodies = [
        (path, json.dumps({**({"messages": Q} if path == CHAT else {"prompt": "x"}), **HOSTILE[name][1]}).encode())
        for name, (path, _) in HOSTILE.items()
        if name in ("n", "all logprobs", "a long stop string", "prompt outside", "variables nested", "embeds")
    ]
    served_too = [
        {"prompt": "x", "max_tokens": 2, "logprobs": 20, "n": 4},
        {"prompt": "x", "max_tokens": 2, "stream": True},
    ]
    with server.client() as c:

        def all_of_them() -> None:
            for path, body in bodies:
                is_error(post(c, path, body), 400)
            for ask in served_too:
                assert post(c, TEXT, ask).status_code == 200

        assert growth(server, all_of_them, times=20) < 24 << 20
    eventually(lambda: quiet(server))
