"""What `paceline serve` can be told besides the engine's options, each declared once: name, type, default, help, bounds.

The groups are the tables of the configuration file. The command line's flags, the environment variables (PACELINE_<FIELD>), the
keys of the file and the bounds that `problems` checks are all read from the declarations below (`server/sources.py`).
"""

from __future__ import annotations

import ipaddress
import os
import re
import ssl
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}")


@dataclass(frozen=True)
class Declared:
    """What a field says beyond its name, type and default. unit: bytes, seconds or none; low, high: inclusive."""

    help: str = ""
    unit: str = ""
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    secret: bool = False


def setting(default: Any, help: str, **rest: Any) -> Any:
    declared = Declared(help, **rest)
    return field(default=default, repr=not declared.secret, metadata={"declared": declared})


@dataclass(frozen=True)
class Option:
    """One field as flags, variables and files see it. kind: str, int, float, bool, or tuple (of str)."""

    group: str
    name: str
    kind: type
    optional: bool
    default: Any
    declared: Declared

    @property
    def variable(self) -> str:
        return f"PACELINE_{self.name.upper()}"


def options(group: str, cls: type) -> dict[str, Option]:
    """The options of a dataclass whose fields are str, int, float, bool or tuple[str, ...], or None."""
    hints = typing.get_type_hints(cls)
    found = {}
    for f in fields(cls):
        union = typing.get_origin(hints[f.name]) in (typing.Union, types.UnionType)
        hint = next(a for a in typing.get_args(hints[f.name]) if a is not type(None)) if union else hints[f.name]
        kind = typing.get_origin(hint) or hint
        default = f.default if f.default is not MISSING else None
        found[f.name] = Option(group, f.name, kind, union, default, f.metadata.get("declared", Declared()))
    return found


class Group:
    """Base of the groups: the bounds and choices of every field, checked from its declaration."""

    def problems(self) -> list[str]:
        found = []
        for o in options("", type(self)).values():
            value, d = getattr(self, o.name), o.declared
            if value is None:
                continue
            if d.low is not None and d.high is not None and not d.low <= value <= d.high:
                found.append(f"{o.name} = {value!r}: must be from {d.low} to {d.high}")
            if d.choices and value not in d.choices:
                found.append(f"{o.name} = {value!r}: must be {', '.join(d.choices)}")
        return found + self.more_problems()

    def more_problems(self) -> list[str]:
        return []


def pairs(texts: Sequence[str]) -> dict[str, str]:
    """`name=path` texts as a mapping, in order."""
    return {name.strip(): path.strip() for name, _, path in (t.partition("=") for t in texts)}


def _pair_problems(name: str, texts: Sequence[str]) -> list[str]:
    found, seen = [], set()
    for t in texts:
        key, sep, path = (part.strip() for part in t.partition("="))
        if not sep or not path or not _NAME.fullmatch(key):
            found.append(f"{name} = {t!r}: must be name=path, the name of letters, digits and . _ : / -")
        elif key in seen:
            found.append(f"{name} = {t!r}: the name {key!r} is given twice")
        seen.add(key)
    return found


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


@dataclass(frozen=True)
class Listen(Group):
    """Where the server listens and to whom it talks at all."""

    host: str = setting("127.0.0.1", "Address to listen on.")
    port: int = setting(8000, "TCP port; 0 takes a free one.", low=0, high=65535)
    uds: str | None = setting(None, "Listen on this Unix socket instead of host and port.")
    root_path: str = setting("", "Path prefix that a reverse proxy strips, such as /llm.")
    allowed_hosts: tuple[str, ...] = setting(
        (), "Host names that requests may address, besides the usual ones on loopback. Repeatable."
    )
    cors_origins: tuple[str, ...] = setting(
        (), "Web origins, such as https://chat.example.com, whose pages may call the API. Repeatable."
    )
    trusted_proxies: tuple[str, ...] = setting(
        (), "Addresses of reverse proxies whose X-Forwarded-For is believed. Repeatable."
    )
    tls_cert: str | None = setting(None, "Certificate chain (PEM): serve HTTPS.")
    tls_key: str | None = setting(None, "Private key of the certificate (PEM).")
    tls_ca: str | None = setting(None, "CA (PEM) that clients' certificates must come from: mutual TLS.")
    tls_min_version: str = setting("1.2", "Oldest TLS version spoken.", choices=("1.2", "1.3"))
    insecure: bool = setting(False, "Allow listening beyond this machine without any key.")

    @property
    def local(self) -> bool:
        """Only this machine can connect."""
        return self.uds is not None or is_loopback(self.host)

    def more_problems(self) -> list[str]:
        found = []
        if self.root_path and not re.fullmatch(r"(/[A-Za-z0-9._~-]+)+", self.root_path):
            found.append(f"root_path = {self.root_path!r}: must be a path such as /llm, without a slash at its end")
        for o in self.cors_origins:
            if o == "*":
                found.append("cors_origins = '*': would let every web page use this server; list the origins instead")
            elif not _is_origin(o):
                found.append(
                    f"cors_origins = {o!r}: must be an origin such as https://chat.example.com, without a path"
                )
        if (self.tls_cert is None) != (self.tls_key is None):
            found.append("tls_cert: needs tls_key, and tls_key needs tls_cert; give both")
        if self.tls_ca is not None and self.tls_cert is None:
            found.append("tls_ca: mutual TLS needs the server's own tls_cert and tls_key")
        for name in ("tls_cert", "tls_key", "tls_ca"):
            path = getattr(self, name)
            if path is not None and not os.access(path, os.R_OK):
                found.append(f"{name} = {path!r}: is not a readable file")
        return found


