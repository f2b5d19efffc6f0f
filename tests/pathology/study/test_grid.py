"""A grid of simulated cohorts: what cells share, what is planted, what is found, what goes on."""

import itertools
import pickle
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from examples.pathology.common.errors import RunError, UserError
from examples.pathology.jobs.engine import Outcome
from examples.pathology.settings.grid import GridConfig
from examples.pathology.simulation.composition import LEUKOCYTES
from examples.pathology.simulation.planned import CORRELATION, PREVALENCE, planned, recorded
from examples.pathology.simulation.simulate import run_simulate
from examples.pathology.study import grid
from examples.pathology.study.grid import Cell, cells_of, fits_of, parts_of, run_grid
from examples.pathology.study.grid_report import CELL, USELESS, corrected, differences, sentences
from examples.pathology.training.learner import Learner

METHODS = ("baseline", "naive", "pcgrad")


def config_of(out, **changes) -> GridConfig:
    values = {
        "overlap": (1.0,),
        "patients": (40,),
        "missing": (0.5,),
        "further": 5,
        "methods": METHODS[:2],
        "cohorts": 3,
        "test_patients": 50,
        "tiles": 8,
        "epochs": 1,
        "width": 6,
    }
    return GridConfig(out, **{**values, **changes})


@pytest.fixture
def begun(monkeypatch):
    """Run jobs in this process, in order, and return the keys of those that were begun."""
    keys = []

    def run_jobs(jobs, client, *, on_outcome, title):
        for job in jobs:
            keys.append(job.key)
            assert pickle.loads(pickle.dumps(job)) == job  # so it reaches a worker
            try:
                on_outcome(Outcome(job.key, "done", value=job.run(*job.arguments)))
            except RunError as error:
                on_outcome(Outcome(job.key, "failed", error=str(error)))

    monkeypatch.setattr(grid, "run_jobs", run_jobs)
    monkeypatch.setattr(grid, "cluster", lambda **_: nullcontext())
    return keys


def test_a_grid_tells_failures_goes_on_and_does_nothing_twice(tmp_path, begun, monkeypatch):
    config = config_of(tmp_path / "grid")
    original = Learner.train_epoch

    def failing(learner, patients, epoch):
        if len(patients) > 32:  # those of the training part, and further ones
            raise RunError("planted")
        return original(learner, patients, epoch)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "train_epoch", failing)
        page, missing = run_grid(config)
    first = pd.read_csv(config.out / "results.csv")
    failed = first["error"] == "planted"
    assert missing == failed.sum() == 6  # two strengths, three cohorts
    assert (first["further"] == 5)[failed].all()
    assert page.read_text().count("planted") == 6
    baselines = first[first["method"] == "baseline"].groupby("cohort")["auroc"]
    assert (baselines.max() == baselines.min()).all()  # it knows no auxiliary value
    assert (baselines.size() == len(cells_of(config))).all()
    assert len(begun) == 1 + 3 * (1 + len(cells_of(config)))

    begun.clear()
    assert run_grid(config)[1] == 0
    assert begun == ["bags/1", *first["fit"][failed]]
    second = pd.read_csv(config.out / "results.csv")
    assert second["error"].isna().all()
    same = [name for name in first if name != "error"]
    pd.testing.assert_frame_equal(second.loc[~failed, same], first.loc[~failed, same])
    assert second["auroc"].between(0, 1).all()
    assert not (config.out / "bags").exists()

    begun.clear()
    assert run_grid(config) == (page, 0)
    assert begun == []
    with pytest.raises(UserError, match="differs in epochs: 1 -> 2"):
        run_grid(replace(config, epochs=2))


def test_a_grid_none_of_whose_trainings_succeeds_is_an_error(tmp_path, begun, monkeypatch):
    def failing(*_):
        raise RunError("planted")

    monkeypatch.setattr(grid, "bags_job", lambda *_: None)
    monkeypatch.setattr(grid, "fit_job", failing)
    monkeypatch.setattr(pickle, "loads", lambda job: job)
    monkeypatch.setattr(pickle, "dumps", lambda job: job)
    with pytest.raises(RunError, match="none did: planted"):
        run_grid(config_of(tmp_path))
    assert begun


