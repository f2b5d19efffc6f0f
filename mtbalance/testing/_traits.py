"""What holds for every weighting, and for those that have a trait."""

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ._other_tasks import state_of_losses_goes_to_other_tasks
from ._violation import (
    bits,
    copies_of,
    entries_of,
    require,
    require_close,
    require_same_state,
    state_of,
)
from ._weighting import (
    ALL_DTYPES,
    TASKS,
    LossSample,
    Trait,
    WeightingProperty,
    WeightingSubject,
    see,
    train,
    train_step,
    weights_of,
)

_NAMES = [str(i) for i in range(TASKS)]
_ANY = (1e-6, 1e6)


def finite_and_of_the_losses_dtype(subject: WeightingSubject, sample: LossSample) -> None:
    """Where parameters of float32 weigh, the weighted losses are of at least that dtype."""
    weighting = subject.make()
    for losses in sample.epochs():
        before = losses.clone()
        weighted = train_step(weighting, losses)
        require_close(losses, before, 0.0, "the losses were written to: loss")
        require(weighted.shape == losses.shape, f"got shape {tuple(weighted.shape)}")
        wide = torch.promote_types(losses.dtype, weighted.dtype)
        expected = wide if list(weighting.parameters()) else losses.dtype
        require(weighted.dtype == expected, f"got {weighted.dtype}, but expected {expected}")
        require(torch.isfinite(weighted).all(), f"{losses.tolist()} gave {weighted.tolist()}")
        weighting.end_epoch()


def weights_sum_to_m(subject: WeightingSubject, sample: LossSample) -> None:
    """Of all tasks, and where some are absent of the others."""
    weighting = see(subject.make(), sample)
    for count in range(1, TASKS + 1):
        for losses in (torch.ones(TASKS), sample.epochs()[0]):
            with weighting.only(torch.arange(count)):
                total = weights_of(weighting, losses[:count]).sum()
            expected = torch.tensor(float(count))
            require_close(total, expected, 1.3e-6 * count, f"sum of {count} weights")


def weights_are_positive(subject: WeightingSubject, sample: LossSample) -> None:
    """For losses whose ratios leave the exponential functions in these weights above zero."""
    weighting = see(subject.make(), sample).eval()
    for losses in (torch.ones(TASKS), torch.linspace(1, 1.5, TASKS), torch.linspace(0.01, 0.05, 3)):
        weights = weights_of(weighting, losses)
        worst = int(weights.argmin())
        least = float(weights[worst])
        require(
            least > 0,
            f"at losses {losses.tolist()}, the weight of task {worst} is {least!r}, but expected "
            "one above 0",
        )


def weights_times_losses(subject: WeightingSubject, sample: LossSample) -> None:
    """The objective has no part that the weights do not show."""
    weighting = see(subject.make(), sample).eval()
    losses = sample.epochs()[0]
    _require_near(weighting(losses), weights_of(weighting, losses) * losses, "weighted loss")


def starts_equal(subject: WeightingSubject, sample: LossSample) -> None:
    """Bit for bit."""
    weights = weights_of(subject.make(), sample.epochs()[0])
    require_close(weights, weights[:1].expand(TASKS), 0.0, "weight")


def remembers_nothing(subject: WeightingSubject, sample: LossSample) -> None:
    """There is nothing to save."""
    weighting = see(subject.make(), sample)
    state = {name: value.tolist() for name, value in weighting.state_dict().items()}
    require(not state, f"the state is {state}, but expected none")


def learns_by_gradient(subject: WeightingSubject, sample: LossSample) -> None:
    """It has parameters for the optimizer, which get a gradient."""
    weighting = see(subject.make(), sample)
    names = [name for name, _ in weighting.named_parameters()]
    require(names, "it has no parameters")


def what_learns_or_remembers_is_saved(subject: WeightingSubject, sample: LossSample) -> None:
    """Whatever learns or remembers is in ``state_dict``, and training changes it."""
    weighting = subject.make()
    weighting(torch.ones(TASKS))
    weighting.reset()
    start = state_of(weighting)
    train(weighting, 3, sample.seed)
    stateless = Trait.STATELESS in subject.traits
    require(stateless or start, "there is no state, but `Trait.STATELESS` is not among its traits")
    changed = state_of(weighting) != start
    require(stateless or changed, f"training left the state {sorted(start)} as it was")
    moves = bool(list(weighting.parameters()))
    require(
        moves == (Trait.LEARNS_BY_GRADIENT in subject.traits),
        f"it has {'' if moves else 'no '}parameters, "
        f"but `Trait.LEARNS_BY_GRADIENT` is {'not ' if moves else ''}among its traits",
    )


