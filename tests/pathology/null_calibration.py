"""How often a benchmark finds differences that are not there, and how often its intervals hold.

Null studies are drawn at the level of predictions, where all methods are equally good on average
over patients and over trained models::

    python -m tests.pathology.null_calibration --studies 1000

Classes and folds are those of MSI in TCGA-CRC, and outside those of CPTAC. A patient's score is the
sum of what every model finds in the patient, of what every model of the method finds there, and of
what this model alone finds there; and each model tells the classes apart a little better or worse
than others. Studies of fewer seeds are the first seeds of studies of more.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from zlib import crc32

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from scipy.special import expit

from examples.pathology.results import resampling
from examples.pathology.results.measuring import Measured
from examples.pathology.results.metrics import Score
from examples.pathology.results.repeats import Estimate, Repeated, estimate, repeated
from examples.pathology.results.resampling import Exchange, exchange_ranks, exchange_values

SEEDS = (1, 2, 3, 5)
LEVEL, METHODS, PERMUTATIONS = 0.05, 16, 399
SEPARATION = 1.35  # of the classes, in standard deviations of the score: an AUROC of 0.83
SLOPE = 0.6  # of the number predicted: a correlation of about 0.6

Floats = NDArray[np.float64]
Folds = NDArray[np.int64]


@dataclass(frozen=True)
class Design:
    """Who is tested, and how far scores vary, as standard deviations.

    Args:
        title: What the setting is.
        method: What a method finds in a patient, whatever the model.
        model: What one model finds in a patient.
        quality: How well a model tells the classes apart.
        training: How well a method does with a fold's training set, whatever the seed: no test of
            the benchmark knows of it.
    """

    title: str
    method: float = 0.3
    model: float = 0.4
    quality: float = 0.15
    training: float = 0.0
    patients: int = 445
    positives: int = 64
    folds: int = 5


DESIGNS = (
    Design("models vary as much as patients"),
    Design("models vary more", model=0.6, quality=0.3),
    Design("models vary little", model=0.1, quality=0.03),
    Design("models do not vary", model=0.0, quality=0.0),
    Design("methods see patients alike", method=0.0),
    Design("one cohort outside", patients=105, positives=24, folds=1),
    Design("not covered: training sets vary as models do", training=0.15),
)


def draw(
    random: np.random.Generator,
    truth: Floats,
    fold: Folds,
    design: Design,
    methods: int,
    seeds: int,
) -> Floats:
    """Draw scores ``(methods, seeds, n)`` of methods that are equally good on average."""
    quality = random.normal(0, design.quality, (methods, seeds, design.folds))
    quality += random.normal(0, design.training, (methods, 1, design.folds))
    shared = np.sqrt(1 - design.method**2 - design.model**2)
    slope = SEPARATION if set(truth) == {0, 1} else SLOPE
    return (
        (slope + quality[..., fold]) * truth
        + random.normal(0, shared, len(truth))
        + random.normal(0, design.method, (methods, 1, len(truth)))
        + random.normal(0, design.model, (methods, seeds, len(truth)))
    )


def measured(strata: NDArray[np.str_], figure: Callable[..., Floats], *values: Floats) -> Measured:
    """Return a figure as the benchmark measures it."""
    resampled = partial(figure, *values)
    value = float(resampled(np.ones((1, len(strata))))[0])
    return Measured(Score(value), strata, resampled)


def probability(score: Floats, positives: float) -> Floats:
    """Return the probability of the positive class that an average model's score means."""
    prior = np.log(positives / (1 - positives))
    return np.asarray(expit(SEPARATION * score - SEPARATION**2 / 2 + prior))


@dataclass(frozen=True)
class Figure:
    """One of the figures compared.

    Args:
        measure: From truth and score ``(n,)`` of a fold.
        exchange: For one seed, from truth and both scores.
    """

    name: str
    measure: Callable[[Floats, Floats], Measured]
    exchange: Callable[[Floats, Floats, Floats], Exchange]


def _area(area: resampling.Figure, truth: Floats, score: Floats) -> Measured:
    return measured(truth.astype(str), area, truth > 0, score)


def _errors(truth: Floats, score: Floats) -> Floats:
    return np.asarray((probability(score, truth.mean()) - truth) ** 2)


def _brier(truth: Floats, score: Floats) -> Measured:
    return measured(truth.astype(str), resampling.mean, _errors(truth, score))


def _pearson(truth: Floats, score: Floats) -> Measured:
    return measured(np.full(len(truth), ""), resampling.pearson, truth, score)


def _exchange_areas(area: resampling.Figure, truth: Floats, one: Floats, other: Floats) -> Exchange:
    return exchange_ranks(truth > 0, one, other, area)


def _exchange_brier(truth: Floats, one: Floats, other: Floats) -> Exchange:
    return exchange_values(_errors(truth, one), _errors(truth, other))


def _exchange_pearson(truth: Floats, one: Floats, other: Floats) -> Exchange:
    n = len(truth)
    figures = (partial(resampling.pearson, truth, each) for each in (one, other))
    return exchange_values(*(resampling.pseudo_values(each, n) for each in figures))


FIGURES = (
    *(
        Figure(name, partial(_area, area), partial(_exchange_areas, area))
        for name, area in (("AUROC", resampling.auroc), ("AUPRC", resampling.auprc))
    ),
    Figure("Brier", _brier, _exchange_brier),
    Figure("Pearson", _pearson, _exchange_pearson),
)