def test_every_training_is_one_job_and_stands_for_every_cell_once(tmp_path):
    config = GridConfig(tmp_path)
    cells, fits = cells_of(config), fits_of(config)
    assert len(cells) == len(set(cells)) == 24
    assert len({fit.key for fit in fits}) == len(fits) == 8 * (4 + 6 * 24)
    stands = [(cell, fit.method, fit.cohort) for fit in fits for cell in fit.cells]
    wanted = itertools.product(cells, config.methods, range(1, 9))
    assert sorted(map(str, stands)) == sorted(map(str, wanted))
    for fit in fits:
        alike = {(cell.overlap, cell.patients) for cell in fit.cells}
        assert len(alike) == 1
        assert fit.method == "baseline" or len(fit.cells) == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"methods": ("naive", "pcgrad")}, "`method` must be given for baseline"),
        ({"strength": (0.5, 1.1)}, "`strength` must be different values, each between 0 and 1"),
        ({"overlap": (1.0, 1.0)}, "`overlap` must be different values"),
        ({"patients": (20,)}, "`patients` must be different values, each at least 40"),
        ({"missing": ()}, "`missing` must be different values"),
        ({"width": 10}, "`width` must be a multiple of 6"),
    ],
)
def test_settings_that_make_no_grid_are_refused(tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        config_of(tmp_path, **changes)


def test_a_method_that_nobody_knows_is_told_before_anything_is_made(tmp_path):
    config = config_of(tmp_path / "grid", methods=("baseline", "naive", "pcgard"))
    with pytest.raises(UserError, match="pcgard"):
        run_grid(config)
    assert not config.out.exists()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A grid's cohorts, whose bags are made."""
    config = config_of(tmp_path_factory.mktemp("world"))
    grid.bags_job(config, 1.0)
    return config, *grid._world(config, 1.0)


def parts_by_name(world, number=1, **changes):
    config, cohort, _ = world
    cell = replace(Cell(0.9, 1.0, 40, 0.0, 0), **changes)
    parts = parts_of(config, cell, cohort, number)
    return [{patient.name: patient for patient in part} for part in parts]


def test_nobody_is_in_two_parts_or_in_two_cohorts(world):
    everyone = []
    for number in (1, 2, 3):
        train, validation, ahead, test = parts_by_name(world, number, further=5)
        assert ahead.keys() < train.keys()
        assert (len(train), len(validation), len(test)) == (32 + 5, 8, 50)
        everyone += [*train, *validation, *test]
        assert sum(not patient.label for patient in train.values()) == 5
        for part in (validation, test):  # about three in ten
            positive = sum(patient.label == "MSI-H" for patient in part.values())
            assert abs(positive - PREVALENCE * len(part)) <= 1
    assert len(everyone) == len(set(everyone))


def test_cells_differ_in_what_is_known_and_in_nothing_else(world):
    def bare(parts):
        return [[replace(p, known={}) for p in part.values()] for part in parts]

    plain = parts_by_name(world)
    for changes in ({"strength": 0.0}, {"missing": 0.5}):
        assert bare(parts_by_name(world, **changes)) == bare(plain)
    train, *_ = further = parts_by_name(world, further=5)
    assert bare([*further[1:]]) == bare(plain[1:])
    assert train.keys() > plain[0].keys()
    labelled = {**parts_by_name(world, missing=0.5)[0], **parts_by_name(world, missing=0.5)[1]}
    assert sum(not patient.known for patient in labelled.values()) == 20
    assert all(patient.known for patient in parts_by_name(world, missing=0.5)[3].values())


def test_what_is_recorded_has_the_strength_for_its_correlation():
    random = np.random.default_rng(0)
    values = 0.1785 + 0.1125 * random.standard_normal(4000)  # as the leukocyte fraction
    for strength in (0.0, 0.5, 0.9, 1.0):
        said = [recorded(value, strength, str(i), 0) for i, value in enumerate(values)]
        assert np.corrcoef(values, said)[0, 1] == pytest.approx(strength, abs=0.05)
        assert np.mean(said) == pytest.approx(0.1785, abs=0.01)
        assert np.std(said) == pytest.approx(0.1125, rel=0.05)


@pytest.mark.parametrize("overlap", [0.0, 1.0])
def test_the_biomarker_shows_where_it_is_planted(tmp_path, overlap):
    names = [str(number) for number in range(400)]
    cohort = run_simulate(planned(tmp_path / "out", names, overlap=overlap, tiles=8, seed=3))
    truth = pd.read_csv(cohort.truth)
    label = truth["positive"]
    assert label.mean() == pytest.approx(PREVALENCE)
    altered = np.corrcoef(
        label, stats.norm.ppf(truth["altered share of tumour"].clip(0.001, 0.999))
    )
    assert (altered[0, 1] > 0.4) == (overlap == 0)
    z = truth[f"z {LEUKOCYTES}"]
    assert z.std() == pytest.approx(1, abs=0.1)
    assert np.corrcoef(label, z)[0, 1] == pytest.approx(overlap * CORRELATION, abs=0.12)
    assert np.corrcoef(z, np.log(truth["LYM"]))[0, 1] > 0.7  # tissue shows the signature
    for other in ("Stromal Fraction", "Proliferation", "Intratumor Heterogeneity"):
        assert abs(np.corrcoef(truth[f"z {other}"], label)[0, 1]) < 0.15
        assert abs(np.corrcoef(truth[f"z {other}"], z)[0, 1]) < 0.15


def planted_rows(cohorts=6, seed=0):
    """Return results in which `naive` gains 0.2 where value and overlap are, and nothing else."""
    random, rows = np.random.default_rng(seed), []
    for overlap, patients, strength, cohort in itertools.product(
        (0.0, 1.0), (80, 200), (0.0, 0.9), range(1, cohorts + 1)
    ):
        for method in METHODS:
            gain = 0.2 * (overlap * strength > 0) * (method != "baseline")
            area = 0.6 + gain + 0.01 * random.standard_normal()
            cell = (overlap, patients, strength, 0, 0.0)
            rows.append((*cell, cohort, method, area))
    return pd.DataFrame(rows, columns=[*CELL, "cohort", "method", "auroc"])


def areas_of(rows, method, **where):
    for name, value in {"method": method, **where}.items():
        rows = rows[rows[name] == value]
    return rows.sort_values("cohort")["auroc"].to_numpy()


def test_differences_in_a_cell_are_those_of_the_paired_t_test():
    rows = planted_rows().sample(frac=1, random_state=1)
    found = differences(rows)
    assert len(found) == 8 + 4 + 8
    for each in found.to_dict("records"):
        where = {name: each[name] for name in CELL}
        ours = areas_of(rows, each["method"], **where)
        if each["reference"] == USELESS:
            where["strength"] = 0.0
        theirs = areas_of(rows, each["reference"].partition(",")[0], **where)
        expected = stats.ttest_rel(ours, theirs)
        assert each["p"] == pytest.approx(expected.pvalue)
        assert each["difference"] == pytest.approx((ours - theirs).mean())
        assert (each["low"], each["high"]) == pytest.approx(tuple(expected.confidence_interval()))
        assert each["reference AUROC"] == pytest.approx(theirs.mean())


def test_means_over_cells_are_taken_within_cohorts():
    rows = planted_rows()
    found = differences(rows, ["strength", "overlap"]).set_index(
        ["method", "reference", "strength", "overlap"]
    )
    where = {"strength": 0.9, "overlap": 1.0}
    of_cohorts = np.mean(
        [
            areas_of(rows, "naive", patients=n, **where)
            - areas_of(rows, "baseline", patients=n, **where)
            for n in (80, 200)
        ],
        axis=0,
    )
    each = found.loc["naive", "baseline", 0.9, 1.0]
    assert each["cohorts"] == len(of_cohorts) == 6
    assert each["difference"] == pytest.approx(of_cohorts.mean())
    assert each["p"] == pytest.approx(stats.ttest_1samp(of_cohorts, 0).pvalue)


def test_what_is_planted_is_found_and_nothing_else():
    cells = corrected(differences(planted_rows()))
    stars = cells[cells["corrected"] < 0.05]
    assert set(stars["method"]) == {"naive"}
    assert set(stars["overlap"]) == {1.0}
    assert set(stars["strength"]) == {0.9}
    assert len(stars) == 2 + 2  # against the baseline, and against a useless value
    for (method, reference), family in cells.groupby(["method", "reference"]):
        p, largest = sorted(family["p"]), 0.0
        for rank, value in enumerate(p):  # Holm's method, by hand
            largest = max(largest, min(1.0, (len(p) - rank) * value))
            assert largest == pytest.approx(sorted(family["corrected"])[rank])
        assert (family["family"] == len(p)).all(), (method, reference)
    by = [["strength"], ["strength", "overlap"], ["strength", "further", "missing"]]
    margins = corrected(pd.concat([differences(planted_rows(), each) for each in by]))
    first, useless, balancer = sentences(cells, margins.assign(patients=None))
    assert "naive against baseline: significantly better in 2 and worse in 0 of 8 cells" in first
    assert "significantly better in 2 and worse in 0 of 4 cells" in useless
    assert "better in 0 and worse in 0 of 8 cells" in balancer
    assert "On average over cells of strength 0: " in first  # all of them, though nothing is there
    assert "On average over cells of strength 0.9, overlap 1: " in first
    assert "overlap 0" not in first  # where nothing was planted
    assert "On average over cells of strength 0.9: " in balancer
    assert "overlap" not in balancer


def test_tests_hold_their_level_where_nothing_is_planted():
    """Of 40 grids without any effect, about one in twenty may have a star in a comparison."""
    found = 0
    for seed in range(40):
        rows = planted_rows(cohorts=5, seed=seed)
        noise = np.random.default_rng(seed).standard_normal(len(rows))
        cells = corrected(differences(rows.assign(auroc=0.7 + 0.02 * noise)))
        found += (cells.loc[cells["method"] == "pcgrad", "corrected"] < 0.05).any()
    assert found <= stats.binom.ppf(0.999, 40, 0.05)


def test_a_training_that_failed_takes_its_cohort_along():
    rows = planted_rows()
    hit = (rows["method"] == "naive") & (rows["cohort"] == 2) & (rows["patients"] == 80)
    rows.loc[hit & (rows["overlap"] == 1.0) & (rows["strength"] == 0.9), "auroc"] = np.nan
    cells = differences(rows).set_index(["method", "reference", *CELL])
    assert cells.loc[("naive", "baseline", 1.0, 80, 0.9, 0, 0.0), "cohorts"] == 5
    assert cells.loc[("naive", "baseline", 1.0, 200, 0.9, 0, 0.0), "cohorts"] == 6
    margins = differences(rows, ["strength"]).set_index(["method", "reference", "strength"])
    assert margins.loc[("naive", "baseline", 0.9), "cohorts"] == 5
    assert margins.loc[("naive", "baseline", 0.0), "cohorts"] == 6


def test_one_cohort_alone_has_no_test_and_counts_for_no_correction():
    rows = planted_rows()
    where = (rows["overlap"] == 1.0) & (rows["strength"] == 0.9) & (rows["patients"] == 80)
    rows.loc[where & (rows["method"] == "pcgrad") & (rows["cohort"] > 1), "auroc"] = np.nan
    cells = corrected(differences(rows)).set_index(["method", "reference", *CELL])
    each = cells.loc[("pcgrad", "naive", 1.0, 80, 0.9, 0, 0.0)]
    assert each["cohorts"] == 1
    assert np.isnan([each["p"], each["low"], each["corrected"]]).all()
    assert (cells.loc[("pcgrad", "naive"), "family"] == 7).all()
