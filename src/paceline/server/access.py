"""Who may come in: from the headers of a request to an identity, and from an identity to what it may still take."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from paceline.core.clock import Clock, RealClock
from paceline.server import settings
from paceline.server.errors import ApiError
from paceline.server.keys import Identity, Keyring, read_plain
from paceline.server.quota import Failures, Grant, Ledger, Refusal

log = logging.getLogger("paceline.access")
REFRESH = 1.0  # seconds between two looks at the key file

Headers = Sequence[tuple[bytes, bytes]]


def presented(headers: Headers) -> str | None:
    """The key of a request: `Authorization: Bearer`, else `x-api-key` (Anthropic's clients), else `api-key` (Azure's)."""
    found: dict[bytes, str] = {}
    for name, value in headers:
        if name in (b"authorization", b"x-api-key", b"api-key"):
            found.setdefault(name, value.decode("latin-1").strip())
    scheme, _, token = found.get(b"authorization", "").partition(" ")
    bearer = token.strip() if scheme.lower() == "bearer" else ""
    return bearer or found.get(b"x-api-key") or found.get(b"api-key") or None


class Gate:
    """Keys, quotas and failures of one server. Without a keyring everybody is `anonymous`."""

    def __init__(self, keyring: Keyring | None, anonymous: Identity, clock: Clock, max_failures: int = 20):
        self.keyring, self.anonymous, self.clock = keyring, anonymous, clock
        self.ledger = Ledger(clock)
        self.failures = Failures(max_failures, clock)
        self._looked = clock.now()

    @staticmethod
    def of(s: settings.ServeSettings, clock: Clock | None = None, wall: Callable[[], float] = time.time) -> Gate:
        """The gate that the settings ask for. Raises ConfigError when a key file cannot be used.

        Without keys whoever sits at this machine is its administrator; one who comes over a network is not.
        """
        a = s.access
        keyring = None
        if a.has_keys:
            plain = (*a.api_key, *(read_plain(Path(a.api_key_file)) if a.api_key_file else ()))
            keyring = Keyring(plain, Path(a.keys_file) if a.keys_file else None, wall, log.warning)
        return Gate(keyring, Identity("", admin=s.listen.local), clock or RealClock(), a.max_auth_failures)

    def identify(self, headers: Headers, address: str | None) -> Identity:
        """Who sent the request. address: the client's; None (a Unix socket, guarded by its file) is never turned away for failures.

        An address with too many wrong keys is turned away before its key is looked at: were a right one let through, guessing would
        go on unhindered. Raises ApiError 401 or 429.
        """
        if self.keyring is None:
            return self.anonymous
        wait = self.failures.wait(address) if address else 0.0
        if wait > 0:
            raise _hammering(wait)
        if self.clock.now() - self._looked >= REFRESH:
            self._looked = self.clock.now()
            self.keyring.refresh()
        key = presented(headers)
        challenge = {"www-authenticate": "Bearer"}
        if key is None:
            raise ApiError(
                401, "a key is needed: send it as Authorization: Bearer KEY", code="missing_api_key", headers=challenge
            )
        identity = self.keyring.find(key)
        if identity is None:
            if address:
                self.failures.add(address)
            raise ApiError(401, "the key is wrong, revoked or expired", headers=challenge)
        return identity

    def admit(self, identity: Identity, tokens: int) -> Grant:
        """Let a request through that takes at most `tokens` (prompt and answer). Raises ApiError 429 with the time to wait."""
        answer = self.ledger.admit(identity.name, identity.quotas, tokens)
        if isinstance(answer, Refusal):
            raise answer.error(self.headers(identity))
        return answer

    def settle(self, grant: Grant, tokens: int) -> None:
        """The request is over, done or not, and took `tokens`."""
        self.ledger.settle(grant, tokens)

    def headers(self, identity: Identity) -> dict[str, str]:
        """The rate-limit headers of an answer."""
        return self.ledger.headers(identity.name, identity.quotas)


def _hammering(wait: float) -> ApiError:
    seconds = max(1, round(wait + 0.5))
    return ApiError(
        429, f"too many wrong keys from this address; try again in {seconds} s", headers={"retry-after": str(seconds)}
    )


def need_model(identity: Identity, model: str) -> None:
    """Raises ApiError 404, as for a model that is not there, so that names of others' models are not told."""
    if not identity.may_use(model):
        raise ApiError(
            404, f"the model {model!r} does not exist or your key may not use it", param="model", code="model_not_found"
        )
