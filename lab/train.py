"""Train one model: ``python -m lab.train --size 8m --minutes 75 --work FOLDER``.

The schedule follows the wall clock, so that a run always ends annealed after ``--minutes``. On a CPU one
single-threaded process per core trains on its own rows and the gradients are summed once per step.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import socket
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lab.mix import Mixer, parse_shares, row_length
from lab.model import SIZES, Llama
from lab.optim import Optimizer

WARMUP_STEPS = 60
CLIP = 1.0


@dataclasses.dataclass
class Progress:
    """Where a run stands: updates, tokens seen by all processes, and seconds spent training."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0


def rate_scale(steps: int, progress: float, decay_from: float) -> float:
    """Warm-up by steps, a plateau, then a linear fall to nearly nothing at ``progress`` of 1."""
    warm = min(1.0, (steps + 1) / WARMUP_STEPS)
    if progress <= decay_from:
        return warm
    return warm * max(0.01, (1.0 - progress) / (1.0 - decay_from))


def flat_gradient(model: nn.Module, device: torch.device) -> Tensor:
    """One buffer ``[parameters + 4]`` whose slices are the parameters' gradients.

    The last four entries carry the loss sum, the weight sum, the seconds and the token count.
    """
    values = list(model.parameters())
    flat = torch.zeros(sum(value.numel() for value in values) + 4, device=device)
    offset = 0
    for value in values:
        value.grad = flat[offset : offset + value.numel()].view_as(value)
        offset += value.numel()
    return flat