def state_travels(subject: WeightingSubject, sample: LossSample) -> None:
    """In the middle of an epoch or at its end: what is loaded or copied goes on bit for bit.

    A fresh weighting need not have seen a loss: loading tells it how many tasks there are.
    """
    for steps in (1, 4, 7):
        original = subject.make()
        train(original, steps, sample.seed)
        others = {"fresh": subject.make(), "bound": subject.make().bind(_NAMES)}
        for other in others.values():
            other.load_state_dict(original.state_dict(), strict=True)
            require_same_state(other, state_of(original))
        others |= copies_of(original)
        expected = train(original, 4, sample.seed + 1)
        for how, other in others.items():
            got = train(other, 4, sample.seed + 1)
            require(got == expected, f"the {how} one weighs otherwise, {steps} steps into training")
        require_same_state(others["fresh"], state_of(original))


def reset_forgets_everything(subject: WeightingSubject, sample: LossSample) -> None:
    """After ``reset()`` a weighting is as new."""
    weighting = subject.make().bind(_NAMES)
    start = state_of(weighting)
    first = train(weighting, 5, sample.seed)
    weighting.reset()
    require_same_state(weighting, start)
    require(train(weighting, 5, sample.seed) == first, "it weighs otherwise than when it was new")


def absent_tasks_are_left_as_they_were(subject: WeightingSubject, sample: LossSample) -> None:
    """State of a task that is absent from a step does not change, whatever its shape."""
    weighting = subject.make()
    train(weighting, 5, sample.seed)
    before = copy.deepcopy(weighting.state_dict())
    active = torch.tensor([2, 0])
    with weighting.only(active):
        weighted = train_step(weighting, sample.epochs()[0][active], active)
    require(weighted.shape == (2,), f"two losses gave shape {tuple(weighted.shape)}")
    _require_task_unmoved(weighting.state_dict(), before)
    shape = weighting(torch.ones(TASKS)).shape
    require(shape == (TASKS,), f"afterwards, {TASKS} losses gave shape {tuple(shape)}")


def numbers_of_tasks_pick_their_weights(subject: WeightingSubject, sample: LossSample) -> None:
    """With state that differs by task, tasks (2, 0) get the weights of tasks 2 and 0.

    Weights that are normalised over the active tasks keep their ratio. Those that depend on all
    losses are looked at in another order.
    """
    weighting = subject.make()
    train(weighting, 5, sample.seed)
    weighting.eval()
    if Trait.COUPLED in subject.traits:
        losses, order = sample.epochs()[0], torch.tensor([2, 0, 1])
        expected = weights_of(weighting, losses)[order]
        with weighting.only(order):
            _require_near(weights_of(weighting, losses[order]), expected, "weight")
        return
    for losses in (torch.ones(TASKS), sample.epochs()[0]):
        expected = weights_of(weighting, losses)[[2, 0]]
        with weighting.only(torch.tensor([2, 0])):
            two = weights_of(weighting, losses[[2, 0]])
        if Trait.SHARED_OUT in subject.traits:
            two, expected = two / two.sum(), expected / expected.sum()
        _require_near(two, expected, "weight")


def bad_losses_leave_no_trace(subject: WeightingSubject, sample: LossSample) -> None:
    """The bad task's memory stays as it was, and everybody's stays finite."""
    for bad in (torch.nan, torch.inf):
        weighting = subject.make()
        train(weighting, 5, sample.seed)
        before = copy.deepcopy(weighting.state_dict())
        losses = sample.epochs()[0]
        losses[1] = bad
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # that it did nothing
            # Its parameters are the optimizer's, which nobody lets step on such losses.
            learns = bool(list(weighting.parameters()))
            weighted = weighting(losses) if learns else train_step(weighting, losses)
        weighted = weighted.detach()
        require(not torch.isfinite(weighted[1]), f"a loss of {bad} became {float(weighted[1])}")
        after = weighting.state_dict()
        _require_task_unmoved(after, before)
        for name in _of_tasks(after):
            require(torch.isfinite(after[name]).all(), f"{name} is now {after[name].tolist()}")


def evaluation_changes_nothing(subject: WeightingSubject, sample: LossSample) -> None:
    """In ``eval`` mode nothing is remembered."""
    weighting = subject.make()
    train(weighting, 5, sample.seed)
    weighting.eval()
    before = state_of(weighting)
    weighting(3 * sample.epochs()[0])
    require_same_state(weighting, before)


def weights_are_constants(subject: WeightingSubject, sample: LossSample) -> None:
    """The weights are constants for the model: no second path to its parameters."""
    weighting = subject.make()
    train(weighting, 5, sample.seed)
    x = torch.tensor(2.0, requires_grad=True)
    losses = torch.stack([x, x.square(), 3 * x])
    weighting.eval()
    (slope,) = torch.autograd.grad(weighting(losses).sum(), x)
    weights = weights_of(weighting, losses)
    _require_near(slope, weights @ torch.tensor([1.0, 4.0, 3.0]), "slope of the objective")


def the_number_of_tasks_is_fixed(subject: WeightingSubject, _: LossSample) -> None:
    """A weighting belongs to one set of tasks."""
    weighting = subject.make()
    _require_refused(RuntimeError, "must be bound to its tasks first", lambda: weighting.num_tasks)
    weighting(torch.ones(TASKS))
    words = f"`losses` must hold one loss for each of the {TASKS} tasks"
    _require_refused(ValueError, words, lambda: weighting(torch.ones(TASKS - 1)))
    with weighting.only(torch.tensor([0])):
        words = "`losses` must hold one loss for each of the 1 tasks"
        _require_refused(ValueError, words, lambda: weighting(torch.ones(TASKS)))
    words = "must belong to one set of tasks"
    _require_refused(RuntimeError, words, lambda: weighting.bind(["a", "b"]))


