"""Small multi-task networks, and the slow, obvious way to what a Balancer should do."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from tests._device import randn

TASKS = ("a", "b", "c")


class Network(nn.Module):
    """A trunk, one head per task, float64; losses of different scale that pull apart."""

    def __init__(self, tasks: Sequence[str] = TASKS, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Linear(4, 6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, 5), nn.Tanh()
        )
        self.heads = nn.ModuleDict({task: nn.Linear(5, 1) for task in tasks})
        self.double()

    def losses(self, batch: Tensor) -> dict[str, Tensor]:
        """Mean losses over the rows of ``batch``, shape (n, 4)."""
        hidden = self.trunk(batch)
        losses = {}
        for number, (task, head) in enumerate(self.heads.items()):
            target = batch.sum(1, keepdim=True) * (-2.0) ** number
            losses[task] = (head(hidden) - target).square().mean()
        return losses


class ReadsItsGradient(torch.autograd.Function):
    """An operation whose backward pass looks at a number, which vmap cannot."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, slope: Tensor) -> Tensor:
        return slope * (1.0 if float(slope.sum()) < 1e9 else 2.0)


def batch(rows: int = 8, seed: int = 0) -> Tensor:
    """Return a random batch, shape (rows, 4), float64."""
    return randn(rows, 4, seed=seed, dtype=torch.float64)


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    """Return a copy of every parameter's ``.grad``, by name."""
    return {
        name: None if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
    }


def raw_rows(losses: Mapping[str, Tensor], parameters: Sequence[Tensor]) -> Tensor:
    """Return the matrix (m, p) of per-task gradients, one autograd call and one cat per task."""
    rows = []
    for loss in losses.values():
        parts = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        rows.append(
            torch.cat(
                [
                    torch.zeros(p.numel(), dtype=p.dtype) if g is None else g.reshape(-1)
                    for g, p in zip(parts, parameters, strict=True)
                ]
            )
        )
    return torch.stack(rows)


def flat_grad(parameters: Sequence[Tensor]) -> Tensor:
    """Return all ``.grad`` as one vector, zeros where there is none."""
    return torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in parameters]
    )
