"""``after_step``: losses at the parameters that a step leads to, for weightings that look back."""

import copy
import pickle
import re
import warnings
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from mtbalance import Balancer, make_balancer
from mtbalance.gradient import PCGrad, Sum
from mtbalance.weighting import FAMO, Equal, Weighting
from tests._networks import TASKS, Network, batch

FORGOTTEN = r"Call balancer\.after_step\(losses\) after optimizer\.step\(\)"
NO_STEP = r"must follow backward\(\) and optimizer\.step\(\), once per step, but no step has been"


class LooksBack(Weighting):
    """Notes what it is shown."""

    needs_after_step: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__()
        self.shown: list[tuple[list[int], Tensor]] = []
        self.grad_enabled: bool | None = None

    def forward(self, losses: Tensor) -> Tensor:
        return losses

    def after_step(self, losses: Tensor) -> None:
        active = self.active.tolist() if isinstance(self.active, Tensor) else []
        self.grad_enabled = torch.is_grad_enabled()
        self.shown.append((active, losses))


def setting(weighting: Weighting | None = None, **options) -> tuple[Network, Balancer]:
    torch.manual_seed(0)
    model = Network()
    weighting = weighting or LooksBack()
    return model, Balancer(weighting, Sum(), tasks=TASKS, shared=model.trunk, **options)


def shown(balancer: Balancer) -> list[tuple[list[int], list[float]]]:
    weighting = balancer.weighting
    assert isinstance(weighting, LooksBack)
    return [(active, losses.tolist()) for active, losses in weighting.shown]


def chosen(losses: dict[str, Tensor], tasks: str) -> dict[str, Tensor]:
    return {task: losses[task] for task in tasks}


# --- what is shown -------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["mapping", "function", "detached"])
def test_shows_the_losses_of_the_tasks_of_the_step(form: str) -> None:
    """In the order of the tasks, as in ``forward``, without graphs."""
    model, balancer = setting()
    balancer.backward(chosen(model.losses(batch()), "ca"))
    after = chosen(model.losses(batch(seed=1)), "ca")
    if form == "function":
        balancer.after_step(lambda: chosen(model.losses(batch(seed=1)), "ca"))
    else:
        balancer.after_step(
            after if form == "mapping" else {t: loss.detach() for t, loss in after.items()}
        )
    assert shown(balancer) == [([0, 2], [after["a"].item(), after["c"].item()])]
    (_, losses), *_ = balancer.weighting.shown
    assert not losses.requires_grad
    assert balancer.weighting.grad_enabled is False
    assert balancer.weighting.active == slice(None)


def test_a_function_is_called_without_graphs_and_leaves_buffers_alone() -> None:
    model, balancer = setting()
    model.trunk.append(nn.BatchNorm1d(5).double())
    balancer.backward(model.losses(batch()))
    norm = model.trunk[-1]
    before = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    enabled = []

    def after() -> dict[str, Tensor]:
        enabled.append(torch.is_grad_enabled())
        return model.losses(batch(seed=3))

    balancer.after_step(after)
    assert enabled == [False]
    assert norm.training
    for name, buffer in norm.named_buffers():
        assert torch.equal(buffer, before[name]), name
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("weighting", [Equal(), make_balancer("dwa", tasks=TASKS).weighting])
def test_does_nothing_elsewhere(weighting: Weighting) -> None:
    """Whenever it is called: loops may call it whatever the weighting is."""
    model, balancer = setting(weighting)

    def unwanted() -> dict[str, Tensor]:
        raise AssertionError

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        balancer.after_step(unwanted)
        for _ in range(3):
            balancer.backward(model.losses(batch()))
        balancer.after_step(unwanted)
        balancer.after_step({"z": torch.zeros(2)})


def test_tasks_without_a_part_in_the_step_do_not_count() -> None:
    """Absent and dropped ones: a function need not know which they were."""
    model, balancer = setting(nonfinite="drop")
    losses = model.losses(batch())
    record = balancer.backward({"a": losses["a"], "b": losses["b"] * float("nan")})
    assert record.tasks == ("a",)
    balancer.after_step(lambda: model.losses(batch()))
    assert shown(balancer) == [([0], [model.losses(batch())["a"].item()])]


