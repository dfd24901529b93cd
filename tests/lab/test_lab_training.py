"""Rows, the optimizer, a few steps on a toy model, checkpoints and the export (needs torch)."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the training needs torch (the torch extra)")
pytest.importorskip("safetensors", reason="checkpoints need safetensors")

from lab import card, evaluate, export, mix, optim, tokenizer, train  # noqa: E402
from lab.data.base import chat_prompt  # noqa: E402
from lab.model import SIZES, Llama  # noqa: E402


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with a tokenizer."""
    folder = tmp_path_factory.mktemp("work")
    tokenizer.save(tokenizer.train(1), folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def mixer(work: Path) -> mix.Mixer:
    return mix.Mixer(work / "tokenizer" / "tokenizer.json", mix.SHARES, 1)


def toy_arguments(work: Path, *extra: str) -> list[str]:
    base = ["--size", "toy", "--work", str(work), "--device", "cpu", "--processes", "1", "--no-compile"]
    return [*base, "--micro-tokens", "256", "--micro-batches", "1", *extra]


def test_rows_have_the_asked_shape_and_weights_only_where_stated(mixer: mix.Mixer) -> None:
    ids, targets, weights = mixer.batch(2048, 512)
    assert ids.shape == targets.shape == weights.shape == (4, 512)
    assert torch.equal(ids[:, 1:], targets[:, :-1])
    assert weights.min() > 0
    assert weights.max() <= 2
    assert int(ids.max()) < 4096


def test_shares_are_kept(work: Path) -> None:
    mixer = mix.Mixer(work / "tokenizer" / "tokenizer.json", mix.SHARES, 2)
    for _ in range(150):
        mixer.row(512)
    total = sum(mixer.counts.values())
    for name, share in mix.SHARES.items():
        assert abs(mixer.counts[name] / total - share) < 0.03


def test_shares_can_be_replaced_and_unknown_names_are_refused() -> None:
    shares = mix.parse_shares("recall=0.5")
    assert shares["recall"] > 0.39
    assert sum(shares.values()) == pytest.approx(1)
    with pytest.raises(ValueError, match="arithmetic"):
        mix.parse_shares("poems=0.5")


def test_row_lengths_grow_with_progress() -> None:
    rng = random.Random(1)
    means = [sum(mix.row_length(rng, at) for _ in range(500)) for at in (0.0, 0.5, 0.99)]
    assert means == sorted(means)


def test_schedule_warms_up_and_anneals() -> None:
    assert train.rate_scale(0, 0.0, 0.6) < 0.1
    assert train.rate_scale(1000, 0.5, 0.6) == 1.0
    assert train.rate_scale(1000, 0.8, 0.6) == pytest.approx(0.5)
    assert train.rate_scale(1000, 1.0, 0.6) == 0.01


@pytest.mark.parametrize("shape", [(3, 32, 64), (2, 96, 32), (1, 48, 48)])
def test_orthogonalised_updates_have_singular_values_near_one(shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    values = torch.linalg.svdvals(optim.orthogonalise(torch.randn(shape)).float())
    assert values.min() > 0.4
    assert values.max() < 1.4


def test_later_tokens_do_not_change_earlier_logits() -> None:
    model = Llama(SIZES["toy"]).eval()
    ids = torch.randint(0, 4096, (1, 32))
    changed = ids.clone()
    changed[0, 20:] = 5
    with torch.inference_mode():
        assert torch.allclose(model(ids)[0, :20], model(changed)[0, :20], atol=1e-5)


def test_loss_falls_on_one_batch(mixer: mix.Mixer) -> None:
    torch.manual_seed(1)
    model = Llama(SIZES["toy"])
    optimizer = optim.Optimizer(model)
    batch = mixer.batch(512, 256)
    losses = []
    for _ in range(12):
        model.zero_grad()
        loss = model.loss(*batch) / batch[2].sum()
        loss.backward()
        optimizer.step(1.0)
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1.0


def test_run_resume_export_and_measure(work: Path, tmp_path: Path) -> None:
    assert train.main(toy_arguments(work, "--minutes", "0.02", "--seed", "3")) == 0
    first = json.loads((work / "toy" / "state.json").read_text(encoding="utf-8"))
    assert first["steps"] >= 1
    assert first["tokens"] >= 256
    assert train.main(toy_arguments(work, "--minutes", "0.04", "--resume", "--mix", "recall=0.5")) == 0
    second = json.loads((work / "toy" / "state.json").read_text(encoding="utf-8"))
    # steps are counted against a clock: a busy machine may spend either budget on a single one
    assert second["steps"] >= first["steps"]
    assert second["seconds"] > first["seconds"]
    out = tmp_path / "toy"
    assert export.main(["--size", "toy", "--work", str(work), "--out", str(out)]) == 0
    model, loaded = evaluate.load(out, torch.device("cpu"))
    figures = evaluate.Evaluator(model, loaded, torch.device("cpu")).tasks(1, 2, "add3")
    assert set(figures) == {"add3-steps", "add3-direct"}
    assert all(0 <= each["accuracy"] <= 1 and each["items"] == 2 for each in figures.values())


def test_teacher_forced_verdict_equals_greedy_decoding(work: Path, tmp_path: Path) -> None:
    """The model's own greedy continuation is right, and any other is wrong."""
    torch.manual_seed(2)
    weights = tmp_path / "weights.safetensors"
    train.write_atomically(dict(Llama(SIZES["toy"]).state_dict()), weights)
    export.export(SIZES["toy"], weights, work / "tokenizer", tmp_path / "out")
    model, loaded = evaluate.load(tmp_path / "out", torch.device("cpu"))
    evaluator = evaluate.Evaluator(model, loaded, torch.device("cpu"))
    prompt = loaded.encode(chat_prompt("What is 1 + 1?")).ids
    answer = evaluator.continuation(prompt, 4)
    assert len(answer) == 4
    assert evaluator.chosen(prompt, answer)
    assert not evaluator.chosen(prompt, [*answer[:3], (answer[3] + 1) % 4096])


def test_card_states_misses_plainly_and_shows_both_models(work: Path) -> None:
    tasks = {name: {"accuracy": 0.5, "items": 2, "prompt_tokens": 9.0} for name in card.GOALS}
    text = {"source": {"perplexity": 9.5, "bits_per_byte": 1.25, "tokens": 10}}
    state = {"steps": 3, "tokens": 4000, "seconds": 90.0, "seed": 1, "mix": {"recall": 1.0}}
    for size in card.MODELS:
        (work / size).mkdir(exist_ok=True)
        (work / size / "state.json").write_text(json.dumps(state), encoding="utf-8")
        figures = {"held-out text": text, "held-out tasks": tasks}
        (work / size / "figures.json").write_text(json.dumps(figures), encoding="utf-8")
    out = work / "CARD.md"
    assert card.main(["--work", str(work), "--out", str(out), "--machine", "a test", "--note", "a note"]) == 0
    written = out.read_text(encoding="utf-8")
    assert "lab-8m 50.0 %, MISSED" in written
    assert "lab-1m: accuracy" in written
    assert "- a note" in written
