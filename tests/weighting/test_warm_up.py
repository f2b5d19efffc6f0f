"""What is true of WarmUp alone; what holds for every weighting is in test_contract.py."""

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from mtbalance import Balancer
from mtbalance._checks import fallbacks_of
from mtbalance.gradient import CAGrad, PCGrad, Sum
from mtbalance.weighting import (
    DWA,
    FAMO,
    STCH,
    AutoLambda,
    Equal,
    LogLoss,
    RandomWeighting,
    Uncertainty,
    WarmUp,
    Weighting,
)
from tests._networks import TASKS, Network, batch, gradients

pytestmark = pytest.mark.usefixtures("in_float64")


def weights(weighting: Weighting, *losses: float) -> Tensor:
    raw = torch.tensor(losses, requires_grad=True)
    return torch.autograd.grad(weighting(raw).sum(), raw)[0]


def test_takes_over_with_what_it_has_seen() -> None:
    """DWA at the end of two epochs: ratios of 1/2 and 1, as if it had weighed all the time."""
    weighting, alone = WarmUp(DWA(), epochs=2), DWA()
    for losses in ([4.0, 4.0], [2.0, 4.0]):
        assert weights(weighting, *losses).tolist() == [1.0, 1.0]
        alone(torch.tensor(losses))
        weighting.end_epoch()
        alone.end_epoch()
    found = weights(weighting, 1.0, 1.0)
    assert torch.equal(found, weights(alone, 1.0, 1.0))
    assert found[0] < 1 < found[1]


def test_epochs_of_the_wrapped_count_from_the_start() -> None:
    """The nadir of epoch 0 is there when the warm-up of two epochs ends."""
    weighting = WarmUp(STCH(warmup_epochs=0), epochs=2)
    for losses in ([2.0, 4.0], [1.0, 1.0]):
        weights(weighting, *losses)
        weighting.end_epoch()
    assert_close(weights(weighting, 2.0, 4.0), torch.tensor([0.5, 0.25]))  # at the nadir


def test_in_the_warm_up_losses_are_returned_as_they_are() -> None:
    """Also those that the wrapped weighting takes no logarithms of."""
    weighting = WarmUp(LogLoss(), epochs=1)
    losses = torch.tensor([-1.0, 3.0], requires_grad=True)
    assert weighting(losses) is losses
    weighting.end_epoch()
    assert torch.isnan(weighting(losses)[0])


def test_no_epochs_leave_the_wrapped_alone() -> None:
    weighting, alone = WarmUp(RandomWeighting(seed=2), epochs=0), RandomWeighting(seed=2)
    assert weighting.warms_up is False
    for _ in range(3):
        assert torch.equal(weights(weighting, 1.0, 2.0), weights(alone, 1.0, 2.0))


def test_unbound() -> None:
    assert WarmUp(DWA(), epochs=1).warms_up
    assert not WarmUp(DWA(), epochs=0).warms_up


def run(weighting: Weighting, gradient: type, ends: tuple[int, ...], **step: object) -> dict:
    """Train, and return the parameters; the optimizer has learned weights, if there are any."""
    torch.manual_seed(0)
    model = Network()
    balancer = Balancer(weighting, gradient(), tasks=TASKS, shared=model.trunk)
    optimizer = torch.optim.SGD([*model.parameters(), *balancer.parameters()], lr=0.02)
    for seed in range(6):
        optimizer.zero_grad()
        balancer.backward(model.losses(batch(seed=seed)), **step)  # type: ignore[arg-type]
        optimizer.step()
        if seed in ends:
            balancer.end_epoch()
    return {**dict(model.named_parameters()), **dict(weighting.named_parameters())}


@pytest.mark.parametrize("gradient", [Sum, PCGrad])
def test_learned_weights_learn_in_the_warm_up(gradient: type) -> None:
    """What they would learn of the same losses, while the model trains with equal weights."""
    learned = WarmUp(Uncertainty(), epochs=9)
    found, plain = run(learned, gradient, ()), run(Equal(), gradient, ())
    for name, parameter in plain.items():
        assert torch.equal(found[name], parameter), name
    slow = torch.zeros(3)
    torch.manual_seed(0)
    model = Network()
    balancer = Balancer(Equal(), gradient(), tasks=TASKS, shared=model.trunk)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    for seed in range(6):
        optimizer.zero_grad()
        losses = model.losses(batch(seed=seed))
        values = torch.stack(list(losses.values())).detach()
        balancer.backward(losses)
        optimizer.step()
        slow = slow - 0.02 * (1 - torch.exp(-slow) * values) / 2
    assert_close(learned.weighting.log_var.detach(), slow)


def auto_lambda(model: Network, epochs: int) -> WarmUp:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    return WarmUp(AutoLambda(optimizer, lr=0.1), epochs)