def write_atomically(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file so that a reader never sees a part of it."""
    part = path.with_suffix(".part")
    save_file({name: value.detach().contiguous() for name, value in tensors.items()}, str(part))
    os.replace(part, path)


class Trainer:
    """One process of a run; rank 0 also keeps the log and the checkpoints."""

    def __init__(self, args: argparse.Namespace, rank: int, world: int, device: torch.device) -> None:
        self.args, self.rank, self.world, self.device = args, rank, world, device
        self.folder: Path = args.work / args.size
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(args.seed)
        self.model = Llama(SIZES[args.size]).to(device)
        self.optimizer = Optimizer(self.model)
        self.progress = Progress()
        if args.resume:
            self.restore()
        self.flat = flat_gradient(self.model, device)
        seed = args.seed * 1000 + rank + 100 * self.progress.steps
        self.mixer = Mixer(args.work / "tokenizer" / "tokenizer.json", parse_shares(args.mix), seed)
        self.lengths = random.Random(seed - rank)
        self.loss = torch.compile(self.model.loss, dynamic=False) if args.compile else self.model.loss
        self.console = Console(quiet=rank != 0)

    def restore(self) -> None:
        """Continue from the checkpoint in the working folder."""
        state: dict[str, Any] = json.loads((self.folder / "state.json").read_text(encoding="utf-8"))
        self.progress = Progress(state["steps"], state["tokens"], state["seconds"])
        weights = load_file(str(self.folder / "model.safetensors"))
        self.model.load_state_dict({name: value.to(self.device) for name, value in weights.items()})
        moments = load_file(str(self.folder / "moments.safetensors"))
        self.optimizer.load(moments, self.progress.steps)

    def save(self) -> None:
        """Write the weights, the moments and where the run stands (rank 0 only)."""
        if self.rank:
            return
        write_atomically(dict(self.model.state_dict()), self.folder / "model.safetensors")
        write_atomically(self.optimizer.state(), self.folder / "moments.safetensors")
        state = dataclasses.asdict(self.progress) | {
            "seed": self.args.seed,
            "mix": parse_shares(self.args.mix),
        }
        part = self.folder / "state.part"
        part.write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        os.replace(part, self.folder / "state.json")

    def share(self) -> float:
        """How much of the time budget is spent, 0 to 1."""
        return self.progress.seconds / (60.0 * self.args.minutes)

    def step(self) -> tuple[float, float]:
        """One update; returns the weighted loss in nats and the gradient norm before clipping."""
        begun = time.monotonic()
        self.flat.zero_()
        loss_sum, weight_sum, tokens = 0.0, 0.0, 0
        for _ in range(self.args.micro_batches):
            length = min(row_length(self.lengths, self.share()), self.model.config.context)
            ids, targets, weights = (each.to(self.device) for each in self.mixer.batch(self.args.micro_tokens, length))
            with torch.autocast(self.device.type, torch.bfloat16):
                loss = self.loss(ids, targets, weights)
            loss.backward()
            loss_sum += loss.item()
            weight_sum += weights.sum().item()
            tokens += ids.numel()
        self.flat[-4:] = torch.tensor([loss_sum, weight_sum, 0.0, tokens])
        if self.world > 1:
            distributed.all_reduce(self.flat)
        loss_sum, weight_sum, _, tokens = self.flat[-4:].tolist()
        gradient = self.flat[:-4]
        gradient.div_(weight_sum)
        norm = gradient.norm().item()
        gradient.mul_(min(1.0, CLIP / (norm + 1e-6)))
        self.optimizer.step(rate_scale(self.progress.steps, self.share(), self.args.decay_from))
        self.advance(int(tokens), time.monotonic() - begun)
        return loss_sum / weight_sum, norm

    def advance(self, tokens: int, seconds: float) -> None:
        """Count a step; rank 0's clock is everybody's."""
        clock = torch.tensor([seconds], dtype=torch.float64)
        if self.world > 1:
            distributed.broadcast(clock, 0)
        self.progress.steps += 1
        self.progress.tokens += tokens
        self.progress.seconds += clock.item()

    def run(self) -> None:
        """Train until the budget is spent."""
        self.console.print(f"{self.args.size}: {self.model.count():,} parameters, {self.world} processes")
        saved = self.progress.seconds
        while self.share() < 1.0:
            before = self.progress.seconds
            loss, norm = self.step()
            if self.progress.steps % self.args.log_every == 0:
                self.report(loss, norm, self.progress.seconds - before)
            if self.progress.seconds - saved > 60 * self.args.save_minutes:
                self.save()
                saved = self.progress.seconds
        self.save()
        self.console.print(f"[green]finished[/] after {self.progress.seconds / 60:.1f} minutes")

    def report(self, loss: float, norm: float, seconds: float) -> None:
        """One line of progress; the rate is of this step."""
        rate = self.args.micro_tokens * self.args.micro_batches * self.world / seconds
        self.console.print(
            f"[bold]{100 * self.share():5.1f} %[/] step {self.progress.steps} "
            f"tokens {self.progress.tokens / 1e6:.2f} M loss {loss:.3f} norm {norm:.2f} {rate:,.0f} tokens/s",
            highlight=False,
        )


def worker(rank: int, args: argparse.Namespace, world: int, port: int) -> None:
    """The body of each process."""
    device = torch.device(args.device)
    if world > 1:
        torch.set_num_threads(1)
        address = f"tcp://127.0.0.1:{port}"
        distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    Trainer(args, rank, world, device).run()
    if world > 1:
        distributed.destroy_process_group()


def free_port() -> int:
    """A port that is free at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line with device-dependent defaults filled in."""
    parser = argparse.ArgumentParser(prog="python -m lab.train", description=__doc__)
    parser.add_argument("--size", choices=sorted(SIZES), default="8m", help="which model")
    parser.add_argument("--minutes", type=float, default=75.0, help="wall-clock budget of training")
    parser.add_argument("--work", type=Path, required=True, help="working folder outside the repository")
    parser.add_argument("--resume", action="store_true", help="continue from the working folder's checkpoint")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to train")
    parser.add_argument("--seed", type=int, default=1, help="seed of the weights and of the data")
    parser.add_argument("--mix", default="", help="token shares, such as recall=0.4,chat=0.1")
    parser.add_argument("--decay-from", type=float, default=0.6, help="progress at which the rate falls")
    parser.add_argument("--processes", type=int, default=0, help="CPU processes; 0 means one per core")
    parser.add_argument("--micro-tokens", type=int, default=0, help="tokens of a micro-batch; 0 chooses")
    parser.add_argument("--micro-batches", type=int, default=2, help="micro-batches per process and step")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--log-every", type=int, default=20, help="steps between progress lines")
    parser.add_argument("--save-minutes", type=float, default=3.0, help="minutes between checkpoints")
    args = parser.parse_args(argv)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.micro_tokens = args.micro_tokens or (32768 if args.device == "cuda" else 4096)
    return args


def main(argv: list[str] | None = None) -> int:
    """Train as the command line says."""
    args = parse(argv)
    world = 1 if args.device == "cuda" else args.processes or os.cpu_count() or 1
    if world == 1:
        worker(0, args, 1, 0)
        return 0
    # Fresh pages are slow on virtual machines: let the allocator keep what it has.
    os.environ.setdefault("MALLOC_MMAP_MAX_", "0")
    os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(1 << 40))
    os.environ.setdefault("MALLOC_TOP_PAD_", str(1 << 26))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.multiprocessing.spawn(worker, (args, world, free_port()), nprocs=world)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
