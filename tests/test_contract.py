"""What holds for every strategy: the catalogue, held to the properties of ``mtbalance.testing``.

The properties themselves, each with the matrices that it is about, are in the kit; here many of
these matrices are drawn, and Hypothesis looks for a small one where a property does not hold.
"""

import inspect
from collections.abc import Callable
from itertools import combinations, islice

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import mtbalance.gradient
import mtbalance.weighting
from mtbalance.gradient import GradientStrategy
from mtbalance.testing import (
    ALWAYS,
    CLAIMED,
    HAVING,
    WEIGHTINGS,
    Claim,
    Property,
    Sample,
    Subject,
    Violation,
    WeightingProperty,
    WeightingSubject,
    check_differ,
    properties_of,
)
from mtbalance.weighting import Weighting
from tests._catalogue import (
    GRADIENT_CASES,
    WEIGHTING_CASES,
    GradientCase,
    WeightingCase,
    gradient_cases,
    weighting_cases,
)
from tests._closeness import near_a_jump, slack_of, tolerance_of
from tests._oracles import array, least_norm_weights
from tests._samplers import (
    BY_NAME,
    DTYPES,
    FAMILIES,
    chances_for,
    chances_of_losses_for,
    gradients,
    losses_for,
    samples_for,
)

# Of some matrices drawn here, strategies say that there is no answer, and fall back.
pytestmark = pytest.mark.filterwarnings("ignore:.* fell back:RuntimeWarning")


# --- the catalogue --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("package", "base", "cases"),
    [
        (mtbalance.gradient, GradientStrategy, GRADIENT_CASES),
        (mtbalance.weighting, Weighting, WEIGHTING_CASES),
    ],
    ids=["gradient", "weighting"],
)
def test_every_exported_strategy_is_in_the_catalogue(package, base, cases) -> None:
    """Whoever adds a strategy to ``__all__`` must say here what it claims."""
    exported = [getattr(package, name) for name in package.__all__]
    strategies = {
        value
        for value in exported
        if inspect.isclass(value) and issubclass(value, base) and not inspect.isabstract(value)
    }
    assert strategies
    assert strategies == {type(case.make()) for case in cases}


@pytest.mark.parametrize("package", [mtbalance.gradient, mtbalance.weighting])
def test_every_strategy_is_exported(package) -> None:
    """A class that is written but not in ``__all__`` would escape the catalogue."""
    bases = (GradientStrategy, Weighting)
    written = {
        name
        for name, value in vars(package).items()
        if inspect.isclass(value) and issubclass(value, bases)
    }
    assert written == {
        name
        for name in package.__all__
        if inspect.isclass(getattr(package, name)) and issubclass(getattr(package, name), bases)
    }


def test_names_of_cases_are_unique() -> None:
    names = [case.name for case in (*GRADIENT_CASES, *WEIGHTING_CASES)]
    assert len(set(names)) == len(names)


# --- the matrices themselves ----------------------------------------------------------------------


def _has_conflict(rows: Tensor) -> bool:
    return bool((rows.double() @ rows.double().T < 0).any())


def _two_rows(rows: Tensor, related: Callable[[Tensor, Tensor], bool]) -> bool:
    m = len(rows)
    return any(related(rows[i], rows[j]) for i in range(m) for j in range(m) if i != j)


def _units(rows: Tensor) -> Tensor:
    return rows.double() / rows.double().norm(dim=1, keepdim=True)


def _least_norm(rows: Tensor) -> float:
    """Return the distance of the rows' convex hull from zero."""
    scaled = array(rows) / float(rows.abs().max())
    weights = least_norm_weights(scaled, np.ones(len(scaled)))
    return float(np.linalg.norm(weights @ scaled)) * float(rows.abs().max())


def _spread(rows: Tensor) -> float:
    norms = rows.double().norm(dim=1)
    return float(norms.max() / norms.min())


