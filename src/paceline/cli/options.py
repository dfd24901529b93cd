"""The options that every command which runs a model shares, declared once from `EngineConfig`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from paceline.core.config import EngineConfig
from paceline.core.recipe import Recipe
from paceline.core.units import size

# field: (type, flags, help). Flag beats environment variable (PACELINE_<FIELD>) beats default.
ENGINE: dict[str, tuple[Any, tuple[str, ...], str]] = {
    "dtype": (str, ("--dtype",), "Unquantised weights: auto (as stored), float32, float16, bfloat16."),
    "format": (
        str,
        ("--format", "-f"),
        "Matrices: auto, int8, int4, int4g:group=64,mins, bf16, ... (see `list formats`).",
    ),
    "kv_dtype": (
        str,
        ("--kv-dtype",),
        "KV cache: auto, float32, float16, bfloat16, int8 (a scale per head and token).",
    ),
    "context": (
        int | None,
        ("--context", "-c"),
        "Longest sequence in tokens; default: the model's, as far as memory allows.",
    ),
    "kv_memory": (
        str | None,
        ("--kv-memory",),
        "Memory of the KV cache, such as 2GiB; default: as needed, at most half of what is free.",
    ),
    "max_rows": (int, ("--max-rows",), "Tokens computed in one step, over all sequences."),
    "max_seqs": (int, ("--max-seqs",), "Sequences running at once."),
    "chunk": (int | None, ("--chunk",), "Most tokens of one prompt in one step; default: max-rows."),
    "threads": (int | None, ("--threads", "-t"), "Threads; default: usable cores."),
    "backend": (str, ("--backend",), "auto, native, reference (NumPy, slow), torch (GPU)."),
    "isa": (str | None, ("--isa",), "Instruction set of the native core; default: the best that works (see `doctor`)."),
    "use": (
        list[str],
        ("--use", "-u"),
        "A technique, as area/name:key=value,...; no:area/name switches a default off. Repeatable.",
    ),
    "adapters": (
        list[str],
        ("--adapter",),
        "A LoRA adapter loaded at start, as name=folder (PEFT). Repeatable; run and chat use the first.",
    ),
    "adapter_dtype": (str, ("--adapter-dtype",), "How adapters are kept: auto (as stored), float32, bfloat16."),
    "adapter_memory": (
        str | None,
        ("--adapter-memory",),
        "Memory for adapters, such as 512MiB, those loaded later included; default: what --adapter needs.",
    ),
    "offline": (bool | None, ("--offline/--online",), "Never contact the hub (also HF_HUB_OFFLINE=1)."),
    "chat_template": (str | None, ("--chat-template",), "A Jinja file, or chatml, llama3, plain."),
}


def engine_options(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command --model and all engine options; it receives `model: str | None` and `config: EngineConfig`."""
    defaults = EngineConfig()
    own = [p for p in inspect.signature(fn).parameters.values() if p.name not in ("model", "config")]
    model = typer.Option(
        None,
        "--model",
        "-m",
        envvar="PACELINE_MODEL",
        help="Folder, .gguf file, hub name, or an embedded model; default: lab-8m.",
    )
    shared = [inspect.Parameter("model", inspect.Parameter.KEYWORD_ONLY, default=model, annotation=str | None)]
    for name, (kind, flags, text) in ENGINE.items():
        value = getattr(defaults, name)
        value = list(value) if isinstance(value, tuple) else value
        option = typer.Option(value, *flags, envvar=f"PACELINE_{name.upper()}", help=text, rich_help_panel="Engine")
        shared.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=kind))
    recipe = typer.Option(
        None, "--recipe", envvar="PACELINE_RECIPE", help="A recipe file (TOML) of techniques.", rich_help_panel="Engine"
    )
    shared.append(inspect.Parameter("recipe", inspect.Parameter.KEYWORD_ONLY, default=recipe, annotation=Path | None))

    @functools.wraps(fn)
    def command(**kwargs: Any) -> Any:
        values = {name: kwargs.pop(name) for name in ENGINE}
        path = kwargs.pop("recipe")
        use = (*(Recipe.read(path).use if path else ()), *values.pop("use"))
        values["adapters"] = tuple(values["adapters"])
        for name in ("kv_memory", "adapter_memory"):
            values[name] = size(values[name], name)
        return fn(model=kwargs.pop("model"), config=EngineConfig(**values, use=use), **kwargs)

    keyword = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
    command.__signature__ = inspect.Signature([*keyword, *shared])  # type: ignore[attr-defined]
    return command


JSON = typer.Option(False, "--json", help="Print one JSON object on stdout and nothing else there.")
