"""A run that is saved and resumed equals one that was never interrupted, bit for bit."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from mtbalance import PAPER_COMBINATIONS, Balancer, make_balancer
from mtbalance.gradient import CAGrad, GradDrop, PCGrad, Sum
from mtbalance.weighting import DWA, AutoLambda, Equal, Uncertainty, Weighting
from tests._device import random_state, set_random_state
from tests._networks import TASKS, Network, batch

STEPS = 5
PAIRS = (
    *PAPER_COMBINATIONS,
    "rlw+pcgrad",
    "imtl-l+cagrad",
    "stch+graddrop",
    "dwa+gradvac",
    "excessmtl+moco",
    "dbmtl",
)
"""Each weighting that remembers or draws, and each gradient strategy, at least once."""


class Run:
    """A training run with dropout and momentum, whose whole state is saved."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(1)
        self.model = Network(dropout=0.3)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.02, momentum=0.9)
        self.balancer = make_balancer(
            name,
            tasks=TASKS,
            shared=self.model.trunk,
            optimizer=self.optimizer,
            seed=7,
            warmup_epochs=1,
        )
        learned = list(self.balancer.parameters())
        if learned:
            self.optimizer.add_param_group({"params": learned, "lr": 0.01})

    def train(self, start: int, stop: int) -> None:
        for step in range(start, stop):
            self.optimizer.zero_grad()
            losses = self.model.losses(batch(seed=step))
            if step % 3 == 1:
                del losses["b"]  # a task may be absent
            self.balancer.backward(
                losses, validation=lambda s=step: self.model.losses(batch(seed=100 + s))
            )
            self.optimizer.step()
            if step % 2:  # so that saving falls into the middle of an epoch
                self.balancer.end_epoch()

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "balancer": self.balancer.state_dict(),
            "torch": random_state(),
        }

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.balancer.load_state_dict(state["balancer"])
        set_random_state(state["torch"])


