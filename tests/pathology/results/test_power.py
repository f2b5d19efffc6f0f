"""Power by simulation against slow loops, closed forms and the tests of the benchmark."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from examples.pathology.results import resampling
from examples.pathology.results.power import (
    FOUND,
    LARGEST,
    Design,
    area,
    correlation,
    curve,
    detectable,
    is_found,
    shared_variance,
    simulate,
)
from examples.pathology.results.repeats import Repeated, estimate

FOLDS = np.array([(76, 13)] * 4 + [(77, 12)])  # MSI of TCGA-CRC
NUMBER = np.array([[90]] * 5)
ONE_SEED = Design(FOLDS, 1, 0.84, np.full((2, 3), 0.8))
SEEDS = Design(FOLDS, 3, 0.84, np.array([[0.8, 0.75, 0.7]] * 2), 0.01**2)
Z = stats.norm.isf(0.025)


def draw(random, fold, areas, alike):
    """Draw truth (n,) and binormal scores (methods, n) of these AUROCs."""
    truth = np.repeat([False, True], fold)
    patients, rest = random.normal(size=len(truth)), random.normal(size=(len(areas), len(truth)))
    shift = np.sqrt(2) * stats.norm.ppf(areas)[:, None]
    return truth, np.sqrt(alike) * patients + np.sqrt(1 - alike) * rest + shift * truth


def close(share, expected, studies, beside=0.0):
    """Whether a share is what it should be, within four standard errors and what is allowed."""
    return abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / studies) + beside


# --- the figures, and the test of them ------------------------------------------------------------


@pytest.mark.parametrize("numbers", [False, True])
def test_figures_and_moves_are_those_of_leaving_patients_out(numbers):
    random = np.random.default_rng(0)
    truth = random.normal(size=17) if numbers else np.repeat([False, True], [11, 6])
    scores = random.normal(size=(2, 3, 17)) + truth
    figure = resampling.pearson if numbers else resampling.auroc
    found, moved = correlation(truth, scores) if numbers else area(scores, 11)
    for place in np.ndindex(2, 3):
        assert found[place] == pytest.approx(figure(truth, scores[place], np.ones((1, 17)))[0])
        without = figure(truth, scores[place], 1 - np.eye(17))
        for part in [truth == truth] if numbers else [truth, ~truth]:
            assert moved[place][part] == pytest.approx(without[part] - without[part].mean())


@pytest.mark.parametrize("seeds", [1, 3])
def test_p_is_that_of_the_benchmark(seeds):
    """Of one seed that of DeLong's test, of several that of readers and cases."""
    random = np.random.default_rng(seeds)
    for alike in (0.5, 0.99):  # with little of the covariance, and with much
        drawn = [draw(random, fold, [0.8] * seeds + [0.9] * seeds, alike) for fold in FOLDS[:3]]
        found, shared, repeated = [], [], []
        for (truth, scores), fold in zip(drawn, FOLDS[:3], strict=True):
            figures, moved = area(scores[None], fold[0])
            found.append(figures[:, seeds:] - figures[:, :seeds])
            shared.append(shared_variance(moved[:, seeds:] - moved[:, :seeds], fold))
            all_but = np.array([resampling.auroc(truth, s, 1 - np.eye(len(truth))) for s in scores])
            without = all_but[seeds:] - all_but[:seeds]
            repeated.append(Repeated(found[-1][0], without, truth.astype(str)))
        if seeds == 1:
            expected = resampling.compare_auroc([(t, s[1], s[0]) for t, s in drawn]).p
        else:
            expected = estimate(repeated).p
        for factor, below in ((0.999, False), (1.001, True)):
            level = factor * expected
            assert is_found(np.array(found), np.array(shared), level) == [below]
        assert 1e-12 < expected < 0.9


def test_methods_that_rank_alike_do_not_differ():
    assert not is_found(np.zeros((5, 1, 3)), np.zeros((5, 1)), 0.999)
    assert is_found(np.full((5, 1, 1), 0.1), np.zeros((5, 1)), 1e-9)


def test_delong_finds_what_exchanges_find():
    """The stand-in for one seed: on binormal scores both tests give nearly one p-value."""
    random, p = np.random.default_rng(3), []
    for difference in [0.0, 0.03, 0.06] * 8:
        drawn = [draw(random, fold, [0.84, 0.84 + difference], 0.7) for fold in FOLDS]
        exchanges = [
            resampling.exchange_ranks(truth, ours, theirs, resampling.auroc)
            for truth, (theirs, ours) in drawn
        ]
        delong = resampling.compare_auroc([(t, ours, theirs) for t, (theirs, ours) in drawn]).p
        p.append((resampling.permutation_p(exchanges, seed=0, permutations=999), delong))
    exchanged, delong = np.array(p).T
    assert np.abs(exchanged - delong).max() < 0.06  # 3 sd of 999 permutations are 0.05
    decided = (exchanged < 0.03) | (exchanged > 0.08)  # not so near the level that chance decides
    assert ((exchanged < 0.05) == (delong < 0.05))[decided].all()
    assert 5 < (delong < 0.05).sum() < 19


# --- how often a difference is found --------------------------------------------------------------


@pytest.mark.parametrize(
    "design",
    [
        ONE_SEED,
        SEEDS,
        replace(SEEDS, folds=NUMBER, reference=0.5, alike=SEEDS.alike[:1]),
        replace(SEEDS, folds=np.array([[81, 24]])),
    ],
)
def test_no_difference_is_found_as_often_as_the_level_says(design):
    share, less = simulate(design, np.zeros(1), (0.05, 0.01), 1500, 0)[:, 0]
    assert close(share, 0.05, 1500, beside=0.005)
    assert close(less, 0.01, 1500, beside=0.005)