STRUCTURE: dict[str, Callable[[Tensor], bool]] = {
    "generic": lambda rows: True,
    "conflicting": _has_conflict,
    "non_conflicting": lambda rows: not _has_conflict(rows),
    "rank_deficient": lambda rows: int(torch.linalg.matrix_rank(rows.double())) < min(rows.shape),
    "duplicate_rows": lambda rows: _two_rows(rows, lambda a, b: torch.equal(a, b) and a.any()),
    "opposite_rows": lambda rows: _two_rows(
        rows, lambda a, b: bool(a.any()) and any(torch.equal(b, -k * a) for k in range(1, 5))
    ),
    "zero_rows": lambda rows: not rows.any(dim=1).all(),
    "near_parallel": lambda rows: bool((_units(rows) @ _units(rows).T > 0.85).all()),
    "unequal_norms": lambda rows: len(rows) == 1 or _spread(rows) >= 2**40 / 22,
    "stationary": lambda rows: _least_norm(rows) < 1e-12 * float(rows.double().abs().max()),
}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@given(data=st.data())
@settings(max_examples=25)
def test_matrices_have_the_structure_they_promise(family, data) -> None:
    """The proofs in the docstrings of the families, checked on the rounded, scaled numbers."""
    rows = data.draw(gradients([family.name], dtypes=DTYPES))
    assert torch.isfinite(rows).all()
    assert STRUCTURE[family.name](rows)


def test_every_family_has_a_check() -> None:
    assert set(STRUCTURE) == set(BY_NAME)


# --- gradient strategies --------------------------------------------------------------------------


def subject_of(case: GradientCase) -> Subject:
    """Return how closely the kit is to look at a case: bit for bit wherever nothing is rounded."""
    return Subject(
        case.make,
        case.identical,
        None if case.max_tasks == 8 else case.max_tasks,
        tolerance=lambda rows: tolerance_of(case, rows),
        unclear=lambda rows: near_a_jump(case, rows),
        slack=lambda rows: slack_of(case, rows),
        exact=True,
        who=case.name,
    )


@pytest.mark.parametrize("prop", ALWAYS, ids=lambda prop: prop.name)
@gradient_cases()
def test_every_gradient_strategy(case: GradientCase, prop: Property) -> None:
    search(prop, subject_of(case))


@pytest.mark.parametrize(
    ("case", "prop"),
    [
        pytest.param(case, prop, id=f"{case.name}-{prop.name}")
        for case in GRADIENT_CASES
        for claim in sorted(case.claims, key=list(Claim).index)
        for prop in CLAIMED[claim]
    ],
)
def test_claims_hold(case: GradientCase, prop: Property) -> None:
    search(prop, subject_of(case))


HARD = (
    ("ConFIG", "linear_in_scales", Sample("stationary", 4, 2, 13056, 2.0**20)),
    ("PCD-much", "rotates", Sample("stationary", 8, 6, 29416, 2.0**67)),
    ("Smoothed", "rotates", Sample("rank_deficient", 8, 5, 4895)),
    ("FairGrad", "order_free", Sample("unequal_norms", 7, 5, 58343, dtype=torch.float32)),
    (
        "AlignedMTL-median",
        "homogeneous_in_powers_of_two",
        Sample("unequal_norms", 3, 16, 2317, 2.0**-67, torch.float32),
    ),
    ("AlignedMTL-rmse", "order_free", Sample("unequal_norms", 8, 4, 24520, 2.0**67)),
    ("DualProj", "no_conflict_left", Sample("generic", 8, 3, 59627, dtype=torch.float32)),
    (
        "FairGrad-throughput",
        "no_conflict_left",
        Sample("unequal_norms", 8, 5, 46094, dtype=torch.float32),
    ),
    ("RowMean-uncorrected", "no_conflict_left", Sample("generic", 8, 4, 49968)),
    (
        "RowMean",
        "order_free",
        Sample("rank_deficient", 6, 16, 38377, 2.0**67, torch.float32),
    ),
    ("NashMTL", "scale_free", Sample("non_conflicting", 1, 2, 26070)),
    ("GradOPS-ahead", "rotates", Sample("opposite_rows", 4, 17, 40102)),
    (
        "IMTLG",
        "low_precision_only_rounds",
        Sample("rank_deficient", 3, 21, 57444, dtype=torch.bfloat16),
    ),
    (
        "PCD",
        "low_precision_only_rounds",
        Sample("unequal_norms", 6, 2, 30098, dtype=torch.bfloat16),
    ),
)
"""Where rounding is magnified, lost or nothing but noise is left, by strategy and property."""