def saved(state: dict[str, Any]) -> dict[str, Any]:
    """Through a file, as the safe loader accepts it."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("name", PAIRS)
def test_resume_is_bit_for_bit(name: str) -> None:
    straight = Run(name)
    straight.train(0, 2 * STEPS)

    first = Run(name)
    first.train(0, STEPS)
    state = saved(first.state())
    second = Run(name)
    second.load(state)
    second.train(STEPS, 2 * STEPS)

    assert_equal_states(second.state(), straight.state())


def assert_equal_states(one: Any, other: Any) -> None:
    if isinstance(other, Tensor):
        assert torch.equal(one, other)
    elif isinstance(other, dict):
        assert one.keys() == other.keys()
        for key in other:
            assert_equal_states(one[key], other[key])
    elif isinstance(other, list):
        for a, b in zip(one, other, strict=True):
            assert_equal_states(a, b)
    else:
        assert one == other


@pytest.mark.parametrize("name", PAIRS)
def test_state_has_a_fixed_shape(name: str) -> None:
    """A fresh Balancer's state has the keys and shapes of a trained one's."""
    fresh, trained = Run(name), Run(name)
    trained.train(0, STEPS)
    shapes = [
        {key: value.shape for key, value in run.balancer.state_dict().items()}
        for run in (fresh, trained)
    ]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("name", PAIRS)
def test_reset_forgets_everything(name: str) -> None:
    run = Run(name)
    fresh = {key: value.clone() for key, value in run.balancer.state_dict().items()}
    learned = list(run.balancer.parameters())
    run.train(0, STEPS)
    run.balancer.reset()
    assert_equal_states(dict(run.balancer.state_dict()), fresh)
    now = list(run.balancer.parameters())
    assert all(a is b for a, b in zip(now, learned, strict=True))  # an optimizer may hold them


def test_seeds_and_generators() -> None:
    """Equal seeds give equal draws; a generator given is the one drawn from."""
    gradients = torch.randn(4, 50)
    for strategy in (GradDrop, PCGrad):
        same = [strategy(seed=3)(gradients) for _ in range(2)]
        assert torch.equal(*same)
        generator = torch.Generator().manual_seed(3)
        before = generator.get_state()
        assert torch.equal(strategy(generator=generator)(gradients), same[0])
        assert not torch.equal(generator.get_state(), before)
    assert not torch.equal(GradDrop(seed=3)(gradients), GradDrop(seed=4)(gradients))


def test_state_of_another_set_of_tasks_is_refused() -> None:
    layer = nn.Linear(2, 2)
    two = Balancer(DWA(), Sum(), tasks=("a", "b"), shared=layer)
    three = Balancer(DWA(), Sum(), tasks=("a", "b", "c"), shared=layer)
    with pytest.raises((RuntimeError, ValueError), match=r"size mismatch|must belong to 3 tasks"):
        three.load_state_dict(two.state_dict())
    with pytest.raises(ValueError, match="must belong to 3 tasks, 'a', 'b', 'c', but has 2"):
        Balancer(Equal(), Sum(), tasks=("a", "b", "c")).load_state_dict(
            Balancer(Equal(), Sum(), tasks=("a", "b")).state_dict()
        )


def equal_balancer(*tasks: str, **options: Any) -> Balancer:
    return Balancer(Equal(), Sum(), tasks=tasks, **options)


@pytest.mark.parametrize("tasks", [("b", "a"), ("x", "y"), ("a", "bb"), ("a", "b", "c")])
def test_state_of_other_names_is_refused_as_a_whole(tasks: tuple[str, ...]) -> None:
    """The order of the names is that of the rows, so it counts, too."""
    state = saved(trained_with_dwa(("a", "b")).state_dict())
    other = trained_with_dwa(tasks, steps=0)
    before = copy.deepcopy(other.state_dict())
    message = (
        f"belong to {len(tasks)} tasks, {', '.join(map(repr, tasks))}, but has 2 tasks, 'a', 'b'"
    )
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(state)
    assert_equal_states(dict(other.state_dict()), dict(before))


def trained_with_dwa(tasks: tuple[str, ...], steps: int = 3) -> Balancer:
    layer = nn.Linear(2, 2)
    balancer = Balancer(DWA(), CAGrad(), tasks=tasks, shared=layer, every=3)
    for _ in range(steps):
        y = layer(torch.ones(2))
        balancer.backward({task: number * y.sum() for number, task in enumerate(tasks, 1)})
    return balancer


def state_of_version_1(balancer: Balancer, kept: list[float]) -> Tensor:
    """The number of tasks, the counts of the epoch, the age of the weights, and these."""
    counts = balancer.end_epoch()
    numbers = [len(balancer.tasks), counts.steps, counts.skipped]
    numbers += [*counts.active.values(), *counts.dropped.values(), *kept]
    return torch.tensor(numbers, dtype=torch.float64)


def test_states_of_version_1_are_read() -> None:
    old = saved({"_extra_state": torch.tensor([2.0, 5, 1, 4, 3, 0, 1, 2, 0.25, 0.75]).double()})
    balancer = Balancer(Equal(), CAGrad(), tasks=("a", "b"), every=4)
    balancer.load_state_dict(old)
    assert torch.equal(state_of_version_1(balancer, [2, 0.25, 0.75]), old["_extra_state"])
    trunk = nn.Parameter(torch.ones(2))
    record = balancer.backward({"a": trunk.sum(), "b": trunk.square().sum()})
    assert record.reused  # the kept weights, two steps old, serve for another one
    assert torch.equal(trunk.grad, torch.full((2,), 0.25 * 1 + 0.75 * 2))
    with pytest.raises(ValueError, match="must belong to 3 tasks, but has 2"):
        equal_balancer("a", "b", "c").load_state_dict(old)


Spoil = Callable[[dict[str, Tensor]], object]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: s.update(_extra_state=torch.tensor(3.0)), r"one vector, but got shape \(\)"),
        (lambda s: s.update(_extra_state=torch.ones(0)), r"one vector, but got shape \(0,\)"),
        (lambda s: s.update(_extra_state=torch.ones(4, dtype=torch.uint8)), "4 bytes of something"),
        (lambda s: s.update(_extra_state=s["_extra_state"][:-9]), "bytes of something else"),
        (lambda s: s.update(_extra_state=torch.ones(5).long()), "but got torch.int64"),
        (lambda s: s.update(_extra_state=torch.tensor([3.0])), "0 numbers for 3 tasks"),
        (lambda s: s.update(_extra_state=old_state(1, -2)), "counts of steps of at least 0"),
        (lambda s: s.update(_extra_state=old_state(1, torch.nan)), "counts of steps of at least 0"),
        (lambda s: s.update(_extra_state=old_state(9, torch.nan)), "weights that are numbers"),
        (lambda s: s.update(_extra_state=old_state(9, -1)), "at least 1 step old"),
        (lambda s: s.update(_extra_state=old_state(10, torch.nan)), "weights that are numbers"),
        (lambda s: s["weighting.count"].sub_(100), "of DWA must have `count` at least 0"),
        (lambda s: s["weighting.epochs"].sub_(100), "of DWA must have `epochs` at least 0"),
        (lambda s: s["weighting.mean"].fill_(torch.nan), "of DWA must have `mean` finite"),
        (lambda s: s["weighting.last"].fill_(torch.inf), "of DWA must have `last` finite"),
        (
            lambda s: s.update({"gradient.random._extra_state": torch.ones(())}),
            r"byte tensor of shape \(\d+,\), but got torch.float32, \(\)",
        ),
    ],
)
def test_damaged_states_are_refused_as_a_whole(spoil: Spoil, message: str) -> None:
    run, other = Run("dwa+pcgrad"), Run("dwa+pcgrad")
    run.train(0, 3)
    state = copy.deepcopy(dict(run.balancer.state_dict()))
    other.balancer.load_state_dict(state)
    spoil(state)
    before = copy.deepcopy(dict(other.balancer.state_dict()))
    for owner, prefix in ((other.balancer, ""), (nn.ModuleDict({"b": other.balancer}), "b.")):
        with pytest.raises(ValueError, match=message) as caught:
            owner.load_state_dict({prefix + key: value for key, value in state.items()})
        assert "\n" not in str(caught.value)
        assert_equal_states(dict(other.balancer.state_dict()), before)


def old_state(position: int, value: float) -> Tensor:
    """A state of version 1 with three tasks, one number of it changed."""
    state = torch.tensor([3.0, 1, 0, 1, 1, 1, 0, 0, 0, 1, 1, 1, 1]).double()
    state[position] = value
    return state


@pytest.mark.parametrize(
    ("make", "name", "value"),
    [
        (lambda optimizer: Uncertainty(), "log_var", torch.nan),
        (AutoLambda, "lambdas", torch.inf),
        (AutoLambda, "exp_avg", torch.nan),
        (AutoLambda, "exp_avg_sq", -1.0),
        (AutoLambda, "steps", -1),
        (lambda optimizer: DWA(), "before_last", torch.nan),
    ],
)
def test_damaged_weightings_are_refused(
    make: Callable[[Any], Weighting], name: str, value: float
) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    saved_one, other = (make(optimizer).bind(["a", "b"]) for _ in range(2))
    state = copy.deepcopy(dict(saved_one.state_dict()))
    state[name][1] = value
    before = copy.deepcopy(dict(other.state_dict()))
    with pytest.raises(ValueError, match=f"must have `{name}` "):
        other.load_state_dict(state)
    assert_equal_states(dict(other.state_dict()), before)


def test_the_random_stream_of_another_strategy_is_refused() -> None:
    one, other, plain = (
        Balancer(Equal(), strategy, tasks=("a", "b"), shared=nn.Linear(2, 2))
        for strategy in (GradDrop(seed=1), PCGrad(seed=2), CAGrad())
    )
    before = copy.deepcopy(dict(other.state_dict()))
    with pytest.raises(ValueError, match="random stream of PCGrad, but has that of GradDrop"):
        other.load_state_dict(saved(one.state_dict()))
    assert_equal_states(dict(other.state_dict()), before)
    other.load_state_dict(saved(plain.state_dict()), strict=False)  # which has none


def test_a_state_of_a_later_version_is_refused() -> None:
    text = b'{"version": 99, "names": ["a"]}'
    with pytest.raises(ValueError, match="version 2 or older, but is of version 99"):
        equal_balancer("a").set_extra_state(torch.tensor(list(text), dtype=torch.uint8))


def test_names_of_any_letters_are_saved() -> None:
    names = ("MSI-Status (Δ ≥ 30 %)", '"{}\\t', "腫瘍")
    state = saved(equal_balancer(*names).state_dict())
    equal_balancer(*names).load_state_dict(state)


def test_a_weighting_alone_can_be_loaded_before_its_first_loss() -> None:
    trained = Uncertainty()
    trained(torch.ones(3))
    trained.log_var.data.copy_(torch.tensor([0.1, 0.2, 0.3]))
    fresh = Uncertainty()
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(fresh.log_var, trained.log_var)


def test_moving_and_casting() -> None:
    balancer = Balancer(Uncertainty(), GradDrop(), tasks=("a", "b"), shared=nn.Linear(2, 2))
    balancer.double()
    assert balancer.weighting.log_var.dtype == torch.float64
    assert sum(1 for _ in balancer.parameters()) == 1  # the model's are not the Balancer's


CASTS = {
    "to": lambda module: module.to(torch.bfloat16),
    "bfloat16": lambda module: module.bfloat16(),
    "half": lambda module: module.half(),
    "float": lambda module: module.float(),
    "apply": lambda module: module._apply(lambda t: t.bfloat16() if t.is_floating_point() else t),
}


@pytest.mark.parametrize("held", [False, True], ids=["alone", "held"])
@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_a_cast_leaves_means_as_they_are(cast: Callable[[nn.Module], object], held: bool) -> None:
    """2000 losses of 1.0005 have a mean that bfloat16 does not hold, nor float32 to 1e-9."""
    balancer = Balancer(DWA(), Sum(), tasks=("a", "b"))
    cast(nn.ModuleList([nn.Linear(1, 1), balancer]) if held else balancer)
    losses = torch.tensor([1.0005, 1.0])
    for _ in range(2000):
        balancer.weighting(losses)
    assert_close(balancer.weighting.mean, losses.double(), rtol=1e-13, atol=0)


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_a_cast_leaves_learned_weights_free_to_move(cast: Callable[[nn.Module], object]) -> None:
    """Steps of 1e-4 from 0.1, or from 1, are below half a unit of bfloat16's last place."""
    weights = nn.Parameter(torch.ones(1))
    auto = AutoLambda(torch.optim.SGD([weights], lr=0.1), init=0.1)
    model = nn.ModuleDict({"auto": Balancer(auto, Sum(), tasks=("a",))})
    uncertainty = Uncertainty(init=1.0)
    model["learned"] = Balancer(uncertainty, Sum(), tasks=("a",))
    optimizer = torch.optim.SGD(model["learned"].parameters(), lr=1e-4)
    before = uncertainty.log_var
    cast(model)
    for _ in range(100):
        model["auto"].backward({"a": -weights.sum()}, validation=lambda: {"a": weights.sum()})
        optimizer.zero_grad()
        model["learned"].backward({"a": 10 * weights.sum()})
        optimizer.step()
    assert uncertainty.log_var is before  # which the optimizer holds
    assert auto.lambdas.item() == pytest.approx(0.09, abs=1e-6)
    assert uncertainty.log_var.item() > 1.01


