"""A client's messages in the form that chat templates expect."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from paceline.core.errors import RequestError
from paceline.server.dialects.grammar import MAX_CALLS

ROLES = ("system", "developer", "user", "assistant", "tool")
_TEXT = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}  # part type -> its field
_ANSWERED = ("refusal", "audio", "annotations", "function_call", "tool_calls")  # SDKs write these even when empty
MAX_PARTS = 1 << 14  # of all messages together
MAX_PROBLEMS = 8  # that one error tells


def conversation(
    messages: Any, *, call_id: Callable[[str], str] | None = None, keep_parts: bool = False
) -> list[dict[str, Any]]:
    """OpenAI's chat messages as a template takes them; the input stays as it is.

    Text parts are joined by newlines; with `keep_parts`, for templates that read parts, every content is a list of
    them. Arguments of calls, which clients send as JSON text, become objects. A tool's message gets the name of its
    function. developer is the new name of system. call_id: makes ids fit the template (`Parser.call_id`).
    Raises RequestError that names the first of the places that are wrong.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)) or not messages:
        raise RequestError("messages: must be a list of at least one message")
    reader = _Reader(call_id or (lambda given: given), keep_parts)
    chat = [reader.message(m, f"messages[{i}]") for i, m in enumerate(messages) if reader.room]
    if reader.problems:
        raise RequestError("; ".join(reader.problems))
    return chat


class _Reader:
    """Collects what is wrong; `names` are the functions of the calls so far, by id."""

    def __init__(self, call_id: Callable[[str], str], keep_parts: bool):
        self.problems: list[str] = []
        self._call_id = call_id
        self._keep_parts = keep_parts
        self._n_parts = 0
        self._names: dict[str, str] = {}

    @property
    def room(self) -> bool:
        return len(self.problems) < MAX_PROBLEMS

    def _wrong(self, problem: str) -> None:
        if self.room:
            self.problems.append(problem)

    def message(self, message: Any, where: str) -> dict[str, Any]:
        if not isinstance(message, Mapping):
            self._wrong(f"{where}: must be an object with role and content")
            return {}
        role = message.get("role")
        if role not in ROLES:
            self._wrong(f"{where}.role = {role!r:.80}: must be one of {', '.join(ROLES)}")
            return {}
        out = {k: v for k, v in message.items() if v is not None and (k not in _ANSWERED or v)}
        out["role"] = "system" if role == "developer" else role
        for name, remedy in (("function_call", "use tool_calls"), ("audio", "send its text as content")):
            if name in out:
                self._wrong(f"{where}.{name}: is not supported; {remedy}")
        if "tool_calls" in out:
            out["tool_calls"] = self._calls(out["tool_calls"], role, f"{where}.tool_calls")
        if "content" in out:
            out["content"] = self._content(out["content"], f"{where}.content")
        elif role != "assistant":
            self._wrong(f"{where}.content: is missing")
        else:  # not left out: more templates add it to a text than ask whether it is there
            out["content"] = self._content(out.get("refusal", ""), f"{where}.refusal")
        out.pop("refusal", None)
        return self._result(out, where) if role == "tool" else out

    def _content(self, content: Any, where: str) -> Any:
        if isinstance(content, str):
            return [{"type": "text", "text": content}] if self._keep_parts else content
        if not isinstance(content, (list, tuple)):
            self._wrong(f"{where}: must be text or a list of parts, found {type(content).__name__}")
            return ""
        self._n_parts += len(content)
        if self._n_parts > MAX_PARTS:
            self._wrong(f"{where}: more than {MAX_PARTS:,} parts in all messages together; join them")
            content = content[:MAX_PROBLEMS]
        texts = [self._part(part, f"{where}[{i}]") for i, part in enumerate(content) if self.room]
        return [{"type": "text", "text": t} for t in texts] if self._keep_parts else "\n".join(texts)

    def _part(self, part: Any, where: str) -> str:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if not isinstance(kind, str):
            self._wrong(f'{where}: must be a part such as {{"type": "text", "text": "..."}}')
        elif kind not in _TEXT:
            self._wrong(f"{where}.type = {kind!r:.80}: this model reads text only; leave the part out")
        elif not isinstance(text := part.get(_TEXT[kind]), str):
            self._wrong(f"{where}.{_TEXT[kind]}: must be text")
        else:
            return text
        return ""

    def _calls(self, calls: Any, role: str, where: str) -> list[dict[str, Any]]:
        if role != "assistant":
            self._wrong(f"{where}: only the assistant's messages have calls")
        elif not isinstance(calls, (list, tuple)) or len(calls) > MAX_CALLS:
            self._wrong(f"{where}: must be a list of at most {MAX_CALLS} calls")
        else:
            return [self._one(call, f"{where}[{i}]") for i, call in enumerate(calls) if self.room]
        return []

    def _one(self, call: Any, where: str) -> dict[str, Any]:
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or call.get("type", "function") != "function":
            self._wrong(f'{where}: must be {{"id": ..., "type": "function", "function": {{...}}}}')
            return {}
        given, name = call.get("id"), function.get("name")
        if given is not None and not isinstance(given, str):
            self._wrong(f"{where}.id: must be text")
        if not isinstance(name, str) or not name:
            self._wrong(f"{where}.function.name: must be text")
            return {}
        arguments = self._arguments(function.get("arguments"), f"{where}.function.arguments")
        out = {**call, "type": "function", "function": {**function, "arguments": arguments}}
        if isinstance(given, str):
            self._names[given] = name
            out["id"] = self._call_id(given)
        return out

    def _arguments(self, arguments: Any, where: str) -> dict[str, Any]:
        if isinstance(arguments, str):
            try:
                arguments = msgspec.json.decode(arguments) if arguments.strip() else {}
            except (ValueError, RecursionError) as e:
                self._wrong(f"{where}: is not valid JSON ({str(e)[:120]})")
                return {}
        if arguments is None:
            return {}
        if not isinstance(arguments, dict):
            self._wrong(f"{where}: must be the JSON text of an object, found {type(arguments).__name__}")
            return {}
        return arguments

    def _result(self, out: dict[str, Any], where: str) -> dict[str, Any]:
        given = out.get("tool_call_id")
        if given is None:
            return out
        if not isinstance(given, str):
            self._wrong(f"{where}.tool_call_id: must be text")
            return out
        if given in self._names:
            out.setdefault("name", self._names[given])
        out["tool_call_id"] = self._call_id(given)
        return out