@pytest.mark.parametrize(
    ("who", "name", "sample"), HARD, ids=[f"{who}-{name}" for who, name, _ in HARD]
)
def test_where_little_is_left_to_know(who: str, name: str, sample: Sample) -> None:
    (case,) = (case for case in GRADIENT_CASES if case.name == who)
    known = [*ALWAYS, *(prop for claimed in CLAIMED.values() for prop in claimed)]
    (prop,) = (prop for prop in known if prop.name == name)
    assert prop(subject_of(case), sample)


@pytest.mark.parametrize(
    ("who", "sample"),
    [
        # Three scores of Krum that differ by 1e-15 or so, and two least slopes that are equal.
        ("Krum-some", Sample("near_parallel", 3, 27, 50516)),
        ("MoCo", Sample("rank_deficient", 3, 15, 46606, 2.0**20, torch.float32)),
        ("MoDo", Sample("conflicting", 7, 29, 16255, 2.0**20)),
    ],
)
def test_where_rounding_decides(who: str, sample: Sample) -> None:
    (case,) = (case for case in GRADIENT_CASES if case.name == who)
    assert near_a_jump(case, sample.rows())
    assert not near_a_jump(case, sample.but(seed=0, scale=1.0, dtype=torch.float64).rows())


def search(prop: Property, subject: Subject) -> None:
    """Look for a matrix at which a property does not hold, and then for a small one."""
    samples = islice(chances_for(prop, subject), 10 * prop.examples)
    try:
        # Some prove nothing, and others take their place.
        proven = sum(islice(filter(None, (prop(subject, each) for each in samples)), prop.examples))
    except Violation:
        search_small(prop, subject)
        raise
    assert proven == prop.examples


def search_small(prop: Property, subject: Subject) -> None:
    """Let Hypothesis look for a matrix at which a property does not hold."""

    @given(sample=samples_for(prop, subject))
    @settings(max_examples=prop.examples)
    def holds(sample) -> None:
        assume(prop(subject, sample))

    holds()


@gradient_cases()
def test_claim_to_work_by_coordinates_agrees_with_the_class(case: GradientCase) -> None:
    """The Balancer hands columns over in blocks exactly where ``coordinatewise`` is set."""
    strategy = case.make()
    assert strategy.coordinatewise == (Claim.COORDINATEWISE in case.claims)
    rows = torch.tensor([[1.0, 0.0, 3.0], [-1.0, 1.0, 0.0], [0.5, -1.0, -1.0]])
    whole = case.make()(rows)
    strategy.start()
    parts = torch.cat([strategy.on_columns(rows[:, :2], 0), strategy.on_columns(rows[:, 2:], 2)])
    if not strategy.coordinatewise and case.name != "CAGrad-no-radius":
        assert (parts - whole).abs().max() > 1e-3


@gradient_cases()
def test_trials_find_every_claim(case: GradientCase) -> None:
    """What the table of properties is computed by, against what is claimed."""
    assert case.claims <= properties_of(case.make, seeds=range(1), max_tasks=case.max_tasks)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name)
        for case in GRADIENT_CASES
        if any(not name.endswith("_extra_state") for name in case.make().state_dict())
    ],
)
def test_trials_find_every_claim_in_later_steps(case: GradientCase) -> None:
    """But for those of the first step alone, against which some trial speaks then."""
    seeds = range(2 if case.first else 1)
    found = properties_of(case.make, seeds=seeds, max_tasks=case.max_tasks, steps=3)
    assert case.claims - case.first <= found
    if case.name != "GradVac":  # by a beta of 0.01, few steps turn little
        assert not case.first & found


