"""Fair shares of the machine between classes of sequences: virtual token counters.

Each class has a counter of the service it got, divided by its weight; the class with the least is served next. A class that comes back
to the queue is lifted to the least counter there, so that idling saves up nothing. While classes have work, their counters differ
by no more than the service in flight, whatever each of them asks for: VTC, arXiv:2401.00588, section 4.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from heapq import heapify, heappop, heappush, nsmallest

from paceline.core.scheduler import Policy, Share, by_arrival
from paceline.core.sequence import Sequence as TokenSequence

MAX_CLASSES = 4096  # counters kept; beyond, those served least are forgotten, who would be lifted when they return


class FairShare(Policy):
    """The `schedule` seam. class_of: the class of a sequence, which never changes; weights: shares (default 1).

    A prompt counts `prompt_weight` for every token, an output `output_weight` for every token. A prompt is charged as a whole when it
    begins (less what was found in the prefix index), and what is computed again after a preemption is free: neither is the class's doing.
    """

    def __init__(
        self,
        class_of: Callable[[TokenSequence], str],
        prompt_weight: float,
        output_weight: float,
        weights: Mapping[str, float] | None = None,
    ):
        self.class_of, self.weights = class_of, dict(weights or {})
        self.prompt_weight, self.output_weight = prompt_weight, output_weight
        self.counters: dict[str, float] = {}
        self._last = ""  # the class served last

    def add(self, seq: TokenSequence, waiting: Sequence[TokenSequence]) -> None:
        name = self.class_of(seq)
        present = {self.class_of(s) for s in waiting}
        if name not in present:
            others = [self.counters[c] for c in present or {self._last} if c in self.counters]
            self.counters[name] = max(self.counters.get(name, 0.0), min(others, default=0.0))
        if len(self.counters) > MAX_CLASSES:
            idle = [c for c in self.counters if c not in present and c != name]
            for c in nsmallest(len(idle) // 2, idle, key=self.counters.__getitem__):
                del self.counters[c]

    def order(self, seqs: Sequence[TokenSequence], now: float) -> list[TokenSequence]:
        """First come first served within a class; between classes as if each in turn had been served already."""
        queues: dict[str, deque[TokenSequence]] = {}
        for seq in sorted(seqs, key=by_arrival):
            queues.setdefault(self.class_of(seq), deque()).append(seq)
        if len(queues) <= 1:
            return [s for queue in queues.values() for s in queue]
        heap = [(self.counters.get(c, 0.0), *by_arrival(q[0])[1:], c) for c, q in queues.items()]
        heapify(heap)
        ordered = []
        while heap:
            counter, _, _, name = heappop(heap)
            queue = queues[name]
            seq = queue.popleft()
            ordered.append(seq)
            if queue:
                more = self._cost(name, prompt=max(0, seq.n_prompt - seq.n_computed) if seq.kv is None else 0)
                heappush(heap, (counter + more, *by_arrival(queue[0])[1:], name))
        return ordered

    def _cost(self, name: str, prompt: int = 0, output: int = 0) -> float:
        return (self.prompt_weight * prompt + self.output_weight * output) / self.weights.get(name, 1.0)

    def observe(self, shares: Sequence[Share], seconds: float) -> None:
        for share in shares:
            seq, start = share.seq, share.positions[0]
            n_prompt = n_output = 0
            if start == seq.n_cached and start < seq.n_prompt and not seq.n_preempted:
                n_prompt = seq.n_prompt - start
            if share.want and seq.n_computed >= seq.n_prompt:
                n_output = len(seq.tokens) - (start + share.n - share.n_draft)
            if n_prompt or n_output:
                self._last = name = self.class_of(seq)
                self.counters[name] = self.counters.get(name, 0.0) + self._cost(name, n_prompt, n_output)