def test_state_is_at_least_float32_whatever_the_default() -> None:
    """As in training "in true bfloat16", where a model is made with this default."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        weighting = Uncertainty().bind(("a", "b"))
    finally:
        torch.set_default_dtype(torch.float32)
    assert weighting.log_var.dtype == weighting.factor.dtype == torch.float32


def test_a_device_without_float64_gets_float32() -> None:
    """Moving float64 there raises TypeError; everything else keeps its dtype."""

    def move(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype == torch.float64:
            raise TypeError
        return tensor.clone()

    weighting = DWA().bind(("a", "b"))
    assert weighting._apply(move).mean.dtype == torch.float32


def test_a_state_in_float32_is_read() -> None:
    trained = trained_with_dwa(("a", "b"))
    state = {
        k: v.float() if v.dtype == torch.float64 and "mean" in k else v
        for k, v in saved(trained.state_dict()).items()
    }
    other = trained_with_dwa(("a", "b"), steps=0)
    other.load_state_dict(state)
    assert_close(other.weighting.mean, trained.weighting.mean, rtol=1e-7, atol=0)
    assert other.weighting.mean.dtype == torch.float64


# --- what is shared, where that is inferred -------------------------------------------------------


def inferring(tasks: tuple[str, ...] = ("a", "b")) -> Balancer:
    return Balancer(Equal(), CAGrad(), tasks=tasks)


def resumed(balancer: Balancer) -> Balancer:
    fresh = inferring(balancer.tasks)
    fresh.load_state_dict(saved(balancer.state_dict()))
    return fresh


def gradients_of(balancer: Balancer, parts: list[nn.Parameter], losses: dict[str, Tensor]) -> Any:
    for part in parts:
        part.grad = None
    balancer.backward(losses)
    return [None if part.grad is None else part.grad.clone() for part in parts]


Losses = Callable[[], dict[str, Tensor]]


def bare() -> tuple[list[nn.Parameter], Losses]:
    """Parameters that no module holds, two of them alike, which the tasks reach in turn."""
    w, v, head = (nn.Parameter(torch.tensor(x)) for x in ([1.0, 2.0], [3.0, 4.0], [5.0, 6.0]))
    a, b = torch.tensor([1.0, 0.5]), torch.tensor([-0.5, 1.0])
    return [w, v, head], lambda: {
        "a": (w * a).sum() + (v * b).sum() + (head * a).sum(),
        "b": (v * a).sum() + (w * b).sum(),
    }


def modules() -> tuple[list[nn.Parameter], Losses]:
    """Modules of their own, all of one class and shape."""
    torch.manual_seed(0)
    trunk, head_a, head_b = (nn.Linear(2, 2) for _ in range(3))
    parts = [p for module in (trunk, head_a, head_b) for p in module.parameters()]
    x = torch.randn(5, 2)
    return parts, lambda: {
        "a": head_a(trunk(x)).square().mean(),
        "b": head_b(trunk(x)).sub(1).square().mean(),
    }


def network() -> tuple[list[nn.Parameter], Losses]:
    torch.manual_seed(0)
    model = Network()
    return list(model.parameters()), lambda: model.losses(batch())


SETTINGS = pytest.mark.parametrize("setting", [bare, modules, network])


@SETTINGS
@pytest.mark.parametrize("times", [1, 2])
def test_an_inferred_split_is_resumed(setting: Any, times: int) -> None:
    """A task alone is balanced where another one has been before the state was saved."""
    parts, losses = setting()
    straight = inferring(tuple(losses()))
    straight.backward(losses())
    interrupted = straight
    for _ in range(times):  # saved once more before any task has been seen
        interrupted = resumed(interrupted)
    for task in losses():
        one = {task: losses()[task]}
        right = gradients_of(straight, parts, one)
        found = gradients_of(interrupted, parts, {task: losses()[task]})
        assert_equal_states(found, right)
        plain = gradients_of(inferring(tuple(losses())), parts, {task: losses()[task]})
        assert any(
            g is not None and not torch.equal(g, r) for g, r in zip(plain, right, strict=True)
        )
        interrupted = resumed(interrupted)  # with some tasks seen, others not


@SETTINGS
def test_a_model_of_another_process_is_found(setting: Any) -> None:
    """What is saved holds for a model that is built anew, next to the first one."""
    parts, losses = setting()
    straight = inferring(tuple(losses()))
    straight.backward(losses())
    others, their_losses = setting()
    balancer = resumed(straight)
    for task in losses():
        right = gradients_of(straight, parts, {task: losses()[task]})
        assert_equal_states(gradients_of(balancer, others, {task: their_losses()[task]}), right)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_knows_what_is_shared(copied: Any) -> None:
    """A task alone is balanced where another one has been before the copy was made."""
    model, balancer = Network(), inferring(TASKS)
    balancer.backward(model.losses(batch()))
    others = copied((model, balancer))
    for task in TASKS:
        right, found, plain = (
            gradients_of(its, list(each.parameters()), {task: each.losses(batch())[task]})
            for each, its in ((model, balancer), others, (model, inferring(TASKS)))
        )
        assert_equal_states(found, right)
        assert any(
            g is not None and not torch.equal(g, r) for g, r in zip(plain, right, strict=True)
        )


def test_a_loaded_split_replaces_what_was_seen_since() -> None:
    """A Balancer that goes back to a state forgets what tasks have reached after it."""
    parts, losses = bare()
    balancer = inferring()
    balancer.backward({"a": losses()["a"]})
    state = saved(balancer.state_dict())
    balancer.backward(losses())
    balancer.load_state_dict(state)
    w, v, head = gradients_of(balancer, parts, {"a": losses()["a"]})
    assert torch.equal(w, head)  # both the plain sum: no other task has been there
    assert v is not None


def test_what_cannot_be_told_apart_is_inferred_anew() -> None:
    """Of three equal tensors without names two are left: which two, nobody knows."""
    w, v, head = (nn.Parameter(torch.ones(2)) for _ in range(3))
    balancer = inferring()
    balancer.backward({"a": (w + v + head).sum(), "b": w.square().sum()})
    fresh = resumed(balancer)
    with pytest.warns(UserWarning, match="3 of the parameters that the loss of task 'a' reached"):
        found = gradients_of(fresh, [v, head], {"a": (v + head).sum()})
    assert_equal_states(found, [torch.ones(2)] * 2)


def test_a_state_with_an_inferred_split_has_a_fixed_shape() -> None:
    _, losses = network()
    trained = inferring(TASKS)
    trained.backward(losses())
    states = [b.state_dict()["_extra_state"] for b in (trained, inferring(TASKS))]
    assert states[0].shape == states[1].shape


def test_states_without_a_split_leave_what_is_known() -> None:
    parts, losses = bare()
    balancer = inferring()
    balancer.backward(losses())
    right = gradients_of(balancer, parts, {"a": losses()["a"]})
    given = Balancer(Equal(), CAGrad(), tasks=("a", "b"), shared=parts[:2])
    old = torch.tensor([2.0, 0, 0, 0, 0, 0, 0, 2**31, torch.inf, torch.inf]).double()
    for state in (saved(given.state_dict()), {"_extra_state": old}):
        balancer.load_state_dict(state)
        assert_equal_states(gradients_of(balancer, parts, {"a": losses()["a"]}), right)
    given.load_state_dict(saved(balancer.state_dict()))
