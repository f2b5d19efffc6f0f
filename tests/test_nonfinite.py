"""A non-finite loss or gradient raises, is dropped, or skips the step; and it is counted."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from mtbalance import (
    PAPER_COMBINATIONS,
    Balancer,
    GradientStrategy,
    GramianStrategy,
    Record,
    make_balancer,
)
from mtbalance._finite import NonFinite
from mtbalance.gradient import CAGrad, GradDrop, PCGrad, Sum
from mtbalance.weighting import DWA, Equal, Uncertainty
from tests._device import DEVICE
from tests._networks import TASKS, Network, batch, gradients

STRATEGIES = [Sum, CAGrad, PCGrad, GradDrop]


def bad_losses(model: Network, what: str) -> dict[str, Tensor]:
    """Task b is broken: its loss, its gradient everywhere, or its gradient in its head only."""
    losses = model.losses(batch())
    if what == "loss":
        losses["b"] = losses["b"] * float("inf")
    elif what == "gradient":  # sqrt has an infinite slope at 0, where its value is finite
        losses["b"] = losses["b"] + (losses["b"] - losses["b"].detach()).abs().sqrt()
    elif what == "head":
        zero = model.heads["b"].weight.sum() * 0
        losses["b"] = losses["b"] + zero.abs().sqrt()
    return losses


@pytest.mark.parametrize("what", ["loss", "gradient", "head"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_raise_names_the_task_and_writes_nothing(strategy, what: str) -> None:
    model = Network()
    balancer = Balancer(Uncertainty(), strategy(), tasks=TASKS, shared=model.trunk)
    model.heads["a"].bias.grad = torch.ones(1, dtype=torch.float64)
    with pytest.raises(FloatingPointError) as caught:
        balancer.backward(bad_losses(model, what))
    message = str(caught.value)
    if strategy is Sum and what != "loss":
        assert "the gradients of the tasks 'a', 'b', 'c' must be finite, but their sum" in message
    else:
        assert f"the {'loss' if what == 'loss' else 'gradient'} of task 'b' must be fin" in message
    assert model.heads["a"].bias.grad == 1
    model.heads["a"].bias.grad = None
    assert all(parameter.grad is None for parameter in model.parameters())
    assert balancer.weighting.log_var.grad is None
    assert balancer.backward(model.losses(batch())).tasks == TASKS  # and the next step is clean


@pytest.mark.parametrize("what", ["loss", "gradient", "head"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_drop_is_absent_and_counted(strategy, what: str) -> None:
    model = Network()
    other = copy.deepcopy(model)
    balancer = Balancer(DWA(), strategy(), tasks=TASKS, shared=model.trunk, nonfinite="drop")
    record = balancer.backward(bad_losses(model, what))
    assert record.tasks == ("a", "c")
    assert record.dropped == record.nonfinite == ("b",)
    assert record.absent == ()
    assert record.as_dict()["dropped"] == 1
    without = Balancer(DWA(), strategy(), tasks=TASKS, shared=other.trunk)
    losses = other.losses(batch())
    del losses["b"]
    without.backward(losses)
    for one, expected in zip(model.parameters(), other.parameters(), strict=True):
        if expected.grad is None:
            assert one.grad is None
        else:
            assert_close(one.grad, expected.grad, rtol=1e-12, atol=1e-14)
    assert balancer.weighting.count.tolist() == [1, 0, 1]
    with pytest.warns(UserWarning, match="usable loss for 'b'"):
        summary = balancer.end_epoch()
    assert summary.dropped == {"a": 0, "b": 1, "c": 0}


class TwoSteps:
    """A first step with every task, and a second in which some are broken or absent."""

    tasks = ("a", "b", "c", "d")

    def __init__(self, name: str, seed: int, *, groups: bool) -> None:
        torch.manual_seed(seed)
        self.model, self.seed = Network(self.tasks), seed
        trunk = self.model.trunk
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        self.balancer = make_balancer(
            name,
            tasks=self.tasks,
            shared={"first": trunk[0], "second": trunk[3]} if groups else trunk,
            optimizer=self.optimizer,
            nonfinite="drop",
        ).double()
        self.step(self.model.losses(batch(seed=seed)))
        self.optimizer.step()
        self.balancer.end_epoch()
        self.optimizer.zero_grad()

    def step(self, losses: dict[str, Tensor]) -> Record:
        return self.balancer.backward(
            losses, validation=lambda: self.model.losses(batch(seed=self.seed + 2))
        )

    def second_losses(self) -> dict[str, Tensor]:
        return self.model.losses(batch(seed=self.seed + 1))


@pytest.mark.parametrize("name", PAPER_COMBINATIONS)
@given(
    what=st.dictionaries(
        st.sampled_from(TwoSteps.tasks),
        st.sampled_from(["loss", "gradient", "head"]),
        min_size=1,
        max_size=3,
    ),
    groups=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=8, deadline=None)
def test_a_dropped_task_might_as_well_be_absent(
    name: str, what: dict[str, str], groups: bool, seed: int
) -> None:
    """Gradients, figures and what weightings remember are those of a step without the tasks."""
    dropped = TwoSteps(name, seed, groups=groups)
    losses = dropped.second_losses()
    for task, how in what.items():
        head = dropped.model.heads[task].weight
        nothing = losses[task] - losses[task].detach() if how == "gradient" else head.sum() * 0
        losses[task] = (
            losses[task] * torch.inf if how == "loss" else (losses[task] + nothing.abs().sqrt())
        )
    record = dropped.step(losses)
    absent = TwoSteps(name, seed, groups=groups)
    expected = absent.step({t: v for t, v in absent.second_losses().items() if t not in what})

    assert record.tasks == expected.tasks
    assert record.dropped == record.nonfinite == expected.absent
    figures, others = record.as_dict(), expected.as_dict()
    for key in ("absent", "nonfinite", "dropped"):
        del figures[key], others[key]
    assert figures == pytest.approx(others, rel=1e-9, abs=1e-12, nan_ok=True)
    found, wanted = gradients(dropped.model), gradients(absent.model)
    assert {k for k, g in found.items() if g is None} == {k for k, g in wanted.items() if g is None}
    for key, gradient in wanted.items():
        if gradient is not None:
            assert_close(found[key], gradient, rtol=1e-9, atol=1e-12, msg=key)
    weighting = dropped.balancer.weighting.state_dict()
    for key, value in absent.balancer.weighting.state_dict().items():
        assert_close(weighting[key], value, rtol=1e-9, atol=1e-12, msg=key)


@pytest.mark.parametrize("what", ["gradient", "head"])
@pytest.mark.parametrize("chunk", [2, 3])
def test_of_tasks_in_one_batched_pass_only_the_bad_one_is_dropped(chunk: int, what: str) -> None:
    """The batched pass gives each task NaN, as zero times the infinite slope of the bad one."""
    model = Network()
    other = copy.deepcopy(model)
    options = {"tasks": TASKS, "nonfinite": "drop"}
    balancer = Balancer(Equal(), CAGrad(), shared=model.trunk, chunk=chunk, **options)
    balancer.backward(model.losses(batch()))
    record = balancer.backward(bad_losses(model, what))
    assert (record.tasks, record.dropped) == (("a", "c"), ("b",))
    assert record.fallbacks == 0  # an operation that cannot be vectorised is something else
    one_by_one = Balancer(Equal(), CAGrad(), shared=other.trunk, **options)
    one_by_one.backward(other.losses(batch()))
    one_by_one.backward(bad_losses(other, what))
    for (key, one), two in zip(gradients(model).items(), gradients(other).values(), strict=True):
        assert_close(one, two, rtol=1e-11, atol=1e-13, msg=key)
    raising = Balancer(Equal(), CAGrad(), tasks=TASKS, shared=model.trunk, chunk=chunk)
    with pytest.raises(FloatingPointError, match="the gradient of task 'b' must be finite"):
        raising.backward(bad_losses(model, what))


@pytest.mark.parametrize("what", ["loss", "gradient", "head"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_skip_writes_nothing_and_is_counted(strategy, what: str) -> None:
    model = Network()
    balancer = Balancer(
        Uncertainty(), strategy(), tasks=TASKS, shared=model.trunk, nonfinite="skip"
    )
    existing = torch.ones(1, dtype=torch.float64)
    model.heads["a"].bias.grad = existing.clone()
    record = balancer.backward(bad_losses(model, what))
    assert record.skipped
    if not (strategy is Sum and what != "loss"):  # one pass cannot tell whose gradient it was
        assert record.nonfinite == ("b",)
    assert torch.equal(model.heads["a"].bias.grad, existing)
    assert sum(parameter.grad is not None for parameter in model.parameters()) == 1
    assert balancer.weighting.log_var.grad is None
    balancer.backward(model.losses(batch()))
    summary = balancer.end_epoch()
    assert (summary.steps, summary.skipped) == (2, 1)
    assert summary.active == {"a": 1, "b": 1, "c": 1}


@pytest.mark.parametrize("policy", ["drop", "skip"])
def test_a_bad_micro_batch_spoils_its_task_for_the_step(policy: str) -> None:
    model = Network()
    balancer = Balancer(Equal(), CAGrad(), tasks=TASKS, shared=model.trunk, nonfinite=policy)
    balancer.accumulate(model.losses(batch()))
    balancer.accumulate(bad_losses(model, "loss"))
    record = balancer.apply()
    assert record.nonfinite == ("b",)
    assert record.skipped == (policy == "skip")
    assert model.heads["b"].weight.grad is None
    assert (model.heads["a"].weight.grad is None) == (policy == "skip")


def test_a_bad_micro_batch_that_raises_ends_the_step() -> None:
    """What came before it must not leak into the next step."""
    model = Network()
    balancer = Balancer(Equal(), CAGrad(), tasks=TASKS, shared=model.trunk)
    balancer.accumulate(model.losses(batch()))
    with pytest.raises(FloatingPointError, match="loss of task 'b'"):
        balancer.accumulate(bad_losses(model, "loss"))
    with pytest.raises(RuntimeError, match="nothing has been accumulated"):
        balancer.apply()


HIDDEN = "below the features"


def spoiled_step(balancer: Balancer, model: Network, what: str, **options: object) -> Record:
    """Take a step whose gradients are not finite: of task b, of its head, or of the trunk alone."""
    if what != HIDDEN:
        return balancer.backward(bad_losses(model, what), **options)
    hidden = model.trunk(batch())
    hidden = hidden + (model.trunk[0].weight.sum() * 0).abs().sqrt()
    losses = {task: head(hidden).square().mean() for task, head in model.heads.items()}
    return balancer.backward(losses, features=hidden, **options)


@pytest.mark.parametrize("what", ["loss", "gradient", "head", HIDDEN])
@pytest.mark.parametrize("policy", ["raise", "skip", "scaler"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_step_that_writes_nothing_is_not_remembered(strategy, policy: str, what: str) -> None:
    """Nor one that a scaler skips. DWA would count its losses, and weigh all later steps by it."""
    model = Network()
    scaler = torch.amp.GradScaler(DEVICE.type) if policy == "scaler" else None
    nonfinite = "raise" if policy == "scaler" else policy
    balancer = Balancer(
        DWA(), strategy(), tasks=TASKS, shared=model.trunk, nonfinite=nonfinite, every=1
    )
    balancer.backward(model.losses(batch()), scaler=scaler)
    before = copy.deepcopy(balancer.weighting.state_dict())
    if policy == "raise" or (policy == "scaler" and what == "loss"):
        with pytest.raises(FloatingPointError):
            spoiled_step(balancer, model, what, scaler=scaler)
    else:
        record = spoiled_step(balancer, model, what, scaler=scaler)
        assert (record.skipped, record.overflow) == (policy == "skip", policy == "scaler")
    for key, value in balancer.weighting.state_dict().items():
        assert torch.equal(value, before[key]), key
    balancer.backward(model.losses(batch()))
    assert balancer.weighting.count.tolist() == [2, 2, 2]


@pytest.mark.parametrize("policy", ["skip", "scaler"])
def test_a_step_with_kept_weights_that_writes_nothing_is_not_remembered(policy: str) -> None:
    model = Network()
    scaler = torch.amp.GradScaler(DEVICE.type) if policy == "scaler" else None
    options = {"tasks": TASKS, "shared": model.trunk, "nonfinite": "skip", "every": 5}
    balancer = Balancer(DWA(), CAGrad(), **options)
    balancer.backward(model.losses(batch()), scaler=scaler)
    record = balancer.backward(bad_losses(model, "gradient"), scaler=scaler)
    assert record.reused
    assert record.skipped != record.overflow
    assert balancer.weighting.count.tolist() == [1, 1, 1]


class RemembersAndFails(DWA):
    """Its weights are infinite for a loss of 7."""

    def forward(self, losses: Tensor) -> Tensor:
        return super().forward(losses) * torch.where(losses == 7, torch.inf, 1.0)


def test_an_error_on_the_way_is_not_remembered() -> None:
    x = nn.Parameter(torch.ones(1))
    balancer = Balancer(RemembersAndFails(), CAGrad(), tasks=("a", "b"), shared=[x])
    with pytest.raises(FloatingPointError, match="must give finite weights"):
        balancer.backward({"a": 7 * x.sum(), "b": x.sum()})
    assert balancer.weighting.count.tolist() == [0, 0]
    assert balancer.weighting.mean.tolist() == [0, 0]


def test_all_tasks_dropped() -> None:
    model = Network(("a",))
    balancer = Balancer(Equal(), Sum(), tasks=("a",), shared=model.trunk, nonfinite="drop")
    loss = model.losses(batch())["a"] * float("nan")
    record = balancer.backward({"a": loss})
    assert record.tasks == ()
    assert record.dropped == ("a",)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_large_and_small_finite_gradients_are_no_case(scale: float) -> None:
    """Squares of float32 numbers may overflow; their norms must not be taken for infinite."""
    x = nn.Parameter(torch.ones(5))
    for strategy in (Sum(), CAGrad(), GradDrop()):
        x.grad = None
        balancer = Balancer(Equal(), strategy, tasks=("a", "b"), shared=[x])
        balancer.backward({"a": 1e5 * scale * x.sum(), "b": 1e5 * scale * x.square().sum()})
        assert bool(torch.isfinite(x.grad).all() and (x.grad > 0).all())


# --- mixed precision ---------------------------------------------------------------------------


def single(model: nn.Module) -> nn.Module:
    return model.float()


@pytest.mark.parametrize("name", ["naive", "uncert", "cagrad", "dwa+pcgrad", "graddrop"])
def test_gradients_are_scaled_for_the_scaler(name: str) -> None:
    """.grad holds scale times what it holds without a scaler, learned weights included."""
    model = single(Network())
    plain = copy.deepcopy(model)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**10)
    rows = batch().float()
    one = make_balancer(name, tasks=TASKS, shared=model.trunk)
    two = make_balancer(name, tasks=TASKS, shared=plain.trunk)
    record = one.backward(model.losses(rows), scaler=scaler)
    expected = two.backward(plain.losses(rows))
    for p, q in zip(
        [*model.parameters(), *one.parameters()],
        [*plain.parameters(), *two.parameters()],
        strict=True,
    ):
        assert_close(p.grad, q.grad * 2.0**10, rtol=1e-5, atol=1e-4)
    for key, value in expected.as_dict().items():
        assert record.as_dict()[key] == pytest.approx(value, rel=1e-5, nan_ok=True), key


@pytest.mark.parametrize("name", ["naive", "cagrad", "graddrop", "autol+pcgrad"])
def test_infinities_reach_the_scaler_which_skips(name: str) -> None:
    model = single(Network())
    before = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**120)
    balancer = make_balancer(name, tasks=TASKS, shared=model.trunk, optimizer=optimizer)
    record = balancer.backward(
        {task: loss * 1e6 for task, loss in model.losses(batch().float()).items()},
        scaler=scaler,
        validation=lambda: model.losses(batch().float()),
    )
    assert record.overflow
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**119
    for p, q in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("scaled", [False, True])
def test_a_dropped_task_is_named_where_the_others_overflow(*, scaled: bool) -> None:
    """It was there, so it is not absent, and it was not finite."""
    h = torch.nn.Parameter(torch.ones(2, dtype=torch.float16))
    losses = {"a": 6e4 * h[0], "b": 6e4 * h[0], "c": h.sum() * float("nan")}
    balancer = Balancer(Equal(), CAGrad(), tasks=("a", "b", "c"), shared=[h], nonfinite="drop")
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0) if scaled else None
    record = balancer.backward(losses, scaler=scaler)
    assert (record.skipped, record.overflow) == (not scaled, scaled)
    assert record.tasks == ("a", "b")
    assert record.nonfinite == ("c",)
    assert record.absent == ()
    assert record.dropped == (("c",) if scaled else ())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_learned_weights_stay_where_a_scaler_skips(strategy) -> None:
    """In an optimizer of their own, too, which the scaler refuses to step without gradients."""
    model = single(Network())
    balancer = Balancer(Uncertainty(), strategy(), tasks=TASKS, shared=model.trunk)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (model, balancer)]
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**120)
    losses = {task: loss * 1e6 for task, loss in model.losses(batch().float()).items()}
    assert balancer.backward(losses, scaler=scaler).overflow
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    assert torch.equal(balancer.weighting.log_var, torch.zeros(3))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nothing_is_looked_at_where_everything_is_passed_on(strategy, monkeypatch) -> None:
    """With a scaler as without one: looking waits for the device."""
    model = single(Network())
    looks: list[object] = []
    monkeypatch.setattr("mtbalance._finite.all_finite", looks.append)
    monkeypatch.setattr("mtbalance._writing.all_finite", looks.append)
    options = {"tasks": TASKS, "shared": model.trunk, "nonfinite": "propagate"}
    balancer = Balancer(DWA(), strategy(), **options)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**120)
    losses = {task: loss * 1e6 for task, loss in model.losses(batch().float()).items()}
    record = balancer.backward(losses, scaler=scaler)
    assert not record.overflow
    assert not looks
    assert balancer.weighting.count.tolist() == [1, 1, 1]


@pytest.mark.parametrize("name", ["naive", "cagrad", "autol+cagrad"])
def test_training_with_a_scaler_is_training_without(name: str) -> None:
    """The scale is a power of two, so that only the order of rounding could differ."""
    models = [single(Network()), None]
    models[1] = copy.deepcopy(models[0])
    for model, scaler in zip(models, [torch.amp.GradScaler(DEVICE.type), None], strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        balancer = make_balancer(name, tasks=TASKS, shared=model.trunk, optimizer=optimizer)
        for seed in range(5):
            optimizer.zero_grad()
            rows = batch(seed=seed).float()
            balancer.backward(
                model.losses(rows), scaler=scaler, validation=lambda m=model, r=rows: m.losses(r)
            )
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_a_disabled_scaler_is_none() -> None:
    model = single(Network())
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=False)
    balancer = make_balancer("cagrad", tasks=TASKS, shared=model.trunk)
    losses = model.losses(batch().float())
    losses["b"] = losses["b"] + (losses["b"] - losses["b"].detach()).abs().sqrt()
    with pytest.raises(FloatingPointError, match="gradient of task 'b'"):
        balancer.backward(losses, scaler=scaler)


@pytest.mark.parametrize("strategy", [Sum(), CAGrad(), GradDrop(), PCGrad()])
def test_under_autocast_to_bfloat16(strategy: GradientStrategy) -> None:
    """Backward inside the autocast region: the balancing itself stays in full precision."""
    model = single(Network())
    inside, outside = model, copy.deepcopy(model)
    rows = batch().float()
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        one = Balancer(Uncertainty(), copy.deepcopy(strategy), tasks=TASKS, shared=inside.trunk)
        one.backward(inside.losses(rows))
        losses = outside.losses(rows)
    two = Balancer(Uncertainty(), copy.deepcopy(strategy), tasks=TASKS, shared=outside.trunk)
    two.backward(losses)
    for p, q in zip(inside.parameters(), outside.parameters(), strict=True):
        assert p.grad.dtype == torch.float32
        assert torch.equal(p.grad, q.grad)


def test_bfloat16_parameters_are_balanced_in_float32() -> None:
    """Rows are rounded, the Gramian and the combination are not: against float64 on equal rows."""
    x = nn.Parameter(torch.randn(1000).bfloat16())
    g = torch.randn(2, 1000).bfloat16()
    balancer = Balancer(Equal(), CAGrad(), tasks=("a", "b"), shared=[x])
    balancer.backward({"a": (x * g[0]).float().sum(), "b": (x * g[1]).float().sum()})
    expected = CAGrad()(g.double())
    assert x.grad.dtype == torch.bfloat16
    assert_close(x.grad.double(), expected, rtol=2**-8, atol=0)  # one rounding to 8 bits


@pytest.mark.parametrize("where", ["shared", "head"])
@pytest.mark.parametrize("strategy", [CAGrad(), PCGrad(order="fixed"), GradDrop()], ids=type)
@pytest.mark.parametrize("policy", ["raise", "drop", "skip", "propagate"])
@pytest.mark.filterwarnings("ignore:several tasks reach:UserWarning")  # the head says so
def test_a_direction_that_its_dtype_does_not_hold(policy: str, strategy, where: str) -> None:
    """Each gradient is below the 65504 of float16, their sum is not."""
    x = nn.Parameter(torch.ones(2, dtype=torch.float16))
    head = nn.Parameter(torch.ones(2, dtype=torch.float16))
    large = {"shared": x, "head": head}[where]
    options = {"shared": [x], "nonfinite": policy}
    balancer = Balancer(Equal(), strategy, tasks=("a", "b"), **options)
    losses = {task: (0.9 * 64000 * large).float().sum() + x.float().sum() for task in "ab"}
    if policy == "propagate":
        balancer.backward(losses)
        assert torch.isinf(large.grad).all()
        return
    if policy == "raise":
        with pytest.raises(FloatingPointError, match="the direction must be finite, but holds"):
            balancer.backward(losses)
    else:
        record = balancer.backward(losses)
        assert (record.skipped, record.dropped) == (True, ())
    assert x.grad is None
    assert head.grad is None


class Huge(GramianStrategy):
    """A strategy of one's own, whose weights are not known to be small."""

    def weights(self, gramian: Tensor) -> Tensor:
        return torch.full_like(gramian[0], 3e38)


