"""Oracles: scikit-learn with sample weights, loops over the definition, and planted truths."""

import itertools
import math
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sklearn_metrics
from sklearn.metrics import silhouette_samples

from examples.pathology.results import metrics, resampling

RANDOM = np.random.default_rng(0)


@st.composite
def samples(draw):
    """Truth with both classes, scores with ties, and weights that draw both classes."""
    n = draw(st.integers(4, 30))
    truth = np.array(draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    truth[:2] = [True, False]
    score = np.array(draw(st.lists(st.integers(0, 6), min_size=n, max_size=n))) / 6
    weights = np.array(draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)), dtype=float)
    weights[:2] = 1
    return truth, score, weights


@settings(deadline=None, max_examples=60)
@given(samples())
def test_weighted_figures_are_those_of_scikit_learn(sample):
    truth, score, weights = sample
    one = weights[None, :]
    expected = sklearn_metrics.roc_auc_score(truth, score, sample_weight=weights)
    assert resampling.auroc(truth, score, one)[0] == pytest.approx(expected)
    expected = sklearn_metrics.average_precision_score(truth, score, sample_weight=weights)
    assert resampling.auprc(truth, score, one)[0] == pytest.approx(expected)
    called = score >= 0.5
    expected = sklearn_metrics.f1_score(truth, called, sample_weight=weights, zero_division=0)
    assert resampling.f1(truth, called, one)[0] == pytest.approx(expected)


def test_a_weight_is_a_number_of_copies():
    x, y = RANDOM.normal(size=(2, 12))
    weights = RANDOM.integers(0, 4, size=(3, 12)).astype(float)
    for row, r, mean in zip(
        weights, resampling.pearson(x, y, weights), resampling.mean(x, weights), strict=True
    ):
        copies = np.repeat(np.arange(12), row.astype(int))
        assert r == pytest.approx(stats.pearsonr(x[copies], y[copies]).statistic)
        assert mean == pytest.approx(x[copies].mean())


@settings(deadline=None, max_examples=60)
@given(samples(), st.integers(0, 6))
def test_a_resampled_rank_correlation_is_that_of_the_copies(sample, seed):
    _, score, weights = sample
    other = np.round(np.random.default_rng(seed).normal(size=len(score)), 1)
    score[:2] = -1, 2  # at least two values are drawn
    other[:2] = 9, 8
    copies = np.repeat(np.arange(len(score)), weights.astype(int))
    expected = stats.spearmanr(score[copies], other[copies]).statistic
    assert resampling.spearman(score, other, weights[None])[0] == pytest.approx(expected)


def test_what_a_resample_cannot_say_is_nan():
    weights = np.array([[1.0, 1.0, 0.0, 0.0]])
    truth = np.array([True, True, False, False])
    assert math.isnan(resampling.auroc(truth, np.arange(4.0), weights)[0])
    for correlation in (resampling.pearson, resampling.spearman):
        assert math.isnan(correlation([1.0, 1.0, 2.0, 3.0], np.arange(4.0), weights)[0])


def test_strata_keep_their_size():
    strata = np.array(["a"] * 7 + ["b"] * 3)
    weights = resampling.draw_weights(strata, 50, np.random.default_rng(0))
    assert (weights[:, :7].sum(axis=1) == 7).all()
    assert (weights[:, 7:].sum(axis=1) == 3).all()
    assert len(np.unique(weights, axis=0)) > 40


