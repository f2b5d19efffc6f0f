"""Balancing at features: what the rule is, what it costs, and what it refuses."""

import copy
import re

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from mtbalance import Balancer, GradientStrategy, make_balancer
from mtbalance.gradient import CAGrad, GradDrop, PCGrad, Sum
from mtbalance.weighting import AutoLambda, Equal, Uncertainty
from tests._device import DEVICE
from tests._networks import TASKS, Network, batch, flat_grad, gradients, raw_rows

STRATEGIES = pytest.mark.parametrize(
    "strategy", [CAGrad(), PCGrad(order="fixed"), GradDrop()], ids=lambda s: type(s).__name__
)


class Split(Network):
    """The network with its features at hand."""

    def features(self, rows: Tensor) -> Tensor:
        return self.trunk(rows)

    def losses_of(self, hidden: Tensor, rows: Tensor) -> dict[str, Tensor]:
        losses = {}
        for number, (task, head) in enumerate(self.heads.items()):
            target = rows.sum(1, keepdim=True) * (-2.0) ** number
            losses[task] = (head(hidden) - target).square().mean()
        return losses


def slow_way(
    model: Split, rows: Tensor, strategy: GradientStrategy, weights: Tensor
) -> dict[str, Tensor | None]:
    """Rows at the features, the strategy alone on them, and one pass from there."""
    hidden = model.features(rows)
    losses = model.losses_of(hidden, rows)
    at_features = raw_rows(losses, [hidden])
    direction = strategy(weights[:, None] * at_features).reshape(hidden.shape)
    for number, loss in enumerate(losses.values()):
        heads = list(model.heads.parameters())
        for head, slope in zip(
            heads,
            torch.autograd.grad(loss, heads, retain_graph=True, allow_unused=True),
            strict=True,
        ):
            if slope is not None:
                head.grad = weights[number] * slope
    hidden.backward(direction)
    return gradients(model)


@STRATEGIES
@pytest.mark.parametrize("weighting", [Equal, Uncertainty])
def test_is_the_rule_applied_to_gradients_of_the_features(weighting, strategy) -> None:
    model = Split()
    reference = copy.deepcopy(model)
    balancer = Balancer(weighting(), copy.deepcopy(strategy), tasks=TASKS, shared=model.trunk)
    weight = 0.5 if weighting is Uncertainty else 1.0  # e^-0 / 2
    expected = slow_way(reference, batch(), strategy, torch.full((3,), weight, dtype=torch.float64))
    hidden = model.features(batch())
    record = balancer.backward(model.losses_of(hidden, batch()), features=hidden)
    for name, gradient in gradients(model).items():
        assert_close(gradient, expected[name], rtol=1e-12, atol=1e-14, msg=name)
    assert record.gramian is not None


@STRATEGIES
def test_is_exact_where_the_trunk_is_orthogonal(strategy) -> None:
    """For h = Q theta with orthogonal Q, gradients of h are those of theta, rotated.

    Gramian strategies commute with rotations, so that balancing at h is balancing at theta; with a
    permutation of the coordinates for Q, so does GradDrop but for its draws, which full leaks undo.
    """
    theta = nn.Parameter(torch.randn(6, dtype=torch.float64))
    turn = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    if isinstance(strategy, GradDrop):
        turn, strategy = torch.eye(6, dtype=torch.float64).flip(0), GradDrop(leak=1.0)
    target = torch.randn(2, 6, dtype=torch.float64)

    def losses(h: Tensor) -> dict[str, Tensor]:
        return {"a": (h - target[0]).square().sum(), "b": (h * target[1]).sum()}

    results = []
    for at_features in (False, True):
        theta.grad = None
        h = turn @ theta
        Balancer(Equal(), copy.deepcopy(strategy), tasks=("a", "b"), shared=[theta]).backward(
            losses(h), features=h if at_features else None
        )
        results.append(theta.grad.clone())
    assert_close(results[1], results[0], rtol=1e-10, atol=1e-12)


