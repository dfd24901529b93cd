"""Keys at rest and in force, quotas, and turning away who guesses."""

from __future__ import annotations

import hmac
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from paceline.cli import make_app
from paceline.core.clock import ManualClock
from paceline.core.errors import ConfigError
from paceline.server import keys, quota
from paceline.server.access import Gate, need_model, presented
from paceline.server.errors import ApiError
from paceline.server.keys import Identity, Keyring
from paceline.server.quota import Failures, Grant, Ledger, Quotas, Refusal, Window, duration, network
from paceline.server.settings import Access, Listen, ServeSettings


def bearer(key: str) -> list[tuple[bytes, bytes]]:
    return [(b"authorization", b"Bearer " + key.encode())]


def one_key(path: Path, name: str = "alice", **options: Any) -> str:
    key, record = keys.make(name, **options)
    old = keys.read(path) if path.exists() else ()
    keys.write(path, (*old, record))
    return key


# ---- the file


def test_a_key_is_long_random_and_not_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "keys.json"
    key = one_key(path)
    assert key.startswith("pk-")
    assert len(key) >= 3 + 43  # 256 bits in base64
    assert key not in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    assert len({keys.new_key() for _ in range(100)}) == 100
    assert list(path.parent.iterdir()) == [path]  # nothing temporary stays


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "keys.json"
    one_key(path)
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match="cannot be written"):
        keys.write(path, ())
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o602, 0o660, 0o620, 0o601])
def test_a_file_that_others_may_use_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "keys.json"
    one_key(path)
    path.chmod(mode)
    with pytest.raises(ConfigError, match="chmod 600"):
        Keyring(path=path)
    path.chmod(0o440)
    Keyring(path=path)


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{}", '{"keys": 3}', '{"keys": [{}]}', '{"version": 2, "keys": []}', '{"keys": [], "more": 1}', "\xff", "[" * 100000,
        '{"keys": [{"name": "a b", "sha256": "' + "0" * 64 + '", "created": 0}]}',
        '{"keys": [{"name": "a", "sha256": "zz", "created": 0}]}',
        '{"keys": [{"name": "a", "sha256": "' + "0" * 64 + '", "created": 0, "requests_per_minute": -1}]}',
        '{"keys": [{"name": "a", "sha256": "' + "0" * 64 + '", "created": 0, "admin": "yes"}]}',
        '{"keys": [' + ",".join(['{"name": "a", "sha256": "' + "0" * 64 + '", "created": 0}'] * 2) + "]}",
    ],
)  # fmt: skip
def test_malformed_files_are_config_errors(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys.json"
    path.write_text(text, encoding="latin-1")
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="keys file"):
        keys.read(path)


def test_plain_key_files(tmp_path: Path) -> None:
    path = tmp_path / "plain"
    path.write_text("# ours\n\nabcdefgh\r\n  ijklmnop\n")
    path.chmod(0o600)
    gate = Gate.of(ServeSettings(access=Access(api_key_file=str(path))), ManualClock())
    assert gate.identify(bearer("ijklmnop"), None).name == ":key-2"
    path.write_text("short\n")
    with pytest.raises(ConfigError, match="8 to 512"):
        keys.read_plain(path)


# ---- the keyring


def test_identity_expiry_and_rights(tmp_path: Path) -> None:
    path, now = tmp_path / "keys.json", [1000.0]
    key = one_key(path, "alice", now=1000, expires=2000, models=("a",), priority=3, requests_per_minute=5, admin=True)
    ring = Keyring(path=path, wall=lambda: now[0])
    found = ring.find(key)
    assert found == Identity("alice", 3, Quotas(requests_per_minute=5), ("a",), True)
    now[0] = 2000
    assert ring.find(key) is None
    for wrong in ("", key[:-1], key + "x", key.upper(), "x" * 100000, "\ud800", "ключ"):
        assert ring.find(wrong) is None


def test_every_key_is_compared_whole_and_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    real = hmac.compare_digest

    def compare(a: bytes, b: bytes) -> bool:
        seen.append((len(a), len(b)))
        return real(a, b)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    ring = Keyring([f"key-number-{i}" for i in range(5)])
    for asked in ("key-number-0", "key-number-4", "k", "wrong" * 20):
        seen.clear()
        ring.find(asked)
        assert seen == [(32, 32)] * 5


