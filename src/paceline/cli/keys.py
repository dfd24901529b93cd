"""`paceline keys`: make, list and revoke the API keys of a server."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import typer

from paceline.cli import show
from paceline.cli.options import JSON
from paceline.core.errors import ConfigError
from paceline.core.units import seconds

FILE = typer.Option(
    None,
    "--file",
    "--keys-file",
    envvar="PACELINE_KEYS_FILE",
    help="The key file. Default: paceline/keys.json in the user's configuration folder.",
)


def path_of(file: Path | None) -> Path:
    return file or Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "paceline" / "keys.json"


def describe(record: Any) -> dict[str, Any]:
    """What may be shown of a key: all but its hash."""
    import msgspec

    row: dict[str, Any] = {
        **msgspec.structs.asdict(record),
        "expired": record.expires is not None and record.expires <= time.time(),
    }
    del row["sha256"]
    return row


def limits(row: dict[str, Any]) -> str:
    """Priority and quotas in words."""
    counts = {
        "requests_per_minute": "requests/min",
        "tokens_per_minute": "tokens/min",
        "tokens_per_day": "tokens/day",
        "max_concurrent": "at once",
    }
    parts = [f"{row[name]} {text}" for name, text in counts.items() if row[name] is not None]
    return ", ".join([*([f"priority {row['priority']}"] if row["priority"] else []), *parts])


def replace(path: Path, records: Any, seen: Any) -> None:
    """Write unless somebody else did meanwhile."""
    from paceline.server import keys

    if keys.signature(path) != seen:
        raise ConfigError(f"keys file {path}: was changed meanwhile; run the command again")
    keys.write(path, records)


def register(app: typer.Typer) -> None:
    group = typer.Typer(no_args_is_help=True, help="Make, list and revoke the API keys of a server.")
    app.add_typer(group, name="keys", rich_help_panel="Serve")

    @group.command()
    def create(
        name: str = typer.Option(..., help="Whose key it is: the name in logs, quotas and fair scheduling."),
        requests_per_minute: int = typer.Option(None, help="Requests in any minute."),
        tokens_per_minute: int = typer.Option(None, help="Tokens, of prompts and answers, in any minute."),
        tokens_per_day: int = typer.Option(None, help="Tokens in any 24 hours."),
        max_concurrent: int = typer.Option(None, help="Requests at once."),
        priority: int = typer.Option(0, help="Larger goes first."),
        models: str = typer.Option("", help="The models it may use, separated by commas. Default: all."),
        admin: bool = typer.Option(False, "--admin", help="May use the administrative routes."),
        expires: str = typer.Option(None, help="How long it is valid, such as 90d. Default: until revoked."),
        file: Path = FILE,
        json: bool = JSON,
    ) -> None:
        """Make a key and print it, once: the file keeps its hash alone.

        Example: paceline keys create --name alice --requests-per-minute 60 --expires 90d
        """
        from paceline.server import keys

        path = path_of(file)
        seen = keys.signature(path)
        records = keys.read(path) if seen is not None else ()
        if any(r.name == name for r in records):
            raise ConfigError(f"name = {name!r}: has a key in {path}; revoke it first, or choose another name")
        if len(records) >= keys.MAX_KEYS:
            raise ConfigError(f"keys file {path}: holds {len(records)} keys, the most allowed; revoke some")
        now = int(time.time())
        key, record = keys.make(
            name,
            now,
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
            tokens_per_day=tokens_per_day,
            max_concurrent=max_concurrent,
            priority=priority,
            models=tuple(m.strip() for m in models.split(",") if m.strip()),
            admin=admin,
            expires=None if expires is None else now + int(seconds(expires, "expires")),
        )
        replace(path, (*records, record), seen)
        if json:
            show.print_json({"key": key, "file": str(path), **describe(record)})
            return
        print(key)
        show.notes([f"the key is not shown again; serve with: paceline serve --keys-file {path}"])

    @group.command("list")
    def list_(file: Path = FILE, json: bool = JSON) -> None:
        """Show the keys' names and limits."""
        from paceline.server import keys

        path = path_of(file)
        rows = [describe(r) for r in (keys.read(path) if keys.signature(path) is not None else ())]
        if json:
            show.print_json({"file": str(path), "keys": rows})
            return
        columns = ("name", "created", "expires", "limits", "models", "rights")
        table = [
            (
                r["name"],
                keys.day(r["created"]),
                keys.day(r["expires"]) + (" (expired)" if r["expired"] else ""),
                limits(r),
                ", ".join(r["models"]) or "all",
                "admin" if r["admin"] else "",
            )
            for r in rows
        ]
        show.table(f"Keys in {path}", columns, table)

    @group.command()
    def revoke(name: str = typer.Argument(..., help="Whose key."), file: Path = FILE, json: bool = JSON) -> None:
        """Take a key out of force; a running server notices within a second or two."""
        from paceline.server import keys

        path = path_of(file)
        seen = keys.signature(path)
        records = keys.read(path)
        kept = tuple(r for r in records if r.name != name)
        if len(kept) == len(records):
            names = ", ".join(r.name for r in records) or "none"
            raise ConfigError(f"name = {name!r}: has no key in {path}; there are: {names}")
        replace(path, kept, seen)
        if json:
            show.print_json({"revoked": name, "file": str(path), "left": len(kept)})
            return
        show.notes([f"the key of {name} is revoked"])
