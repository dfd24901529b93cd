"""Muon for the matrices, AdamW for the embedding and the norms, with state that is plain tensors."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

MATRIX_RATE = 0.015
OTHER_RATE = 0.004
MOMENTUM = 0.95
BETAS = (0.9, 0.95)
DECAY = 0.05


def orthogonalise(stack: Tensor, steps: int = 5) -> Tensor:
    """Nearly orthogonal matrices in the directions of ``stack``, ``[count, rows, columns]``, in bfloat16.

    Newton-Schulz iteration with the quintic whose slope at zero is largest for this number of steps.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = stack.shape[-2] > stack.shape[-1]
    x = stack.mT if tall else stack
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).bfloat16()
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Optimizer:
    """Updates a model's parameters in place; ``scale`` multiplies both learning rates."""

    def __init__(self, model: nn.Module) -> None:
        named = dict(model.named_parameters())
        self.matrices: dict[tuple[int, ...], list[str]] = defaultdict(list)
        self.others: list[str] = []
        for name, value in named.items():
            if value.ndim == 2 and "embed" not in name:
                self.matrices[tuple(value.shape)].append(name)
            else:
                self.others.append(name)
        self.named = named
        self.steps = 0
        self.first = {name: torch.zeros_like(value) for name, value in named.items()}
        self.second = {name: torch.zeros_like(named[name]) for name in self.others}

    def gradient(self, name: str) -> Tensor:
        """The gradient that a parameter holds."""
        grad = self.named[name].grad
        if grad is None:
            raise RuntimeError(f"{name} has no gradient; call backward before step")
        return grad

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """One update from the gradients that the parameters hold."""
        self.steps += 1
        for names in self.matrices.values():
            self._muon(names, MATRIX_RATE * scale)
        for name in self.others:
            self._adam(name, OTHER_RATE * scale)

    def _muon(self, names: list[str], rate: float) -> None:
        """Update matrices of one shape together."""
        directions = []
        for name in names:
            grad, momentum = self.gradient(name), self.first[name]
            momentum.lerp_(grad, 1 - MOMENTUM)
            directions.append(grad.lerp(momentum, MOMENTUM))
        updates = orthogonalise(torch.stack(directions)).float()
        rows, columns = updates.shape[-2:]
        size = rate * max(1.0, rows / columns) ** 0.5
        for name, update in zip(names, updates, strict=True):
            self.named[name].mul_(1 - rate * DECAY).sub_(update, alpha=size)

    def _adam(self, name: str, rate: float) -> None:
        """Update one parameter by its bias-corrected moments; only the embedding decays."""
        value, grad = self.named[name], self.gradient(name)
        first, second = self.first[name], self.second[name]
        first.lerp_(grad, 1 - BETAS[0])
        second.lerp_(grad.square(), 1 - BETAS[1])
        mean = first / (1 - BETAS[0] ** self.steps)
        spread = (second / (1 - BETAS[1] ** self.steps)).sqrt_().add_(1e-10)
        if value.ndim == 2:
            value.mul_(1 - rate * DECAY)
        value.sub_(mean / spread, alpha=rate)

    def state(self) -> dict[str, Tensor]:
        """The moments as flat names to tensors; ``steps`` is kept by the caller."""
        found = {f"first.{name}": value for name, value in self.first.items()}
        return found | {f"second.{name}": value for name, value in self.second.items()}

    def load(self, tensors: dict[str, Tensor], steps: int) -> None:
        """Restore what ``state`` returned after ``steps`` updates."""
        for name, value in self.state().items():
            value.copy_(tensors[name])
        self.steps = steps