class Late(CAGrad):
    """One that makes more of the directions of another one."""

    def weights(self, gramian: Tensor) -> Tensor:
        return 3e38 * super().weights(gramian)


class Columns(GradientStrategy):
    """One that is no combination of rows."""

    def forward(self, gradients: Tensor) -> Tensor:
        return gradients.sum(0) * torch.inf


@pytest.mark.parametrize("strategy", [Huge(), Late(), Columns()], ids=type)
def test_a_direction_of_ones_own_that_is_not_finite(strategy) -> None:
    x = nn.Parameter(torch.ones(2))
    balancer = Balancer(Equal(), strategy, tasks=("a", "b"), shared=[x])
    with pytest.raises(FloatingPointError, match="the direction must be finite, but holds NaN"):
        balancer.backward({"a": x.sum(), "b": 2 * x.sum()})
    assert x.grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("strategy", [Sum(), CAGrad(), PCGrad(), GradDrop()], ids=type)
def test_ordinary_directions_are_not_looked_at(strategy, dtype, monkeypatch) -> None:
    """Reading them once more takes time: that no entry is too large is known from the lengths."""
    monkeypatch.setattr(NonFinite, "accepts_directions", None)
    x, head = (nn.Parameter(torch.ones(2, dtype=dtype)) for _ in range(2))
    balancer = Balancer(Equal(), strategy, tasks=("a", "b"), shared=[x], nonfinite="drop")
    balancer.backward({"a": 100 * (x - head).sum(), "b": (x * x).sum()})
    assert torch.isfinite(x.grad).all()
