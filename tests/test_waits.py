"""How often the host waits for a device in a step, counted on a device that is pretended."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from mtbalance import make_balancer
from tests._pretended import DEVICE, Pretended

WAIT = {
    "if": lambda x: bool(x.sum() > 0),
    "item": lambda x: x[0].item(),
    "float": lambda x: float(x[0]),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "nonzero": lambda x: x.nonzero(),
    "a mask": lambda x: x[x > 0],
    "indices of the host": lambda x: x[[1, 0]],
    "equal": lambda x: torch.equal(x, x + 1),
    "new_tensor": lambda x: x.new_tensor([1.0, 2.0]),
    "tensor": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "to": lambda x: torch.ones(2).to(x.device),
    "copy_": lambda x: x.copy_(torch.ones(2)),
    "where": lambda x: torch.where(x > 0, x, torch.tensor(1.0)),
    "eigh": lambda x: torch.linalg.eigh(torch.outer(x, x)),
}
"""Operations that wait once on a GPU, on a vector of two numbers."""
NO_WAIT = {
    "arithmetic": lambda x: (2 * x + 1).clamp_min(0).sqrt().sum(),
    "where": lambda x: torch.where(x > 0, x, 1.0),
    "a scalar of the host": lambda x: x * torch.tensor(2.0),
    "zeros": lambda x: torch.zeros(2, device=x.device),
    "full": lambda x: x.new_full((2,), 3.0),
    "product": lambda x: torch.outer(x, x) @ x,
    "indices of the device": lambda x: x[torch.arange(2, device=x.device)],
    "not waited for": lambda x: torch.ones(2).to(x.device, non_blocking=True),
    "gradient": lambda x: torch.autograd.grad(x.requires_grad_().square().sum(), x),
    "norms": lambda x: torch._foreach_norm([x, x]),
    "out": lambda x: torch.mul(x, 2, out=torch.empty_like(x)) + 1,
}


@pytest.mark.parametrize("name", WAIT)
def test_the_pretended_device_is_waited_for(name: str) -> None:
    with Pretended() as device:
        x = torch.tensor([1.0, 2.0]).to(DEVICE)
        assert x.device == DEVICE
        device.waits.clear()
        WAIT[name](x)
        assert len(device.waits) == 1


@pytest.mark.parametrize("name", NO_WAIT)
def test_the_pretended_device_is_not_waited_for(name: str) -> None:
    with Pretended() as device:
        x = torch.tensor([1.0, 2.0]).to(DEVICE)
        device.waits.clear()
        found = NO_WAIT[name](x)
        assert not device.waits
        (found,) = found[:1] if isinstance(found, tuple | list) else (found,)
        assert found.device == DEVICE
        expected = NO_WAIT[name](torch.tensor([1.0, 2.0]))
        (expected,) = expected[:1] if isinstance(expected, tuple | list) else (expected,)
        assert torch.equal(found.cpu(), expected)


# --- steps ----------------------------------------------------------------------------------------


def steps(
    strategies: str, m: int, device: torch.device, waits: Callable[[], list[str]], **options
) -> tuple[list[Tensor], int]:
    """Take three steps; return what the last has written, and how often it waited."""
    tasks = tuple("abc"[:m])
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(4, 6), nn.Tanh())
    heads = nn.ModuleDict({task: nn.Linear(6, 1) for task in tasks})
    model = nn.ModuleList([trunk, heads]).double().to(device)
    rows = torch.randn(5, 4, dtype=torch.float64).to(device)
    balancer = make_balancer(strategies, tasks=tasks, shared=model[0], **options).to(device)
    for _ in range(3):
        model.zero_grad()
        hidden = model[0](rows)
        losses = {
            task: (head(hidden) - (-2.0) ** number).square().mean()
            for number, (task, head) in enumerate(model[1].items())
        }
        before = len(waits())
        balancer.backward(losses)
        taken = len(waits()) - before
    return [parameter.grad for parameter in model.parameters()], taken


COUNTS = {
    # strategies, tasks: with nonfinite="propagate", and with any other
    ("equal+sum", 2): (0, 3),
    ("cagrad", 2): (0, 3),
    ("pcgrad", 2): (0, 3),
    ("graddrop", 2): (0, 3),
    ("dwa+cagrad", 2): (0, 3),
    ("cagrad", 3): (1, 4),
    ("pcgrad", 3): (1, 4),
    ("graddrop", 3): (0, 3),
}
"""How often the host waits in a step, as docs/performance.md says."""


@pytest.mark.parametrize("nonfinite", ["propagate", "raise", "drop", "skip"])
@pytest.mark.parametrize(("strategies", "m"), COUNTS)
def test_a_step_waits_as_often_as_the_documents_say(
    strategies: str, m: int, nonfinite: str
) -> None:
    """And it writes what the same step writes on the CPU."""
    with Pretended() as device:
        gradients, waits = steps(strategies, m, DEVICE, lambda: device.waits, nonfinite=nonfinite)
        assert all(gradient.device == DEVICE for gradient in gradients)
        found = [gradient.cpu() for gradient in gradients]
    assert waits == COUNTS[strategies, m][nonfinite != "propagate"], device.waits
    expected, _ = steps(strategies, m, torch.device("cpu"), list, nonfinite=nonfinite)
    assert_close(found, expected, rtol=1e-12, atol=1e-14)