def test_changes_of_the_file_are_noticed(tmp_path: Path) -> None:
    path, told = tmp_path / "keys.json", []
    alice = one_key(path, "alice")
    ring = Keyring(["plain-key"], path, warn=told.append)
    bob = one_key(path, "bob")
    assert ring.find(bob) is None
    ring.refresh()
    assert ring.find(bob)
    assert ring.find(alice)
    path.write_text("{")  # half an edit: the keys stay, and it is told once
    ring.refresh()
    ring.refresh()
    assert ring.find(alice)
    assert len(told) == 1
    path.unlink()
    ring.refresh()
    assert ring.find(alice) is None
    assert ring.find("plain-key")


def test_no_key_left_means_nobody_not_everybody(tmp_path: Path) -> None:
    path, clock = tmp_path / "keys.json", ManualClock()
    key = one_key(path)
    gate = Gate.of(ServeSettings(access=Access(keys_file=str(path))), clock)
    gate.identify(bearer(key), None)
    keys.write(path, ())
    clock.advance(2)
    for headers in (bearer(key), []):
        with pytest.raises(ApiError) as e:
            gate.identify(headers, None)
        assert e.value.status == 401


# ---- who sends a request


@pytest.mark.parametrize(
    ("headers", "key"),
    [
        ([], None),
        ([(b"authorization", b"Bearer abc")], "abc"),
        ([(b"authorization", b"bearer   abc ")], "abc"),
        ([(b"authorization", b"Basic abc")], None),
        ([(b"authorization", b"Bearer")], None),
        ([(b"authorization", b"abc")], None),
        ([(b"x-api-key", b"abc")], "abc"),
        ([(b"api-key", b"abc")], "abc"),
        ([(b"api-key", b"z"), (b"x-api-key", b"y"), (b"authorization", b"Bearer x")], "x"),
        ([(b"authorization", b"Basic u"), (b"x-api-key", b"y")], "y"),
        ([(b"x-api-key", b"first"), (b"x-api-key", b"second")], "first"),
    ],
)
def test_where_the_key_is_found(headers: list[tuple[bytes, bytes]], key: str | None) -> None:
    assert presented(headers) == key


@given(
    st.lists(st.tuples(st.sampled_from([b"authorization", b"x-api-key", b"api-key", b"host"]), st.binary(max_size=60)))
)
def test_any_header_is_survived(headers: list[tuple[bytes, bytes]]) -> None:
    gate = Gate(Keyring(["the-only-key"]), Identity(""), ManualClock(), 10**6)
    if presented(headers) == "the-only-key":
        return
    with pytest.raises(ApiError) as e:
        gate.identify(headers, "1.2.3.4")
    assert e.value.status == 401
    assert e.value.headers["www-authenticate"] == "Bearer"


def test_without_keys_everyone_is_anonymous_and_admin_only_at_home() -> None:
    assert Gate.of(ServeSettings()).identify(bearer("whatever"), "127.0.0.1") == Identity("", admin=True)
    far = Gate.of(ServeSettings(listen=Listen(host="0.0.0.0", insecure=True)))
    assert not far.identify([], "10.0.0.1").admin


def test_guessing_is_turned_away_and_nobody_else() -> None:
    clock = ManualClock()
    gate = Gate(Keyring(["right-key"]), Identity(""), clock, 5)

    def status(key: str, address: str | None) -> int:
        try:
            gate.identify(bearer(key), address)
        except ApiError as e:
            return e.status
        return 200

    assert [status("wrong", "1.1.1.1") for _ in range(7)] == [401] * 5 + [429] * 2
    assert status("right-key", "1.1.1.1") == 429  # or guessing would go on
    assert status("right-key", "2.2.2.2") == 200
    assert [status("wrong", None) for _ in range(9)] == [401] * 9
    with pytest.raises(ApiError) as e:
        gate.identify(bearer("wrong"), "1.1.1.1")
    clock.advance(int(e.value.headers["retry-after"]))
    assert status("right-key", "1.1.1.1") == 200


def test_failures_are_bounded_and_count_ipv6_by_network() -> None:
    failures = Failures(1, ManualClock(), max_addresses=100)
    for i in range(1000):
        failures.add(f"10.0.{i // 250}.{i % 250}")
    assert len(failures._seen) == 100
    failures.add("2001:db8::1")
    assert failures.wait("2001:db8::ffff") > 0
    assert failures.wait("2001:db8:0:1::1") == 0
    assert network("::ffff:1.2.3.4") == "1.2.3.4"
    assert len(network("x" * 10**6)) == 64


def test_models_of_others_are_not_told() -> None:
    need_model(Identity("a"), "m")
    need_model(Identity("a", models=("m",)), "m")
    with pytest.raises(ApiError) as e:
        need_model(Identity("a", models=("x",)), "m")
    assert (e.value.status, e.value.code, e.value.param) == (404, "model_not_found", "model")