@dataclass(frozen=True)
class Study:
    """Null predictions of several methods in one figure.

    Args:
        truth: By fold ``(n,)``.
        scores: By fold ``(methods, seeds, n)``.
        samples: By method and fold, the figure from every seed.
    """

    figure: Figure
    truth: Sequence[Floats]
    scores: Sequence[Floats]
    samples: Sequence[Sequence[Repeated]]

    def of(self, method: int, seeds: int) -> Estimate:
        """Return a method's own figure."""
        return estimate([_first(each, seeds) for each in self.samples[method]])

    def p(self, method: int, seeds: int, seed: int) -> float:
        """Return the p-value of a method against the first, as the benchmark tests it."""
        if seeds == 1:
            exchanges = [
                self.figure.exchange(truth, scores[method, 0], scores[0, 0])
                for truth, scores in zip(self.truth, self.scores, strict=True)
            ]
            return resampling.permutation_p(exchanges, seed=seed, permutations=PERMUTATIONS)
        pairs = zip(self.samples[method], self.samples[0], strict=True)
        return estimate([_first(_minus(*pair), seeds) for pair in pairs]).p


def _minus(one: Repeated, other: Repeated) -> Repeated:
    return Repeated(one.values - other.values, one.without - other.without, one.strata)


def _first(sample: Repeated, seeds: int) -> Repeated:
    return Repeated(sample.values[:seeds], sample.without[:seeds], sample.strata)


def null_study(
    design: Design, figure: Figure, number: int, methods: int = 2, seeds: int = max(SEEDS)
) -> Study:
    """Draw a study by its number."""
    random = np.random.default_rng([number, crc32(f"{design.title}, {figure.name}".encode())])
    positive = np.arange(design.patients) < design.positives
    fold = np.arange(design.patients) % design.folds  # as many of a class in each, but for one
    truth = positive.astype(float)
    if figure.name == "Pearson":
        truth = random.normal(size=design.patients)
    scores = draw(random, truth, fold, design, methods, seeds)
    parts = [fold == k for k in range(design.folds)]
    samples = []
    for of_method in scores:
        folds = [[figure.measure(truth[part], each[part]) for each in of_method] for part in parts]
        known = [sample for each in folds if (sample := repeated(each)) is not None]
        assert len(known) == design.folds
        samples.append(known)
    return Study(
        figure, [truth[part] for part in parts], [scores[..., part] for part in parts], samples
    )


def false_findings(
    design: Design, figure: Figure, studies: int, seeds: Sequence[int] = SEEDS
) -> dict[int, int]:
    """Return by number of seeds how many null studies find a difference at 5 %."""
    found = dict.fromkeys(seeds, 0)
    for number in range(studies):
        study = null_study(design, figure, number, seeds=max(seeds))
        for s in seeds:
            found[s] += study.p(1, s, number) < LEVEL
    return found


def false_families(design: Design, figure: Figure, studies: int) -> dict[int, int]:
    """Return how many null studies of 16 methods find any difference after Holm's correction."""
    found = dict.fromkeys(SEEDS, 0)
    for number in range(studies):
        study = null_study(design, figure, number, methods=METHODS + 1)
        for s in SEEDS:
            p = [study.p(method, s, number) for method in range(1, METHODS + 1)]
            found[s] += min(resampling.holm(p)) < LEVEL
    return found


def misses(design: Design, figure: Figure, studies: int) -> dict[int, int]:
    """Return how many 95 % intervals of a method's own figure miss its mean over studies."""
    found: dict[int, list[Estimate]] = {s: [] for s in SEEDS[1:]}
    for number in range(studies):
        study = null_study(design, figure, number, methods=1)
        for s, estimates in found.items():
            estimates.append(study.of(0, s))
    truth = np.mean([each.value for each in found[max(SEEDS)]])
    return {s: sum(not e.low <= truth <= e.high for e in each) for s, each in found.items()}


COUNTS = {"p < 0.05": false_findings, "any of 16": false_families, "interval": misses}
LINES = [
    *(("p < 0.05", design, figure) for design in DESIGNS for figure in FIGURES),
    ("any of 16", DESIGNS[0], FIGURES[0]),
    *(("interval", DESIGNS[k], figure) for k in (0, 3, 5) for figure in FIGURES),
]


def line(number: int, studies: int) -> str:
    """Return a line of the table: rates in percent with their 95 % intervals."""
    name, design, figure = LINES[number]
    found, cells = COUNTS[name](design, figure, studies), []
    for s in SEEDS:
        if s in found:
            low, high = stats.binomtest(found[s], studies).proportion_ci(method="wilson")
            cells.append(f"{100 * found[s] / studies:.1f} [{100 * low:.1f}, {100 * high:.1f}]")
        else:
            cells.append("")
    return " | ".join([f"| {name}", design.title, figure.name, *cells]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=1)
    arguments = parser.parse_args()
    heading = ["| Percent of null studies", "setting", "figure", *(f"seeds: {s}" for s in SEEDS)]
    sys.stdout.write(" | ".join(heading) + f" |\n{'|---' * len(heading)}|\n")
    with ProcessPoolExecutor(arguments.workers) as pool:
        for each in pool.map(partial(line, studies=arguments.studies), range(len(LINES))):
            sys.stdout.write(f"{each}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
