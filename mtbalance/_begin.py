"""What comes before a step: is everything there, where is it balanced, what are the losses."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mtbalance._checks import check_batches, check_losses_by_task, check_validation
from mtbalance._company import Losses, Validation
from mtbalance._engines import refuse_engines_of
from mtbalance._places import features_of
from mtbalance._seen import Seen
from mtbalance._step import Setting
from mtbalance._task_gradients import TaskGradients


def checked(
    setting: Setting,
    pending: TaskGradients,
    batches: Sequence[Validation] = (),
    features: Tensor | Sequence[Tensor] | None = None,
) -> Setting:
    """Return the setting, with further batches, at the features if tasks are balanced there.

    Args:
        setting: Who takes the step, and with what.
        pending: What has been accumulated; of several processes, an error ends the step for all.
        batches: Return the losses of further batches.
        features: The features, if any.
    """
    if setting.weighting.needs_validation or batches or setting.gradient.further_batches:
        try:
            if setting.weighting.needs_validation:
                check_validation(setting.weighting, setting.validation)
                setting.weighting.check_ready()
            check_batches(setting.gradient, batches)
        except (TypeError, ValueError) as error:
            if setting.company.size > 1:
                pending.clear()
            setting.company.agree(Seen(), error)
        if setting.gradient.further_batches:  # else one loop serves every strategy
            setting = setting._replace(batches=tuple(batches))
    if features is None:
        return setting
    if pending:
        raise RuntimeError(
            "`features` must be None after accumulate(), but got tensors. Features belong to "
            "one backward pass."
        )
    place = features_of(features, setting.weighting, setting.gradient, setting.company)
    return setting if setting.one_pass_serves else setting._replace(place=place)


def look(losses: Losses, tasks: Sequence[str], setting: Setting, *, agree: bool = True) -> Seen:
    """Check the losses, and let all processes know: they stop or go on together.

    Args:
        losses: The losses of this process.
        tasks: All tasks.
        setting: Who takes the step, and where.
        agree: Whether the processes tell each other; an error is told in any case.
    """
    company, place = setting.company, setting.place
    seen, error = Seen(), None
    try:
        named = check_losses_by_task(losses, tasks, may_be_empty=True)
        _check_mode()
        place.check(named)
        first = setting.watch.look(named.values())
        seen = company.look(named, setting.policy.losses(named), place)
        if first:  # to look takes tenths of a second where DeepSpeed has been imported
            refuse_engines_of(seen.reach.leaves)
    except (TypeError, ValueError) as caught:
        error = caught
    return company.agree(seen, error) if agree or error is not None else seen


def _check_mode() -> None:
    """Raise where no backward pass can be made."""
    if torch.is_inference_mode_enabled():
        raise ValueError(
            "losses must be balanced outside of torch.inference_mode(), which allows no backward "
            "pass, but got some inside. torch.no_grad() does."
        )
