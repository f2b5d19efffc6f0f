"""What is remembered goes along with its task where tasks come, go and change places."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mtbalance import Balancer, with_tasks
from mtbalance.gradient import Sum
from mtbalance.weighting import Equal

from ._matrices import Sample
from ._property import Subject, size_of, turned
from ._step import take_step
from ._violation import bits, entries_of, require, require_close
from ._weighting import TASKS, LossSample, WeightingSubject, train

_NAMES = tuple(str(i) for i in range(TASKS))
_NEW = "new"


def state_goes_to_other_tasks(subject: Subject, sample: Sample) -> None:
    """A task that has never been there may come or go, and the others go on as they would have.

    Task 0 keeps its place, as strategies may have a primary one, and the rows their order. One that
    has been there is not taken away: its rows may count for others as long as it is absent.
    """
    rows = sample.rows()
    names = tuple(str(i) for i in range(len(rows)))
    fewer, more = (names[0], *names[2:]), (names[0], _NEW, *names[1:])
    shared = torch.zeros_like(rows[0], requires_grad=True)

    def balancer_of(tasks: Sequence[str]) -> Balancer:
        return Balancer(Equal(), subject.make(), tasks=tasks, shared=[shared])

    def direction(balancer: Balancer, towards: float, present: Sequence[str]) -> Tensor:
        moved = turned(rows, towards)
        shared.grad = torch.zeros_like(shared)
        take_step(balancer, lambda: {task: moved[int(task)] @ shared for task in present})
        return shared.grad

    for tasks, present in ((fewer, fewer), (more, names)):
        before, after, back = balancer_of(names), balancer_of(tasks), balancer_of(names)
        for towards in (4.0, -0.8, 1.0):
            direction(before, towards, present)
        saved = before.gradient.state_dict()
        if not saved:
            return
        after.load_state_dict(with_tasks(before.state_dict(), after))
        back.load_state_dict(with_tasks(after.state_dict(), back))
        _require_same(back.gradient.state_dict(), saved, f"tasks {tasks} and back")
        for step, towards in enumerate((-0.8, 4.0, -0.8)):
            got, expected = (direction(each, towards, present) for each in (after, before))
            how = f"of {present}, step {step} after {names} became {tasks}: coordinate"
            require_close(got, expected, 1e-9 * size_of(turned(rows, towards)), how)


def state_of_losses_goes_to_other_tasks(subject: WeightingSubject, sample: LossSample) -> None:
    """Each task that stays keeps its entries, whatever its place; there and back is as before."""
    old = Balancer(subject.make(), Sum(), tasks=_NAMES)
    train(old.weighting, 5, sample.seed)
    saved = old.weighting.state_dict()
    for tasks in (("2", _NEW, "0"), ("2", "0", "1"), (*_NAMES[:1], _NEW, *_NAMES[1:])):
        try:
            after = Balancer(subject.make(), Sum(), tasks=tasks)
        except ValueError:  # an option has an entry for each of three tasks
            require(len(tasks) != TASKS, f"tasks {tasks} were refused, {_NAMES} were not")
            continue
        after.load_state_dict(with_tasks(old.state_dict(), after))
        now = after.weighting.state_dict()
        for task in set(tasks) & set(_NAMES) if len(tasks) == TASKS else ():
            was, found = (
                entries_of(state, order.index(task))
                for state, order in ((saved, _NAMES), (now, tasks))
            )
            for name in was.keys() | found.keys():
                same = name in was and name in found and bits(was[name]) == bits(found[name])
                words = f"{name} of task {task} was {was.get(name)}, is {found.get(name)}"
                require(same, f"{words}, where {_NAMES} became {tasks}")
        if set(_NAMES) <= set(tasks):
            back = Balancer(subject.make(), Sum(), tasks=_NAMES)
            back.load_state_dict(with_tasks(after.state_dict(), back))
            _require_same(back.weighting.state_dict(), saved, f"tasks {tasks} and back")


def _require_same(now: Mapping[str, Tensor], was: Mapping[str, Tensor], how: str) -> None:
    """Require that two states are the same, up to rounding."""
    require(now.keys() == was.keys(), f"{how}: the state is of {sorted(now)}, not {sorted(was)}")
    for name, value in was.items():
        wide = value.double().nan_to_num()  # NaN stands for nothing yet
        require_close(
            now[name].double().nan_to_num(),
            wide,
            1e-6 * float(wide.abs().max()) if wide.numel() else 0.0,
            f"{how}: {name}",
        )