def test_one_pass_goes_through_the_trunk() -> None:
    model = Split()
    passes: list[int] = []
    model.trunk[0].register_full_backward_hook(lambda *_: passes.append(1))
    rows = batch().requires_grad_()
    hidden = model.features(rows)
    Balancer(Equal(), PCGrad(), tasks=TASKS, shared=model.trunk).backward(
        model.losses_of(hidden, rows.detach()), features=[hidden]
    )
    assert len(passes) == 1


def test_several_features_and_absent_tasks() -> None:
    """Rows are those of all features together; a task that does not reach one is zero there."""
    x = nn.Parameter(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    first, second = x[:2] * 1.0, x[2:] * 1.0
    losses = {"a": first.sum() + 2 * second.sum(), "b": -first.sum()}
    balancer = Balancer(Equal(), PCGrad(), tasks=("a", "b", "c"), shared=[x])
    record = balancer.backward(losses, features=(first, second))
    rows = torch.tensor([[1.0, 1.0, 2.0], [-1.0, -1.0, 0.0]], dtype=torch.float64)
    assert_close(x.grad, PCGrad()(rows))
    assert_close(record.gramian, rows @ rows.T)
    assert record.absent == ("c",)


def test_with_sum_it_is_the_plain_sum() -> None:
    model = Split()
    reference = copy.deepcopy(model)
    hidden = model.features(batch())
    balancer = Balancer(Equal(), Sum(), tasks=TASKS, shared=model.trunk)
    balancer.backward(model.losses_of(hidden, batch()), features=hidden)
    sum(reference.losses(batch()).values()).backward()
    assert_close(flat_grad(list(model.parameters())), flat_grad(list(reference.parameters())))


@pytest.mark.parametrize("policy", ["raise", "drop", "skip", "propagate"])
def test_bad_gradients_follow_the_policy(policy: str) -> None:
    """sqrt at 0 has an infinite slope though its value is finite."""
    x = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    h = x * 1.0
    losses = {"a": h[0].sqrt() + h[1], "b": (h - 1).square().sum()}
    balancer = Balancer(Equal(), CAGrad(), tasks=("a", "b"), shared=[x], nonfinite=policy)
    if policy == "raise":
        with pytest.raises(FloatingPointError, match="gradient of task 'a' must be finite"):
            balancer.backward(losses, features=h)
        assert x.grad is None
        return
    record = balancer.backward(losses, features=h)
    if policy == "skip":
        assert record.skipped
        assert x.grad is None
    elif policy == "drop":
        assert record.dropped == ("a",)
        assert_close(x.grad, CAGrad()(torch.full((1, 2), -2.0, dtype=torch.float64)))
    else:
        assert not torch.isfinite(x.grad).all()


@pytest.mark.parametrize("strategy", [Sum(), CAGrad(), PCGrad(), GradDrop()], ids=repr)
@pytest.mark.parametrize("policy", ["raise", "drop", "skip", "propagate"])
def test_bad_gradients_below_the_features_follow_the_policy(policy: str, strategy) -> None:
    """The gradients of the features are finite; the slope of sqrt at 0 comes below them."""
    x, head = (nn.Parameter(torch.zeros(3, dtype=torch.float64)) for _ in range(2))
    x.grad = torch.ones_like(x)
    h = x.sqrt()
    losses = {"a": (h + head).sum(), "b": (h - 1).square().sum()}
    balancer = Balancer(Equal(), strategy, tasks=("a", "b"), shared=[x], nonfinite=policy)
    if policy == "propagate":
        balancer.backward(losses, features=h)
        assert not torch.isfinite(x.grad).any()
        assert head.grad is not None
        return
    if policy == "raise":
        with pytest.raises(FloatingPointError, match="must be finite, but"):
            balancer.backward(losses, features=h)
    else:
        assert balancer.backward(losses, features=h).skipped
    assert_close(x.grad, torch.ones_like(x))
    assert head.grad is None


def test_with_a_scaler_everything_is_scaled() -> None:
    results = []
    for scale in (None, 8.0):
        torch.manual_seed(0)
        model = Split().float()
        scaler = None if scale is None else torch.amp.GradScaler(DEVICE.type, init_scale=scale)
        hidden = model.features(batch().float())
        make_balancer("cagrad", tasks=TASKS, shared=model.trunk).backward(
            model.losses_of(hidden, batch().float()), features=hidden, scaler=scaler
        )
        results.append(flat_grad(list(model.parameters())) / (scale or 1.0))
    assert_close(results[1], results[0])


def refused() -> list[tuple[str, type[Exception], str]]:
    return [
        ("leaf", ValueError, "`features` must be outputs of the shared part"),
        ("none", ValueError, "`features` must hold at least one tensor, but got none."),
        ("twice", ValueError, "`features` must hold each tensor once, but the one of shape (2,)"),
        ("number", TypeError, "`features` must be tensors, but got float."),
        ("past", ValueError, "the loss of task 'b' reaches 1 of its parameters"),
        ("apart", ValueError, "the loss of task 'b' must reach `features`, but does not."),
        ("accumulated", RuntimeError, "`features` must be None after accumulate()"),
        ("autol", ValueError, "`features` must be None with AutoLambda"),
    ]


@pytest.mark.parametrize(("case", "kind", "words"), refused())
def test_refuses(case: str, kind: type[Exception], words: str) -> None:
    x, y = (nn.Parameter(torch.ones(2)) for _ in range(2))
    h = x * 2
    losses = {"a": h.sum(), "b": (h * y).sum()}
    weighting = AutoLambda(torch.optim.SGD([x], lr=0.1)) if case == "autol" else Equal()
    balancer = Balancer(weighting, CAGrad(), tasks=("a", "b"), shared=[x])
    features: object = h
    if case == "leaf":
        features = x
    elif case == "none":
        features = []
    elif case == "twice":
        features = [h, h]
    elif case == "number":
        features = [1.0]
    elif case == "past":
        losses["b"] = (h * x).sum()
    elif case == "apart":
        losses["b"] = y.sum()
        balancer = Balancer(weighting, CAGrad(), tasks=("a", "b"), shared=[x, y])
    elif case == "accumulated":
        balancer.accumulate({"a": (x * 2).sum()})
    with pytest.raises(kind, match=re.escape(words)):
        balancer.backward(losses, features=features, validation=lambda: losses)
    assert x.grad is None


@pytest.mark.parametrize("swapped", [False, True])
def test_features_that_are_computed_from_each_other_are_refused(swapped: bool) -> None:
    """The way through the second would count twice."""
    model = Split()
    hidden = model.features(batch())
    features = [hidden, hidden.mean(1)]
    losses = {
        "a": (features[0] ** 2).mean(),
        "b": (features[1] ** 2).mean(),
        "c": features[0].sum() + features[1].sum(),
    }
    balancer = Balancer(Equal(), CAGrad(c=0.0), tasks=TASKS, shared=model.trunk)
    words = r"computed from each other, but the one of shape \(\d+,\) is computed from that of"
    with pytest.raises(ValueError, match=words):
        balancer.backward(losses, features=features[::-1] if swapped else features)
    assert all(p.grad is None for p in model.parameters())


def test_features_may_be_parts_of_one_tensor() -> None:
    model, plain = Split(), Split()
    plain.load_state_dict(model.state_dict())
    rows = batch()
    halves = torch.chunk(model.features(rows), 2, 1)
    losses = {"a": halves[0].square().mean(), "b": (halves[0].sum(1) * halves[1].sum(1)).mean()}
    balancer = Balancer(Equal(), CAGrad(c=0.0), tasks=("a", "b"), shared=model.trunk)
    balancer.backward(losses, features=halves)
    first, second = torch.chunk(plain.features(rows), 2, 1)
    (first.square().mean() + (first.sum(1) * second.sum(1)).mean()).backward()
    for ours, theirs in zip(model.trunk.parameters(), plain.trunk.parameters(), strict=True):
        assert_close(ours.grad, theirs.grad)
