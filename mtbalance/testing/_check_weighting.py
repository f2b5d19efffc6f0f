"""Hold a weighting to its contract and its traits, or find out which it has."""

from collections.abc import Callable, Iterable

from mtbalance.weighting import Weighting

from ._check import Report, check_maker, left, trials
from ._traits import HAVING, WEIGHTINGS, numbers_of_tasks_pick_their_weights
from ._violation import Violation
from ._weighting import Trait, WeightingProperty, WeightingSubject


def check_weighting(
    make: Callable[[], Weighting],
    *,
    traits: Iterable[Trait] = (),
    seeds: Iterable[int] = range(5),
    without: Iterable[str] = (),
) -> Report:
    """Check what holds for every weighting, and what this one is said to be.

    Args:
        make: Returns a new weighting for three tasks, such as the class itself.
        traits: What is said of it. ``STATELESS``, ``LEARNS_BY_GRADIENT``, ``SHARED_OUT`` and
            ``COUPLED`` must be said where they are true, as they decide what else is checked.
        seeds: One series of losses is made for each of these.
        without: Names of properties that are not asked, such as
            "state_of_losses_goes_to_other_tasks" of a weighting that refuses that on purpose.

    Returns:
        What was checked, and which further traits were there in all trials.

    Raises:
        Violation: If a property does not hold. The message names it, the call that makes the losses
            again, and both numbers.
        TypeError: If ``make`` makes something else.

    Example:
        >>> from mtbalance.weighting import DWA
        >>> report = check_weighting(DWA, traits=[Trait.SHARED_OUT, Trait.SUMS_TO_M])
        >>> Trait.POSITIVE in report.unclaimed
        True
    """
    given, said = tuple(seeds), frozenset(traits)
    check_maker(make, Weighting, "check_gradient_strategy")
    subject = WeightingSubject(make, said)
    every = [*WEIGHTINGS, *(HAVING[trait] for trait in Trait if trait in said & set(HAVING))]
    properties = left(every, without)
    count = 0
    with trials():
        for each in properties:
            for sample in each.samples(given):
                each(subject, sample)
                count += 1
    unsaid = traits_of(make, seeds=given) - said
    return Report(subject.name, tuple(each.name for each in properties), count, unsaid)


def traits_of(
    make: Callable[[], Weighting], *, seeds: Iterable[int] = range(5)
) -> frozenset[Trait]:
    """Return the traits that a weighting had in all trials.

    Args:
        make: Returns a new weighting for three tasks.
        seeds: One series of losses is made for each of these.

    Example:
        >>> from mtbalance.weighting import Equal
        >>> Trait.STATELESS in traits_of(Equal)
        True
    """
    given = tuple(seeds)
    picks = WeightingProperty(numbers_of_tasks_pick_their_weights, "")
    plain, shared = WeightingSubject(make), WeightingSubject(make, frozenset({Trait.SHARED_OUT}))
    with trials():
        found = {trait for trait, each in HAVING.items() if _survives(plain, each, given)}
        # Weights that stay as they are keep their ratios, too: sharing out is what only does that.
        if _survives(shared, picks, given) and not _survives(plain, picks, given):
            found.add(Trait.SHARED_OUT)
    return frozenset(found)


def _survives(subject: WeightingSubject, each: WeightingProperty, seeds: tuple[int, ...]) -> bool:
    try:
        for sample in each.samples(seeds):
            each(subject, sample)
    except Violation:
        return False
    return True
