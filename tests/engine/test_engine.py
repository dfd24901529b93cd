"""What the engine promises: the same tokens and bits alone, batched, chunked, preempted, forked or speculated; nothing lost."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence as Seq
from typing import Any

import numpy as np
import pytest

from paceline.core.errors import RequestError
from paceline.core.runner import Parts
from paceline.core.sequence import NO_DRAFT, Draft, Sequence
from paceline.core.types import Request, SamplingParams

from .conftest import BACKENDS, make_backend
from .tiny import CONFIG, WINDOWED, request, run_all, tiny_engine, tiny_model

N_SCHEDULES = int(os.environ.get("PACELINE_TEST_SCHEDULES", "20"))  # nightly: 200
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 12}


def prompts(n: int, seed: int = 0, longest: int = 40) -> list[list[int]]:
    rng = random.Random(seed)
    shared = [rng.randrange(97) for _ in range(longest)]
    found = []
    for _ in range(n):
        head = shared[: rng.choice([0, 0, 9, 20])]
        found.append((head + [rng.randrange(97) for _ in range(rng.randint(1, longest))])[:longest])
    return found


def alone(model: Any, r: Request, **options: Any) -> Any:
    return run_all(tiny_engine(model, radix=False, **options), [r])[r.id]


def test_chunking_does_not_change_tokens_or_bits(model: Any) -> None:
    prompt = prompts(1, seed=3)[0] * 2
    want = alone(model, request("a", prompt, logprobs=3, **GREEDY))
    for chunk in (1, 3, 17):
        got = alone(model, request("a", prompt, logprobs=3, **GREEDY), chunk=chunk)
        assert got.token_ids == want.token_ids
        assert got.completions[0].logprobs == want.completions[0].logprobs


@pytest.mark.parametrize("head_split", [None, 1])
def test_a_batch_gives_what_each_gives_alone(model: Any, head_split: int | None) -> None:
    requests = [
        request(f"r{i}", p, seed=i, temperature=0.8 * (i % 3), top_k=20 * (i % 2), logprobs=2, max_tokens=5 + i)
        for i, p in enumerate(prompts(8))
    ]
    together = run_all(tiny_engine(model, head_split=head_split, max_rows=29), requests)
    for r in requests:
        want = alone(model, r)
        assert together[r.id].token_ids == want.token_ids
        assert together[r.id].completions[0].logprobs == want.completions[0].logprobs


def test_preemption_loses_nothing(model: Any) -> None:
    requests = [
        request(f"r{i}", p, seed=i, temperature=0.7, logprobs=0, max_tokens=30) for i, p in enumerate(prompts(8, 5))
    ]
    engine = tiny_engine(model, n_pages=40, radix=False)
    together = run_all(engine, requests)
    assert engine.runner.scheduler.n_preempted > 0
    for r in requests:
        want = alone(model, r, n_pages=40)
        assert together[r.id].token_ids == want.token_ids
        assert together[r.id].completions[0].logprobs == want.completions[0].logprobs
    assert engine.runner.cache.pools[0].n_used == 0


def test_prefix_reuse_is_exact_and_counted(model: Any) -> None:
    prompt = prompts(1, 7)[0] + list(range(30))
    engine = tiny_engine(model)
    first = run_all(engine, [request("a", prompt, logprobs=1, **GREEDY)])["a"]
    second = run_all(engine, [request("b", prompt, logprobs=1, **GREEDY)])["b"]
    assert first.n_cached == 0
    assert second.n_cached >= len(prompt) - 2 * 4
    assert second.token_ids == first.token_ids
    assert second.completions[0].logprobs == first.completions[0].logprobs
    other = Request("c", tuple(prompt), SamplingParams(**GREEDY), salt="someone else")
    assert run_all(engine, [other])["c"].n_cached == 0
    engine.runner.parts.prefix.check()  # type: ignore[union-attr]


def schedule_of(model: Any, seed: int, plain: Any = None) -> None:
    """One random schedule: arrivals, chunking, page shortage, prefix hits; every sequence's logprobs are those of its run alone."""
    rng = random.Random(seed)
    n = rng.randint(2, 6)
    requests = [
        request(
            f"r{i}",
            p,
            seed=i,
            temperature=rng.choice([0.0, 0.9]),
            logprobs=2,
            max_tokens=rng.randint(1, 14),
            n=rng.choice([1, 1, 2]),
        )
        for i, p in enumerate(prompts(n, seed, longest=30))
    ]
    engine = tiny_engine(
        model, n_pages=rng.choice([24, 40, 200]), page_size=rng.choice([2, 4, 16]) if rng.random() < 0.5 else 4,
        max_rows=rng.choice([5, 16, 64]), chunk=rng.choice([1, 3, 7, 64]), radix=rng.random() < 0.7,
        max_seqs=rng.choice([2, 16]), head_split=rng.choice([None, 1]),
    )  # fmt: skip
    outputs = run_all(engine, requests, at=[rng.randint(0, 12) for _ in requests])
    for r in requests:
        want = alone(plain or model, r)
        assert [c.token_ids for c in outputs[r.id].completions] == [c.token_ids for c in want.completions]
        assert [c.logprobs for c in outputs[r.id].completions] == [c.logprobs for c in want.completions]
    engine.runner.cache.check_integrity(
        [], [] if engine.runner.parts.prefix is None else engine.runner.parts.prefix.held()
    )  # type: ignore[attr-defined]