def _is_origin(text: str) -> bool:
    try:
        u = urlsplit(text)
        return (
            u.scheme in ("http", "https")
            and bool(u.hostname)
            and text == f"{u.scheme}://{u.netloc}"
            and "@" not in text
        )
    except ValueError:
        return False


@dataclass(frozen=True)
class Access(Group):
    """Who may use the server. Without any key everyone who can connect may."""

    api_key: tuple[str, ...] = setting(
        (),
        "A key that clients must present; better in the variable, since flags show in `ps`. Repeatable.",
        secret=True,
    )
    api_key_file: str | None = setting(None, "A file of such keys, one a line.")
    keys_file: str | None = setting(
        None, "Hashed keys with names and quotas, made by `paceline keys`; read again on change."
    )
    require_keys: bool = setting(False, "Refuse to start when there is no key.")
    max_auth_failures: int = setting(
        20, "Wrong keys per minute and client address before it is turned away.", low=1, high=1_000_000
    )

    @property
    def has_keys(self) -> bool:
        return bool(self.api_key or self.api_key_file or self.keys_file)

    def more_problems(self) -> list[str]:
        found = []
        if any(not re.fullmatch(r"[\x21-\x7e]{8,512}", k) for k in self.api_key):
            found.append("api_key: must be 8 to 512 visible ASCII characters; `paceline keys create` makes good ones")
        if self.require_keys and not self.has_keys:
            found.append("require_keys: there is no key; give keys_file (see `paceline keys create`) or api_key")
        for name in ("api_key_file", "keys_file"):
            path = getattr(self, name)
            if path is not None and not os.access(path, os.R_OK):
                found.append(f"{name} = {path!r}: is not a readable file")
        return found


@dataclass(frozen=True)
class Bounds(Group):
    """How much a request, a client and all of them together may take."""

    max_body: int = setting(16 << 20, "Largest request body.", unit="bytes", low=1024, high=1 << 32)
    max_headers: int = setting(64, "Header lines of a request.", low=8, high=4096)
    max_header_bytes: int = setting(
        32 << 10, "All headers of a request together.", unit="bytes", low=1024, high=1 << 20
    )
    max_connections: int = setting(4096, "Requests being answered at once, waiting ones included.", low=1, high=1 << 20)
    max_queue: int = setting(1024, "Requests waiting for the engine; more are refused with 503.", low=1, high=1 << 20)
    max_prompt_tokens: int | None = setting(None, "Longest prompt; default: the context.", low=1, high=1 << 24)
    max_output_tokens: int | None = setting(None, "Longest answer; default: the context.", low=1, high=1 << 24)
    max_n: int = setting(16, "Completions of one prompt.", low=1, high=1024)
    max_top_logprobs: int = setting(20, "Alternatives reported per token.", low=0, high=1024)
    header_timeout: float = setting(
        20.0, "For the headers of a request to arrive.", unit="seconds", low=0.1, high=86400
    )
    body_timeout: float = setting(60.0, "For a request's body to arrive.", unit="seconds", low=0.1, high=86400)
    request_timeout: float | None = setting(
        None, "For a request as a whole; default: none.", unit="seconds", low=0.1, high=604800
    )
    keep_alive: float = setting(15.0, "Between comment lines of a silent stream.", unit="seconds", low=0.1, high=3600)
    write_timeout: float = setting(
        60.0, "A reader that takes nothing for so long is dropped.", unit="seconds", low=0.1, high=86400
    )
    stream_buffer: int = setting(256 << 10, "Unread output kept for one stream.", unit="bytes", low=4096, high=1 << 30)
    trust_chat_template: bool = setting(False, "Let requests bring a chat template of their own.")
    template_timeout: float = setting(2.0, "For a chat template to render.", unit="seconds", low=0.01, high=600)


