from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import multivariate_normal

from examples.pathology.common.errors import UserError
from examples.pathology.settings.simulate import SimulateConfig
from examples.pathology.simulation.composition import (
    HETEROGENEITY,
    HRD,
    LEUKOCYTES,
    LYMPHOCYTES,
    MSI,
    PROLIFERATION,
    SIGNATURES,
    STROMA,
    TISSUES,
    Population,
    complete,
    draw_tissue,
    shares_from,
)

TABLES = Path(__file__).parents[4] / "shared" / "data" / "tables"
EFFECTS = SimulateConfig(
    Path("nowhere"),
    tumour_share=0.4,
    tumour_noise=1.5,
    lymphocyte_shift=0.3,
    signature_effect=0.8,
    composition_noise=0.4,
)
POPULATIONS = pytest.mark.parametrize("population", [MSI, HRD], ids=lambda p: p.target)


def unknown(population):
    return np.full(len(population.signatures), np.nan)


@POPULATIONS
def test_what_is_drawn_has_the_published_prevalence_and_correlations(population):
    generator = np.random.default_rng(0)
    drawn = [
        complete(population, unknown(population), generator, positive=None) for _ in range(5000)
    ]
    status, z = np.array([s for s, _ in drawn]), np.stack([z for _, z in drawn])
    assert status.mean() == pytest.approx(population.prevalence, abs=0.015)
    for k, r in enumerate(population.correlation):
        assert np.corrcoef(status, z[:, k])[0, 1] == pytest.approx(r, abs=0.04)
    within = z - np.where(status[:, None], z[status].mean(0), z[~status].mean(0))
    found = np.corrcoef(within.T)[np.tril_indices(z.shape[1], -1)]
    np.testing.assert_allclose(found, population.within, atol=0.04)
    np.testing.assert_allclose(z.mean(0), 0, atol=0.05)
    np.testing.assert_allclose(z.std(0), 1, atol=0.04)


@POPULATIONS
@pytest.mark.skipif(not TABLES.exists(), reason="needs the tables of ../shared/data")
def test_the_published_numbers_are_those_of_the_tables(population):
    name = {"isMSIH": "tcga_crc_labels.csv", "HRD": "tcga_luad_labels.csv"}[population.target]
    table = pd.read_csv(TABLES / name)
    labelled = table[table[population.target].notna()]
    positive = labelled[population.target] == population.positive
    values = labelled[list(population.signatures)]
    assert positive.mean() == pytest.approx(population.prevalence, abs=5e-4)
    for k, column in enumerate(population.signatures):
        assert table[column].mean() == pytest.approx(population.mean[k], abs=1e-4)
        assert table[column].std() == pytest.approx(population.sd[k], abs=1e-4)
        assert values[column].corr(positive) == pytest.approx(population.correlation[k], abs=6e-4)
        assert values[column].isna().mean() == pytest.approx(population.missing[k], abs=6e-4)
    within = values - values.groupby(labelled[population.target]).transform("mean")
    found = within.corr().to_numpy()[np.tril_indices(values.shape[1], -1)]
    np.testing.assert_allclose(found, population.within, atol=6e-4)


@given(
    z=st.lists(st.floats(-2, 2), min_size=5, max_size=5),
    known=st.lists(st.booleans(), min_size=5, max_size=5),
    positive=st.booleans(),
)
@settings(deadline=None, max_examples=30)
def test_what_is_known_stays_and_nothing_is_left_unknown(z, known, positive):
    given_z = np.where(known, z, np.nan)
    status, filled = complete(MSI, given_z, np.random.default_rng(1), positive=positive)
    assert status is positive
    np.testing.assert_array_equal(filled[known], given_z[known])
    assert np.isfinite(filled).all()


def test_a_missing_signature_follows_a_known_one_by_the_line_of_regression():
    z = unknown(MSI)
    z[SIGNATURES.index(LEUKOCYTES)] = 1.2
    generator = np.random.default_rng(2)
    drawn = np.stack([complete(MSI, z, generator, positive=False)[1] for _ in range(3000)])
    # By hand, for two variables: mean + r sd / sd (x - mean), within the negative class.
    p, (r_leukocytes, r_stroma), r = MSI.prevalence, (0.308, 0.098), 0.812
    means = [-p * value / np.sqrt(p * (1 - p)) for value in (r_leukocytes, r_stroma)]
    slope = r * np.sqrt((1 - r_stroma**2) / (1 - r_leukocytes**2))
    expected = means[1] + slope * (1.2 - means[0])
    assert drawn[:, SIGNATURES.index(STROMA)].mean() == pytest.approx(expected, abs=0.04)


def test_a_missing_status_is_drawn_with_its_probability_given_the_signatures():
    z = np.array([1.5, np.nan, 0.2, 1.0, -1.0])
    known = np.isfinite(z)
    covariance = MSI.covariance()[np.ix_(known, known)]
    joint = [
        share
        * multivariate_normal(MSI.class_mean(positive=status)[known], covariance).pdf(z[known])
        for status, share in ((True, MSI.prevalence), (False, 1 - MSI.prevalence))
    ]
    generator = np.random.default_rng(3)
    found = np.mean([complete(MSI, z, generator, positive=None)[0] for _ in range(3000)])
    assert found == pytest.approx(joint[0] / sum(joint), abs=0.03)