@pytest.mark.parametrize("seed", range(N_SCHEDULES))
def test_random_schedules_give_the_same_bits(model: Any, windowed: Any, seed: int) -> None:
    schedule_of(windowed if seed % 3 == 0 else model, seed)


@pytest.fixture(scope="module")
def by_threads() -> dict[int, tuple[Any, Any]]:
    """Threads -> the plain and the windowed model on the native core."""
    if "native" not in BACKENDS:
        pytest.skip("the native core is not built")
    return {n: tuple(tiny_model(make_backend("native", n), c) for c in (CONFIG, WINDOWED)) for n in (1, 2)}


@pytest.mark.parametrize("seed", range(N_SCHEDULES))
def test_random_schedules_on_two_threads_give_the_bits_of_one(
    by_threads: dict[int, tuple[Any, Any]], seed: int
) -> None:
    which = int(seed % 3 == 0)
    schedule_of(by_threads[2][which], seed, plain=by_threads[1][which])


@pytest.mark.skipif("native" not in BACKENDS, reason="the native core is not built")
@pytest.mark.parametrize("format", ["bf16", "f16", "int8", "int8:group=0", "int4", "int4g:group=64,mins"])
@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
def test_every_format_gives_the_same_bits_with_any_threads(format: str, kv_dtype: str) -> None:
    """The same requests in another schedule and with one thread more."""
    requests = [
        request(f"r{i}", p, seed=i, temperature=0.7 * (i % 2), logprobs=2, max_tokens=8)
        for i, p in enumerate(prompts(6, 21))
    ]
    found = []
    for threads, chunk, max_rows in ((1, 64, 64), (2, 5, 16)):
        model = tiny_model(make_backend("native", threads), format=format)
        outputs = run_all(tiny_engine(model, chunk=chunk, max_rows=max_rows, kv_dtype=kv_dtype), requests)
        found.append([(outputs[r.id].token_ids, outputs[r.id].completions[0].logprobs) for r in requests])
    assert found[0] == found[1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_head_in_two_passes_gives_the_same_bits_in_any_batch(backend: str) -> None:
    large = {**CONFIG, "vocab_size": 1 << 14, "num_hidden_layers": 1, "tie_word_embeddings": True}
    requests = [
        request(f"r{i}", p, seed=i, temperature=0.8 * (i % 2), logprobs=3, max_tokens=4)
        for i, p in enumerate(prompts(5, 33))
    ]
    found = []
    for threads, chunk, max_rows in ((1, 64, 64), (2, 5, 16)):
        model = tiny_model(make_backend(backend, threads), large, format="int4")
        assert model.w["embed.coarse"].format == "int4"
        outputs = run_all(tiny_engine(model, chunk=chunk, max_rows=max_rows), requests)
        found.append([(outputs[r.id].token_ids, outputs[r.id].completions[0].logprobs) for r in requests])
    assert found[0] == found[1]
    for r, got in zip(requests[:2], found[0], strict=False):
        want = alone(model, r)
        assert got == (want.token_ids, want.completions[0].logprobs)


class Oracle:
    """Proposes the plain run's own tokens, with mistakes, as a chain or a tree."""

    def __init__(self, plain: dict[str, list[int]], tree: bool, seed: int):
        self.plain, self.tree, self.rng = plain, tree, random.Random(seed)
        self.n_accepted = 0

    def propose(self, seqs: Seq[Sequence]) -> list[Draft]:
        return [self._draft(s) for s in seqs]

    def _draft(self, seq: Sequence) -> Draft:
        rest = self.plain[seq.request.id][len(seq.output) :][: self.rng.randint(0, 5)]
        if not rest:
            return NO_DRAFT
        tokens, parents = [], []
        last = -1
        for t in rest:
            if self.tree:  # a wrong sibling before the right one
                tokens.append((t + 1) % 97)
                parents.append(last)
            tokens.append(t if self.rng.random() < 0.8 else (t + 7) % 97)
            parents.append(last)
            last = len(tokens) - 1
        return Draft(np.array(tokens, np.int32), np.array(parents, np.int32))

    def observe(self, seq: Sequence, n: int) -> None:
        self.n_accepted += n


@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_speculation_gives_the_plain_tokens(model: Any, windowed: Any, tree: bool, temperature: float) -> None:
    for which in (model, windowed):
        requests = [
            request(
                f"r{i}", p, seed=i, temperature=temperature, logprobs=1, max_tokens=25, presence_penalty=0.5 * (i % 2)
            )
            for i, p in enumerate(prompts(5, 11))
        ]
        plain = {r.id: alone(which, r) for r in requests}
        drafter = Oracle({k: v.token_ids for k, v in plain.items()}, tree, seed=1)
        engine = tiny_engine(which, parts=Parts(drafter=drafter), n_pages=60)
        got = run_all(engine, requests)
        assert drafter.n_accepted > 12
        assert engine.runner.n_steps < 60
        for r in requests:
            assert got[r.id].token_ids == plain[r.id].token_ids
            assert got[r.id].completions[0].logprobs == plain[r.id].completions[0].logprobs


def test_n_completions_share_the_prompt(model: Any) -> None:
    prompt = prompts(1, 2)[0] + list(range(40))
    engine = tiny_engine(model, radix=False)
    out = run_all(engine, [request("a", prompt, n=4, seed=5, temperature=1.0, max_tokens=6)])["a"]
    assert len({tuple(c.token_ids) for c in out.completions}) > 1
    assert engine.runner.cache.pools[0].peak < 2 * (len(prompt) // 4)
    again = alone(model, request("a", prompt, n=4, seed=5, temperature=1.0, max_tokens=6), n_pages=60)
    assert [c.token_ids for c in again.completions] == [c.token_ids for c in out.completions]


def test_stop_conditions(model: Any) -> None:
    prompt = prompts(1, 4)[0]
    plain = alone(model, request("a", prompt, temperature=0.0, max_tokens=20)).token_ids
    stop = plain[5]
    first = plain.index(stop)
    out = alone(model, request("a", prompt, temperature=0.0, max_tokens=20, stop_token_ids=[stop]))
    assert out.token_ids == plain[: first + 1]
    assert (out.completions[0].finish_reason, out.completions[0].stop_reason) == ("stop", stop)
    eos = frozenset({stop})
    out = alone(model, request("a", prompt, temperature=0.0, max_tokens=20), eos=eos)
    assert out.token_ids == plain[: first + 1]
    out = alone(model, request("a", prompt, temperature=0.0, max_tokens=20, ignore_eos=True), eos=eos)
    assert out.token_ids == plain
    out = alone(model, request("a", prompt, temperature=0.0, max_tokens=20, min_tokens=first + 3), eos=eos)
    assert stop not in out.token_ids[: first + 3]
    assert alone(model, request("a", prompt, temperature=0.0, max_tokens=3)).completions[0].finish_reason == "length"


def test_logit_bias_and_penalties(model: Any) -> None:
    prompt = prompts(1, 4)[0]
    out = alone(model, request("a", prompt, temperature=0.0, max_tokens=5, logit_bias={42: 100.0}))
    assert out.token_ids == [42] * 5
    plain = alone(model, request("a", prompt, temperature=0.0, max_tokens=40)).token_ids
    varied = alone(
        model, request("a", prompt, temperature=0.0, max_tokens=40, presence_penalty=2.0, frequency_penalty=2.0)
    ).token_ids
    assert len(set(varied)) >= len(set(plain))
    strong = alone(model, request("a", prompt, temperature=0.0, max_tokens=20, repetition_penalty=1000.0)).token_ids
    assert len(set(strong)) == 20


def test_prompt_logprobs_are_those_of_generation(model: Any) -> None:
    prompt = prompts(1, 4)[0]
    out = alone(model, request("a", prompt, temperature=0.0, max_tokens=10, logprobs=0))
    whole = prompt + out.token_ids
    scored = alone(model, request("b", whole, temperature=0.0, max_tokens=1, prompt_logprobs=2), chunk=7)
    got = [lp.logprob for lp in scored.prompt_logprobs[len(prompt) :]]
    assert got == [lp.logprob for lp in out.completions[0].logprobs]
    assert scored.prompt_logprobs[0] is None
    assert len(scored.prompt_logprobs) == len(whole)


def test_abort_at_any_moment(model: Any) -> None:
    for moment in range(8):
        engine = tiny_engine(model, radix=False, chunk=7)
        for i, p in enumerate(prompts(3, 9)):
            engine.add(request(f"r{i}", p, n=2, **GREEDY))
        outputs = {}
        for _ in range(moment):
            outputs.update({o.id: o for o in engine.step()[1]})
        engine.abort("r1")
        engine.abort("nobody")
        while engine.has_work:
            outputs.update({o.id: o for o in engine.step()[1]})
        outputs.update({o.id: o for o in engine.step()[1]})
        assert outputs["r0"].completions[0].finish_reason == "length"
        assert outputs["r1"].completions[0].finish_reason in ("abort", "length")
        assert engine.runner.cache.pools[0].n_used == 0


@pytest.mark.parametrize(
    ("tokens", "params", "says"),
    [
        ([], {}, "prompt: is empty"),
        ([1, 97], {}, "token id 97"),
        ([-1], {}, "token id -1"),
        ([1] * 513, {}, "exceed 511"),
        ([1], {"logit_bias": {500: 1.0}}, "logit_bias: token id 500"),
        ([1], {"stop_token_ids": [97]}, "stop_token_ids"),
    ],
)
def test_bad_requests_are_refused_and_others_served(
    model: Any, tokens: list[int], params: dict[str, Any], says: str
) -> None:
    engine = tiny_engine(model)
    engine.add(request("good", [1, 2, 3], **GREEDY))
    with pytest.raises(RequestError, match=says):
        engine.add(request("bad", tokens, **params))
    assert len(run_all(engine, [])["good"].token_ids) == 12


def test_unusable_logits_fail_only_their_request(ops: Any) -> None:
    model = tiny_model(ops)
    engine = tiny_engine(model, radix=False)
    forward = model.program.forward

    def poisoned(batch: Any) -> Any:
        logits = ops.numpy(forward(batch)).copy()
        logits[0] = np.nan
        return logits

    want = alone(model, request("b", [4, 5, 6], **GREEDY)).token_ids
    object.__setattr__(model.program, "forward", poisoned)
    engine.add(request("a", [1, 2, 3], **GREEDY))
    engine.add(request("b", [4, 5, 6], **GREEDY))
    first = engine.step()[1]
    assert [o.id for o in first] == ["a"]
    assert "not finite" in str(first[0].error)
    object.__setattr__(model.program, "forward", forward)
    assert run_all(engine, [])["b"].token_ids == want


def test_a_parked_state_is_continued_and_forked(model: Any) -> None:
    prompt = prompts(1, 8)[0]
    engine = tiny_engine(model, radix=False)
    first = run_all(engine, [Request("a", tuple(prompt), SamplingParams(temperature=0.0, max_tokens=6), park=True)])[
        "a"
    ]
    kept = first.sequences[0]
    child = engine.fork(kept)
    whole = alone(model, request("x", prompt, temperature=0.0, max_tokens=14)).token_ids
    for name, parent in (("b", kept), ("c", child)):
        engine.add(request(name, kept.tokens, temperature=0.0, max_tokens=8), parent)
        out = run_all(engine, [])[name]
        assert first.token_ids + out.token_ids == whole
        assert out.n_cached == len(prompt) + 5
    for seq in (kept, child):
        engine.runner.scheduler.remove(seq)
    assert engine.runner.cache.pools[0].n_used == 0


def test_parked_states_give_way_when_pages_run_out(model: Any) -> None:
    engine = tiny_engine(model, n_pages=16, radix=False)
    parked = Request("a", tuple(range(40)), SamplingParams(temperature=0.0, max_tokens=2), park=True)
    kept = run_all(engine, [parked])["a"].sequences[0]
    out = run_all(engine, [request("b", list(range(45)), temperature=0.0, max_tokens=6)])["b"]
    assert len(out.token_ids) == 6
    assert kept.kv is None
    engine.add(request("c", kept.tokens, temperature=0.0, max_tokens=3), kept)
    assert len(run_all(engine, [])["c"].token_ids) == 3


def test_windows_release_pages(windowed: Any) -> None:
    engine = tiny_engine(windowed, radix=False, n_pages=200)
    out = run_all(engine, [request("a", list(range(90)), temperature=0.0, max_tokens=60)])
    assert len(out["a"].token_ids) == 60
    engine.add(request("b", list(range(90)) * 4, temperature=0.0, max_tokens=20))
    for _ in range(12):
        engine.step()
    assert engine.runner.cache.pools[0].n_used <= 24 // 4 + 64 // 4 + 1


def test_pooled_hidden_states_do_not_depend_on_chunks(model: Any) -> None:
    found = []
    for chunk in (3, 64):
        for pool in ("mean", "last"):
            r = Request("a", tuple(range(20)), SamplingParams(), generate=False, pool=pool)  # type: ignore[arg-type]
            found.append(alone(model, r, chunk=chunk).sequences[0].pooled)
    assert np.array_equal(found[1], found[3])
    assert np.allclose(found[0], found[2], rtol=1e-12)