def test_micro_batches() -> None:
    model, balancer = setting()
    for part in batch().chunk(2):
        balancer.accumulate({task: loss / 2 for task, loss in model.losses(part).items()})
    balancer.apply()
    balancer.after_step(lambda: model.losses(batch()))
    assert shown(balancer)[0][0] == [0, 1, 2]
    balancer.accumulate(model.losses(batch()))
    balancer.backward(model.losses(batch()))  # joins them, and is one step
    balancer.after_step(lambda: model.losses(batch()))
    assert len(shown(balancer)) == 2


def test_after_a_step_that_wrote_nothing() -> None:
    model, balancer = setting(nonfinite="skip")
    losses = model.losses(batch())
    assert balancer.backward({**losses, "a": losses["a"] * float("inf")}).skipped
    balancer.after_step(lambda: 1 / 0)  # not called
    assert shown(balancer) == []
    with pytest.raises(RuntimeError, match=NO_STEP):
        balancer.after_step(model.losses(batch()))


def test_after_an_overflow() -> None:
    model, balancer = setting()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100)
    losses = {task: loss * 1e300 for task, loss in model.losses(batch()).items()}
    assert balancer.backward(losses, scaler=scaler).overflow
    balancer.after_step(lambda: 1 / 0)
    assert shown(balancer) == []


# --- errors --------------------------------------------------------------------------------------


def test_there_must_be_a_step_of_its_own() -> None:
    """Before any, twice, after one that raised, after reset."""
    model, balancer = setting()
    with pytest.raises(RuntimeError, match=NO_STEP):
        balancer.after_step(model.losses(batch()))
    balancer.backward(model.losses(batch()))
    balancer.after_step(model.losses(batch()))
    with pytest.raises(RuntimeError, match=NO_STEP):
        balancer.after_step(model.losses(batch()))
    balancer.backward(model.losses(batch()))
    with (
        pytest.warns(RuntimeWarning, match=FORGOTTEN),
        pytest.raises(FloatingPointError),
    ):
        balancer.backward({"a": model.losses(batch())["a"] * float("nan")})
    with pytest.raises(RuntimeError, match=NO_STEP):
        balancer.after_step(model.losses(batch()))
    balancer.backward(model.losses(batch()))
    balancer.reset()
    with pytest.raises(RuntimeError, match=NO_STEP):
        balancer.after_step(model.losses(batch()))
    assert len(shown(balancer)) == 1


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda losses: chosen(losses, "ab"), ValueError, "every task of the step ('a', 'b', 'c')"),
        (lambda losses: chosen(losses, "ab"), ValueError, "but 'c' is missing."),
        (lambda losses: {}, ValueError, "`losses` must hold at least one task's loss"),
        (lambda losses: list(losses.values()), TypeError, "`losses` must map task names"),
        (lambda losses: {**losses, "d": losses["a"]}, ValueError, "`losses` must name tasks among"),
        (lambda losses: {**losses, "b": 1.0}, TypeError, "the loss of task 'b' must be a tensor"),
        (
            lambda losses: {**losses, "b": torch.ones(3)},
            ValueError,
            "the loss of task 'b' must be a scalar",
        ),
    ],
)
@pytest.mark.parametrize("function", [False, True])
def test_losses_that_are_refused(change, error, words: str, function: bool) -> None:
    """Nothing has happened then: the call may be repeated with better ones."""
    model, balancer = setting()
    balancer.backward(model.losses(batch()))
    bad = change(model.losses(batch()))
    with pytest.raises(error, match=re.escape(words)):
        balancer.after_step((lambda: bad) if function else bad)
    balancer.after_step(model.losses(batch()))
    assert len(shown(balancer)) == 1


@pytest.mark.parametrize("form", ["mapping", "function", "detached"])
def test_losses_of_before_the_step_are_refused(form: str) -> None:
    """They tell nothing of the step, and a weighting would learn that it changed nothing."""
    model, balancer = setting()
    losses = model.losses(batch())
    balancer.backward(losses)
    given = {t: loss.detach() for t, loss in losses.items()} if form == "detached" else losses
    with pytest.raises(ValueError, match=r"of 'a' is the one that backward\(\) was given"):
        balancer.after_step((lambda: given) if form == "function" else given)
    balancer.after_step({task: loss.clone() for task, loss in losses.items()})  # equal, but anew
    assert len(shown(balancer)) == 1
    balancer.backward(model.losses(batch()))
    balancer.after_step(losses)  # of the step before: only those of this one are known
    assert len(shown(balancer)) == 2