def test_an_interval_is_the_percentiles_of_means_over_folds():
    """Of a plain mean of normal values: its standard error is known."""
    folds = []
    values = [RANDOM.normal(size=400) for _ in range(4)]
    for x in values:
        strata = np.full(400, "a")
        folds.append((strata, lambda weights, x=x: resampling.mean(x, weights)))
    low, high = resampling.interval(folds, seed=0)
    centre = np.mean([x.mean() for x in values])
    error = math.sqrt(sum(x.var() / 400 for x in values)) / 4
    assert low == pytest.approx(centre - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(centre + 1.96 * error, abs=0.2 * error)
    assert resampling.interval(folds, seed=0) == (low, high)
    assert all(map(math.isnan, resampling.interval([], seed=0)))


def components(truth, score):
    """DeLong's structural components, pair by pair."""
    win = lambda a, b: (a > b) + 0.5 * (a == b)  # noqa: E731
    positives, negatives = score[truth], score[~truth]
    v10 = [np.mean([win(a, b) for b in negatives]) for a in positives]
    v01 = [np.mean([win(a, b) for a in positives]) for b in negatives]
    return np.array(v10), np.array(v01)


def test_delong_is_its_definition():
    truth = np.arange(23) % 3 == 0
    scores = np.round(RANDOM.normal(size=(2, 23)) + truth, 1)  # with ties
    areas, covariance = resampling.delong(truth, scores)
    (a10, a01), (b10, b01) = (components(truth, score) for score in scores)
    assert areas == pytest.approx([a10.mean(), b10.mean()])
    for (i, u10, u01), (j, v10, v01) in itertools.product([(0, a10, a01), (1, b10, b01)], repeat=2):
        expected = np.cov(u10, v10)[0, 1] / len(u10) + np.cov(u01, v01)[0, 1] / len(u01)
        assert covariance[i, j] == pytest.approx(expected)


def test_delong_is_calibrated_where_there_is_no_difference():
    """Two equally good scores: a p-value below 0.1 comes in about a tenth of all draws."""
    random = np.random.default_rng(1)
    truth = np.arange(60) % 3 == 0
    p = []
    for _ in range(400):
        folds = []
        for _ in range(3):
            shared = random.normal(size=60) + truth
            folds.append((truth, shared + random.normal(size=60), shared + random.normal(size=60)))
        p.append(resampling.compare_auroc(folds).p)
    low, high = stats.binom.ppf([0.0005, 0.9995], 400, 0.1)
    assert low <= sum(value < 0.1 for value in p) <= high


def test_a_comparison_is_the_sum_of_the_folds_worked_by_hand():
    folds = []
    variances, differences = [], []
    for n in (20, 31):
        truth = np.arange(n) % 2 == 0
        ours, theirs = truth + RANDOM.normal(size=n), truth + 2 * RANDOM.normal(size=n)
        folds.append((truth, ours, theirs))
        (a10, a01), (b10, b01) = components(truth, ours), components(truth, theirs)
        differences.append(a10.mean() - b10.mean())
        variances.append(
            np.var(a10 - b10, ddof=1) / len(a10) + np.var(a01 - b01, ddof=1) / len(a01)
        )
    found = resampling.compare_auroc(folds)
    error = math.sqrt(sum(variances)) / 2
    assert found.difference == pytest.approx(np.mean(differences))
    assert (found.high - found.low) / 2 == pytest.approx(1.959964 * error, rel=1e-5)
    z = found.difference / error
    assert found.p == pytest.approx(2 * (1 - stats.norm.cdf(abs(z))))


def test_equal_scores_do_not_differ_and_one_class_cannot_be_compared():
    truth = np.arange(10) % 2 == 0
    score = RANDOM.normal(size=10)
    same = resampling.compare_auroc([(truth, score, 2 * score)])  # the same ranks
    assert (same.difference, same.p) == (0.0, 1.0)
    none = resampling.compare_auroc([(np.ones(10, dtype=bool), score, -score)])
    assert none.folds == 0
    assert math.isnan(none.p)


def test_holm_worked_by_hand():
    assert resampling.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert resampling.holm([0.5, math.nan, 0.9])[::2] == pytest.approx([1.0, 1.0])
    assert math.isnan(resampling.holm([0.5, math.nan])[1])


# --- permutation ----------------------------------------------------------------------------------

AREAS = {
    "auroc": (resampling.auroc, sklearn_metrics.roc_auc_score),
    "auprc": (resampling.auprc, sklearn_metrics.average_precision_score),
}


def paired_scores(random, *, patients, ours, theirs, folds=2):
    """Truth and two scores of equal dependence, each as good as its shift says."""
    drawn = []
    for _ in range(folds):
        truth = np.arange(patients) % 3 == 0
        shared = random.normal(size=patients)
        drawn.append(
            (
                truth,
                shared + random.normal(size=patients) + ours * truth,
                np.exp(shared + random.normal(size=patients) + theirs * truth),  # another scale
            )
        )
    return drawn


def p_of(folds, area=resampling.auroc, permutations=999, seed=0):
    exchanges = [resampling.exchange_ranks(*fold, area) for fold in folds]
    return resampling.permutation_p(exchanges, seed=seed, permutations=permutations)


@pytest.mark.parametrize("name", AREAS)
def test_permuting_ranks_agrees_with_every_exchange_there_is(name):
    """All 2^n exchanges of one small fold with ties, by scikit-learn on ranks swapped in a loop."""
    area, reference = AREAS[name]
    random = np.random.default_rng(3)
    truth = np.array([1, 0, 1, 0, 0, 1, 0, 0], dtype=bool)
    ours, theirs = random.normal(size=8) + 2 * truth, random.integers(0, 4, 8) / 4
    a, b = stats.rankdata(ours), stats.rankdata(theirs)
    every = np.array(list(itertools.product([0.0, 1.0], repeat=8)))
    expected = np.array(
        [
            reference(truth, np.where(swap, b, a)) - reference(truth, np.where(swap, a, b))
            for swap in every
        ]
    )
    exchange = resampling.exchange_ranks(truth, ours, theirs, area)
    assert resampling.permuted_differences([exchange], [every]) == pytest.approx(expected)
    exact = np.mean(np.abs(expected) >= abs(expected[0]) - 1e-12)
    assert 0.02 < exact < 0.9
    estimated = resampling.permutation_p([exchange], seed=0)
    assert estimated == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 9999))


