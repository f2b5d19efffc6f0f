"""Random small networks: what reaches what, which parameters are odd, and faults on demand."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests._device import on_device, randn

WIDTH, ROWS, WORDS = 3, 4, 5

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Trunk:
    """One part that several tasks may read."""

    kind: str
    """linear, twice (used two times), tied (to the weight of trunk 0), embedding, sparse (an
    embedding with sparse gradients), scalar, complex, transposed (not contiguous), stubborn (its
    backward pass cannot be vectorised)"""
    frozen: bool = False
    dtype: str = "float64"


@dataclass(frozen=True)
class Head:
    """What a task makes of the trunks that it reads."""

    trunks: tuple[int, ...]
    own: bool
    """Whether it has parameters of its own."""
    loss: str
    """square, abs, linear or softplus"""
    factor: float
    table: bool = False
    """Whether it also reads the table of the first embedding, densely."""


@dataclass(frozen=True)
class Plan:
    """A network."""

    trunks: tuple[Trunk, ...]
    heads: Mapping[str, Head]
    dtype: str

    def embedding(self) -> int | None:
        """Return the number of the first embedding."""
        for number, trunk in enumerate(self.trunks):
            if trunk.kind in ("embedding", "sparse"):
                return number
        return None


class Stubborn(torch.autograd.Function):
    """Twice its input, by a backward pass that reads a number and so has no batching rule."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx, slope: Tensor) -> Tensor:
        float(slope.detach().reshape(-1)[0])
        return 2 * slope


class Part(nn.Module):
    """A trunk."""

    def __init__(self, plan: Trunk, first: "Part | None") -> None:
        super().__init__()
        self.plan = plan
        dtype = DTYPES[plan.dtype]
        if plan.kind in ("embedding", "sparse"):
            self.table = nn.Embedding(WORDS, WIDTH, sparse=plan.kind == "sparse", dtype=dtype)
        elif plan.kind == "scalar":
            self.factor = nn.Parameter(torch.randn((), dtype=dtype))
        elif plan.kind == "complex":
            self.turn = nn.Parameter(torch.randn(WIDTH, dtype=torch.complex128))
        elif plan.kind == "transposed":
            self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH + 1, dtype=dtype).T)
        else:
            self.linear = nn.Linear(WIDTH, WIDTH, dtype=dtype)
            if plan.kind == "tied" and first is not None and hasattr(first, "linear"):
                self.linear.weight = first.linear.weight
        self.more = nn.ModuleList()
        """Layers that are added later."""
        if plan.frozen:
            self.requires_grad_(False)

    def grow(self) -> tuple[nn.Parameter | None, nn.Parameter]:
        """Replace the weight of a linear layer, or add one; return what is gone and what is new."""
        if len(self.more):
            old = self.more[-1].weight
            self.more[-1].weight = nn.Parameter(-old.detach())
            return old, self.more[-1].weight
        self.more.append(nn.Linear(WIDTH, WIDTH, bias=False, dtype=DTYPES[self.plan.dtype]))
        return None, self.more[0].weight

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        """Return what it makes of a batch."""
        h = self._own(x, words)
        for layer in self.more:
            h = layer(h).tanh()
        return h

    def _own(self, x: Tensor, words: Tensor) -> Tensor:
        kind = self.plan.kind
        x = x.to(DTYPES[self.plan.dtype])
        if kind in ("embedding", "sparse"):
            return self.table(words).tanh()
        if kind == "scalar":
            return (x * self.factor).tanh()
        if kind == "complex":
            turned = self.turn * x  # of which both parts matter, and not alike
            return (turned.real - 0.5 * turned.imag).tanh()
        if kind == "transposed":
            return (x @ self.weight[:WIDTH] + self.weight[WIDTH]).tanh()
        h = self.linear(x).tanh()
        if kind == "twice":
            h = self.linear(h).tanh()
        return Stubborn.apply(h) if kind == "stubborn" else h


class Network(nn.Module):
    """The network of a plan."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        self.trunks = nn.ModuleList()
        for trunk in plan.trunks:
            self.trunks.append(Part(trunk, self.trunks[0] if self.trunks else None))
        self.heads = nn.ModuleDict(
            {
                task: nn.Linear(WIDTH, 1, dtype=DTYPES[plan.dtype])
                for task, head in plan.heads.items()
                if head.own
            }
        )

    def forward(
        self, tasks: Sequence[str], batch: int, faults: Mapping[str, str] | None = None
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Return the losses of some tasks on a batch, and the outputs of all trunks.

        Args:
            tasks: The tasks.
            batch: The seed of the batch.
            faults: What is wrong with some of them: nan (the loss), inf (the loss), shared (the
                gradient of a trunk), own (that of the head).
        """
        drawn = torch.Generator().manual_seed(batch)
        x = randn(ROWS, WIDTH, generator=drawn, dtype=torch.float64)
        words = on_device(torch.randint(WORDS, (ROWS,), generator=drawn, device="cpu"))
        needed = {n for task in tasks for n in self.plan.heads[task].trunks}
        outputs = {n: self.trunks[n](x, words) for n in sorted(needed)}
        losses = {}
        for task in tasks:
            loss = self._loss(task, outputs, x)
            fault = (faults or {}).get(task)
            losses[task] = loss if fault is None else self._spoilt(task, loss, fault)
        return losses, list(outputs.values())

    def _loss(self, task: str, outputs: Mapping[int, Tensor], x: Tensor) -> Tensor:
        head = self.plan.heads[task]
        dtype = DTYPES[self.plan.dtype]
        h = sum(outputs[n].to(dtype) for n in head.trunks)
        number = self.plan.embedding()
        if head.table and number is not None:
            h = h + self.trunks[number].table.weight.mean(0).to(dtype)
        out = self.heads[task](h) if head.own else h.sum(1, keepdim=True)
        # The target depends on the task, so that tasks pull apart.
        target = x.sum(1, keepdim=True) * (-1.5) ** len(losses_before(self.plan, task))
        out = out.to(torch.promote_types(dtype, torch.float32)) - target
        if head.loss == "square":
            out = out.square()
        elif head.loss == "abs":
            out = out.abs()
        elif head.loss == "softplus":
            out = F.softplus(out)
        return head.factor * out.mean().to(torch.promote_types(dtype, torch.float32))

    def _spoilt(self, task: str, loss: Tensor, fault: str) -> Tensor:
        if fault == "nan":
            return loss * float("nan")
        if fault == "inf":
            return loss + float("inf")
        modules = [self.trunks[n] for n in self.plan.heads[task].trunks]
        if fault == "own":
            modules = [self.heads[task]]
        parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
        tables = [trunk.table.weight for trunk in self.trunks if trunk.plan.kind == "sparse"]
        real = [p for p in parameters if not (p.is_complex() or any(p is t for t in tables))]
        # The root's slope at zero is infinite, and zero times that is NaN; the value is zero.
        return loss + (real[0] * 0).sum().sqrt().to(loss.dtype) if real else loss


def losses_before(plan: Plan, task: str) -> list[str]:
    """Return the tasks before one."""
    names = list(plan.heads)
    return names[: names.index(task)]
