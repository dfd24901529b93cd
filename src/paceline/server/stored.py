"""Answers that clients refer to later, kept in memory for a while: of each identity its own, the longest unused giving way."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import msgspec


@dataclass(frozen=True, eq=False)
class Kept:
    """A response and the items of its turn; with those of the turns before, the conversation.

    n_bytes: of this and of all before it, which it keeps alive. So a conversation is counted more often than it lies in memory.
    """

    response: bytes  # JSON
    items: list[dict[str, Any]]
    before: Kept | None
    n_bytes: int

    @staticmethod
    def of(response: bytes, items: list[dict[str, Any]], before: Kept | None) -> Kept:
        own = len(response) + 2 * len(msgspec.json.encode(items))
        return Kept(response, items, before, own + (0 if before is None else before.n_bytes))

    def conversation(self) -> list[dict[str, Any]]:
        """The items of all turns, the first first."""
        turns: list[list[dict[str, Any]]] = []
        at: Kept | None = self
        while at is not None:
            turns.append(at.items)
            at = at.before
        return [item for items in reversed(turns) for item in items]


@dataclass
class _Shelf:
    """What one identity has: the longest unused first."""

    kept: OrderedDict[str, Kept] = field(default_factory=OrderedDict)
    n_bytes: int = 0

    def drop(self, id: str) -> Kept:
        one = self.kept.pop(id)
        self.n_bytes -= one.n_bytes
        return one


class Stored:
    """most, most_bytes: of each identity; all_bytes: of all, whose largest gives way first."""

    def __init__(self, most: int = 1024, most_bytes: int = 32 << 20, all_bytes: int = 256 << 20):
        self.most, self.most_bytes, self.all_bytes = most, most_bytes, all_bytes
        self.n_bytes = 0
        self._shelves: dict[str, _Shelf] = {}

    def put(self, owner: str, id: str, one: Kept) -> None:
        """Keep it; what is larger than all that its owner may have is not."""
        if one.n_bytes > min(self.most_bytes, self.all_bytes):
            return
        shelf = self._shelves.setdefault(owner, _Shelf())
        shelf.kept[id] = one
        shelf.n_bytes += one.n_bytes
        self.n_bytes += one.n_bytes
        while len(shelf.kept) > self.most or shelf.n_bytes > self.most_bytes:
            self._drop(owner, next(iter(shelf.kept)))
        while self.n_bytes > self.all_bytes:
            largest = max(self._shelves, key=lambda name: self._shelves[name].n_bytes)
            self._drop(largest, next(iter(self._shelves[largest].kept)))

    def get(self, owner: str, id: str) -> Kept | None:
        """The owner's own of this id, which now counts as used."""
        shelf = self._shelves.get(owner)
        if shelf is None or id not in shelf.kept:
            return None
        shelf.kept.move_to_end(id)
        return shelf.kept[id]

    def delete(self, owner: str, id: str) -> bool:
        """Whether there was one."""
        shelf = self._shelves.get(owner)
        if shelf is None or id not in shelf.kept:
            return False
        self._drop(owner, id)
        return True

    def _drop(self, owner: str, id: str) -> None:
        shelf = self._shelves[owner]
        self.n_bytes -= shelf.drop(id).n_bytes
        if not shelf.kept:
            del self._shelves[owner]
