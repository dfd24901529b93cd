"""A small Redis server in a thread: the commands that the Redis tier sends, and the faults it must survive."""

from __future__ import annotations

import socket
import threading
import time


class FakeRedis:
    """mode: "ok", "silent" (accepts and never answers), "error" (answers with an error), "garbage"."""

    def __init__(self):
        self.data: dict[bytes, bytes] = {}
        self.life: dict[bytes, float] = {}
        self.mode = "ok"
        self.n_calls = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self):
        for s in (self._listener, *self._open):
            s.close()

    def _accept(self):
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._open.append(connection)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection):
        file = connection.makefile("rb")
        try:
            while (line := file.readline()).startswith(b"*"):
                args = []
                for _ in range(int(line[1:])):
                    n = int(file.readline()[1:])
                    args.append(file.read(n + 2)[:-2])
                self.n_calls += 1
                if self.mode == "silent":
                    continue
                connection.sendall({"error": b"-ERR no\r\n", "garbage": b"?!\r\n"}.get(self.mode) or self._answer(args))
        except (OSError, ValueError):
            pass

    def _answer(self, args):
        name, *rest = args
        name = name.upper()
        for key, until in list(self.life.items()):
            if time.time() > until:
                self.data.pop(key, None)
                del self.life[key]
        if name == b"SET":
            self.data[rest[0]] = rest[1]
            if b"PX" in rest:
                self.life[rest[0]] = time.time() + int(rest[rest.index(b"PX") + 1]) / 1000
            return b"+OK\r\n"
        if name == b"GETRANGE":
            return bulk(self.data.get(rest[0], b"")[int(rest[1]) : int(rest[2]) + 1])
        if name == b"PEXPIRE":
            if rest[0] in self.data:
                self.life[rest[0]] = time.time() + int(rest[1]) / 1000
            return b":%d\r\n" % (rest[0] in self.data)
        if name == b"PERSIST":
            return b":%d\r\n" % (self.life.pop(rest[0], None) is not None)
        if name == b"EXISTS":
            return b":%d\r\n" % (rest[0] in self.data)
        if name == b"DEL":
            self.life.pop(rest[0], None)
            return b":%d\r\n" % (self.data.pop(rest[0], None) is not None)
        if name == b"SCAN":
            return b"*2\r\n" + bulk(b"0") + b"*%d\r\n" % len(self.data) + b"".join(map(bulk, self.data))
        return b"+OK\r\n" if name in (b"CLIENT", b"AUTH", b"SELECT") else b"-ERR unknown command\r\n"


def bulk(x: bytes) -> bytes:
    return b"$%d\r\n" % len(x) + x + b"\r\n"