def test_auto_lambda_waits_for_its_effect() -> None:
    """No validation batch is drawn, and one pass serves, until it takes over."""
    model = Network()
    weighting = auto_lambda(model, 1)
    balancer = Balancer(weighting, Sum(), tasks=TASKS, shared=model.trunk)
    calls = 0

    def validation() -> dict[str, Tensor]:
        nonlocal calls
        calls += 1
        return model.losses(batch(seed=9))

    record = balancer.backward(model.losses(batch()), validation=validation)
    assert (calls, record.gramian) == (0, None)
    assert [float(weight) for weight in record.weights.values()] == [1, 1, 1]
    assert weighting.weighting.lambdas.tolist() == [0.1] * 3
    balancer.end_epoch()
    record = balancer.backward(model.losses(batch()), validation=validation)
    assert calls == 1
    assert record.gramian is not None
    assert weighting.weighting.lambdas.tolist() != [0.1] * 3


def test_what_the_wrapped_needs_is_asked_for_from_the_start() -> None:
    model = Network()
    balancer = Balancer(auto_lambda(model, 1), Sum(), tasks=TASKS, shared=model.trunk)
    with pytest.raises(ValueError, match="`validation` must be a function"):
        balancer.backward(model.losses(batch()))
    with pytest.raises(ValueError, match="`every` must be 1 unless"):
        Balancer(auto_lambda(model, 1), CAGrad(), tasks=TASKS, every=2)
    balancer = Balancer(WarmUp(FAMO(), 1), Sum(), tasks=TASKS, shared=model.trunk)
    balancer.backward(model.losses(batch()))
    with pytest.warns(RuntimeWarning, match=r"Call balancer\.after_step"):
        balancer.backward(model.losses(batch()))


def test_famo_waits_for_its_effect() -> None:
    model = Network()
    weighting = WarmUp(FAMO(), 1)
    balancer = Balancer(weighting, Sum(), tasks=TASKS, shared=model.trunk)
    calls = 0

    def again() -> dict[str, Tensor]:
        nonlocal calls
        calls += 1
        return {task: loss / 2 for task, loss in model.losses(batch()).items()}

    for _ in range(2):
        balancer.backward(model.losses(batch()))
        balancer.after_step(again)
        balancer.end_epoch()
        assert weighting.weighting.steps.tolist() == [calls] * 3
    assert calls == 1


def test_fallbacks_of_the_wrapped_are_counted() -> None:
    weighting = WarmUp(FAMO(), epochs=0)
    weighting(torch.ones(2))
    with pytest.warns(RuntimeWarning, match="FAMO fell back"):
        weighting.after_step(torch.tensor([1.0, float("nan")]))
    assert fallbacks_of(weighting) == 1


def test_reset_warms_up_again() -> None:
    weighting = WarmUp(RandomWeighting(seed=4), epochs=1)
    first = []
    for run_of in range(2):
        for epoch in range(2):
            found = weights(weighting, 1.0, 2.0)
            if run_of == 0:
                first.append(found)
            assert torch.equal(found, first[epoch])
            weighting.end_epoch()
        weighting.reset()
        assert weighting.warms_up


def test_tally_is_of_both() -> None:
    weighting = WarmUp(DWA(), epochs=1).bind(["a", "b"])
    weighting.close_epoch()
    weighting.weighting.reset()
    assert weighting.tally() == (1, 2, 0)
    weighting.load_state_dict(weighting.state_dict())
    assert weighting.tally()[0] == 3


def test_the_count_is_read_anew_whoever_writes_it() -> None:
    weighting = WarmUp(DWA(), epochs=2).bind(["a", "b"])
    assert weighting.warms_up
    weighting.closed.fill_(2)
    assert not weighting.warms_up
    weighting.load_state_dict({**weighting.state_dict(), "closed": torch.tensor([1, 1])})
    assert weighting.warms_up
    with pytest.raises(ValueError, match="`closed` at least 0"):
        weighting.load_state_dict({**weighting.state_dict(), "closed": torch.tensor([-1, 1])})


def test_no_warning_of_a_loop_that_does_it_right() -> None:
    """Learned weights move, and epochs end: nothing is told."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(WarmUp(Uncertainty(), epochs=2), Sum, (0, 1, 2, 3))


def test_a_step_that_writes_nothing_is_not_remembered() -> None:
    model = Network()
    weighting = WarmUp(DWA(), epochs=1)
    balancer = Balancer(weighting, Sum(), tasks=TASKS, shared=model.trunk, nonfinite="skip")
    losses = model.losses(batch())
    balancer.backward({**losses, "a": losses["a"] * float("nan")})
    assert weighting.weighting.count.tolist() == [0, 0, 0]
    assert gradients(model)["trunk.0.weight"] is None


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((DWA, 1), TypeError, "`weighting` must be a Weighting, but got the class DWA"),
        ((nn.Identity(), 1), TypeError, "`weighting` must be a Weighting, but got Identity"),
        ((DWA(), -1), ValueError, "`epochs` must be at least 0, but got -1"),
        ((DWA(), 1.5), TypeError, r"`epochs` must be a whole number, but got 1\.5"),
    ],
)
def test_refuses_options(arguments: tuple, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        WarmUp(*arguments)