def test_flipping_signs_agrees_with_every_flip_there_is():
    folds = [RANDOM.normal(size=(2, n)) + np.array([[0.5], [0.0]]) for n in (4, 5)]
    signs = [np.array(list(itertools.product([1, -1], repeat=n))) for n in (4, 5)]
    means = [sign @ (a - b) / len(a) for sign, (a, b) in zip(signs, folds, strict=True)]
    every = (means[0][:, None] + means[1][None, :]).ravel() / 2
    exact = np.mean(np.abs(every) >= abs(every[0]) - 1e-12)
    exchanges = [resampling.exchange_values(a, b) for a, b in folds]
    estimated = resampling.permutation_p(exchanges, seed=0)
    assert estimated == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 9999))


@pytest.mark.parametrize("name", AREAS)
def test_a_permutation_p_is_uniform_where_there_is_no_difference(name):
    random = np.random.default_rng(11)
    p = [
        p_of(paired_scores(random, patients=24, ours=1, theirs=1), AREAS[name][0], 199)
        for _ in range(300)
    ]
    assert stats.kstest(p, "uniform").pvalue > 0.01
    low, high = stats.binom.ppf([0.0005, 0.9995], 300, 0.05)
    assert low <= sum(value <= 0.05 for value in p) <= high


@pytest.mark.parametrize("name", AREAS)
def test_a_permutation_finds_a_difference_in_either_direction(name):
    random = np.random.default_rng(12)
    for ours, theirs in ((2.5, 0.5), (0.5, 2.5)):
        draws = [
            p_of(paired_scores(random, patients=60, ours=ours, theirs=theirs), AREAS[name][0])
            for _ in range(20)
        ]
        assert sum(p < 0.05 for p in draws) >= 18


def numbers(random, patients=40):
    """What is measured, and two predictions of equal errors, the second of another unit."""
    truth, shared = random.normal(size=(2, patients))
    ours, theirs = truth + shared + random.normal(size=(2, patients))
    return truth, ours, 5 + theirs / 4


def probabilities(random, patients=40):
    """Who is positive, and two probabilities that are alike."""
    truth, shared = np.arange(patients) % 4 == 0, random.normal(size=patients)
    return truth, *(1 / (1 + np.exp(1 - truth - shared - random.normal(size=(2, patients)))))