def test_one_seed_is_as_the_closed_form_says():
    differences = np.array([0.02, 0.035, 0.05])
    shares = simulate(ONE_SEED, differences, [0.05], 1500, 0)[0]
    random = np.random.default_rng(1)
    for difference, share in zip(differences, shares, strict=True):
        variances = []
        for _ in range(30):
            for fold in FOLDS:
                drawn = draw(random, fold, [0.84, 0.84 + difference], 0.8)
                _, covariance = resampling.delong(*drawn)
                variances.append(np.array([1, -1]) @ covariance @ [1, -1])
        error = np.sqrt(np.mean(variances) / len(FOLDS))
        expected = stats.norm.cdf(difference / error - Z) + stats.norm.cdf(-difference / error - Z)
        assert close(share, expected, 1500, beside=0.03)
    assert shares[0] < 0.4 < 0.8 < shares[2]


def test_several_seeds_are_as_their_variances_say():
    """Of exactly known variances, the power is nearly that of a normal difference."""
    difference, studies = 0.04, 1500
    share = simulate(SEEDS, np.array([difference]), [0.05], studies, 0)[0, 0]
    random, found = np.random.default_rng(2), []
    levels = 0.84, 0.84 + difference
    for _ in range(150):
        of_folds = []
        for negative, positive in FOLDS:
            n = negative + positive
            patient, of_seed = random.normal(size=n), random.normal(size=(3, n))
            areas = []
            for m in range(2):
                of_method = random.normal(size=n)
                for s in range(3):
                    level = levels[m] + m * 0.01 * random.normal()
                    score = np.sqrt([0.7, 0.1, 0.05, 0.15]) @ [
                        patient,
                        of_method,
                        of_seed[s],
                        random.normal(size=n),
                    ]
                    score[negative:] += np.sqrt(2) * stats.norm.ppf(level)
                    areas.append(area(score, negative)[0])
            of_folds.append(np.mean(areas[3:]) - np.mean(areas[:3]))
        found.append(np.mean(of_folds))
    assert np.mean(found) == pytest.approx(difference, abs=0.004)
    error = np.std(found)
    expected = stats.norm.cdf(difference / error - Z)
    assert 0.5 < expected < 0.95
    assert close(share, expected, studies, beside=0.06)


def test_r_is_as_pearson_and_filon_say():
    """The variance of the difference of two dependent correlations, for many patients (1898)."""
    n, theirs, rest = 400, 0.5, 0.6
    design = Design(np.array([[n]]), 1, theirs, np.full((1, 3), rest))
    differences = np.array([0.05, 0.08, 0.11])
    shares = simulate(design, differences, [0.05], 1500, 0)[0]
    for ours, share in zip(theirs + differences, shares, strict=True):
        free, other = 1 - ours**2, 1 - theirs**2
        both = ours * theirs + rest * np.sqrt(free * other)
        square = 1 - ours**2 - theirs**2
        covariance = both * square - ours * theirs * (square - both**2) / 2
        error = np.sqrt((free**2 + other**2 - 2 * covariance) / n)
        assert close(share, stats.norm.cdf((ours - theirs) / error - Z), 1500, beside=0.02)


def test_what_helps_and_what_hurts():
    def found(design, difference=0.04):
        return simulate(design, np.array([difference]), [0.05], 600, 0)[0, 0]

    usual = found(SEEDS)
    assert 0.3 < usual < 0.9
    assert found(SEEDS, 0.05) > usual + 0.05
    assert found(replace(SEEDS, folds=2 * FOLDS)) > usual + 0.05
    assert found(replace(SEEDS, seeds=10)) > usual + 0.05
    assert found(replace(SEEDS, alike=SEEDS.alike - 0.4)) < usual - 0.05
    assert found(replace(SEEDS, spread=0.05**2)) < usual - 0.05


# --- curves ---------------------------------------------------------------------------------------


def test_a_curve_begins_at_the_level_rises_and_ends_where_nearly_all_find_it():
    found = curve(ONE_SEED, (0.05, 0.05 / 32), 0)
    before, after = (found[column].to_numpy() for column in FOUND)
    assert found["difference"][0] == 0
    assert close(before[0], 0.05, 1000, beside=0.005)
    assert (before >= after).all()
    for shares in (before, after):
        assert np.diff(shares).min() > -0.02
        assert shares[-1] > 0.95
    assert found["difference"].iloc[-1] < 0.999 - 0.84
    pd.testing.assert_frame_equal(found, curve(ONE_SEED, (0.05, 0.05 / 32), 0))
    assert not found.equals(curve(ONE_SEED, (0.05, 0.05 / 32), 1))


def test_a_curve_ends_where_nothing_is_better():
    few = curve(Design(np.array([[6, 3]]), 1, 0.8, np.full((2, 3), 0.2)), (0.05, 0.001), 0)
    assert few["difference"].iloc[-1] == pytest.approx(LARGEST - 0.8)
    assert np.isnan(detectable(few, FOUND[1], 0.8))


def test_the_smallest_difference_found_lies_between_two_steps():
    steps = pd.DataFrame({"difference": [0, 0.1, 0.2, 0.3], "found": [0.05, 0.5, 0.9, 0.89]})
    assert detectable(steps, "found", 0.8) == pytest.approx(0.175)
    assert np.isnan(detectable(steps, "found", 0.95))
