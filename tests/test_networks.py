"""Networks whose graphs are out of the ordinary, against one autograd call per task."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from mtbalance import Balancer, make_balancer
from mtbalance.gradient import CAGrad, GradDrop, PCGrad, Sum
from mtbalance.weighting import Equal
from tests._networks import batch, flat_grad, raw_rows


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.cell = kind(4, 6, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x)[0]


class Attention(nn.Module):
    """Queries, keys and values from one projection; the fused kernel."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.project = nn.Linear(4, 12)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout)


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.last = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.inner(x.flatten(0, 1))).relu())


class Tied(nn.Module):
    """One matrix in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(4, 4), nn.Linear(4, 4)
        self.decode.weight = self.encode.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x).tanh())


class Looping(nn.Module):
    """How often the layer runs, and on what, depends on the numbers; one layer is never run."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(1 + int(x.abs().sum()) % 3):
            x = self.layer(x).tanh()
        if bool(x.sum() > 1e9):
            x = self.other(x)
        return torch.where(x > 0, x, x * self.layer.bias)


class Checkpointed(nn.Module):
    """Runs its forward pass again in each backward pass."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


def layer(dropout: float) -> nn.Module:
    return nn.TransformerEncoderLayer(4, 2, 8, dropout=dropout, batch_first=True)


NETWORKS = {
    "lstm": lambda: Recurrent(nn.LSTM),
    "gru": lambda: Recurrent(nn.GRU),
    "attention": Attention,
    "attention with dropout": lambda: Attention(0.3),
    "transformer with dropout": lambda: layer(0.2),
    "batch norm": Normed,
    "tied weights": Tied,
    "control flow": Looping,
    "checkpoint": lambda: Checkpointed(layer(0.0)),
    "checkpoint with dropout": lambda: Checkpointed(layer(0.2)),
    "checkpointed lstm": lambda: Checkpointed(Recurrent(nn.LSTM)),
    "convolution": lambda: nn.Sequential(
        nn.Conv1d(4, 6, 3, padding=1), nn.GELU(), nn.GroupNorm(2, 6)
    ),
}
STRATEGIES = (Sum(), CAGrad(), PCGrad(order="fixed"), GradDrop())


def losses_of(trunk: nn.Module) -> dict[str, Tensor]:
    h = trunk(batch(12).reshape(3, 4, 4))
    return {"a": h.square().mean(), "b": (h - 1).abs().mean(), "c": -h.mean()}


@pytest.mark.filterwarnings("ignore:no loss reaches:UserWarning")  # "control flow" says so
@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_are_those_of_one_call_per_task(name: str, strategy) -> None:
    trunk = NETWORKS[name]().double()
    losses = losses_of(trunk)
    shared = list(trunk.parameters())
    expected = copy.deepcopy(strategy)(raw_rows(losses, shared))
    Balancer(Equal(), copy.deepcopy(strategy), tasks=tuple(losses), shared=trunk).backward(losses)
    assert_close(flat_grad(shared), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore:no loss reaches:UserWarning")
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # says torch's vmap
@pytest.mark.parametrize("name", NETWORKS)
def test_batched_passes_give_the_same_or_fall_back(name: str) -> None:
    trunk = NETWORKS[name]().double()
    losses = losses_of(trunk)
    shared = list(trunk.parameters())
    expected = CAGrad()(raw_rows(losses, shared))
    balancer = Balancer(Equal(), CAGrad(), tasks=tuple(losses), shared=trunk, chunk=3)
    fallen_back = False
    try:
        balancer.backward(losses)
    except RuntimeWarning as warning:  # warnings are errors here: the first fallback raises it
        fallen_back = "fell back" in str(warning)
        balancer.backward(losses)
    assert fallen_back == (balancer.fallbacks == 1)
    assert_close(flat_grad(shared), expected, rtol=1e-9, atol=1e-12)


def test_batch_norm_sees_each_batch_once() -> None:
    """The passes for the tasks are backward passes: running means move as in a plain step."""
    trunk, reference = Normed().double(), Normed().double()
    reference.load_state_dict(trunk.state_dict())
    Balancer(Equal(), CAGrad(), tasks=("a", "b", "c"), shared=trunk).backward(losses_of(trunk))
    losses_of(reference)
    for one, other in zip(trunk.buffers(), reference.buffers(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["lstm", "batch norm", "tied weights", "transformer with dropout"])
def test_looking_ahead(name: str) -> None:
    """Auto-Lambda's derivative is that of double backward through the virtual step.

    With dropout both validation passes draw from the same stream.
    """
    trunk = NETWORKS[name]().double()
    frozen = copy.deepcopy(trunk)
    optimizer = torch.optim.SGD(trunk.parameters(), lr=0.1)
    tasks = ("a", "b", "c")
    balancer = make_balancer("autol", tasks=tasks, shared=trunk, optimizer=optimizer, seed=5)
    torch.manual_seed(1)
    losses = losses_of(trunk)
    rows = raw_rows(losses, list(trunk.parameters()))
    balancer.backward(losses, validation=lambda: losses_of(trunk))

    lambdas = torch.full((3,), 0.1, dtype=torch.float64, requires_grad=True)
    step = lambdas @ rows
    virtual, start = {}, 0
    for key, parameter in frozen.named_parameters():
        size = parameter.numel()
        move = step[start : start + size].reshape(parameter.shape)
        virtual[key] = parameter.detach() - 0.1 * move
        start += size
    drawn = torch.Generator().manual_seed(5)
    torch.manual_seed(int(torch.randint(2**62, (), generator=drawn, device="cpu")))
    with torch.random.fork_rng(devices=[]):
        h = torch.func.functional_call(frozen, virtual, (batch(12).reshape(3, 4, 4),))
    total = h.square().mean() + (h - 1).abs().mean() - h.mean()
    (expected,) = torch.autograd.grad(total, lambdas)
    # Adam's first step goes by the sign alone; its first moment is a tenth of the derivative.
    assert_close(balancer.weighting.exp_avg.double() * 10, expected, rtol=1e-5, atol=1e-9)
