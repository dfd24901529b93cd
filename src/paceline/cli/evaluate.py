"""`paceline eval`: perplexity, divergence from another precision, recall at a distance."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import typer

from paceline.cli import show
from paceline.cli.options import JSON, engine_options
from paceline.core.config import EngineConfig
from paceline.core.errors import RequestError

MAX_BYTES = 1 << 30


def read_text(path: Path) -> str:
    """A UTF-8 file. Raises RequestError."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise RequestError(f"file = {path}: larger than {MAX_BYTES} bytes")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise RequestError(f"file = {path}: not UTF-8 text (byte {e.start})") from None
    except OSError as e:
        raise RequestError(f"file = {path}: {e.strerror}") from None


def register(app: typer.Typer) -> None:
    group = typer.Typer(help="Measure quality: perplexity, KL divergence, recall.", no_args_is_help=True)
    app.add_typer(group, name="eval", rich_help_panel="Understand")
    file = typer.Option(..., "--file", help="A UTF-8 text file.")
    limit = typer.Option(None, "--max-tokens", help="Use only the first so many tokens.")

    @group.command()
    @engine_options
    def perplexity(
        model: str | None,
        config: EngineConfig,
        file: Path = file,
        window: int = typer.Option(None, "--window", help="Tokens per window; default: the context, at most 2048."),
        stride: int = typer.Option(None, help="Tokens a window advances; default: the window (no overlap)."),
        max_tokens: int = limit,
        json: bool = JSON,
    ) -> None:
        """Perplexity of a model on a text.

        Example: paceline eval perplexity -m ./model --file book.txt --json
        """
        from paceline.analysis import quality
        from paceline.llm import LLM

        text = read_text(file)
        with show.progress(not json) as update, LLM(model, config, progress=update) as llm:
            result = quality.perplexity(llm, llm.tokens(text)[:max_tokens], window, stride, update)
            name = llm.plan.model.name
        if json:
            show.print_json({"model": name, "file": str(file), **result.describe()})
        else:
            show.out.print(
                f"perplexity {result.perplexity:.4f} ± {result.stderr:.4f} "
                f"({result.tokens} tokens, windows of {result.context}, stride {result.stride})"
            )

    @group.command()
    @engine_options
    def kl(
        model: str | None,
        config: EngineConfig,
        file: Path = file,
        against: str = typer.Option(None, help="The reference model; default: the same model."),
        against_format: str = typer.Option("auto", help="The reference's format; default: as stored."),
        window: int = typer.Option(256, "--window", help="Tokens per window."),
        max_tokens: int = limit,
        json: bool = JSON,
    ) -> None:
        """KL divergence of a model (or one of its precisions) from a reference, token by token.

        Example: paceline eval kl -m ./model --format int4 --file book.txt
        """
        from paceline.analysis import quality
        from paceline.llm import LLM

        text = read_text(file)
        with (
            show.progress(not json) as update,
            LLM(against or model, replace(config, format=against_format), progress=update) as reference,
            LLM(model, config, progress=update) as candidate,
        ):
            tokens = candidate.tokens(text)[:max_tokens]
            result = quality.divergence(reference, candidate, tokens, window, update)
            formats = (reference.plan.model.formats, candidate.plan.model.formats)
        if json:
            show.print_json({"reference": formats[0], "candidate": formats[1], **result.describe()})
        else:
            rows = [(k, f"{v:.6g}" if isinstance(v, float) else v) for k, v in result.describe().items()]
            show.table(f"{formats[1]} against {formats[0]}", ("measure", "value"), rows)

    @group.command()
    @engine_options
    def recall(
        model: str | None,
        config: EngineConfig,
        file: Path = typer.Option(..., "--file", help="UTF-8 text that fills the distance."),
        distance: list[int] = typer.Option([512, 1024, 2048], help="Tokens between fact and question. Repeatable."),
        n: int = typer.Option(50, help="Questions per distance."),
        seed: int = typer.Option(0, help="Chooses the facts."),
        json: bool = JSON,
    ) -> None:
        """Key-value recall over a distance of running text.

        Example: paceline eval recall --file book.txt --distance 1024 --distance 3000
        """
        from paceline.analysis import quality
        from paceline.llm import LLM

        text = read_text(file)
        with show.progress(not json) as update, LLM(model, config, progress=update) as llm:
            found = quality.recall(llm, text, distance, n, seed, update)
        if json:
            show.print_json([r.describe() for r in found])
        else:
            rows = [(r.tokens, f"{r.correct}/{r.asked}", f"{100 * r.accuracy:.1f} %") for r in found]
            show.table("recall", ("distance (tokens)", "correct", "accuracy"), rows)
