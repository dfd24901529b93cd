"""How much an identity may use: requests and tokens per minute, tokens per day, requests at once.

Each rate is a sliding window cut into slices. It counts what was let through in the slices of the last window and the one running now, so
no window of that length, wherever it begins, lets through more than the limit; a token bucket of the same rate lets twice as much through
in the minute after a pause. Memory is one small list per rate and identity, and only identities that a key names have any.

Times are of the monotonic clock (`core/clock.py`), so a changed wall clock neither opens nor closes a window. State is this process's: a
restart begins the day anew.
"""

from __future__ import annotations

import ipaddress
import math
from collections import OrderedDict
from dataclasses import dataclass, field

from paceline.core.clock import Clock
from paceline.server.errors import ApiError

MAX_STATES = 8192


@dataclass(frozen=True)
class Quotas:
    """None: unbounded."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    tokens_per_day: int | None = None
    max_concurrent: int | None = None


class Window:
    """At most `limit` in any `seconds`. `n_slices`: how finely old use is forgotten."""

    def __init__(self, limit: int, seconds: float, n_slices: int):
        self.limit = limit
        self.n_slices = n_slices
        self.width = seconds / n_slices
        self.used = 0
        self.slices: OrderedDict[int, int] = OrderedDict()  # index of a slice: what was taken in it; oldest first
        self._last = -math.inf

    def _now(self, now: float) -> float:
        """Forget what is older than the window. Time that goes back stands still."""
        self._last = now = max(now, self._last)
        oldest = int(now // self.width) - self.n_slices
        while self.slices and (first := next(iter(self.slices))) < oldest:
            self.used -= self.slices.pop(first)
        return now

    def _expiry(self, index: int, now: float) -> float:
        return max(0.0, (index + self.n_slices + 1) * self.width - now)

    def wait(self, now: float, amount: int) -> float | None:
        """Seconds until `amount` may pass: 0 now, None never."""
        if amount > self.limit:
            return None
        now, left = self._now(now), self.used
        if left + amount <= self.limit:
            return 0.0
        for index, taken in self.slices.items():
            left -= taken
            if left + amount <= self.limit:
                return self._expiry(index, now)
        raise AssertionError("an empty window has room")

    def take(self, now: float, amount: int) -> int:
        """Count `amount`; returns the slice it is counted in."""
        index = int(self._now(now) // self.width)
        self.slices[index] = self.slices.get(index, 0) + amount
        self.used += amount
        return index

    def correct(self, now: float, index: int, delta: int) -> None:
        """What was taken in a slice was `delta` more. An excess whose slice is forgotten counts now."""
        self._now(now)
        if index in self.slices:
            self.slices[index] += delta
            self.used += delta
        elif delta > 0:
            self.take(now, delta)

    def remaining(self, now: float) -> int:
        self._now(now)
        return max(0, self.limit - self.used)

    def reset(self, now: float) -> float:
        """Seconds until nothing counts any more."""
        now = self._now(now)
        return self._expiry(next(reversed(self.slices)), now) if self.slices else 0.0


@dataclass(frozen=True)
class Refusal:
    """retry_after_s: None where waiting does not help. which: the quota's name."""

    retry_after_s: float | None
    which: str

    def error(self, headers: dict[str, str] | None = None) -> ApiError:
        """429, with Retry-After in whole seconds and the rate-limit headers given."""
        if self.retry_after_s is None:
            text = f"the request is larger than the key's {self.which}; ask for fewer tokens"
            return ApiError(429, text, code="request_too_large", headers=headers)
        wait = max(1, math.ceil(self.retry_after_s))
        text = f"the key's {self.which} is used up; try again in {wait} s"
        return ApiError(429, text, headers={**(headers or {}), "retry-after": str(wait)})


@dataclass
class Grant:
    """A request let through; `Ledger.settle` it exactly once, whatever became of the request (twice does no harm)."""

    name: str
    tokens: int
    slices: dict[str, int]
    settled: bool = False


@dataclass
class _State:
    quotas: Quotas = field(default_factory=Quotas)
    windows: dict[str, Window] = field(default_factory=dict)
    n_active: int = 0

    def adopt(self, quotas: Quotas) -> None:
        """Take over changed limits without forgetting what was used."""
        if quotas == self.quotas:
            return
        for name, seconds, n_slices in (
            ("requests_per_minute", 60, 60),
            ("tokens_per_minute", 60, 60),
            ("tokens_per_day", 86400, 96),
        ):
            limit = getattr(quotas, name)
            if limit is None:
                self.windows.pop(name, None)
            elif name in self.windows:
                self.windows[name].limit = limit
            else:
                self.windows[name] = Window(limit, seconds, n_slices)
        self.quotas = quotas


