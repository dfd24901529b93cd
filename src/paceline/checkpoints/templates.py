"""Chat templates: a conversation to the text a model was trained on.

The environment is that of transformers' `apply_chat_template` (trim_blocks, lstrip_blocks, loop controls, `generation`
blocks, raise_exception, strftime_now, its tojson), run in bounds (`template_sandbox`). Values reach the template as
plain JSON data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import CodeType
from typing import TYPE_CHECKING, Any

from paceline.checkpoints.files import open_regular
from paceline.checkpoints.template_meter import Limits
from paceline.checkpoints.template_sandbox import compile_template, render_code
from paceline.core.errors import TemplateError

if TYPE_CHECKING:
    from paceline.checkpoints.tokenizer import Tokenizer

MAX_DEPTH = 64  # of nested values in messages, tools, documents and variables
MAX_VALUES = 1_000_000
MAX_NAME = 64

# What the caller of a server may not set through template variables: our own arguments and the environment's names.
RESERVED = frozenset(
    "messages tools documents add_generation_prompt continue_final_message chat_template conversation tokenize "  # noqa: SIM905
    "padding truncation max_length return_tensors return_dict tokenizer_kwargs return_assistant_tokens_mask "
    "bos_token eos_token unk_token sep_token pad_token cls_token mask_token raise_exception strftime_now namespace "
    "dict range cycler joiner lipsum self loop caller varargs "
    "kwargs".split()
)
_REASONING = ("reasoning_content", "thinking", "reasoning")  # the names one field has had
_TAG = "PACELINE-CONTINUE-HERE "  # ends in a space to find out whether the template trims the message

BUILTIN: dict[str, str] = {
    "chatml": (
        "{%- for message in messages -%}\n"
        "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
        "{% endfor -%}\n"
        "{%- if add_generation_prompt -%}\n<|im_start|>assistant\n{% endif -%}"
    ),
    "llama3": (
        "{{- bos_token -}}\n"
        "{%- for message in messages -%}\n"
        "<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n{{ message.content | trim }}<|eot_id|>\n"
        "{%- endfor -%}\n"
        "{%- if add_generation_prompt -%}\n<|start_header_id|>assistant<|end_header_id|>\n\n{% endif -%}"
    ),
    "plain": (
        "{%- for message in messages -%}\n"
        "{{ message.role | capitalize }}: {{ message.content | trim }}\n\n"
        "{% endfor -%}\n"
        "{%- if add_generation_prompt -%}\nAssistant:{% endif -%}"
    ),
}


class ChatTemplate:
    """One compiled template, or several by name of which "tool_use" is taken when there are tools and "default"
    otherwise.

    source: Jinja text. special_tokens: "bos_token" and the like -> text. limits: bounds of one rendering. clock: what
    strftime_now reads. Raises TemplateError when the source cannot be compiled.
    """

    def __init__(
        self,
        source: str | Mapping[str, str],
        special_tokens: Mapping[str, str] | None = None,
        *,
        limits: Limits | None = None,
        clock: Callable[[], datetime] = datetime.now,
    ):
        self.sources = {"default": source} if isinstance(source, str) else dict(source)
        self.special_tokens = dict(special_tokens or {})
        self.limits = limits or Limits()
        self._clock = clock
        self._codes: dict[str, CodeType] = {}
        for name in ("default", "tool_use"):
            if name in self.sources:
                self._codes[name] = compile_template(self.sources[name], self.limits)
        if "default" not in self._codes:
            raise TemplateError(
                f"chat template: none is named 'default' (found: {', '.join(self.sources) or 'none'}); choose one by "
                f"name"
            )

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt for `messages`; encode it with `add_special_tokens=False`.

        add_generation_prompt: end with the header of the assistant's answer (default: unless a message is continued).
        continue_final_message: end inside the last message, for the model to go on with it (prefill).
        variables: further values for the template (`enable_thinking`, ...), as a server takes them from its clients;
        they cannot replace any argument above, a special token or a function of the environment.
        Raises TemplateError when an argument is unusable, and when the template refuses it or exceeds its bounds.
        """
        if add_generation_prompt is None:
            add_generation_prompt = not continue_final_message
        if add_generation_prompt and continue_final_message:
            raise TemplateError(
                "add_generation_prompt and continue_final_message exclude each other: a new answer or the last one"
            )
        chat = _conversation(messages)
        name = "tool_use" if tools and "tool_use" in self._codes else "default"
        final = _tag_final(chat, self.sources[name]) if continue_final_message else ""
        values = {
            **self.special_tokens,
            **_variables(variables or {}, self.special_tokens),
            "messages": chat,
            "tools": _objects(tools, "tools"),
            "documents": _objects(documents, "documents"),
            "add_generation_prompt": bool(add_generation_prompt),
        }
        text = render_code(self._codes[name], values, self.limits, self._clock)
        return _cut(text, final) if continue_final_message else text