@dataclass(frozen=True)
class Life(Group):
    """Starting, failing and stopping."""

    drain: float = setting(30.0, "On SIGTERM, for running requests to finish.", unit="seconds", low=0, high=86400)
    max_restarts: int = setting(10, "Restarts of a failed worker within the window before giving up.", low=0, high=1000)
    restart_window: float = setting(60.0, "The window that restarts are counted in.", unit="seconds", low=1, high=86400)


@dataclass(frozen=True)
class Observe(Group):
    """What the server tells of itself."""

    dashboard: bool = setting(True, "Serve the status page at /.")
    metrics: bool = setting(True, "Serve /metrics for Prometheus.")
    vllm_metrics: bool = setting(False, "Also give the metrics vLLM's names, for existing dashboards.")
    log_format: str = setting("text", "Form of the log lines.", choices=("text", "json"))
    log_level: str = setting("info", "Least important messages logged.", choices=("debug", "info", "warning", "error"))
    log_prompts: bool = setting(False, "Log prompts and answers. They may hold secrets.")
    receipts: bool = setting(False, "Tell in each answer which configuration made it and what it cost.")
    otel_endpoint: str | None = setting(None, "Send traces to this OTLP/HTTP address.")

    def more_problems(self) -> list[str]:
        url = self.otel_endpoint
        if url is not None and (not re.fullmatch(r"https?://[^\s/@]+(/\S*)?", url)):
            return [f"otel_endpoint = {url!r}: must be an address such as http://localhost:4318, without a user"]
        return []


@dataclass(frozen=True)
class Serving(Group):
    """Which models are served, and under which names."""

    served_name: tuple[str, ...] = setting((), "Name of the model in requests; default: its own. Repeatable: aliases.")
    models: tuple[str, ...] = setting((), "A further model, as name=path. Repeatable.")
    model_memory: int | None = setting(
        None, "Memory for all loaded models together; default: what is free.", unit="bytes", low=1 << 20, high=1 << 46
    )

    def more_problems(self) -> list[str]:
        found = [
            f"served_name = {n!r}: must be letters, digits and . _ : / -, at most 128"
            for n in self.served_name
            if not _NAME.fullmatch(n)
        ]
        found += _pair_problems("models", self.models)
        twice = sorted(set(self.served_name) & set(pairs([t for t in self.models if "=" in t])))
        return found + [f"served_name, models: {n!r} names two things" for n in twice]


@dataclass(frozen=True)
class ServeSettings:
    listen: Listen = Listen()
    access: Access = Access()
    bounds: Bounds = Bounds()
    life: Life = Life()
    observe: Observe = Observe()
    serving: Serving = Serving()

    def problems(self) -> list[str]:
        """Everything wrong, each text beginning with the field's name."""
        found = [p for name in GROUPS for p in getattr(self, name).problems()]
        open_to_all = not self.listen.local and not self.access.has_keys and self.listen.tls_ca is None
        if open_to_all and not self.listen.insecure:
            found.append(
                f"host = {self.listen.host!r}: other machines could use this server without a key; give keys_file (see "
                "`paceline keys create`), api_key or tls_ca, or say insecure"
            )
        return found


GROUPS: Mapping[str, type[Group]] = {
    "listen": Listen,
    "access": Access,
    "bounds": Bounds,
    "life": Life,
    "observe": Observe,
    "serving": Serving,
}


def tls_context(listen: Listen) -> ssl.SSLContext | None:
    """For the server's sockets, or None where it speaks plain HTTP. Raises OSError (ssl.SSLError) on unusable files."""
    if listen.tls_cert is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3 if listen.tls_min_version == "1.3" else ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(Path(listen.tls_cert), Path(listen.tls_key) if listen.tls_key else None)
    if listen.tls_ca is not None:
        context.load_verify_locations(Path(listen.tls_ca))
        context.verify_mode = ssl.CERT_REQUIRED
    return context