def only_is_over_even_after_an_error(subject: WeightingSubject, _: LossSample) -> None:
    """Afterwards, all tasks are active."""
    weighting = subject.make()
    weighting(torch.ones(TASKS))
    try:
        with weighting.only(torch.tensor([1])):
            raise KeyError
    except KeyError:
        shape = weighting(torch.ones(TASKS)).shape
    require(shape == (TASKS,), f"{TASKS} losses gave shape {tuple(shape)}")


def refuses_what_is_no_vector_of_losses(subject: WeightingSubject, _: LossSample) -> None:
    """One error for what is no tensor, has not one dimension, no loss, or no real numbers."""
    refused: list[tuple[Any, type[Exception], str]] = [
        ([1.0, 2.0, 3.0], TypeError, "`losses` must be a tensor of shape (m,)"),
        (torch.tensor(1.0), ValueError, "`losses` must have shape (m,)"),
        (torch.ones(1, 3), ValueError, "but got shape (1, 3)."),
        (torch.ones(0), ValueError, "m at least 1, but got shape (0,)."),
        (torch.ones(3, dtype=torch.int64), TypeError, "but got torch.int64."),
    ]
    for losses, error, words in refused:
        _require_refused(error, words, partial(subject.make(), losses))


def _require_refused(error: type[Exception], words: str, use: Callable[[], object]) -> None:
    try:
        got = use()
    except error as raised:
        require(words in str(raised), f"it says {str(raised)!r}, but expected {words!r}")
    else:
        require(None, f"got {got!r}, but expected a {error.__name__}: {words}")


def _require_near(got: Tensor, expected: Tensor, what: str) -> None:
    """Require that numbers of float32 agree up to a few roundings."""
    atol = 1e-5 + 1.3e-6 * float(expected.detach().abs().max())
    require_close(got, expected, atol, what)


def _of_tasks(state: dict[str, Tensor]) -> list[str]:
    """Return the names of what is remembered of tasks: all but streams of random numbers."""
    return [name for name in state if "random" not in name]


def _require_task_unmoved(after: dict[str, Tensor], before: dict[str, Tensor]) -> None:
    now = entries_of(after, 1)
    for name, was in entries_of(before, 1).items():
        same = name in now and bits(was) == bits(now[name])
        require(same, f"{name} of task 1 was {was.tolist()}, is {now.get(name)}")


HAVING: dict[Trait, WeightingProperty] = {
    trait: WeightingProperty(body, trait.value, **rest)
    for trait, body, rest in (
        (Trait.SUMS_TO_M, weights_sum_to_m, {"bounds": _ANY, "examples": 25}),
        (Trait.POSITIVE, weights_are_positive, {"examples": 25}),
        (Trait.LINEAR, weights_times_losses, {}),
        (Trait.STARTS_EQUAL, starts_equal, {}),
        (Trait.STATELESS, remembers_nothing, {}),
        (Trait.LEARNS_BY_GRADIENT, learns_by_gradient, {}),
    )
}
"""The property that a trait stands for; ``SHARED_OUT`` and ``COUPLED`` say how another is asked."""

WEIGHTINGS = tuple(
    WeightingProperty(body, says, **rest)
    for body, says, rest in (
        (
            finite_and_of_the_losses_dtype,
            "weighted losses are finite and of the losses' dtype",
            {"bounds": _ANY, "dtypes": ALL_DTYPES, "examples": 75},
        ),
        (
            what_learns_or_remembers_is_saved,
            "`state_dict` holds what learns or remembers, and training changes it",
            {},
        ),
        (
            state_travels,
            "a weighting that is loaded, copied or pickled goes on as the original",
            {"examples": 2},
        ),
        (
            state_of_losses_goes_to_other_tasks,
            "what is remembered of a task goes along with it to other tasks, with `with_tasks`",
            {"examples": 2},
        ),
        (reset_forgets_everything, "after `reset()` a weighting is as new", {}),
        (absent_tasks_are_left_as_they_were, "what is remembered of an absent task stays", {}),
        (numbers_of_tasks_pick_their_weights, "tasks (2, 0) get the weights of tasks 2 and 0", {}),
        (bad_losses_leave_no_trace, "a loss that is not finite comes out, and leaves no trace", {}),
        (evaluation_changes_nothing, "in `eval` mode nothing is remembered", {}),
        (weights_are_constants, "the weights are constants for the model", {}),
        (the_number_of_tasks_is_fixed, "a weighting belongs to one set of tasks", {}),
        (only_is_over_even_after_an_error, "`only` is over after an error", {}),
        (refuses_what_is_no_vector_of_losses, "what is no vector of losses is refused", {}),
    )
)
"""The properties of every weighting."""