# ---- quotas


@given(
    st.lists(st.tuples(st.floats(-5, 100), st.integers(1, 12)), max_size=60),
    st.integers(1, 20),
    st.sampled_from([6, 60]),
)
def test_no_window_lets_more_than_the_limit_through(steps: list[tuple[float, int]], limit: int, n_slices: int) -> None:
    window, now, seen, passed = Window(limit, 60.0, n_slices), 0.0, 0.0, []
    for pause, amount in steps:
        now += pause  # a clock that goes back, too
        seen = max(seen, now)
        wait = window.wait(now, amount)
        if wait == 0:
            window.take(now, amount)
            passed.append((seen, amount))
        else:
            assert (wait is None) == (amount > limit)
    for begin, _ in passed:
        assert sum(a for t, a in passed if begin <= t <= begin + 60) <= limit
    assert len(window.slices) <= n_slices + 1
    assert window.used == sum(window.slices.values()) >= 0


@given(st.lists(st.tuples(st.floats(0, 30), st.integers(1, 10)), max_size=30), st.integers(1, 10), st.integers(1, 10))
def test_waiting_as_long_as_told_helps(steps: list[tuple[float, int]], limit: int, amount: int) -> None:
    window, now = Window(limit, 60.0, 60), 0.0
    for pause, a in steps:
        now += pause
        if window.wait(now, a) == 0:
            window.take(now, a)
    wait = window.wait(now, amount)
    if wait is not None:
        assert wait <= 61
        later = now + wait + 1e-6
        assert window.wait(later, amount) == 0
        assert window.remaining(later + window.reset(later) + 1e-6) == limit


@settings(max_examples=60)
@given(st.data())
def test_settled_requests_never_exceed_the_quotas(data: st.DataObject) -> None:
    clock = ManualClock()
    ledger, quotas = Ledger(clock), Quotas(5, 100, 300, 2)
    running: list[tuple[Grant, int]] = []
    used: list[tuple[float, int]] = []
    for _ in range(data.draw(st.integers(1, 40))):
        clock.advance(data.draw(st.floats(0, 40)))
        if running and data.draw(st.booleans()):
            grant, actual = running.pop(data.draw(st.integers(0, len(running) - 1)))
            ledger.settle(grant, actual)
            ledger.settle(grant, actual)  # twice does no harm
        else:
            estimate = data.draw(st.integers(0, 120))
            answer = ledger.admit("a", quotas, estimate)
            if isinstance(answer, Grant):
                actual = data.draw(st.integers(0, estimate))
                running.append((answer, actual))
                used.append((clock.now(), actual))
            else:
                assert (answer.retry_after_s is None) == (estimate > 100)
        assert len(running) <= 2
    for begin, _ in used:
        minute = [n for t, n in used if begin <= t <= begin + 60]
        assert len(minute) <= 5
        assert sum(minute) <= 100
        assert sum(n for t, n in used if begin <= t <= begin + 86400) <= 300


def test_refunds_debts_and_headers() -> None:
    clock = ManualClock(1000)
    ledger, quotas = Ledger(clock), Quotas(requests_per_minute=10, tokens_per_minute=100)
    grant = ledger.admit("a", quotas, 90)
    assert isinstance(grant, Grant)
    assert ledger.headers("a", quotas)["x-ratelimit-remaining-tokens"] == "10"
    refused = ledger.admit("a", quotas, 20)
    assert isinstance(refused, Refusal)
    assert refused.which == "tokens_per_minute"
    assert ledger.headers("a", quotas)["x-ratelimit-remaining-requests"] == "9"  # refusals count nowhere
    ledger.settle(grant, 30)
    assert ledger.headers("a", quotas)["x-ratelimit-remaining-tokens"] == "70"
    long = ledger.admit("a", quotas, 10)
    assert isinstance(long, Grant)
    clock.advance(500)
    ledger.settle(long, 95)  # more than was said, after its minute: it counts now
    assert ledger.headers("a", quotas) == {
        "x-ratelimit-limit-requests": "10", "x-ratelimit-remaining-requests": "10", "x-ratelimit-reset-requests": "0s",
        "x-ratelimit-limit-tokens": "100", "x-ratelimit-remaining-tokens": "15", "x-ratelimit-reset-tokens": "1m1s",
    }  # fmt: skip
    assert ledger.headers("b", Quotas()) == {}


