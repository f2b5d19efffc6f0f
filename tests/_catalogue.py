"""Every public strategy: how to build it, and what it claims.

``test_contract.py`` crosses this table with the matrices of ``mtbalance.testing`` and holds every
entry to its claims; it fails when a strategy that the package exports is not listed here. To add a
strategy, add an entry per setting that behaves differently.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass

import pytest

from mtbalance.gradient import (
    DBMTL,
    IMTLG,
    MGDA,
    PCD,
    AlignedMTL,
    CAGrad,
    ConFIG,
    DualProj,
    FairGrad,
    GradDrop,
    GradientCosine,
    GradientStrategy,
    GradOPS,
    GradVac,
    Krum,
    MoCo,
    MoDo,
    NashMTL,
    Normalized,
    PCGrad,
    RandomGradient,
    RowMean,
    SDMGrad,
    Smoothed,
    Sum,
    TrimmedMean,
    UPGrad,
)
from mtbalance.testing import Claim, Trait
from mtbalance.testing._weighting import optimizer_of_a_point
from mtbalance.weighting import (
    COSMOS,
    DWA,
    FAMO,
    IMTLL,
    PBI,
    STCH,
    AutoLambda,
    Constant,
    Equal,
    ExcessMTL,
    GeometricMean,
    GO4Align,
    GradNorm,
    LogLoss,
    RandomWeighting,
    Uncertainty,
    UncertaintySoftmax,
    WarmUp,
    Weighting,
)

ORDER_FREE = Claim.ORDER_FREE
GEOMETRIC = {Claim.ROTATES, Claim.ODD, Claim.HOMOGENEOUS}


@dataclass(frozen=True)
class GradientCase:
    """One setting of a gradient strategy."""

    name: str
    make: Callable[[], GradientStrategy]
    claims: frozenset[Claim]
    identical: float = 1.0
    """m equal rows g give this times m g."""
    max_tasks: int = 8
    first: frozenset[Claim] = frozenset()
    """Those of its claims that are of its first step only, before it remembers any."""


def _gradient_case(
    name: str,
    make: Callable[[], GradientStrategy],
    claims: set[Claim],
    first: Collection[Claim] = (),
    **rest: float,
) -> GradientCase:
    return GradientCase(name, make, frozenset(claims), first=frozenset(first), **rest)  # type: ignore[arg-type]


_CAGRAD = {ORDER_FREE, Claim.DOUBLES, Claim.IGNORES_ZERO_ROWS, *GEOMETRIC}
_ALIGNED = {ORDER_FREE, Claim.DOUBLES, Claim.IGNORES_ZERO_ROWS, *GEOMETRIC}
_BARGAINS = {
    ORDER_FREE,
    Claim.DOUBLES,
    Claim.IGNORES_ZERO_ROWS,
    Claim.NO_CONFLICT_LEFT,
    *GEOMETRIC,
}
_GRADDROP = {
    ORDER_FREE,
    Claim.HOMOGENEOUS,
    Claim.DOUBLES,
    Claim.IGNORES_ZERO_ROWS,
    Claim.COORDINATEWISE,
}
# Each projected row is a multiple of its own, and the others' directions are all that it sees.
_PROJECTED = {*GEOMETRIC, Claim.SUM_WITHOUT_CONFLICT, Claim.LINEAR_IN_SCALES}
_DUAL_CONE = {
    ORDER_FREE,
    Claim.DOUBLES,
    Claim.IGNORES_ZERO_ROWS,
    Claim.SUM_WITHOUT_CONFLICT,
    Claim.NO_CONFLICT_LEFT,
    *GEOMETRIC,
}
_OFF_THE_OTHERS = {ORDER_FREE, Claim.IGNORES_ZERO_ROWS, Claim.NO_CONFLICT_LEFT, *GEOMETRIC}
_EQUIANGULAR = {ORDER_FREE, Claim.DOUBLES, Claim.IGNORES_ZERO_ROWS, *GEOMETRIC}
_MGDA = {ORDER_FREE, Claim.DOUBLES, Claim.NO_CONFLICT_LEFT, *GEOMETRIC}

# Of a strategy around which weights or rows are averaged: those of earlier gradients serve the new
# ones only in part, and no sum or angle is that of the new rows alone.
_NOT_OF_MEANS = {Claim.SUM_WITHOUT_CONFLICT, Claim.NO_CONFLICT_LEFT}
_NORMALIZED = {ORDER_FREE, Claim.DOUBLES, Claim.IGNORES_ZERO_ROWS, *GEOMETRIC}
_TRIMMED = {ORDER_FREE, Claim.ODD, Claim.HOMOGENEOUS, Claim.COORDINATEWISE}

GRADIENT_CASES = (
    _gradient_case("Sum", Sum, set(Claim) - {Claim.NO_CONFLICT_LEFT, Claim.SCALE_FREE}),
    _gradient_case("GradDrop", GradDrop, _GRADDROP),
    _gradient_case("GradDrop-leak", lambda: GradDrop(leak=0.3, seed=3), _GRADDROP),
    _gradient_case(
        "GradDrop-all-leaks", lambda: GradDrop(leak=1.0), {*_GRADDROP, Claim.LINEAR_IN_SCALES}
    ),
    _gradient_case("PCGrad", PCGrad, _PROJECTED),
    _gradient_case(
        "PCGrad-fixed",
        lambda: PCGrad(order="fixed"),
        {*_PROJECTED, Claim.IGNORES_ZERO_ROWS},
    ),
    _gradient_case(
        "PCGrad-expectation",
        lambda: PCGrad(expectation=True),
        {*_PROJECTED, ORDER_FREE, Claim.IGNORES_ZERO_ROWS},
        max_tasks=6,
    ),
    _gradient_case(
        "PCGrad-primary", lambda: PCGrad(primary=0), {*GEOMETRIC, Claim.SUM_WITHOUT_CONFLICT}
    ),
    # Later, rows without a conflict are turned, too, to the cosine that is usual by then.
    _gradient_case(
        "GradVac",
        GradVac,
        {*GEOMETRIC, Claim.SUM_WITHOUT_CONFLICT},
        first={Claim.SUM_WITHOUT_CONFLICT},
    ),
    _gradient_case(
        "GradVac-fixed",
        lambda: GradVac(0.5, order="fixed"),
        {*GEOMETRIC, Claim.SUM_WITHOUT_CONFLICT, Claim.IGNORES_ZERO_ROWS},
        first={Claim.SUM_WITHOUT_CONFLICT},
    ),
    _gradient_case(
        "GradOPS",
        GradOPS,
        {*_OFF_THE_OTHERS, Claim.SUM_WITHOUT_CONFLICT},
    ),
    _gradient_case("GradOPS-behind", lambda: GradOPS(alpha=-1.5), _OFF_THE_OTHERS),
    _gradient_case("GradOPS-ahead", lambda: GradOPS(alpha=0.5), _OFF_THE_OTHERS),
    # m equal rows g: g_w = g0 = g for every w, so d = m (1 + c) g over the divisor.
    _gradient_case("CAGrad", CAGrad, _CAGRAD, identical=1.4 / 1.16),
    _gradient_case("CAGrad-raw", lambda: CAGrad(c=0.9, rescale=0), _CAGRAD, identical=1.9),
    _gradient_case("CAGrad-divided", lambda: CAGrad(c=0.5, rescale=2), _CAGRAD, identical=1.0),
    _gradient_case(
        "CAGrad-wide",
        lambda: CAGrad(c=1.5),
        {*_CAGRAD, Claim.NO_CONFLICT_LEFT},
        identical=2.5 / 3.25,
    ),
    _gradient_case(
        "CAGrad-no-radius",
        lambda: CAGrad(c=0),
        {*_CAGRAD, Claim.SUM_WITHOUT_CONFLICT, Claim.LINEAR_IN_SCALES},
    ),
    _gradient_case("AlignedMTL", AlignedMTL, _ALIGNED),
    _gradient_case("AlignedMTL-median", lambda: AlignedMTL("median"), _ALIGNED),
    _gradient_case("AlignedMTL-rmse", lambda: AlignedMTL("rmse"), _ALIGNED),
    _gradient_case("AlignedMTL-blunt", lambda: AlignedMTL(rtol=1e-6), _ALIGNED),
    _gradient_case("NashMTL", NashMTL, {*_BARGAINS, Claim.SCALE_FREE}),
    _gradient_case("UPGrad", UPGrad, {*_DUAL_CONE, Claim.LINEAR_IN_SCALES}),
    _gradient_case("DualProj", DualProj, _DUAL_CONE),
    _gradient_case("ConFIG", ConFIG, {*_EQUIANGULAR, Claim.LINEAR_IN_SCALES}),
    _gradient_case("IMTLG", IMTLG, {*_EQUIANGULAR, Claim.SCALE_FREE}),
    _gradient_case("IMTLG-official", lambda: IMTLG(normalize="official"), _EQUIANGULAR),
    _gradient_case("MGDA", MGDA, _MGDA),
    _gradient_case(
        "MGDA-ignoring",
        lambda: MGDA(ignore_zero_rows=True),
        {*_MGDA, Claim.IGNORES_ZERO_ROWS},
    ),
    _gradient_case("Normalized-Sum", lambda: Normalized(Sum()), _NORMALIZED),
    _gradient_case("Normalized-Sum-max", lambda: Normalized(Sum(), "max"), _NORMALIZED),
    _gradient_case(
        "Normalized-UPGrad-min",
        lambda: Normalized(UPGrad(), "min"),
        {*_NORMALIZED, Claim.NO_CONFLICT_LEFT},
    ),
    _gradient_case("RandomGradient", RandomGradient, {*GEOMETRIC, Claim.LINEAR_IN_SCALES}),
    # The products of the rows with themselves stand for those of two batches.
    _gradient_case("MoDo", MoDo, {ORDER_FREE, Claim.ROTATES, Claim.ODD}),
    # Steps as large as the authors' may magnify rounding: what is no symmetry of each digit is only
    # true of smaller ones.
    _gradient_case("SDMGrad", SDMGrad, {Claim.ODD}),
    _gradient_case("SDMGrad-small", lambda: SDMGrad(lr=0.05), {ORDER_FREE, *GEOMETRIC}),
    _gradient_case("Smoothed", lambda: Smoothed(UPGrad(), alpha=0.9), _DUAL_CONE, _NOT_OF_MEANS),
    _gradient_case(
        "Smoothed-gradvac",
        lambda: Smoothed(GradVac(order="fixed"), alpha=0.5),
        {*GEOMETRIC, Claim.SUM_WITHOUT_CONFLICT, Claim.IGNORES_ZERO_ROWS},
        first={Claim.SUM_WITHOUT_CONFLICT},
    ),
    _gradient_case("RowMean", lambda: RowMean(UPGrad()), _DUAL_CONE, _NOT_OF_MEANS),
    _gradient_case(
        "RowMean-uncorrected",
        lambda: RowMean(UPGrad(), 0.5, correct=False),
        _DUAL_CONE - {Claim.SUM_WITHOUT_CONFLICT},
        first={Claim.NO_CONFLICT_LEFT},
        identical=0.5,
    ),
    _gradient_case(
        "RowMean-recall",
        lambda: RowMean(MGDA(), recall=True),
        _MGDA,
        first={Claim.NO_CONFLICT_LEFT},
    ),
    # What it remembers is of whole rows, of which blocks of columns alone are no part.
    _gradient_case(
        "RowMean-graddrop",
        lambda: RowMean(GradDrop()),
        _GRADDROP,
        first={Claim.COORDINATEWISE},
    ),
    _gradient_case("RowMean-normalized", lambda: RowMean(Normalized(Sum(), "max")), _NORMALIZED),
    _gradient_case("DBMTL", DBMTL, _NORMALIZED),
    _gradient_case(
        "DBMTL-published",
        lambda: DBMTL(0.5, sigma=0.5, correct=False),
        _NORMALIZED,
        identical=0.5,
    ),
    # Not ROTATES: weights jump between tasks whose slopes differ by rounding, if rows are long.
    _gradient_case("MoCo", MoCo, {ORDER_FREE, Claim.ODD}),
    _gradient_case(
        "MoCo-softmax", lambda: MoCo(projection="softmax", rho=0.5), {ORDER_FREE, Claim.ODD}
    ),
    _gradient_case("FairGrad", FairGrad, {*_BARGAINS, Claim.SCALE_FREE}),
    _gradient_case("FairGrad-delay", lambda: FairGrad(alpha=2.0), _BARGAINS),
    _gradient_case("FairGrad-throughput", lambda: FairGrad(alpha=0.5), _BARGAINS),
    _gradient_case(
        "GradientCosine",
        lambda: GradientCosine(primary=0),
        {*GEOMETRIC, Claim.DOUBLES, Claim.SUM_WITHOUT_CONFLICT},
    ),
    _gradient_case(
        "GradientCosine-weighted",
        lambda: GradientCosine(primary=0, weighted=True),
        {*GEOMETRIC, Claim.DOUBLES},
    ),
    _gradient_case("PCD", lambda: PCD(primary=0), GEOMETRIC),
    _gradient_case("PCD-much", lambda: PCD(primary=0, tau=0.9, beta=0.5), GEOMETRIC),
    _gradient_case(
        "PCD-none-set-back", lambda: PCD(primary=0, tau=0.0), {*GEOMETRIC, Claim.NO_CONFLICT_LEFT}
    ),
    _gradient_case("Krum", lambda: Krum(byzantine=0), GEOMETRIC),
    _gradient_case("Krum-some", lambda: Krum(byzantine=0, selected=2), GEOMETRIC),
    _gradient_case("TrimmedMean", lambda: TrimmedMean(trim=1), _TRIMMED),
    _gradient_case(
        "TrimmedMean-none",
        lambda: TrimmedMean(trim=0),
        set(Claim) - {Claim.NO_CONFLICT_LEFT, Claim.SCALE_FREE},
    ),
)


@dataclass(frozen=True)
class WeightingCase:
    """One setting of a weighting."""

    name: str
    make: Callable[[], Weighting]
    traits: frozenset[Trait]


_GRADNORM = frozenset(
    {Trait.SHARED_OUT, Trait.SUMS_TO_M, Trait.POSITIVE, Trait.LINEAR, Trait.STARTS_EQUAL}
)

WEIGHTING_CASES = (
    WeightingCase(
        "Equal",
        Equal,
        frozenset(set(Trait) - {Trait.LEARNS_BY_GRADIENT, Trait.SHARED_OUT, Trait.COUPLED}),
    ),
    WeightingCase(
        "Uncertainty",
        Uncertainty,
        frozenset({Trait.POSITIVE, Trait.STARTS_EQUAL, Trait.LEARNS_BY_GRADIENT}),
    ),
    WeightingCase(
        "Uncertainty-kinds",
        lambda: Uncertainty(kind=["classification", "regression", "classification"], init=-0.5),
        frozenset({Trait.POSITIVE, Trait.LEARNS_BY_GRADIENT}),
    ),
    WeightingCase(
        "Uncertainty-log1p",
        lambda: Uncertainty(regularizer="log1p"),
        frozenset({Trait.POSITIVE, Trait.STARTS_EQUAL, Trait.LEARNS_BY_GRADIENT}),
    ),
    WeightingCase(
        "DWA",
        DWA,
        frozenset(
            {Trait.SHARED_OUT, Trait.SUMS_TO_M, Trait.POSITIVE, Trait.LINEAR, Trait.STARTS_EQUAL}
        ),
    ),
    WeightingCase(
        "AutoLambda",
        lambda: AutoLambda(optimizer_of_a_point(), lr=0.05),
        frozenset({Trait.LINEAR, Trait.STARTS_EQUAL}),
    ),
    WeightingCase(
        "AutoLambda-bounded",
        lambda: AutoLambda(optimizer_of_a_point(), lr=0.3, minimum=0.05),
        frozenset({Trait.LINEAR, Trait.STARTS_EQUAL, Trait.POSITIVE}),
    ),
    WeightingCase(
        "Constant",
        lambda: Constant([0.1, 3.0, 1e-3]),
        frozenset({Trait.POSITIVE, Trait.LINEAR, Trait.STATELESS}),
    ),
    WeightingCase(
        "Constant-zeros",
        lambda: Constant([0.0, 2.0, 0.0]),
        frozenset({Trait.LINEAR, Trait.STATELESS}),
    ),
    WeightingCase(
        "RandomWeighting",
        RandomWeighting,
        frozenset({Trait.SHARED_OUT, Trait.SUMS_TO_M, Trait.POSITIVE, Trait.LINEAR}),
    ),
    WeightingCase(
        "GeometricMean",
        GeometricMean,
        frozenset({Trait.SHARED_OUT, Trait.POSITIVE, Trait.LINEAR, Trait.STATELESS}),
    ),
    WeightingCase("LogLoss", LogLoss, frozenset({Trait.POSITIVE, Trait.STATELESS})),
    WeightingCase(
        "IMTLL",
        IMTLL,
        frozenset({Trait.POSITIVE, Trait.STARTS_EQUAL, Trait.LEARNS_BY_GRADIENT}),
    ),
    WeightingCase(
        "UncertaintySoftmax",
        UncertaintySoftmax,
        frozenset(
            {Trait.SHARED_OUT, Trait.SUMS_TO_M, Trait.POSITIVE, Trait.LINEAR, Trait.STATELESS}
        ),
    ),
    WeightingCase("STCH", STCH, frozenset({Trait.POSITIVE})),  # in the warm-up
    WeightingCase(
        "STCH-warm",
        lambda: STCH(warmup_epochs=0),
        frozenset({Trait.POSITIVE, Trait.SHARED_OUT}),
    ),
    WeightingCase(
        "STCH-nadir",
        lambda: STCH(mu=0.5, nadir=[1.0, 20.0, 1e-3]),
        frozenset({Trait.POSITIVE, Trait.SHARED_OUT, Trait.STATELESS}),
    ),
    WeightingCase(
        "FAMO",
        FAMO,
        frozenset({Trait.SHARED_OUT, Trait.SUMS_TO_M, Trait.POSITIVE, Trait.LINEAR}),
    ),
    WeightingCase(
        "FAMO-fast",
        lambda: FAMO(gamma=0.5, lr=1.0),
        frozenset({Trait.SHARED_OUT, Trait.SUMS_TO_M, Trait.POSITIVE, Trait.LINEAR}),
    ),
    WeightingCase(
        "WarmUp-over",
        lambda: WarmUp(RandomWeighting(seed=3), epochs=0),
        frozenset({Trait.SHARED_OUT, Trait.SUMS_TO_M, Trait.POSITIVE, Trait.LINEAR}),
    ),
    # Two epochs in most tests, so that both halves are seen, and the turn in mid-run.
    WeightingCase(
        "WarmUp-DWA",
        lambda: WarmUp(DWA(), epochs=2),
        frozenset(
            {Trait.SHARED_OUT, Trait.SUMS_TO_M, Trait.POSITIVE, Trait.LINEAR, Trait.STARTS_EQUAL}
        ),
    ),
    WeightingCase(
        "WarmUp-FAMO",
        lambda: WarmUp(FAMO(), epochs=1),
        frozenset(
            {Trait.SHARED_OUT, Trait.SUMS_TO_M, Trait.POSITIVE, Trait.LINEAR, Trait.STARTS_EQUAL}
        ),
    ),
    WeightingCase(
        "WarmUp-Uncertainty",
        lambda: WarmUp(Uncertainty(), epochs=2),
        frozenset({Trait.POSITIVE, Trait.STARTS_EQUAL, Trait.LEARNS_BY_GRADIENT}),
    ),
    WeightingCase(
        "WarmUp-AutoLambda",
        lambda: WarmUp(AutoLambda(optimizer_of_a_point(), lr=0.05), epochs=1),
        frozenset({Trait.LINEAR, Trait.STARTS_EQUAL}),
    ),
    WeightingCase("COSMOS", COSMOS, frozenset({Trait.COUPLED, Trait.STATELESS})),
    WeightingCase(
        "COSMOS-preference",
        lambda: COSMOS(3.0, preference=[0.2, 5.0, 1.0]),
        frozenset({Trait.COUPLED, Trait.STATELESS}),
    ),
    WeightingCase(
        "PBI", PBI, frozenset({Trait.COUPLED, Trait.SUMS_TO_M, Trait.LINEAR, Trait.STATELESS})
    ),
    WeightingCase(
        "PBI-preference",
        lambda: PBI(0.5, preference=[0.2, 5.0, 1.0]),
        frozenset({Trait.COUPLED, Trait.LINEAR, Trait.STATELESS}),
    ),
    WeightingCase(
        "PBI-ideal",
        lambda: PBI(2.0, ideal=[-1.0, 0.1, 0.3]),
        frozenset({Trait.COUPLED, Trait.SUMS_TO_M, Trait.STATELESS}),
    ),
    WeightingCase(
        "GO4Align",
        lambda: GO4Align(eta=0.1),
        frozenset({Trait.COUPLED, Trait.POSITIVE, Trait.LINEAR}),
    ),
    WeightingCase(
        "GO4Align-together",
        lambda: GO4Align(groups=1),
        frozenset({Trait.COUPLED, Trait.POSITIVE, Trait.LINEAR, Trait.STARTS_EQUAL}),
    ),
    WeightingCase(
        "GO4Align-alone",
        lambda: GO4Align(groups=8, eta=0.1),
        frozenset({Trait.POSITIVE, Trait.LINEAR, Trait.SHARED_OUT}),
    ),
    WeightingCase("GradNorm", GradNorm, _GRADNORM),
    WeightingCase("ExcessMTL", ExcessMTL, _GRADNORM),
    WeightingCase("ExcessMTL-fast", lambda: ExcessMTL(lr=1.0), _GRADNORM - {Trait.POSITIVE}),
    WeightingCase("GradNorm-fast", lambda: GradNorm(alpha=0.12, lr=2.0), _GRADNORM),
)


def gradient_cases(*claims: Claim) -> pytest.MarkDecorator:
    """Parametrize a test by the gradient cases that make all of these claims."""
    chosen = [case for case in GRADIENT_CASES if case.claims.issuperset(claims)]
    return pytest.mark.parametrize("case", chosen, ids=lambda case: case.name)


def weighting_cases(*traits: Trait) -> pytest.MarkDecorator:
    """Parametrize a test by the weighting cases that have all of these traits."""
    chosen = [case for case in WEIGHTING_CASES if case.traits.issuperset(traits)]
    return pytest.mark.parametrize("case", chosen, ids=lambda case: case.name)
