"""The stores behind the tiers: limits, damage, several processes, servers that fail."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from resp import FakeRedis

from paceline.core.blocks import KEY_BYTES, OWNER_BYTES
from paceline.core.config import describe
from paceline.core.errors import ConfigError
from paceline.core.technique import Fact
from paceline.techniques.kvcache import disk
from paceline.techniques.kvcache.disk import Disk, DiskStore, default_folder
from paceline.techniques.kvcache.ram import Ram, RamStore
from paceline.techniques.kvcache.redis import Redis, RedisStore
from paceline.techniques.parts.pause import Pause

HOUR = 3600.0


def key(i: int, owner: int = 0) -> bytes:
    return bytes([owner]) * OWNER_BYTES + i.to_bytes(KEY_BYTES - OWNER_BYTES, "big")


def real_redis(folder: Path):
    server = shutil.which("redis-server") or shutil.which("valkey-server")
    if server is None:
        pytest.skip("needs redis-server or valkey-server")
    path = folder / "redis.sock"
    options = ["--port", "0", "--unixsocket", str(path), "--save", "", "--dir", str(folder)]
    process = subprocess.Popen([server, *options], stdout=subprocess.DEVNULL)
    for _ in range(200):
        if path.exists():
            return process, f"unix://{path}"
        time.sleep(0.05)
    process.kill()
    raise AssertionError("the server did not start")


@pytest.fixture(params=["ram", "disk", "fake redis", "redis"])
def store(request, tmp_path):
    if request.param == "ram":
        yield RamStore(1000)
    elif request.param == "disk":
        yield DiskStore(tmp_path / "kv", 1000, HOUR)
    else:
        pytest.importorskip("redis")
        if request.param == "redis":
            process, url = real_redis(tmp_path)
            yield RedisStore(url, HOUR)
            process.terminate()
            process.wait()
        else:
            server = FakeRedis()
            yield RedisStore(f"redis://127.0.0.1:{server.port}/0", HOUR)
            server.close()


def test_what_every_store_does(store):
    assert store.get(key(1), 100) is None
    assert store.put(key(1), b"x" * 100) == []
    assert store.put(key(2, owner=1), bytes(range(100))) == []
    assert store.has(key(1))
    assert store.get(key(1), 100) == b"x" * 100
    assert store.get(key(2, owner=1), 100) == bytes(range(100))
    assert len(store.get(key(1), 10) or b"") in (11, 100)  # what is too long is told from what is sound, and bounded
    assert store.put(key(1), b"y" * 50) == []  # replaced
    assert store.get(key(1), 50) == b"y" * 50
    assert set(store.keys(None)) == {key(1), key(2, owner=1)}
    assert set(store.keys(bytes([1]) * OWNER_BYTES)) == {key(2, owner=1)}
    assert store.find([key(1), key(2, owner=1), key(3)]) == 2
    assert store.find([key(3), key(1)]) == store.find([]) == 0
    assert store.stats()["n_blocks"] >= 2
    assert store.delete(key(1))
    assert not store.delete(key(1))
    assert not store.has(key(1))
    assert store.get(key(1), 100) is None
    store.close()


def test_ram_gives_up_what_was_used_longest_ago():
    store = RamStore(300)
    for i in range(3):
        assert store.put(key(i), bytes(100)) == []
    store.touch(key(0), 0)
    assert store.put(key(3), bytes(100)) == [(key(1), bytes(100))]
    store.pinned = {key(2), key(0)}
    assert store.put(key(4), bytes(100)) == [(key(3), bytes(100))]
    store.pinned = {key(2), key(0), key(4)}
    assert store.put(key(5), bytes(100)) == [(key(5), bytes(100))]  # all is pinned: it is passed on
    assert store.put(key(6), bytes(301)) == [(key(6), bytes(301))]
    assert store.stats() == {"n_blocks": 3, "n_bytes": 300, "capacity": 300}


# ---- disk


def aged(store: DiskStore, i: int, seconds: float) -> None:
    when = time.time() - seconds
    os.utime(store._path(key(i)), (when, when))


def test_disk_is_private_and_found_again(tmp_path):
    store = DiskStore(tmp_path / "a" / "kv", 1000, HOUR)
    store.put(key(1), bytes(100))
    path = Path(store._path(key(1)))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == stat.S_IMODE(store.folder.stat().st_mode) == 0o700
    again = DiskStore(store.folder, 1000, HOUR)
    assert again.get(key(1), 100) == bytes(100)
    assert again.stats()["n_bytes"] == 100


def test_disk_refuses_folders_of_others(tmp_path):
    (tmp_path / "open").mkdir(mode=0o755)
    (tmp_path / "file").write_text("x")
    (tmp_path / "own").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "own")
    for name, told in (("open", "chmod 700"), ("file", "cannot be used"), ("link", "not a folder")):
        with pytest.raises(ConfigError, match=told):
            DiskStore(tmp_path / name, 1000, HOUR)


def test_disk_stays_below_its_limit_and_forgets_the_oldest(tmp_path):
    store = DiskStore(tmp_path / "kv", 1000, HOUR)
    for i in range(10):
        assert store.put(key(i), bytes(100)) == []
        aged(store, i, 100 - i)
    store.touch(key(0), 0)
    assert store.put(key(10), bytes(100)) == []
    left = sorted(int.from_bytes(k[OWNER_BYTES:], "big") for k in store.keys(None))
    assert left == [0, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    store.pinned = set(store.keys(None))
    assert store.put(key(11), bytes(100)) == [(key(11), bytes(100))]
    assert sum(f.stat().st_size for f in store.folder.rglob("*.kv")) <= 1000


def test_a_text_is_given_up_from_its_end(tmp_path):
    store = DiskStore(tmp_path / "kv", 500, HOUR)
    for i in range(5):
        store.put(key(i), bytes(100))
        store.touch(key(i), index=i)
    store.put(key(9, owner=1), bytes(100))
    assert store.find([key(i) for i in range(5)]) == 4


def test_disk_forgets_what_is_old(tmp_path):
    store = DiskStore(tmp_path / "kv", 1000, 60)
    for i in range(3):
        store.put(key(i), bytes(100))
        aged(store, i, 61)
    store.pinned = {key(1)}
    assert store.get(key(0), 100) is None
    assert not store.has(key(0))
    assert store.get(key(1), 100) == bytes(100)
    DiskStore(store.folder, 1000, 60)  # sweeps, and knows of no pins
    assert list(store.keys(None)) == []
    assert list(store.folder.iterdir()) == []
    assert store.put(key(1), bytes(100)) == []


def test_other_files_are_left_alone_and_old_temporary_ones_removed(tmp_path):
    store = DiskStore(tmp_path / "kv", 1000, HOUR)
    store.put(key(1), bytes(100))
    folder = Path(store._path(key(1))).parent
    (store.folder / "note.txt").write_text("mine")
    (folder / "zz.kv").write_text("no key")
    (folder / "old.kv.1.tmp").write_text("")
    (folder / "new.kv.1.tmp").write_text("")
    os.symlink("/etc/passwd", store._path(key(2)))
    os.utime(folder / "old.kv.1.tmp", (0, 0))
    again = DiskStore(store.folder, 1000, HOUR)
    assert list(again.keys(None)) == [key(1)]
    assert again.get(key(2), 100) is None  # links are not followed
    names = {p.name for p in store.folder.rglob("*")}
    assert {"note.txt", "zz.kv", "new.kv.1.tmp"} <= names
    assert "old.kv.1.tmp" not in names


def test_a_full_disk_pauses_writing_and_nothing_else(tmp_path, monkeypatch, caplog):
    store = DiskStore(tmp_path / "kv", 1000, HOUR)
    store.put(key(1), bytes(100))
    real = os.fdopen

    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *exc):
            self.file.close()

        def write(self, data):
            self.file.write(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(
        disk.os, "fdopen", lambda fd, mode, **o: Full(real(fd, mode, **o)) if "w" in mode else real(fd, mode, **o)
    )
    with caplog.at_level(logging.WARNING):
        assert store.put(key(2), bytes(100)) == [(key(2), bytes(100))]
        assert store.put(key(3), bytes(100)) == [(key(3), bytes(100))]
    assert [r.message.endswith("No space left on device") for r in caplog.records] == [True]
    assert not store.accepts
    assert store.stats()["paused"] == "No space left on device"
    assert store.get(key(1), 100) == bytes(100)
    assert list(store.folder.rglob("*.tmp")) == []
    monkeypatch.undo()
    store.pause._until = 0  # the pause is over
    assert store.put(key(2), bytes(100)) == []
    assert store.stats()["paused"] is None


def test_the_default_folder_is_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "paceline" / "kv"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which the specification says to ignore
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_folder() == tmp_path / "home" / ".cache" / "paceline" / "kv"


WRITER = """
import sys, hashlib
from pathlib import Path
from paceline.techniques.kvcache.disk import DiskStore
store = DiskStore(Path(sys.argv[1]), 200_000, 3600.0)
start = int(sys.argv[2])
print("ready", flush=True)
i = 0
while i < int(sys.argv[3]):
    n = (start + i) % 64
    key = hashlib.sha256(b"%d" % n).digest() + bytes(16)
    store.put(key, hashlib.sha512(b"%d" % n).digest() * 100)
    raw = store.get(hashlib.sha256(b"%d" % (n // 2)).digest() + bytes(16), 6400)
    assert raw is None or raw == hashlib.sha512(b"%d" % (n // 2)).digest() * 100, "a torn block"
    i += 1
print("done", flush=True)
"""


def writer(folder: Path, start: int, n: int) -> subprocess.Popen:
    env = {**os.environ, "PYTHONPATH": str(Path(disk.__file__).resolve().parents[3])}
    command = [sys.executable, "-c", WRITER, str(folder), str(start), str(n)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)


def sound(folder: Path) -> int:
    """How many blocks there are, all of them whole."""
    import hashlib

    names = {
        hashlib.sha256(b"%d" % n).digest() + bytes(16): hashlib.sha512(b"%d" % n).digest() * 100 for n in range(64)
    }
    store = DiskStore(folder, 200_000, HOUR)
    keys = list(store.keys(None))
    assert all(store.get(k, 6400) == names[k] for k in keys)
    return len(keys)


def test_processes_may_share_a_folder(tmp_path):
    running = [writer(tmp_path / "kv", start, 300) for start in (0, 21, 42)]
    for process in running:
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        assert out.endswith("done\n")
    assert sound(tmp_path / "kv") > 0
    # each keeps to the limit as it sees it, so that together they may be over by what they wrote since their last sweep
    assert sum(f.stat().st_size for f in (tmp_path / "kv").rglob("*.kv")) <= 3 * 200_000


def test_killed_while_writing_nothing_is_torn(tmp_path):
    for delay in (0.0, 0.01, 0.03, 0.07):
        process = writer(tmp_path / "kv", 0, 10**9)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        sound(tmp_path / "kv")


# ---- Redis


@pytest.fixture
def server():
    pytest.importorskip("redis")
    fake = FakeRedis()
    yield fake
    fake.close()


def test_redis_blocks_expire_unless_used_or_pinned(server):
    store = RedisStore(f"redis://127.0.0.1:{server.port}/0", 0.5)
    store.put(key(1), b"a")
    store.pinned = {key(2)}
    store.put(key(2), b"b")
    name = b"paceline:kv:" + key(1)
    assert name in server.life
    server.life[name] = time.time() + 1000
    store.get(key(1), 10)
    assert server.life[name] < time.time() + 1  # counted anew
    assert b"paceline:kv:" + key(2) not in server.life
    server.life[name] = 0.0
    assert store.get(key(1), 10) is None
    assert store.get(key(2), 10) == b"b"


@pytest.mark.parametrize("mode", ["silent", "error", "garbage"])
def test_a_redis_that_fails_is_left_alone_for_a_while(server, mode, caplog):
    store = RedisStore(f"redis://:hunter2@127.0.0.1:{server.port}/0", HOUR)
    server.mode = mode
    with caplog.at_level(logging.DEBUG):
        assert store.get(key(1), 10) is None
        n = server.n_calls
        for _ in range(50):
            assert store.get(key(1), 10) is None
            assert store.put(key(1), b"a") == [(key(1), b"a")]
            assert store.find([key(1)]) == 0
            assert list(store.keys(None)) == []
            assert not store.delete(key(1))
    assert server.n_calls == n  # not asked again
    assert not store.accepts
    assert store.stats()["paused"]
    assert "hunter2" not in caplog.text + str(store.stats())
    server.mode = "ok"
    store.pause._until = 0
    assert store.put(key(1), b"a") == []
    assert store.accepts


def test_a_redis_that_is_not_there(caplog):
    pytest.importorskip("redis")
    with FreePort() as port:
        store = RedisStore(f"redis://u:hunter2@127.0.0.1:{port}/0", HOUR)
    assert store.get(key(1), 10) is None
    assert store.put(key(1), b"a") == [(key(1), b"a")]
    assert "hunter2" not in caplog.text
    assert store.stats()["n_failures"] == 1


class FreePort:
    """A port nobody listens on any more."""

    def __enter__(self) -> int:
        import socket

        self.socket = socket.create_server(("127.0.0.1", 0))
        return int(self.socket.getsockname()[1])

    def __exit__(self, *exc: object) -> None:
        self.socket.close()


def test_a_wrong_url_is_refused_without_being_quoted():
    pytest.importorskip("redis")
    for url in ("http://u:hunter2@x", "hunter2", "redis://:hunter2@host:port/0"):
        with pytest.raises(ConfigError) as e:
            RedisStore(url, HOUR)
        assert "hunter2" not in str(e.value)
        assert e.value.__cause__ is None


def test_the_password_is_in_no_description():
    asked = Redis(url="redis://u:hunter2@host:6379/0", max_age_h=2.0)
    asked.__class__.name = "kvcache/redis"
    assert "hunter2" not in repr(asked) + describe(asked)
    assert "url=***" in describe(asked)
    assert "max_age_h=2.0" in describe(asked)


# ---- the rest


def test_a_pause_grows_and_ends(caplog):
    pause = Pause("it", 10, 25)
    assert not pause.active
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            pause.failed("why")
        assert pause.active
        assert pause._seconds == 25
        pause.worked()
    assert not pause.active
    assert len(caplog.records) == 2
    assert pause.n_failures == 3


def test_the_pause_counts_every_failure_of_many_threads():
    pause = Pause("it", 10, 25)
    threads = [threading.Thread(target=lambda: [pause.failed("x") for _ in range(200)]) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert pause.n_failures == 800


class PlanOf:
    def __init__(self, *techniques, free=1 << 30):
        self.techniques = techniques
        self.peak_bytes = 1 << 30
        self.machine = type("M", (), {"memory": (1 << 30) + free})()


def test_the_techniques_say_what_they_need():
    from paceline.techniques.serving.radix import Radix

    for technique in (Ram(size_mib=1), Disk(), Redis()):
        assert technique.manifest().seams == {"kv_tier"}
        assert technique.manifest().needs == {Fact.PREFIX_PURE}
        assert technique.why_not(PlanOf(Radix(), technique)) is None
        assert "serving/radix" in technique.why_not(PlanOf(technique))
    assert "1024 MiB are left" in Ram(size_mib=1025).why_not(PlanOf(Radix()))
