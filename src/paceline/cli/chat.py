"""`paceline chat`: a conversation in the terminal. The prefix index keeps its state, so each turn computes only what is new."""

from __future__ import annotations

import json as jsonlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer

from paceline.cli import show
from paceline.cli.options import engine_options
from paceline.cli.run import first_adapter, sampling, summary
from paceline.core.config import EngineConfig
from paceline.core.errors import PacelineError, RequestError
from paceline.core.types import Output, SamplingParams

HELP = {
    "/help": "this list",
    "/system TEXT": "set the system message (empty: none) and start over",
    "/clear": "forget the conversation",
    "/undo": "take back the last question and its answer",
    "/retry": "answer the last question again",
    "/set NAME VALUE": "change a sampling option, such as /set temperature 0.7",
    "/stats": "what the last answer cost",
    "/plan": "what is running",
    "/save FILE, /load FILE": "write or read the conversation as JSON",
    "/exit": "leave (also Ctrl-D)",
}
MAX_HISTORY_BYTES = 16 << 20


@dataclass
class Conversation:
    """Messages and the options of the next answer."""

    llm: Any
    params: SamplingParams
    system: str = ""
    messages: list[dict[str, str]] = field(default_factory=list)
    last: Output | None = None

    def history(self) -> list[dict[str, str]]:
        return ([{"role": "system", "content": self.system}] if self.system else []) + self.messages

    def ask(self, text: str, write: Callable[[str], object]) -> None:
        """Answer one message, writing pieces as they come; an interrupted or failed answer leaves the history as it was."""
        self.messages.append({"role": "user", "content": text})
        answer: list[str] = []
        try:
            pieces = self.llm.stream(self.llm.chat_prompt(self.history()), self.params, adapter=first_adapter(self.llm))
            while True:
                try:
                    answer.append(next(pieces).text)
                except StopIteration as end:
                    self.last = end.value
                    break
                write(answer[-1])
        except PacelineError:
            self.messages.pop()
            raise
        except KeyboardInterrupt:
            pieces.close()
        self.messages.append({"role": "assistant", "content": "".join(answer)})

    def undo(self) -> str | None:
        """Take back the last exchange; its question."""
        while self.messages:
            message = self.messages.pop()
            if message["role"] == "user":
                return message["content"]
        return None

    def set(self, name: str, value: str) -> None:
        if name not in SamplingParams.__dataclass_fields__ or name in (
            "n",
            "logprobs",
            "prompt_logprobs",
            "logit_bias",
        ):
            raise RequestError(f"{name}: no such sampling option")
        try:
            parsed = jsonlib.loads(value)
        except ValueError:
            parsed = value
        self.params = self.params.with_(**{name: parsed})

    def save(self, path: Path) -> None:
        try:
            path.write_text(
                jsonlib.dumps({"system": self.system, "messages": self.messages}, ensure_ascii=False, indent=1)
            )
        except OSError as e:
            raise RequestError(f"{path}: {e.strerror}") from None

    def load(self, path: Path) -> None:
        try:
            if path.stat().st_size > MAX_HISTORY_BYTES:
                raise RequestError(f"{path}: larger than {MAX_HISTORY_BYTES} bytes")
            data = jsonlib.loads(path.read_text(encoding="utf-8"))
            messages = [{"role": str(m["role"]), "content": str(m["content"])} for m in data["messages"]]
            self.system, self.messages = str(data.get("system", "")), messages
        except OSError as e:
            raise RequestError(f"{path}: {e.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise RequestError(f"{path}: not a conversation saved by /save") from None


def command(c: Conversation, line: str) -> bool:
    """Carry out a /command; False to leave."""
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    if name in ("/exit", "/quit", "/bye"):
        return False
    if name == "/help":
        show.table("commands", ("command", "what it does"), list(HELP.items()))
    elif name == "/clear":
        c.messages.clear()
    elif name == "/system":
        c.system = rest
        c.messages.clear()
    elif name == "/undo":
        c.undo()
    elif name == "/retry":
        question = c.undo()
        if question is not None:
            answer(c, question)
    elif name == "/set":
        c.set(*rest.split(" ", 1)) if " " in rest else show.err.print("usage: /set NAME VALUE")
    elif name == "/stats":
        show.err.print(summary(c.last) if c.last else "nothing answered yet", highlight=False)
    elif name == "/plan":
        from paceline.cli.explain import rows

        show.table("Plan", ("what", "value"), rows(c.llm.plan))
    elif name == "/save":
        c.save(Path(rest))
    elif name == "/load":
        c.load(Path(rest))
    else:
        show.err.print(f"{name}: no such command; /help lists them", highlight=False)
    return True


def answer(c: Conversation, text: str) -> None:
    def write(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    c.ask(text, write)
    sys.stdout.write("\n")


def loop(c: Conversation, prompt: str) -> None:
    """Read lines until the end; a line that fails is reported and the conversation goes on."""
    while True:
        try:
            line = input(prompt).strip()
        except (EOFError, KeyboardInterrupt):
            break
        if not line:
            continue
        try:
            if line.startswith("/"):
                if not command(c, line):
                    break
            else:
                answer(c, line)
        except PacelineError as e:
            print(f"error: {e}", file=sys.stderr)


def register(app: typer.Typer) -> None:
    @app.command(rich_help_panel="Use a model")
    @engine_options
    def chat(
        model: str | None,
        config: EngineConfig,
        system: str = typer.Option("", help="A system message."),
        max_tokens: int = typer.Option(512, "--max-tokens", "-n", help="Most tokens of an answer."),
        temperature: float = typer.Option(None, help="0 is greedy. Default: the model's recommendation."),
        top_k: int = typer.Option(None, help="Sample from the k most likely tokens."),
        top_p: float = typer.Option(None, help="Sample from the most likely tokens that make up this mass."),
        seed: int = typer.Option(None, help="Makes sampling repeatable."),
    ) -> None:
        """Talk to a model. /help lists the commands.

        Example: paceline chat -m ./Llama-3.2-1B-Instruct --format int4
        """
        from paceline.llm import LLM

        given = sampling(max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        SamplingParams(**given)
        with show.progress() as update:
            llm = LLM(model, config, progress=update)
        with llm:
            show.notes(llm.notes)
            llm.chat_template()  # a model that cannot chat is refused before the first question
            tty = sys.stdin.isatty()
            if tty:
                import readline  # noqa: F401  (line editing and history for input())

                show.err.print(
                    f"[dim]{llm.plan.model.name} · {llm.plan.model.formats} · /help for commands[/dim]", highlight=False
                )
            loop(Conversation(llm, llm.default_params().with_(**given), system), "> " if tty else "")