def test_units_and_standard_deviations_belong_to_each_other():
    z = MSI.standardized({LEUKOCYTES: 0.1785 + 0.1125, STROMA: 0.3594 - 2 * 0.1699})
    np.testing.assert_allclose(z, [1, np.nan, -2, np.nan, np.nan], atol=1e-9)
    assert MSI.standardized({LEUKOCYTES: 0.67})[0] == 3  # as far as it counts
    values = MSI.in_units(np.array([1.0, 0, 0, 0, -3]))
    assert values[LEUKOCYTES] == pytest.approx(0.291)
    assert values[HETEROGENEITY] == 0  # no less than was ever measured


def tissues(z, *, positive=False, effects=EFFECTS, seeds=range(400)):
    return [
        draw_tissue(MSI, row, effects, np.random.default_rng(seed), positive=positive)
        for seed, row in zip(seeds, np.broadcast_to(z, (len(seeds), 5)), strict=True)
    ]


@given(seed=st.integers(0, 10**6), positive=st.booleans())
@settings(deadline=None, max_examples=30)
def test_shares_are_shares_of_the_six_tissues(seed, positive):
    generator = np.random.default_rng(seed)
    z = generator.standard_normal(5)
    tissue = draw_tissue(MSI, z, EFFECTS, generator, positive=positive)
    assert tissue.shares.sum() == pytest.approx(1)
    assert (tissue.shares[:6] > 0).all()
    np.testing.assert_allclose(tissue.shares[6:], 0, atol=1e-12)
    assert 0 < tissue.altered < 1
    assert 0 < tissue.clone < 1


@pytest.mark.parametrize(
    ("signature", "measure", "slope"),
    [
        (LEUKOCYTES, lambda t: np.log(t.shares[2] / t.shares[4]), 0.4),
        (LYMPHOCYTES, lambda t: np.log(t.shares[2] / t.shares[4]), 0.4),
        (STROMA, lambda t: np.log(t.shares[1] / t.shares[4]), 0.8),
        (HETEROGENEITY, lambda t: np.log(t.clone / (1 - t.clone)), 0.8),
        (PROLIFERATION, lambda t: t.growth, 0.8),
    ],
)
def test_each_signature_moves_its_tissue_by_its_effect_and_nothing_else(signature, measure, slope):
    high = np.zeros(5)
    high[SIGNATURES.index(signature)] = 1.0
    moved = [
        measure(a) - measure(b) for a, b in zip(tissues(high), tissues(np.zeros(5)), strict=True)
    ]
    np.testing.assert_allclose(moved, slope)  # the noise of a patient is the same in both
    assert all(
        a.altered == b.altered for a, b in zip(tissues(high), tissues(np.zeros(5)), strict=True)
    )


def test_patients_alike_vary_by_the_noise():
    drawn = tissues(np.zeros(5), seeds=range(3000))
    logs = np.log([t.shares[:6] for t in drawn])
    # a difference of two log-shares has twice the variance of one
    assert np.std(logs[:, 1] - logs[:, 4]) == pytest.approx(0.4 * np.sqrt(2), rel=0.05)
    odds = [np.log(t.altered / (1 - t.altered)) for t in drawn]
    assert np.std(odds) == pytest.approx(1.5, rel=0.05)
    assert np.median([t.altered for t in drawn]) == pytest.approx(0.05, rel=0.15)


def test_the_biomarker_alters_tumour_and_brings_lymphocytes():
    pairs = list(zip(tissues(np.zeros(5), positive=True), tissues(np.zeros(5)), strict=True))
    moved = [
        np.log(a.shares[2] / a.shares[4]) - np.log(b.shares[2] / b.shares[4]) for a, b in pairs
    ]
    np.testing.assert_allclose(moved, 0.3)
    assert np.median([a.altered for a, _ in pairs]) == pytest.approx(0.4, abs=0.08)
    assert all(a.altered > b.altered for a, b in pairs)


def test_a_measured_composition_is_taken_as_it_is():
    measured = shares_from({name: str(i) for i, name in enumerate(TISSUES)}, "P1")
    np.testing.assert_allclose(measured, np.arange(8) / 28)
    tissue = draw_tissue(
        MSI, np.ones(5), EFFECTS, np.random.default_rng(0), positive=True, measured=measured
    )
    np.testing.assert_array_equal(tissue.shares, measured)


def test_a_population_without_leukocyte_fraction_uses_lymphocyte_infiltration_alone():
    z = np.zeros(4)
    z[HRD.signatures.index(LYMPHOCYTES)] = 1
    low, high = (
        draw_tissue(HRD, v, EFFECTS, np.random.default_rng(0), positive=False)
        for v in (np.zeros(4), z)
    )
    moved = np.log(high.shares[2] / high.shares[4]) - np.log(low.shares[2] / low.shares[4])
    assert moved == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("", "of P1 must be numbers, but are '', "),
        ("-0.5", "of P1 must be at least 0 and not all 0, but are -0.5, "),
        ("nan", "of P1 must be at least 0"),
    ],
)
def test_fractions_that_are_none_are_refused(cell, message):
    row = {**dict.fromkeys(TISSUES, "0.1"), "TUM": cell}
    with pytest.raises(UserError, match=message):
        shares_from(row, "P1")
    with pytest.raises(UserError, match="not all 0"):
        shares_from(dict.fromkeys(TISSUES, "0"), "P1")