def chat_template(tokenizer: Tokenizer, choice: str | None = None) -> ChatTemplate:
    """The template to use with `tokenizer`.

    choice: None for the model's own, the name of one of its own or of a built-in (chatml, llama3, plain), or a file of
    Jinja text.
    Raises TemplateError; a base model without a template is refused, because guessing a format silently spoils the
    answers.
    """
    own = tokenizer.chat_template
    tokens = tokenizer.special_tokens
    if choice is None:
        if own is None:
            raise TemplateError(
                "the model has no chat template (a base model cannot chat): complete a prompt instead, or say how to "
                f"write a conversation with --chat-template FILE, or one of {', '.join(BUILTIN)}"
            )
        return ChatTemplate(own, tokens)
    if isinstance(own, dict) and choice in own:
        return ChatTemplate(own[choice], tokens)
    if choice in BUILTIN:
        return ChatTemplate(BUILTIN[choice], tokens)
    path = Path(choice)
    if not path.is_file():
        named = [*(own if isinstance(own, dict) else ()), *BUILTIN]
        raise TemplateError(f"chat template {choice!r:.200} is neither a file nor one of {', '.join(named)}")
    with open_regular(path) as f:
        data = f.read(4 * Limits.source + 1)
    try:
        return ChatTemplate(data.decode("utf-8"), tokens)
    except UnicodeDecodeError as e:
        raise TemplateError(f"chat template {choice!r:.200}: is not UTF-8 text ({e.reason} at byte {e.start})") from e


# --- what the template sees ----------------------------------------------------------------------


class _Plain:
    """Copies of values as the plain JSON types, counted."""

    def __init__(self, where: str):
        self._where = where
        self._left = MAX_VALUES

    def copy(self, value: Any, depth: int = 0) -> Any:
        self._left -= 1
        if self._left < 0 or depth > MAX_DEPTH:
            raise TemplateError(f"{self._where}: more than {MAX_VALUES:,} values, or nested deeper than {MAX_DEPTH}")
        if value is None or type(value) in (str, int, float, bool):
            return value
        if isinstance(value, Mapping):
            if not all(isinstance(k, str) for k in value):
                raise TemplateError(f"{self._where}: the keys of objects must be text")
            return {str(k): self.copy(v, depth + 1) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.copy(v, depth + 1) for v in value]
        raise TemplateError(
            f"{self._where}: {type(value).__name__!r} values cannot be given to a chat template, only JSON types"
        )


def _objects(values: Sequence[Mapping[str, Any]] | None, where: str) -> list[dict[str, Any]] | None:
    if values is None:
        return None
    if not isinstance(values, (list, tuple)) or not all(isinstance(v, Mapping) for v in values):
        raise TemplateError(f"{where}: must be a list of objects")
    copied: list[dict[str, Any]] = _Plain(where).copy(list(values))
    return copied


def _conversation(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Copies without null entries (templates test whether a key is there), with reasoning under each name templates
    know."""
    chat = _objects(messages, "messages")
    if not chat:
        raise TemplateError("messages: empty; give at least one message with role and content")
    out = []
    for i, message in enumerate(chat):
        message = {k: v for k, v in message.items() if v is not None}
        if not isinstance(message.get("role"), str):
            raise TemplateError(f"messages[{i}].role: must be text such as 'user', found {message.get('role')!r:.80}")
        reasoning = next((message[k] for k in _REASONING if k in message), None)
        if reasoning is not None:
            message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
        out.append(message)
    return out


def _variables(variables: Mapping[str, Any], special_tokens: Mapping[str, str]) -> dict[str, Any]:
    for name in variables:
        if not isinstance(name, str) or not name.isidentifier() or name.startswith("_") or len(name) > MAX_NAME:
            raise TemplateError(
                f"template variable {name!r:.100}: not a name of at most {MAX_NAME} letters, digits and underscores"
            )
        if name in RESERVED or name in special_tokens:
            raise TemplateError(f"template variable {name!r}: is set by the engine and cannot be replaced")
    copied: dict[str, Any] = _Plain("template variables").copy(dict(variables))
    return copied


# --- prefill -------------------------------------------------------------------------------------


def _tag_final(chat: list[dict[str, Any]], source: str) -> str:
    """Mark where the last message's text ends, so that the rendering can be cut there. Returns that text."""
    content = chat[-1].get("content")
    if "content" not in source or content is None:
        raise TemplateError("continue_final_message: the last message has no content that this template writes")
    if isinstance(content, str):
        chat[-1]["content"] = content + _TAG
        return content
    for block in reversed(content if isinstance(content, list) else []):
        if isinstance(block, dict) and isinstance(block.get("text"), str):
            text: str = block["text"]
            block["text"] = text + _TAG
            return text
    raise TemplateError("continue_final_message: the last message has no text to continue")


def _cut(text: str, final: str) -> str:
    at = text.rfind(_TAG.strip())
    if at < 0 or final.strip() not in text:
        raise TemplateError(
            "continue_final_message: the template drops or changes the last message; give it a role the template keeps"
        )
    kept = text[:at]
    return kept if text.startswith(_TAG, at) else kept.rstrip()