NUMBERS = {
    "pearson": (numbers, resampling.exchange_standardised, lambda t, a: stats.pearsonr(t, a)[0]),
    "spearman": (
        numbers,
        lambda *fold: resampling.exchange_ranks(*fold, resampling.spearman),
        lambda t, a: stats.spearmanr(t, a)[0],
    ),
    "brier": (
        probabilities,
        lambda t, a, b: resampling.exchange_values((a - t) ** 2, (b - t) ** 2),
        lambda t, a: np.mean((a - t) ** 2),
    ),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_an_exchange_of_predictions_is_the_figure_of_those_exchanged(name):
    """All 2^n exchanges of one small fold, in a loop over predictions swapped one by one."""
    draw, exchange, figure = NUMBERS[name]
    truth, ours, theirs = draw(np.random.default_rng(3), 8)
    a, b = ours, theirs
    if draw is numbers:
        a, b = (stats.zscore(x) if name == "pearson" else stats.rankdata(x) for x in (ours, theirs))
    every = np.array(list(itertools.product([0.0, 1.0], repeat=8)))
    expected = [
        figure(truth, np.where(swap, b, a)) - figure(truth, np.where(swap, a, b)) for swap in every
    ]
    assert expected[0] == pytest.approx(figure(truth, ours) - figure(truth, theirs))
    found = resampling.permuted_differences([exchange(truth, ours, theirs)], [every])
    assert found == pytest.approx(np.array(expected))
    assert len(np.unique(np.round(found, 12))) > 20


@pytest.mark.parametrize("name", NUMBERS)
def test_an_exchange_of_predictions_is_calibrated_where_there_is_no_difference(name):
    draw, exchange, _ = NUMBERS[name]
    random = np.random.default_rng(17)
    p = []
    for _ in range(200):
        exchanges = [exchange(*draw(random)) for _ in range(2)]
        p.append(resampling.permutation_p(exchanges, seed=0, permutations=199))
    low, high = stats.binom.ppf([0.0005, 0.9995], 200, 0.05)
    assert low <= sum(value <= 0.05 for value in p) <= high


@pytest.mark.parametrize("direction", [1, -1])
def test_how_far_two_models_are_off_is_alike_in_either_direction(direction):
    """A bias of 0.15 in both; exchanged probabilities would call opposite ones different."""
    random = np.random.default_rng(19)
    p, of_probabilities = [], []
    for _ in range(200):
        exchanges, naive = [], []
        for _ in range(2):
            truth = random.random(60) < 0.4
            ours, theirs = (
                0.4
                + np.array([[0.15], [0.15 * direction]])
                + random.normal(scale=0.05, size=(2, 60))
            )
            figures = [
                partial(resampling.distance_of_mean, each - truth) for each in (ours, theirs)
            ]
            exchanges.append(
                resampling.exchange_values(*(resampling.pseudo_values(f, 60) for f in figures))
            )
            naive.append(resampling.Exchange(60, partial(exchanged, truth, ours, theirs)))
        p.append(resampling.permutation_p(exchanges, seed=0, permutations=199))
        of_probabilities.append(resampling.permutation_p(naive, seed=0, permutations=199))
    low, high = stats.binom.ppf([0.0005, 0.9995], 200, 0.05)
    assert low <= sum(value <= 0.05 for value in p) <= high
    assert (sum(value <= 0.05 for value in of_probabilities) <= high) == (direction > 0)


def exchanged(truth, ours, theirs, swaps):
    """Return the difference of two distances for probabilities that change places."""
    a, b = np.where(swaps > 0, theirs, ours), np.where(swaps > 0, ours, theirs)
    share = truth.mean()
    return np.abs(a.mean(axis=1) - share) - np.abs(b.mean(axis=1) - share)


def test_pseudo_values_of_a_distance_are_errors_in_its_direction():
    errors = np.array([-0.5, -0.25, 0.25, -0.75])
    found = resampling.pseudo_values(partial(resampling.distance_of_mean, errors), 4)
    assert found == pytest.approx(-errors)


def test_predictions_of_another_unit_are_not_exchangeable_until_they_are_standardised():
    truth, ours, _ = numbers(np.random.default_rng(18))
    exchange = resampling.exchange_standardised(truth, ours, 100 - 40 * ours)
    assert resampling.permutation_p([exchange], seed=0, permutations=999) == 1 / 1000
    exchange = resampling.exchange_standardised(truth, ours, 7 + ours / 50)
    assert resampling.permutation_p([exchange], seed=0, permutations=999) == 1.0


def embeddings(random, *, patients=30, folds=2):
    """Two embeddings of the same classes, equally well parted, of the same patients."""
    label = np.arange(patients) % 3 == 0
    for _ in range(folds):
        shared = random.normal(size=(patients, 4)) + label[:, None]
        yield label, *(shared + random.normal(size=(2, patients, 4)))


def silhouette_exchange(label, ours, theirs):
    return resampling.exchange_values(
        *(
            resampling.pseudo_values(lambda w, x=x: resampling.silhouette(x, label, w), len(label))
            for x in (ours, theirs)
        )
    )


def test_silhouettes_of_patients_are_not_exchangeable_but_their_pseudo_values_are():
    """Patients are measured against each other: as if independent, a difference seems certain."""
    random = np.random.default_rng(14)
    p, as_if_independent = [], []
    for _ in range(200):
        folds = list(embeddings(random))
        exchanges = [silhouette_exchange(*fold) for fold in folds]
        p.append(resampling.permutation_p(exchanges, seed=0, permutations=199))
        exchanges = [
            resampling.exchange_values(*(silhouette_samples(x, label) for x in both))
            for label, *both in folds
        ]
        as_if_independent.append(resampling.permutation_p(exchanges, seed=0, permutations=199))
    most = stats.binom.ppf(0.9995, 200, 0.05)
    assert sum(value <= 0.05 for value in p) <= most
    assert sum(value <= 0.3 for value in p) >= stats.binom.ppf(0.0005, 200, 0.15)  # not timid
    assert sum(value <= 0.05 for value in as_if_independent) > most


def test_a_permutation_finds_a_better_parted_embedding():
    random = np.random.default_rng(15)
    exchanges = [
        silhouette_exchange(label, ours + 2.0 * label[:, None], theirs)
        for label, ours, theirs in embeddings(random)
    ]
    assert resampling.permutation_p(exchanges, seed=0) < 0.01


def test_pseudo_values_of_a_mean_are_its_values():
    x = RANDOM.normal(size=9)
    assert resampling.pseudo_values(lambda w: resampling.mean(x, w), 9) == pytest.approx(x)


def test_a_resampled_silhouette_is_that_of_the_patients_drawn():
    random = np.random.default_rng(16)
    points, label = random.normal(size=(30, 3)), np.array(list("abc") * 10)
    weights = (random.random(size=(6, 30)) < 0.7).astype(float)
    weights[0] = 1
    found = resampling.silhouette(points, label, weights)
    for row, value in zip(weights, found, strict=True):
        drawn = row > 0
        expected = sklearn_metrics.silhouette_score(points[drawn], label[drawn])
        assert value == pytest.approx(expected)
    alone = np.isin(np.arange(30), [0, 1, 4, 7]).astype(float)  # one a, three b
    expected = sklearn_metrics.silhouette_score(points[alone > 0], label[alone > 0])
    assert resampling.silhouette(points, label, alone[None])[0] == pytest.approx(expected)
    only = (label == "a").astype(float)
    assert math.isnan(resampling.silhouette(points, label, only[None])[0])
    # Two copies of a patient count twice for others, and are no neighbours of each other.
    twice = np.array([[2.0, 1.0, 1.0]])
    line, two = np.array([[0.0], [1.0], [3.0]]), np.array(["a", "a", "b"])
    near, far = (3 - 1) / 3, (2 - 1) / 2  # of the first and of the second; the third is alone
    assert resampling.silhouette(line, two, twice)[0] == pytest.approx((2 * near + far + 0) / 4)


def test_a_permutation_agrees_with_delong_for_many_patients():
    random = np.random.default_rng(13)
    for ours, theirs in ((1.0, 1.0), (1.2, 1.0), (1.0, 1.3)):
        folds = paired_scores(random, patients=300, ours=ours, theirs=theirs, folds=3)
        assert p_of(folds, permutations=4999) == pytest.approx(
            resampling.compare_auroc(folds).p, abs=0.03
        )


def test_a_permutation_cannot_tell_equal_ranks_apart_and_needs_a_fold():
    truth, score = np.arange(10) % 2 == 0, RANDOM.normal(size=10)
    assert p_of([(truth, score, np.exp(score))]) == 1.0
    assert math.isnan(resampling.permutation_p([], seed=0))
    with pytest.raises(ValueError, match="must be defined in every fold, but is NaN in one"):
        resampling.permutation_p([resampling.exchange_values(score, score * math.nan)], seed=0)
    perfect = [(np.arange(60) % 2 == 0, *np.stack([-(np.arange(60) % 2), np.arange(60)]))]
    assert p_of(perfect) == 1 / 1000  # the smallest there is: never 0
    assert p_of(perfect, seed=1) == p_of(perfect, seed=1)


# --- the threshold of F1 --------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(samples())
def test_no_threshold_has_a_higher_f1(sample):
    truth, score, _ = sample
    best = metrics.best_threshold(truth, score)
    reached = metrics.f1(truth, score, best).value
    for other in np.append(score, 2.0):
        assert metrics.f1(truth, score, other).value <= reached + 1e-12


def test_f1_worked_by_hand():
    truth, score = np.array([1, 1, 0, 0, 1], dtype=bool), np.array([0.9, 0.4, 0.6, 0.1, 0.7])
    # called at 0.5: 3, of them 2 of the 3 positives: precision 2/3, recall 2/3
    assert metrics.f1(truth, score, 0.5).value == pytest.approx(2 / 3)
    assert metrics.best_threshold(truth, score) == 0.4  # precision 3/4, recall 1: 6/7
    assert math.isnan(metrics.best_threshold(np.ones(3), score[:3]))
    assert metrics.f1(truth, score, math.nan).reason.startswith("no threshold")
    assert metrics.f1(truth[:2], score[:2], 0.5).reason == "one class only"
