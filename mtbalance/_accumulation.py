"""What is accumulated for a step, and what becomes of it when something goes wrong in between."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from mtbalance._begin import look
from mtbalance._company import Company, Losses
from mtbalance._names import outermost_modules
from mtbalance._seen import Seen
from mtbalance._step import Setting
from mtbalance._task_gradients import TaskGradients


def add_micro_batch(
    pending: TaskGradients,
    losses: Losses,
    tasks: Sequence[str],
    setting: Setting,
    retain_graph: bool,  # noqa: FBT001
) -> None:
    """Add the rows of a micro-batch: all of them, or an error and none.

    Args:
        pending: What has been accumulated; after an error, the same, or nothing if the step is
            over.
        losses: The losses of this process.
        tasks: All tasks.
        setting: Who takes the step, and where.
        retain_graph: Whether the graphs of the losses are to last.
    """
    company, policy = setting.company, setting.policy
    setting.place.retains = retain_graph
    late = company.agrees_late
    with _told(pending, over=late):  # the others learn of an error, too, and end the step
        seen = look(losses, tasks, setting, agree=not late)
    if policy.raises and not late:
        with _told(pending, over=True):
            policy.ended("loss", seen.finite, seen.nonfinite)
    with _told(pending, over=False):
        rows = list(setting.place.rows(seen, company, setting.scaler))
    with _told(pending, over=True):  # half of them may have been added
        pending.mark_nonfinite(seen.nonfinite)
        while rows:
            pending.add(rows.pop(0))


def seen_of(pending: TaskGradients, company: Company) -> Seen:
    """Return what all processes know of what has been accumulated, or raise if nothing has."""
    seen = company.agree(Seen.of_accumulated(pending))
    if not (seen.losses or seen.nonfinite):
        raise RuntimeError("apply() must follow accumulate(), but nothing has been accumulated.")
    return seen


@contextmanager
def _told(pending: TaskGradients, *, over: bool) -> Iterator[None]:
    """Discard what has been accumulated if an error ends the step; say what becomes of it."""
    try:
        yield
    except BaseException as error:
        if pending and isinstance(error, ArithmeticError | RuntimeError | TypeError | ValueError):
            what = (
                "What was accumulated before is discarded, as the step is over."
                if over
                else "What was accumulated before is kept; balancer.discard() drops it."
            )
            error.args = (f"{error} {what}",)
        if over:
            pending.clear()
        raise


def discard_at_loading(pending: TaskGradients) -> None:
    """Discard what has been accumulated before a state is loaded, and warn if that is anything."""
    if pending:
        pending.clear()
        warnings.warn(
            "what has been accumulated since the last apply() is discarded, as a state is loaded. "
            "Call balancer.discard() before, if that is meant.",
            UserWarning,
            stacklevel=2,
        )


def check_copied_with_model(pending: TaskGradients) -> None:
    """Raise if gradients were copied with their Balancer, but not the model that they are of."""
    if not pending.from_models:
        return
    held = {id(p) for module in outermost_modules() for p in module.parameters()}
    if any(id(leaf) not in held for leaf in pending.from_models):
        raise RuntimeError(
            "apply() must write to the parameters of a model, but this Balancer was copied without "
            "it after accumulate(). Copy both at once, copy.deepcopy((model, balancer)), or call "
            "balancer.discard()."
        )