ALIKE = (
    # All that is dropped leaks; a ball of 0; nothing is trimmed.
    {"Sum", "GradDrop-all-leaks", "CAGrad-no-radius", "TrimmedMean-none"},
    {"PCGrad", "GradVac"},  # in the first step
    {"PCGrad-fixed", "GradVac-fixed", "Smoothed-gradvac"},
    {"UPGrad", "Smoothed", "RowMean"},  # in the first step
    {"MGDA", "RowMean-recall"},
    {"MoCo", "MoDo"},
    {"GradDrop", "RowMean-graddrop"},
    {"Normalized-Sum-max", "RowMean-normalized", "DBMTL"},
    {"NashMTL", "FairGrad"},  # alpha = 1 is Nash's bargain
    {"IMTLG", "IMTLG-official"},  # which turns it round where the weights' sum is negative
)
"""Settings that are one method by their formulas."""


def test_no_two_cases_are_one_in_disguise() -> None:
    for one, other in combinations(GRADIENT_CASES, 2):
        if any({one.name, other.name} <= names for names in ALIKE):
            with pytest.raises(Violation, match="differ"):
                check_differ(one.make, other.make)
        else:
            check_differ(one.make, other.make)


@gradient_cases()
def test_repr_names_the_settings(case: GradientCase) -> None:
    strategy = case.make()
    text = repr(strategy)
    assert text.startswith(type(strategy).__name__ + "(")
    settings_of = [name for name in vars(strategy) if name in ("c", "rescale", "leak", "order")]
    for name in settings_of:
        assert f"{name}=" in text


# --- weightings -----------------------------------------------------------------------------------


@pytest.mark.parametrize("prop", WEIGHTINGS, ids=lambda prop: prop.name)
@weighting_cases()
def test_every_weighting(case: WeightingCase, prop: WeightingProperty) -> None:
    search_losses(prop, WeightingSubject(case.make, case.traits, case.name))


@pytest.mark.parametrize(
    ("case", "prop"),
    [
        pytest.param(case, prop, id=f"{case.name}-{prop.name}")
        for case in WEIGHTING_CASES
        for trait, prop in HAVING.items()
        if trait in case.traits
    ],
)
def test_traits_are_there(case: WeightingCase, prop: WeightingProperty) -> None:
    search_losses(prop, WeightingSubject(case.make, case.traits, case.name))


def search_losses(prop: WeightingProperty, subject: WeightingSubject) -> None:
    """Look for losses for which a property does not hold, and then for simple ones."""
    try:
        for sample in islice(chances_of_losses_for(prop, subject), prop.examples):
            prop(subject, sample)
    except Violation:
        search_simple_losses(prop, subject)
        raise


def search_simple_losses(prop: WeightingProperty, subject: WeightingSubject) -> None:
    """Let Hypothesis look for losses for which a property does not hold."""

    @given(sample=losses_for(prop))
    @settings(max_examples=prop.examples)
    def holds(sample) -> None:
        prop(subject, sample)

    holds()


@weighting_cases()
def test_state_of_another_number_of_tasks_is_refused(case: WeightingCase) -> None:
    if case.name == "Uncertainty-kinds" or not case.make().bind(list("abc")).state_dict():
        return
    saved = case.make().bind(["a", "b"]).state_dict()
    if set(saved) == {"random._extra_state"}:  # nothing of any task
        return
    with pytest.raises(RuntimeError, match="size mismatch"):
        case.make().bind(["a", "b", "c"]).load_state_dict(saved)


@weighting_cases()
def test_repr_of_weightings(case: WeightingCase) -> None:
    weighting = case.make()
    assert repr(weighting).startswith(type(weighting).__name__ + "(")
    for name in inspect.signature(type(weighting)).parameters:
        if name in vars(weighting):
            assert f"{name}=" in repr(weighting)
