"""`paceline run`: one prompt in, its answer streamed out, and what it cost."""

from __future__ import annotations

import sys
from typing import Any

import typer

from paceline.cli import show
from paceline.cli.options import JSON, engine_options
from paceline.core.config import EngineConfig
from paceline.core.errors import RequestError
from paceline.core.types import Output, SamplingParams

MAX_STDIN = 64 << 20


def sampling(**given: Any) -> dict[str, Any]:
    """The sampling options a user set, without those left at None."""
    return {k: v for k, v in given.items() if v is not None and v != []}


def read_prompt(prompt: str | None, text: str | None) -> str:
    """From --prompt, the argument, or stdin."""
    if prompt is not None and text is not None:
        raise RequestError("prompt: given twice, as an argument and by --prompt; give one")
    found = prompt if prompt is not None else text
    if found is None:
        if sys.stdin.isatty():
            raise RequestError('prompt: missing; give one as in paceline run --prompt "Hello", or pipe it in')
        found = sys.stdin.read(MAX_STDIN + 1)
        if len(found) > MAX_STDIN:
            raise RequestError(f"prompt: more than {MAX_STDIN} characters on stdin")
    return found


def describe(output: Output, model: str, params: SamplingParams) -> dict[str, Any]:
    """The JSON form of an answer."""
    t, first = output.timing, output.completions[0]
    n_prompt, n_out = len(output.prompt_token_ids), sum(len(c.token_ids) for c in output.completions)
    result: dict[str, Any] = {
        "model": model,
        "prompt_token_ids": output.prompt_token_ids,
        "token_ids": first.token_ids,
        "text": first.text,
        "logprobs": None if first.logprobs is None else [lp.logprob for lp in first.logprobs],
        "finish_reason": first.finish_reason,
        "stop_reason": first.stop_reason,
        "usage": {
            "prompt_tokens": n_prompt,
            "completion_tokens": n_out,
            "total_tokens": n_prompt + n_out,
            "cached_tokens": output.n_cached,
        },
        "timing": {
            "queue_s": t.queue,
            "time_to_first_token_s": t.first_token,
            "prompt_s": t.prompt,
            "generation_s": t.generation,
            "prompt_tokens_per_s": rate(n_prompt - output.n_cached, t.prompt),
            "generation_tokens_per_s": rate(n_out - len(output.completions), t.generation),
        },
        "peak_memory_bytes": show.peak_memory(),
    }
    if params.logprobs:
        result["top_logprobs"] = [dict(lp.top) for lp in first.logprobs or []]
    if len(output.completions) > 1:
        result["completions"] = [
            {"index": c.index, "text": c.text, "token_ids": c.token_ids, "finish_reason": c.finish_reason}
            for c in output.completions
        ]
    return result


def rate(n: int, seconds: float) -> float | None:
    return n / seconds if n > 0 and seconds > 0 else None


def summary(output: Output) -> str:
    t = output.timing
    n_prompt, n_out = len(output.prompt_token_ids), sum(len(c.token_ids) for c in output.completions)
    fast = rate(n_prompt - output.n_cached, t.prompt)
    gen = rate(n_out - len(output.completions), t.generation)
    parts = [f"prompt {n_prompt} tokens" + (f" ({output.n_cached} cached)" if output.n_cached else "")]
    parts[0] += f", {fast:.0f} tokens/s" if fast else ""
    parts.append(f"generation {n_out} tokens" + (f", {gen:.1f} tokens/s" if gen else ""))
    parts += [f"first token {1e3 * t.first_token:.0f} ms", f"memory {show.size(show.peak_memory())}"]
    return " · ".join(parts)


def first_adapter(llm: Any) -> str:
    """The adapter of commands that answer one request: the first that was given."""
    return next(iter(llm.engine.adapters.loaded), "")