def numbers_of(correlation, count=400, seed=0):
    """Return a table, as text, of normal variables in units of their own with gaps."""
    generator = np.random.default_rng(seed)
    z = generator.multivariate_normal(np.zeros(len(correlation)), correlation, count)
    columns = ["score", *SIGNATURES[1:]][: len(correlation)]
    table = pd.DataFrame(25 + 15 * z, columns=columns).map(str)
    return table.mask(generator.random(table.shape) < 0.1, "")


SCORE = np.array([[1.0, 0.5, -0.2], [0.5, 1.0, 0.4], [-0.2, 0.4, 1.0]])


def test_a_number_goes_together_with_signatures_as_in_its_table():
    text = numbers_of(SCORE)
    table = text.replace("", np.nan).astype(float)
    population = Population.of_number("score", text)
    np.testing.assert_allclose(population.covariance(), table.corr(), atol=1e-12)
    np.testing.assert_allclose(population.mean, table.mean())
    np.testing.assert_allclose(population.sd, table.std())
    assert population.signatures == tuple(table)
    generator = np.random.default_rng(1)
    nothing = unknown(population)
    drawn = [complete(population, nothing, generator, positive=None)[1] for _ in range(3000)]
    np.testing.assert_allclose(np.corrcoef(np.stack(drawn).T), table.corr(), atol=0.05)
    np.testing.assert_allclose(np.mean(drawn, 0), 0, atol=0.06)


def test_a_missing_number_follows_the_signatures_by_the_line_of_regression():
    population = Population.of_number("score", numbers_of(SCORE))
    r = population.covariance()
    z = np.array([np.nan, 1.2, -0.7])
    generator = np.random.default_rng(2)
    drawn = [complete(population, z, generator, positive=None)[1][0] for _ in range(3000)]
    # By hand, of two predictors: the coefficients of regression from the three correlations.
    spare = 1 - r[1, 2] ** 2
    slopes = [(r[0, 1] - r[0, 2] * r[1, 2]) / spare, (r[0, 2] - r[0, 1] * r[1, 2]) / spare]
    explained = slopes[0] * r[0, 1] + slopes[1] * r[0, 2]
    assert np.mean(drawn) == pytest.approx(slopes[0] * 1.2 - slopes[1] * 0.7, abs=0.05)
    assert np.var(drawn) == pytest.approx(1 - explained, abs=0.06)


def test_correlations_that_contradict_each_other_and_copies_are_made_possible():
    # Never known all at once: a grows with b, b with c, but a falls with c.
    rows = [(str(i), str(i), "") for i in range(9)] + [("", str(i), str(i)) for i in range(9)]
    rows += [(str(i), "", str(-i)) for i in range(9)]
    for table in (rows, [(str(i), str(i), "7") for i in range(9)]):
        columns = ["score", STROMA, PROLIFERATION]
        population = Population.of_number("score", pd.DataFrame(table, columns=columns))
        covariance = population.covariance()
        np.testing.assert_allclose(covariance.diagonal(), 1)
        assert np.linalg.eigvalsh(covariance).min() > 0.001
        z = complete(population, unknown(population), np.random.default_rng(0), positive=None)[1]
        assert np.isfinite(z).all()
    assert population.signatures == ("score", STROMA)  # one value alone has no sd


def test_a_number_alters_tissue_by_degrees_as_labels_do_by_classes():
    population = Population.of_number("score", numbers_of(SCORE[:1, :1]))
    config = replace(EFFECTS, tumour_noise=0.0, composition_noise=0.0)

    def tissue(z, of=population, **status):
        return draw_tissue(of, np.array(z), config, np.random.default_rng(0), **status)

    low, middle, high, far = (tissue([z], positive=False) for z in (-1.0, 0.0, 1.0, 3.0))
    mss, msi = (tissue([0.0] * 5, MSI, positive=status) for status in (False, True))
    for number, label in ((low, mss), (high, msi)):
        assert number.altered == pytest.approx(label.altered)
        np.testing.assert_allclose(number.shares, label.shares)
    assert (low.altered, high.altered) == pytest.approx((0.05, 0.4))
    odds = [t.altered / (1 - t.altered) for t in (low, middle, high, far)]
    assert odds[1] == pytest.approx(np.sqrt(odds[0] * odds[2]))  # log-odds are linear
    assert odds[3] / odds[2] == pytest.approx(odds[2] / odds[0])
    lymphocytes = [t.shares[2] / t.shares[0] for t in (low, middle, high, far)]
    np.testing.assert_allclose(np.diff(np.log(lymphocytes)), [0.15, 0.15, 0.3])