def test_losses_that_are_written_to_one_place_are_taken() -> None:
    """As a CUDA graph does: where they lie is no sign that they are those of before."""
    model, balancer = setting()
    losses = model.losses(batch())
    balancer.backward(losses)
    with torch.no_grad():
        for task, loss in model.losses(batch(seed=1)).items():
            losses[task].copy_(loss)
    balancer.after_step(losses)
    ((_, after),) = shown(balancer)
    assert after == [loss.item() for loss in model.losses(batch(seed=1)).values()]


def test_an_error_of_the_function_comes_out_as_it_is() -> None:
    model, balancer = setting()
    balancer.backward(model.losses(batch()))
    with pytest.raises(ZeroDivisionError):
        balancer.after_step(lambda: 1 / 0)
    balancer.after_step(model.losses(batch()))


# --- forgotten -----------------------------------------------------------------------------------


def test_forgetting_it_is_told_once() -> None:
    """At the second ``backward``, at the line of the caller."""
    model, balancer = setting()
    balancer.backward(model.losses(batch()))
    with pytest.warns(RuntimeWarning, match=FORGOTTEN) as caught:
        balancer.backward(model.losses(batch()))
    assert [warning.filename for warning in caught] == [__file__]
    balancer.backward(model.losses(batch()))


def test_forgetting_it_is_told_where_steps_are_applied() -> None:
    model, balancer = setting()
    balancer.backward(model.losses(batch()))
    balancer.accumulate(model.losses(batch()))
    with pytest.warns(RuntimeWarning, match=FORGOTTEN) as caught:
        balancer.apply()
    assert [warning.filename for warning in caught] == [__file__]


def test_nothing_is_told_of_steps_that_wrote_nothing() -> None:
    model, balancer = setting(nonfinite="skip")
    for factor in (float("nan"), float("nan"), 1.0):
        losses = model.losses(batch())
        balancer.backward({**losses, "a": losses["a"] * factor})
    balancer.after_step(model.losses(batch()))
    balancer.backward(model.losses(batch()))


# --- state ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("copies", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_copies_know_what_is_due(copies) -> None:
    both = setting(FAMO())
    model, balancer = both
    balancer.backward(chosen(model.losses(batch()), "ab"))
    model, copied = copies(both)
    copied.after_step(lambda: chosen(model.losses(batch(seed=1)), "ab"))
    assert copied.weighting.steps.tolist() == [1, 1, 0]
    assert balancer.weighting.steps.tolist() == [0, 0, 0]


def test_what_is_due_is_saved() -> None:
    """The size of a state does not tell whether anything is."""
    model, balancer = setting(FAMO())
    fresh = balancer.state_dict()["_extra_state"]
    balancer.backward(chosen(model.losses(batch()), "ac"))
    saved = balancer.state_dict()
    assert saved["_extra_state"].shape == fresh.shape
    _, other = setting(FAMO())
    other.load_state_dict(saved)
    balancer.after_step(model.losses(batch(seed=1)))
    other.after_step(model.losses(batch(seed=1)))
    assert torch.equal(other.weighting.logits, balancer.weighting.logits)
    other.load_state_dict(balancer.state_dict())
    with pytest.raises(RuntimeError, match=NO_STEP):
        other.after_step(model.losses(batch()))


def test_with_surgery_and_chunks() -> None:
    """The weights of the next step are those of the new logits."""
    model = Network()
    balancer = Balancer(FAMO(lr=1.0), PCGrad(), tasks=TASKS, shared=model.trunk, chunk=3)
    losses = model.losses(batch())
    first = balancer.backward(losses)
    falls = dict(zip(TASKS, (0.5, 1.0, 1.0), strict=True))
    balancer.after_step({task: loss * falls[task] for task, loss in first.losses.items()})
    second = balancer.backward(model.losses(batch()))
    assert second.weights["a"] < first.weights["a"]
    assert second.weights["b"] > first.weights["b"]
