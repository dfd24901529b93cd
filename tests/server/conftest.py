"""A real server for the tests of its APIs: the app behind uvicorn on a free port, in a thread of this process. Workers are processes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from served import served

import paceline.lab
from paceline.core.types import Delta, Request
from paceline.server import wire
from paceline.server.keys import Record, write
from paceline.server.settings import Access, Observe, ServeSettings

ALICE, BOB = "key-of-alice-0001", "key-of-bob-0000002"
CAROL, DAVE = "key-of-carol-00003", "key-of-dave-000004"
# Qwen's way of calls and of thoughts, with nothing else.
TEMPLATE = """\
{%- if tools %}<|im_start|>system
Answer with <tool_call>
{"name": ..., "arguments": ...}
</tool_call>. Tools: {{ tools | tojson }}<|im_end|>
{% endif -%}
{%- for m in messages %}<|im_start|>{{ m.role }}
{% if m.reasoning_content %}<think>
{{ m.reasoning_content }}
</think>

{% endif %}{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>
{"name": {{ c.function.name | tojson }}, "arguments": {{ c.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}{% endif -%}"""


@dataclass
class Running:
    """A server at `url`. What the engine says may be scripted: the texts of the pieces of one answer, the last with how it ends."""

    server: Any
    url: str
    requests: list[Request] = field(default_factory=list)  # that a script answered

    @property
    def model(self) -> Any:
        return next(iter(self.server.models.loaded.values()))

    def prompt(self) -> str:
        """Of the last scripted request."""
        return str(self.model.tokenizer.decode(list(self.requests[-1].tokens), skip_special_tokens=False))

    @staticmethod
    def wait_for(condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < end, "this does not come"
            time.sleep(0.01)

    @contextlib.contextmanager
    def says(
        self, *texts: str, finish: Any = "stop", stop: Any = None, fails: Exception | None = None, cached: int = 0
    ) -> Iterator[None]:
        """The next answers come from here instead of the engine; everything before and after it is the real thing."""

        async def serve(requests: Any, *_: Any) -> AsyncIterator[Any]:
            self.requests += requests
            for i, text in enumerate(texts):
                end = (finish, stop) if i == len(texts) - 1 and fails is None else (None, None)
                yield [(0, Delta(requests[0].id, 0, (5,), text, (), *end))]
            if fails is not None:
                raise fails
            yield [(0, wire.Ended(requests[0].id, cached))]

        self.model.supervisor.serve = serve
        try:
            yield
        finally:
            del self.model.supervisor.serve


@contextlib.contextmanager
def serving(model: str | None, settings: ServeSettings) -> Iterator[Running]:
    settings = replace(settings, life=replace(settings.life, drain=0.0))
    with served(model, made=settings) as s:
        yield Running(s.server, s.url)


def settings(folder: Path) -> ServeSettings:
    """Alice and Bob may do anything; Carol and Dave, who each have one test only, are held to two requests a minute."""
    held = {"carol": CAROL, "dave": DAVE}
    digests = {name: hashlib.sha256(key.encode()).hexdigest() for name, key in held.items()}
    records = [Record(name, digest, int(time.time()), requests_per_minute=2) for name, digest in digests.items()]
    write(folder / "keys.json", records)
    access = Access(api_key=(ALICE, BOB), keys_file=str(folder / "keys.json"))
    return ServeSettings(access=access, observe=Observe(log_level="error"))


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The embedded model, with keys."""
    with serving(None, settings(tmp_path_factory.mktemp("keys"))) as running:
        yield running


def with_template(folder: Path, template: str) -> str:
    """The embedded model in a folder of its own, with another chat template."""
    own = Path(paceline.lab.__file__).parent / "lab-8m"
    for file in own.iterdir():
        shutil.copy(file, folder / file.name)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    return str(folder)


@pytest.fixture(scope="session")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The embedded model with a template that knows tools and thoughts."""
    model = with_template(tmp_path_factory.mktemp("thinker"), TEMPLATE)
    with serving(model, settings(tmp_path_factory.mktemp("keys"))) as running:
        yield running


@pytest.fixture(scope="session")
def caller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The same without thoughts, in which a small model that has to call would get lost."""
    template = TEMPLATE.replace("<think>", "(").replace("</think>", ")")
    with serving(with_template(tmp_path_factory.mktemp("caller"), template), ServeSettings()) as running:
        yield running


@pytest.fixture
def http(server: Running) -> Iterator[httpx.Client]:
    """Plain HTTP to the embedded model, as Alice."""
    with httpx.Client(base_url=server.url, headers={"authorization": f"Bearer {ALICE}"}, timeout=60) as client:
        yield client


@pytest.fixture
def thinking(thinker: Running) -> Iterator[httpx.Client]:
    """Plain HTTP to the model with tools, as Alice."""
    with httpx.Client(base_url=thinker.url, headers={"authorization": f"Bearer {ALICE}"}, timeout=60) as client:
        yield client
