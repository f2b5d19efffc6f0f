"""Who has which tissue: from labels and signatures to the composition of a simulated slide.

A patient is a biomarker status and a vector of signatures in standard deviations of the population
(``z``). What the clinical table does not say is drawn given what it says: within a class the
signatures are normal with one covariance, and the classes differ in their means by as much as the
point-biserial correlations say. A biomarker that
is a number is normal together with the signatures, and alters tissue by degrees. Status and
signatures then decide the mean composition; what a slide really holds varies around it
(logistic-normal).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import pandas as pd

from examples.pathology.common.errors import UserError, listing
from examples.pathology.settings.simulate import SimulateConfig

Vector = npt.NDArray[np.float64]

TISSUES = ("TUM", "STR", "LYM", "MUC", "NORM", "DEB", "ADI", "MUS")
"""Tumour, stroma, lymphocytes, mucin, normal mucosa, debris, adipose tissue, smooth muscle: the
tissue classes of Kather et al. (2019), https://doi.org/10.1371/journal.pmed.1002730, without
background."""

BACKGROUND = "BACK"

LEUKOCYTES = "Leukocyte Fraction"
LYMPHOCYTES = "Lymphocyte Infiltration Signature Score"
STROMA = "Stromal Fraction"
PROLIFERATION = "Proliferation"
HETEROGENEITY = "Intratumor Heterogeneity"
SIGNATURES = (LEUKOCYTES, LYMPHOCYTES, STROMA, PROLIFERATION, HETEROGENEITY)

MAX_Z = 3.0
"""Signatures further out than this many standard deviations count as this far."""

_MEAN_SHARES = MappingProxyType(
    {"TUM": 0.46, "STR": 0.17, "LYM": 0.13, "MUC": 0.05, "NORM": 0.12, "DEB": 0.07}
)
_CLONE_LOGIT = -1.4  # a fifth of the tumour is of the second clone where heterogeneity is average
NEGATIVE_SHARE = 0.05  # of altered tumour tiles in patients without the biomarker
_MIN_EIGENVALUE = 0.01  # of correlations, so that each variable keeps something of its own


@dataclass(frozen=True)
class Population:
    """How a biomarker and the signatures go together, as measured in a public cohort.

    Args:
        target: Column of the biomarker.
        positive: Its rarer label; `negative` is the other. Empty where the biomarker is a number.
        prevalence: Share of positives among the labelled.
        unlabelled: Share of patients without a label.
        signatures: Names of the signatures, of which there are k.
        mean: Of each signature, in its own unit ``(k,)``.
        sd: Of each signature ``(k,)``.
        low: Smallest value measured ``(k,)``; `high` is the largest.
        missing: Share of patients who lack it ``(k,)``.
        correlation: Point-biserial correlation with the biomarker ``(k,)``.
        within: Correlation of the signatures within a class, the lower triangle row by row
            ``(k (k - 1) / 2,)``.
    """

    target: str
    positive: str
    negative: str
    prevalence: float
    unlabelled: float
    signatures: tuple[str, ...]
    mean: tuple[float, ...]
    sd: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    missing: tuple[float, ...]
    correlation: tuple[float, ...]
    within: tuple[float, ...]

    @classmethod
    def of_number(cls, target: str, clinical: pd.DataFrame) -> "Population":
        """Return how a biomarker that is a number goes together with signatures in a table.

        The number counts as the first of the signatures; there are no classes.

        Args:
            target: Column of the number.
            clinical: The number, then the signatures, by patient; empty where missing. Signatures
                of fewer than two values are left out.
        """
        values = clinical.apply(pd.to_numeric)
        values = values.loc[:, values.std() > 0]
        # Each of the patients who have both: together they may contradict each other.
        levels, axes = np.linalg.eigh(values.corr().fillna(0.0).to_numpy())
        covariance = (axes * np.maximum(levels, _MIN_EIGENVALUE)) @ axes.T
        sd = np.sqrt(covariance.diagonal())
        within = (covariance / np.outer(sd, sd))[np.tril_indices(len(sd), -1)]
        return cls(
            target=target,
            positive="",
            negative="",
            prevalence=0.5,
            unlabelled=float(values[target].isna().mean()),
            signatures=tuple(values),
            mean=tuple(values.mean()),
            sd=tuple(values.std()),
            low=tuple(values.min()),
            high=tuple(values.max()),
            missing=tuple(values.isna().mean()),
            correlation=(0.0,) * len(sd),
            within=tuple(within),
        )

    def dose(self, z: Vector, *, positive: bool) -> float:
        """Return how much of the biomarker a patient has: 1 if positive, 0 if not.

        A number gives 0 at one standard deviation below its mean, 1 at one above, and is linear.
        """
        return float(positive) if self.positive else (1 + float(z[0])) / 2

    def class_mean(self, *, positive: bool) -> Vector:
        """Return the mean z of the signatures in a class ``(k,)``."""
        p = self.prevalence
        # r = d sqrt(p (1 - p)) for classes d apart and a variance of 1 over both
        distance = np.array(self.correlation) / np.sqrt(p * (1 - p))
        mean: Vector = distance * ((1 - p) if positive else -p)
        return mean

    def covariance(self) -> Vector:
        """Return the covariance of z within a class ``(k, k)``."""
        matrix = np.zeros((len(self.signatures), len(self.signatures)))
        matrix[np.tril_indices(len(matrix), -1)] = self.within
        matrix += matrix.T + np.eye(len(matrix))
        scale = np.sqrt(1 - np.square(self.correlation))
        covariance: Vector = matrix * np.outer(scale, scale)
        return covariance

    def standardized(self, values: Mapping[str, float]) -> Vector:
        """Return z of the signatures ``(k,)``, at most `MAX_Z` from 0; NaN for those not given."""
        raw = np.array([values.get(name, np.nan) for name in self.signatures])
        z: Vector = (raw - np.array(self.mean)) / np.array(self.sd)
        return np.clip(z, -MAX_Z, MAX_Z)

    def in_units(self, z: Vector) -> dict[str, float]:
        """Return signatures ``(k,)`` in their own units, within the range measured."""
        values = np.clip(z * np.array(self.sd) + np.array(self.mean), self.low, self.high)
        return dict(zip(self.signatures, (round(float(v), 6) for v in values), strict=True))


# Both from the open tables that Thorsson et al. (2018) define, https://doi.org/10.1016/
# j.immuni.2018.03.023: 457 TCGA-CRC patients with an MSI status (Liu et al. 2018), 506 TCGA-LUAD
# patients with an HRD score (positive: 42 or more; no leukocyte fraction in the table).
MSI = Population(
    target="isMSIH",
    positive="MSI-H",
    negative="MSS",
    prevalence=0.142,
    unlabelled=0.004,
    signatures=SIGNATURES,
    mean=(0.1785, -0.0907, 0.3594, 0.5980, 0.1399),
    sd=(0.1125, 0.9225, 0.1699, 0.3216, 0.1447),
    low=(0.0088, -2.6496, 0.05, -0.6764, 0.0),
    high=(0.6719, 2.6081, 0.83, 1.3866, 0.71),
    missing=(0.0, 0.0, 0.007, 0.007, 0.015),
    correlation=(0.308, 0.154, 0.098, 0.191, -0.290),
    within=(
        *(0.609,),
        *(0.812, 0.624),
        *(-0.152, -0.216, -0.180),
        *(0.151, 0.144, 0.223, -0.010),
    ),
)
HRD = Population(
    target="HRD",
    positive="HRD-H",
    negative="HRD-L",
    prevalence=0.154,
    unlabelled=0.031,
    signatures=SIGNATURES[1:],
    mean=(1.0689, 0.5389, -0.2133, 0.2638),
    sd=(0.8646, 0.1752, 0.6544, 0.1832),
    low=(-1.3249, 0.0, -1.8732, 0.0),
    high=(3.2851, 0.91, 1.3917, 0.81),
    missing=(0.123, 0.0, 0.123, 0.026),
    correlation=(-0.103, -0.111, 0.290, 0.070),
    within=(*(0.552,), *(-0.076, 0.080), *(0.179, 0.299, 0.310)),
)
POPULATIONS = MappingProxyType({population.target: population for population in (MSI, HRD)})


@dataclass(frozen=True)
class Tissue:
    """What a patient's slides are made of.

    Args:
        shares: Share of each of `TISSUES` ``(8,)``, which sum to 1.
        altered: Share of tumour tiles that the biomarker has altered.
        clone: Share of tumour tiles of the second clone.
        growth: How far proliferation moves all tumour tiles, as a log-share would be moved.
    """

    shares: Vector
    altered: float
    clone: float
    growth: float


def complete(
    population: Population, z: Vector, generator: np.random.Generator, *, positive: bool | None
) -> tuple[bool, Vector]:
    """Draw what is not known of a patient given what is.

    Args:
        population: How status and signatures go together.
        z: Signatures ``(k,)``; NaN where not known.
        generator: Of the draw, of which as many numbers are taken whatever is known.
        positive: The biomarker status; ``None``: not known, drawn given the known signatures.

    Returns:
        The status, and z without gaps ``(k,)``.
    """
    chance, noise = generator.random(), generator.standard_normal(len(z))
    known = np.isfinite(z)
    covariance = population.covariance()
    weights = np.linalg.solve(covariance[np.ix_(known, known)], covariance[np.ix_(known, ~known)])
    if positive is None:
        high, low = (population.class_mean(positive=status)[known] for status in (True, False))
        middle = z[known] - (high + low) / 2
        slope = np.linalg.solve(covariance[np.ix_(known, known)], high - low)
        prior = np.log(population.prevalence / (1 - population.prevalence))
        positive = bool(chance < _logistic(prior + float(middle @ slope)))
    mean = population.class_mean(positive=positive)
    rest = covariance[np.ix_(~known, ~known)] - covariance[np.ix_(~known, known)] @ weights
    filled = z.copy()
    drawn = mean[~known] + (z - mean)[known] @ weights + np.linalg.cholesky(rest) @ noise[~known]
    filled[~known] = np.clip(drawn, -MAX_Z, MAX_Z)
    return positive, filled


def draw_tissue(
    population: Population,
    z: Vector,
    config: SimulateConfig,
    generator: np.random.Generator,
    *,
    positive: bool,
    measured: Vector | None = None,
) -> Tissue:
    """Draw what a patient's slides are made of, given the status and signatures without gaps.

    The biomarker's dose moves the log-odds of altered tumour tiles and the log-share of
    lymphocytes. These follow the mean of leukocyte fraction and lymphocyte infiltration, stroma the
    stromal fraction, the second clone intratumor heterogeneity. Measured shares of `TISSUES`
    ``(8,)`` are taken as they are; neither status nor signatures nor noise change them.
    """
    of = dict(zip(population.signatures, (float(value) for value in z), strict=True))
    noise = config.composition_noise * generator.standard_normal(len(TISSUES))
    spread, clone, growth = (float(value) for value in generator.standard_normal(3))
    dose = population.dose(z, positive=positive)
    odds = (1 - dose) * _logit(NEGATIVE_SHARE) + dose * _logit(config.tumour_share)
    immune = [of[name] for name in (LEUKOCYTES, LYMPHOCYTES) if name in of]
    effect, vary = config.strength("signature_effect"), config.composition_noise
    shares = measured
    if shares is None:
        logits = np.array([np.log(_MEAN_SHARES.get(name, 0.0) or 1e-300) for name in TISSUES])
        logits += noise
        logits[TISSUES.index("LYM")] += effect * sum(immune) / max(len(immune), 1)
        logits[TISSUES.index("LYM")] += config.lymphocyte_shift * dose
        logits[TISSUES.index("STR")] += effect * of.get(STROMA, 0.0)
        shares = np.exp(logits - logits.max())
        shares /= shares.sum()
    return Tissue(
        shares=shares,
        altered=_logistic(odds + config.tumour_noise * spread),
        clone=_logistic(_CLONE_LOGIT + effect * of.get(HETEROGENEITY, 0.0) + vary * clone),
        growth=effect * of.get(PROLIFERATION, 0.0) + vary * growth,
    )


def shares_from(row: Mapping[str, str], patient: str) -> Vector:
    """Return measured tissue fractions as shares of `TISSUES` ``(8,)``, without background.

    Raises:
        UserError: A fraction is no number of at least 0, or all of them are 0.
    """
    try:
        fractions = np.array([float(row[tissue]) for tissue in TISSUES])
    except ValueError as error:
        raise UserError(
            f"The tissue fractions of {patient} must be numbers, but are "
            f"{listing(repr(row[tissue]) for tissue in TISSUES)}."
        ) from error
    total = fractions.sum()
    if not (np.isfinite(total) and fractions.min() >= 0 and total > 0):
        raise UserError(
            f"The tissue fractions of {patient} must be at least 0 and not all 0, but are "
            f"{listing(f'{value:g}' for value in fractions)}."
        )
    shares: Vector = fractions / total
    return shares


def _logit(share: float) -> float:
    return float(np.log(share / (1 - share)))


def _logistic(x: float) -> float:
    return float(1 / (1 + np.exp(-x)))


def population_of(config: SimulateConfig) -> Population:
    """Return how biomarker and signatures go together; for other targets than HRD as for MSI."""
    return POPULATIONS.get(config.target, MSI)