def register(app: typer.Typer) -> None:
    @app.command(rich_help_panel="Use a model")
    @engine_options
    def run(
        model: str | None,
        config: EngineConfig,
        text: str = typer.Argument(None, metavar="[PROMPT]", help="The prompt; else --prompt, else stdin."),
        prompt: str = typer.Option(None, "--prompt", "-p", help="The prompt."),
        max_tokens: int = typer.Option(256, "--max-tokens", "-n", help="Most tokens to generate."),
        min_tokens: int = typer.Option(None, help="Fewest tokens to generate."),
        temperature: float = typer.Option(None, help="0 is greedy. Default: the model's recommendation, else 1."),
        top_k: int = typer.Option(None, help="Sample from the k most likely tokens; 0: all."),
        top_p: float = typer.Option(None, help="Sample from the most likely tokens that make up this mass."),
        min_p: float = typer.Option(None, help="Drop tokens less likely than this share of the likeliest."),
        repetition_penalty: float = typer.Option(None, help="Above 1: less repetition of prompt and answer."),
        presence_penalty: float = typer.Option(None, help="-2 to 2, once per token seen in the answer."),
        frequency_penalty: float = typer.Option(None, help="-2 to 2, per occurrence in the answer."),
        stop: list[str] = typer.Option([], help="End at this string. Repeatable."),
        stop_token_ids: list[int] = typer.Option([], "--stop-token-id", help="End at this token. Repeatable."),
        seed: int = typer.Option(None, help="Makes sampling repeatable."),
        n: int = typer.Option(None, "--n", help="Completions of the same prompt."),
        ignore_eos: bool = typer.Option(False, "--ignore-eos", help="Go on after the end token, up to --max-tokens."),
        logprobs: int = typer.Option(None, help="Report log-probabilities with this many alternatives (JSON)."),
        chat: bool = typer.Option(
            None,
            "--chat/--raw",
            help="Put the prompt in the model's chat template. Default: only for the embedded model.",
        ),
        system: str = typer.Option(None, help="A system message (implies --chat)."),
        json: bool = JSON,
    ) -> None:
        """Answer one prompt.

        Examples:

          paceline run "What is 123 + 456?"

          echo "Once upon a time" | paceline run -m ./stories --temperature 0 -n 64

          paceline run -m ./model --prompt "Hi" --format int4 --logprobs 5 --json
        """
        from paceline.llm import LLM

        asked = read_prompt(prompt, text)
        given = sampling(
            max_tokens=max_tokens, min_tokens=min_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
            repetition_penalty=repetition_penalty, presence_penalty=presence_penalty, frequency_penalty=frequency_penalty,
            stop=stop, stop_token_ids=stop_token_ids, seed=seed, n=n, logprobs=logprobs,
        )  # fmt: skip
        SamplingParams(**given)  # refuse nonsense before anything is loaded
        with show.progress(not json) as update:
            llm = LLM(model, config, progress=update)
        with llm:
            show.notes(llm.notes)
            params = llm.default_params().with_(**given, ignore_eos=ignore_eos)
            if chat or system or (chat is None and model is None):
                messages = ([{"role": "system", "content": system}] if system else []) + [
                    {"role": "user", "content": asked}
                ]
                tokens: Any = llm.chat_prompt(messages)
            else:
                tokens = asked
            if json:
                output = llm.generate([tokens], params, adapter=first_adapter(llm))[0]
                show.print_json(describe(output, llm.plan.model.name, params))
            else:
                output = _stream(llm, tokens, params)
                show.err.print(f"[dim]{summary(output)}[/dim]", highlight=False, soft_wrap=True)
            if output.error:
                raise RequestError(output.error)


def _stream(llm: Any, tokens: Any, params: SamplingParams) -> Output:
    """Print the pieces as they come (several completions one after the other)."""
    if params.n > 1:
        output: Output = llm.generate([tokens], params, adapter=first_adapter(llm))[0]
        for c in output.completions:
            print(f"[{c.index}] {c.text}")
        return output
    pieces = llm.stream(tokens, params, adapter=first_adapter(llm))
    while True:
        try:
            sys.stdout.write(next(pieces).text)
        except StopIteration as end:
            sys.stdout.write("\n")
            sys.stdout.flush()
            whole: Output = end.value
            return whole
        sys.stdout.flush()