class Ledger:
    """Who has used how much. One event loop uses it; nothing in it waits."""

    def __init__(self, clock: Clock):
        self.clock = clock
        self._states: OrderedDict[str, _State] = OrderedDict()  # least recently used first

    def admit(self, name: str, quotas: Quotas, tokens: int) -> Grant | Refusal:
        """Let a request through that may take `tokens` (prompt and answer), or say which quota stands against it.

        A refused request counts nowhere. `tokens` is what the request may take at most: what it leaves is given back by `settle`.
        """
        state, now = self._state(name, quotas), self.clock.now()
        amounts = {w: 1 if w == "requests_per_minute" else max(0, tokens) for w in state.windows}
        waits = {w: window.wait(now, amounts[w]) for w, window in state.windows.items()}
        for which, wait in waits.items():
            if wait is None:
                return Refusal(None, which)
        worst = max(waits, key=lambda w: waits[w] or 0.0, default=None)
        if worst is not None and waits[worst]:
            return Refusal(waits[worst], worst)
        if quotas.max_concurrent is not None and state.n_active >= quotas.max_concurrent:
            return Refusal(1.0, "max_concurrent")
        state.n_active += 1
        return Grant(name, max(0, tokens), {w: window.take(now, amounts[w]) for w, window in state.windows.items()})

    def settle(self, grant: Grant, tokens: int) -> None:
        """The request is over and took `tokens`, computed or not (prompt and answer)."""
        state = self._states.get(grant.name)
        if grant.settled or state is None:
            return
        grant.settled = True
        state.n_active -= 1
        now = self.clock.now()
        for which, index in grant.slices.items():
            if which != "requests_per_minute" and which in state.windows:
                state.windows[which].correct(now, index, tokens - grant.tokens)

    def headers(self, name: str, quotas: Quotas) -> dict[str, str]:
        """OpenAI's rate-limit headers, for the quotas that there are."""
        state, now, found = self._state(name, quotas), self.clock.now(), {}
        for kind in ("requests", "tokens"):
            window = state.windows.get(f"{kind}_per_minute")
            if window is not None:
                found[f"x-ratelimit-limit-{kind}"] = str(window.limit)
                found[f"x-ratelimit-remaining-{kind}"] = str(window.remaining(now))
                found[f"x-ratelimit-reset-{kind}"] = duration(window.reset(now))
        return found

    def _state(self, name: str, quotas: Quotas) -> _State:
        state = self._states.get(name)
        if state is None:
            state = self._states[name] = _State()
            self._forget(name)
        self._states.move_to_end(name)
        state.adopt(quotas)
        return state

    def _forget(self, newest: str) -> None:
        """Keys come and go with their file: drop the longest unused identities with nothing running."""
        if len(self._states) > MAX_STATES:
            idle = [n for n, s in self._states.items() if s.n_active == 0 and n != newest]
            for name in idle[: len(self._states) - MAX_STATES]:
                del self._states[name]


def duration(seconds: float) -> str:
    """As OpenAI writes it: 250ms, 12s, 6m0s, 2h3m0s."""
    if 0 < seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    whole = math.ceil(seconds)
    minutes, s = divmod(whole, 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}h{m}m{s}s" if hours else f"{m}m{s}s" if m else f"{s}s"


class Failures:
    """Wrong keys per client address and minute, for the addresses seen last. IPv6 addresses count per /64 network."""

    def __init__(self, limit: int, clock: Clock, max_addresses: int = 4096):
        self.limit, self.clock, self.max_addresses = limit, clock, max_addresses
        self._seen: OrderedDict[str, Window] = OrderedDict()

    def wait(self, address: str) -> float:
        """Seconds until another attempt is looked at; 0: now."""
        window = self._seen.get(network(address))
        return (window.wait(self.clock.now(), 1) or 0.0) if window else 0.0

    def add(self, address: str) -> None:
        key = network(address)
        window = self._seen.setdefault(key, Window(self.limit, 60, 12))
        self._seen.move_to_end(key)
        window.take(self.clock.now(), 1)
        if len(self._seen) > self.max_addresses:
            self._seen.popitem(last=False)


def network(address: str) -> str:
    """The address itself, or its /64 for IPv6, of which one host commands all."""
    try:
        ip = ipaddress.ip_address(address.split("%")[0])
    except ValueError:
        return address[:64]
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped:
            return str(ip.ipv4_mapped)
        return str(ipaddress.ip_network((ip, 64), strict=False))
    return str(ip)