def test_identities_do_not_share_and_new_limits_keep_the_use() -> None:
    clock = ManualClock()
    ledger = Ledger(clock)
    for _ in range(3):
        assert isinstance(ledger.admit("a", Quotas(3), 0), Grant)
    assert isinstance(ledger.admit("a", Quotas(3), 0), Refusal)
    assert isinstance(ledger.admit("b", Quotas(3), 0), Grant)
    assert isinstance(ledger.admit("a", Quotas(4), 0), Grant)
    assert isinstance(ledger.admit("a", Quotas(2), 0), Refusal)
    assert isinstance(ledger.admit("a", Quotas(), 10**9), Grant)
    clock.advance(1e9)  # a machine that slept
    assert isinstance(ledger.admit("b", Quotas(3), 0), Grant)


def test_the_ledger_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quota, "MAX_STATES", 10)
    ledger = Ledger(ManualClock())
    held = ledger.admit("held", Quotas(max_concurrent=1), 0)
    assert isinstance(held, Grant)
    for i in range(100):
        ledger.headers(f"name-{i}", Quotas(5))
    assert len(ledger._states) <= 10
    assert isinstance(ledger.admit("held", Quotas(max_concurrent=1), 0), Refusal)
    ledger.settle(held, 0)
    assert isinstance(ledger.admit("held", Quotas(max_concurrent=1), 0), Grant)


def test_the_gate_refuses_with_retry_after() -> None:
    clock = ManualClock()
    gate = Gate(None, Identity("", quotas=Quotas(1, 50)), clock)
    who = gate.identify([], None)
    with pytest.raises(ApiError) as e:
        gate.admit(who, 51)
    assert (e.value.status, e.value.code) == (429, "request_too_large")
    assert "retry-after" not in e.value.headers
    gate.settle(gate.admit(who, 5), 5)
    with pytest.raises(ApiError) as e:
        gate.admit(who, 5)
    assert (e.value.status, e.value.type) == (429, "rate_limit_error")
    assert e.value.headers["x-ratelimit-remaining-requests"] == "0"
    clock.advance(int(e.value.headers["retry-after"]))
    gate.admit(who, 5)


@pytest.mark.parametrize(
    ("t", "text"),
    [(0, "0s"), (0.0004, "1ms"), (0.25, "250ms"), (1, "1s"), (60, "1m0s"), (61.2, "1m2s"), (7380, "2h3m0s")],
)
def test_durations_as_openai_writes_them(t: float, text: str) -> None:
    assert duration(t) == text


# ---- the command


def run(*args: str) -> Any:
    return CliRunner().invoke(make_app(), ["keys", *args])


def test_keys_are_made_listed_and_revoked(tmp_path: Path) -> None:
    file = str(tmp_path / "keys.json")
    options = ("--requests-per-minute", "60", "--models", "a, b", "--expires", "90d", "--admin")
    done = run("create", "--name", "alice", *options, "--file", file)
    assert done.exit_code == 0, done.output
    key = next(line for line in done.output.splitlines() if line.startswith("pk-"))
    ring = Keyring(path=Path(file))
    who = ring.find(key)
    assert who is not None
    assert (who.name, who.models, who.admin, who.quotas.requests_per_minute) == ("alice", ("a", "b"), True, 60)
    made = json.loads(run("create", "--name", "bob", "--file", file, "--json").output)
    assert ring.find(made["key"]) is None
    listed = run("list", "--file", file, "--json").output
    assert [k["name"] for k in json.loads(listed)["keys"]] == ["alice", "bob"]
    assert keys.digest(key).hex() not in listed
    assert key not in listed
    table = run("list", "--file", file).output
    assert "alice" in table
    assert "60" in table
    assert run("revoke", "alice", "--file", file).exit_code == 0
    ring.refresh()
    assert ring.find(key) is None
    assert ring.find(made["key"])


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("create", "--name", "a b"), "name"),
        (("create", "--name", "alice"), "revoke it first"),
        (("create", "--name", "x", "--requests-per-minute", "0"), "requests_per_minute"),
        (("create", "--name", "x", "--expires", "soon"), "duration"),
        (("revoke", "nobody"), "there are: alice"),
    ],
)
def test_mistakes_are_told(tmp_path: Path, args: tuple[str, ...], words: str) -> None:
    path = tmp_path / "keys.json"
    one_key(path)
    before = path.read_bytes()
    done = run(*args, "--file", str(path))
    assert isinstance(done.exception, ConfigError)
    assert words in str(done.exception)
    assert path.read_bytes() == before
