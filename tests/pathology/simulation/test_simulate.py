import logging
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from examples.pathology.cli import main
from examples.pathology.cohort.check import run_check
from examples.pathology.cohort.cohort import load_cohort
from examples.pathology.common.errors import UserError
from examples.pathology.common.toml import read_toml
from examples.pathology.features.files import read_features
from examples.pathology.runs.crossval import run_crossval
from examples.pathology.settings.cohort import CheckConfig, CohortConfig
from examples.pathology.settings.crossval import CrossvalConfig
from examples.pathology.settings.simulate import SimulateConfig
from examples.pathology.simulation.composition import SIGNATURES, TISSUES
from examples.pathology.simulation.feature_space import FeatureSpace
from examples.pathology.simulation.simulate import run_simulate
from examples.pathology.simulation.tables import read_external, read_tables, shuffled, tables_of
from tests.pathology.tiny import write_bag, write_table

SHARED = Path(__file__).parents[4] / "shared" / "data"
REAL_LABELS = "Features are SIMULATED by a program; labels are those of a clinical table."
CLINICAL = [
    ["P1", "MSS", "0.30", "", "x"],
    ["P2", "MSI-H", "0.1785", "0.2", "y"],
    ["P3", "MSS", "", "0.1", ""],
    ["P4", "", "0.05", "0.4", ""],
    ["P5", "MSS", "0.22", "0.0", ""],
    ["P6", "MSI-H", "0.41", "0.03", ""],
    ["P7", "NA", "", "", ""],
]


@pytest.fixture
def tables(tmp_path):
    columns = ["PATIENT", "isMSIH", "Leukocyte Fraction", "Intratumor Heterogeneity", "Other"]
    clini = write_table(tmp_path / "labels.csv", columns, CLINICAL)
    slides = [[p, f"{p}-DX1"] for p in ("P1", "P2", "P3", "P4", "P6", "P7", "Q9")]
    slides.append(["P1", "P1-DX2"])
    return clini, write_table(tmp_path / "slide-table.csv", ["PATIENT", "FILENAME"], slides)


@pytest.fixture
def settings(tables, tmp_path):
    clini, slides = tables
    return SimulateConfig(
        tmp_path / "sim", clini=clini, slide_table=slides, tiles=12, max_tiles=20, seed=5
    )


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Return two drawn cohorts of the same bags: as they are, and the null setting."""
    folder = tmp_path_factory.mktemp("drawn")
    config = SimulateConfig(folder / "signal", patients=300, tiles=1, max_tiles=16)
    config = replace(config, tiles=16)
    return run_simulate(config), run_simulate(replace(config, out=folder / "null", null=True))


def text(path):
    return pd.read_csv(path, dtype=str, keep_default_na=False).set_index("PATIENT")


def content(folder):
    """Return everything that a cohort's files hold, by relative path."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".h5":
            with h5py.File(path) as file:
                found[name] = (dict(file.attrs), {k: file[k][()].tobytes() for k in file})
        elif path.is_file() and path.name != ".lock":
            found[name] = path.read_bytes()
    return found


def bags_of(cohort):
    return {
        path.stem: read_features(path) for path in sorted(cohort.sources.features.rglob("*.h5"))
    }


def pooled(cohort):
    return {name: bag.feats.mean(0) for name, bag in bags_of(cohort).items()}


def test_labels_come_through_verbatim_and_what_is_missing_stays_missing(settings):
    cohort = run_simulate(settings)
    clini = text(cohort.sources.clini)
    assert list(clini) == ["isMSIH", "Leukocyte Fraction", "Intratumor Heterogeneity"]
    expected = {row[0]: [cell.replace("NA", "") for cell in row[1:4]] for row in CLINICAL}
    assert {name: list(row) for name, row in clini.iterrows()} == expected
    slides = pd.read_csv(cohort.sources.slide_table)
    assert list(slides["FILENAME"]) == [f"P{i}-DX1" for i in (1, 2, 3, 4, 6, 7)] + ["P1-DX2"]
    assert (cohort.patients, cohort.slides, cohort.positive) == (7, 7, "MSI-H")
    truth = pd.read_csv(cohort.truth).set_index("PATIENT")
    assert list(truth.loc[["P1", "P2", "P3", "P5", "P6"], "positive"]) == [0, 1, 0, 0, 1]
    assert truth.notna().all(axis=None)  # bags of patients who lack a value are like any other
    assert truth.loc["P2", "z Leukocyte Fraction"] == 0  # the mean of TCGA-CRC
    assert truth.loc["P1", "z Leukocyte Fraction"] == pytest.approx((0.30 - 0.1785) / 0.1125)


def test_a_simulated_cohort_is_read_like_any_other_and_says_what_it_is(settings, caplog):
    simulated = run_simulate(settings)
    config = CohortConfig(
        simulated.sources.clini,
        simulated.sources.slide_table,
        simulated.sources.features,
        simulated.target,
        auxiliary=simulated.auxiliary,
    )
    with caplog.at_level(logging.WARNING):
        cohort = load_cohort(config)
    assert [p.name for p in cohort.patients] == ["P1", "P2", "P3", "P6"]
    assert [p.name for p in cohort.training_only] == ["P4"]
    assert len(cohort.patients[0].files) == 2
    assert cohort.kind.simulated == REAL_LABELS
    assert (cohort.kind.extractor, cohort.kind.random_weights) == ("simulated-seed5", False)
    for bag in bags_of(simulated).values():
        assert bag.kind.simulated == REAL_LABELS
        assert bag.feats.shape[1] == 768
        assert 8 <= len(bag.feats) <= 20
        assert bag.kind.tile_size_um == 256


def test_the_same_settings_give_the_same_content_and_another_seed_another(settings, tmp_path):
    run_simulate(settings)
    run_simulate(replace(settings, out=tmp_path / "again"))
    assert content(settings.out) == content(tmp_path / "again")
    other = run_simulate(replace(settings, out=tmp_path / "other", seed=6))
    ours, theirs = pooled(run_simulate(settings)), pooled(other)
    assert not any(np.allclose(ours[name], theirs[name]) for name in ours)


def test_a_patients_bags_depend_on_no_other_patient(settings, tmp_path):
    whole = run_simulate(settings)
    rows = [row for row in CLINICAL if row[0] in ("P1", "P3", "P6")]
    columns = ["PATIENT", "isMSIH", "Leukocyte Fraction", "Intratumor Heterogeneity", "Other"]
    few = write_table(tmp_path / "few.csv", columns, rows[::-1])
    part = run_simulate(
        replace(settings, clini=few, out=tmp_path / "part", positive="MSI-H", max_tiles=20)
    )
    before, after = bags_of(whole), bags_of(part)
    assert sorted(after) == ["P1-DX1", "P1-DX2", "P3-DX1", "P6-DX1"]
    for name, bag in after.items():
        np.testing.assert_array_equal(bag.feats, before[name].feats)
        np.testing.assert_array_equal(bag.coords_um, before[name].coords_um)


def test_a_stopped_simulation_is_taken_up_and_another_one_is_refused(settings):
    cohort = run_simulate(settings)
    before = content(settings.out)
    kept, lost = cohort.sources.features / "P1-DX1.h5", cohort.sources.features / "P6-DX1.h5"
    lost.unlink()
    stamp = kept.stat().st_mtime_ns
    run_simulate(settings)
    assert content(settings.out) == before
    assert kept.stat().st_mtime_ns == stamp
    with pytest.raises(UserError, match=r"one of the same simulation, but .* batch_effect: 0.2 ->"):
        run_simulate(replace(settings, batch_effect=0.3))
    settings.clini.write_text(settings.clini.read_text().replace("0.41", "0.42"))
    with pytest.raises(UserError, match="differs in clini_sha256"):
        run_simulate(settings)


def test_settings_are_written_down_resolved(settings):
    run_simulate(settings)
    stored = read_toml(settings.out / "simulation.toml")["simulation"]
    assert (stored["positive"], stored["tumour_shift"], stored["seed"]) == ("MSI-H", 6.0, 5)
    assert REAL_LABELS in (settings.out / "README.txt").read_text()


def test_composition_and_features_follow_the_signatures_and_the_label(drawn):
    signal, _ = drawn
    table = pd.read_csv(signal.sources.clini).set_index("PATIENT")
    truth = pd.read_csv(signal.truth).set_index("PATIENT")
    for signature, column, least in (
        ("Leukocyte Fraction", "LYM", 0.4),
        ("Lymphocyte Infiltration Signature Score", "LYM", 0.4),
        ("Stromal Fraction", "STR", 0.3),
        ("Intratumor Heterogeneity", "second clone's share of tumour", 0.6),
        ("Proliferation", "growth", 0.8),
    ):
        assert table[signature].corr(truth[column]) > least
    odds = np.log(truth["altered share of tumour"] / (1 - truth["altered share of tumour"]))
    assert roc_auc_score(truth["positive"], odds) > 0.8
    assert lymphocytes_seen(signal).corr(truth["LYM"]) > 0.6  # the bags hold what the truth says


def lymphocytes_seen(cohort):
    """Return how far each patient's mean features lie towards the lymphocytes' centroid."""
    axis = FeatureSpace(0).centroids[TISSUES.index("LYM")]
    return pd.Series({name: mean @ axis for name, mean in pooled(cohort).items()})


def test_in_the_null_setting_auxiliary_values_say_nothing_of_label_or_bag(drawn):
    signal, null = drawn
    before, after = text(signal.sources.clini), text(null.sources.clini)
    assert list(before["isMSIH"]) == list(after["isMSIH"])
    ours, theirs = bags_of(signal), bags_of(null)
    for name, bag in ours.items():  # the very same bags: the label shows as before
        np.testing.assert_array_equal(bag.feats, theirs[name].feats)
    labelled = before["isMSIH"] != ""
    for part in (labelled, ~labelled):  # the same rows, of other patients
        rows = [
            sorted(map(tuple, t.loc[part, list(SIGNATURES)].to_numpy())) for t in (before, after)
        ]
        assert rows[0] == rows[1]
    chance = 3.5 / np.sqrt(len(before))  # of a correlation, in standard deviations
    values = after[list(SIGNATURES)].apply(pd.to_numeric)
    seen, status = lymphocytes_seen(null), (after["isMSIH"] == "MSI-H").astype(float)
    for signature in SIGNATURES:
        assert abs(values[signature].corr(seen)) < chance
        assert abs(values[signature].corr(status[labelled])) < chance
    assert before["Leukocyte Fraction"].astype(float).corr(seen) > 1.5 * chance
    assert "SHUFFLED among patients (null setting)" in null.simulated
    assert "Null setting" in (null.sources.clini.parent / "README.txt").read_text()


def test_patients_with_and_without_a_label_are_shuffled_apart(tmp_path):
    rows = {f"P{i:02d}": ["MSS" if i % 2 else "", f"{i}"] for i in range(60)}
    table = pd.DataFrame.from_dict(rows, orient="index", columns=["isMSIH", "Proliferation"])
    mixed = shuffled(table, SimulateConfig(tmp_path))
    assert list(mixed["isMSIH"]) == list(table["isMSIH"])
    for labelled in (True, False):
        before, after = (
            t["Proliferation"][(t["isMSIH"] != "") == labelled] for t in (table, mixed)
        )
        assert sorted(before) == sorted(after)
        assert (before == after).mean() < 0.2  # by chance, one of 30 stays on average


def test_drawn_labels_say_so_and_lack_as_many_values_as_real_ones(drawn):
    signal, _ = drawn
    assert signal.simulated.endswith("labels are DRAWN as well.")
    table = text(signal.sources.clini)
    assert set(table["isMSIH"]) <= {"MSI-H", "MSS", ""}
    assert 0.08 < (table["isMSIH"] == "MSI-H").mean() < 0.21
    assert (table["Intratumor Heterogeneity"] == "").mean() < 0.05
    assert (table["Leukocyte Fraction"] != "").all()


def test_another_site_is_shifted_and_needs_no_signatures(settings, tmp_path):
    others = write_table(
        tmp_path / "other.csv",
        ["PATIENT", "isMSIH"],
        [[f"C{i}", ("MSI-H", "MSS", "")[i % 3]] for i in range(30)],
    )
    config = replace(settings, external_clini=others, batch_effect=0.0, domain_shift=0.5)
    cohort = run_simulate(config)
    external = cohort.external
    assert external is not None
    assert (external.patients, external.auxiliary, external.simulated) == (30, (), REAL_LABELS)
    assert list(text(external.sources.clini)) == ["isMSIH"]
    truth = pd.read_csv(external.truth)
    assert truth["z Leukocyte Fraction"].nunique() == 30  # drawn given the label
    plain = run_simulate(replace(config, domain_shift=0.0, out=tmp_path / "plain")).external
    assert plain is not None
    shift = np.mean(list(pooled(external).values()), 0) - np.mean(list(pooled(plain).values()), 0)
    space = FeatureSpace(5)
    assert np.corrcoef(shift, space.domain)[0, 1] > 0.9
    strange = write_table(tmp_path / "strange.csv", ["PATIENT", "isMSIH"], [["C1", "MSI"]])
    with pytest.raises(UserError, match=r"must be one of MSI-H, MSS, .* but has 'MSI'"):
        run_simulate(replace(config, external_clini=strange, out=tmp_path / "strange"))


def test_a_measured_composition_is_all_that_its_bags_hold(settings, tmp_path):
    columns = ["PATIENT", "ADI", "BACK", "DEB", "LYM", "MUC", "MUS", "NORM", "STR", "TUM"]
    rows = [["P1", 0, 0.5, 0, 0, 0, 0, 0, 0, 0.5], ["P3", 0, 0.2, 0, 0.4, 0, 0, 0, 0, 0.4]]
    rows.append(["R1", *[0.1] * 9])
    config = replace(
        settings,
        composition="measured",
        tissue_fractions=write_table(tmp_path / "fractions.csv", columns, rows),
        positive="MSS",
    )
    with pytest.raises(UserError, match="at least 2 values"):
        run_simulate(config)  # nobody is left who has MSI
    rows.append(["P6", 0, 0, 0, 0, 0, 0, 1, 0, 0])
    config = replace(
        config, tissue_fractions=write_table(tmp_path / "f2.csv", columns, rows), batch_effect=0.0
    )
    cohort = run_simulate(config)
    truth = pd.read_csv(cohort.truth).set_index("PATIENT")
    assert list(truth.index) == ["P1", "P3", "P6"]
    expected = {"P1": {"TUM": 1.0}, "P3": {"TUM": 0.5, "LYM": 0.5}, "P6": {"NORM": 1.0}}
    for name, shares in expected.items():
        assert {t: truth.loc[name, t] for t in TISSUES if truth.loc[name, t]} == shares
    readme = (config.out / "README.txt").read_text()
    assert "tissue fractions are measured" in cohort.simulated
    assert "4 patients without fractions are left out" in readme
    assert "Nothing is planted" in readme
    # Nothing in the bags depends on the label or on the signatures.
    swapped = settings.clini.read_text().replace("MSI-H", "?").replace("MSS", "MSI-H")
    swapped = swapped.replace("?", "MSS").replace("0.41", "0.01")
    other = tmp_path / "swapped.csv"
    other.write_text(swapped)
    again = run_simulate(replace(config, clini=other, out=tmp_path / "swapped"))
    for name, bag in bags_of(again).items():
        np.testing.assert_array_equal(bag.feats, bags_of(cohort)[name].feats)


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data")
def test_measured_fractions_tell_msi_as_well_as_published(tmp_path):
    config = SimulateConfig(
        tmp_path / "out",
        clini=SHARED / "tables" / "tcga_crc_labels.csv",
        composition="measured",
        tissue_fractions=SHARED / "bags" / "tcga_crc_tissue_fractions.csv",
        tiles=1,
        max_tiles=1,
    )
    cohort = run_simulate(config)
    assert cohort.patients == 363
    table = text(cohort.sources.clini).join(pd.read_csv(cohort.truth).set_index("PATIENT"))
    table = table[table["isMSIH"] != ""]
    model = make_pipeline(StandardScaler(), LogisticRegression())
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    logs = np.log(table[list(TISSUES)].to_numpy() + 1e-4)
    positive = table["isMSIH"] == "MSI-H"
    scores = cross_val_predict(model, logs, positive, cv=folds, method="predict_proba")[:, 1]
    assert roc_auc_score(positive, scores) == pytest.approx(0.66, abs=0.04)


def test_simulated_and_real_features_never_mix(settings):
    cohort = run_simulate(settings)
    config = CohortConfig(
        cohort.sources.clini, cohort.sources.slide_table, cohort.sources.features, "isMSIH"
    )
    path = cohort.sources.features / "P6-DX1.h5"
    bag = read_features(path)
    write_bag(path, bag.feats, extractor=bag.kind.extractor, sha="")
    with pytest.raises(UserError, match="All feature files must come from one extractor"):
        load_cohort(config)


def test_every_number_and_figure_of_a_run_states_it(tmp_path):
    cohort = run_simulate(SimulateConfig(tmp_path / "sim", patients=60, tiles=8, max_tiles=8))
    files = (cohort.sources.clini, cohort.sources.slide_table, cohort.sources.features)
    said: list[str] = []
    run_check(CheckConfig(*files, "isMSIH", folds=2), said.append)
    assert cohort.simulated in said
    summary = run_crossval(
        CrossvalConfig(
            *files, "isMSIH", tmp_path / "run", folds=2, epochs=1, width=12, layers=1, device="cpu"
        )
    )
    assert summary.simulated == cohort.simulated
    assert cohort.simulated in summary.caption
    provenance = read_toml(tmp_path / "run" / "config.toml")["provenance"]
    assert provenance["simulated"] == cohort.simulated


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tiles": 0}, "`tiles` must be at least 1, but got 0"),
        ({"batch_effect": -1.0}, "`batch-effect` must be at least 0, but got -1.0"),
        ({"tumour_shift": float("nan")}, "`tumour-shift` must be at least 0"),
        ({"tumour_share": 1.0}, "`tumour-share` must be between 0 and 1, but got 1.0"),
        ({"composition": "mesured"}, "Did you mean `measured`"),
        (
            {"composition": "measured"},
            "`tissue-fractions` must be given for `composition` measured",
        ),
        ({"tissue_fractions": Path("f.csv")}, "and only then"),
        ({"patients": 50}, "`patients` must be left out where --clini is given"),
        ({"clini": None}, "must go with --clini"),
        ({"clini": None, "slide_table": None, "target": "HRD-H"}, "Did you mean `HRD`"),
        ({"auxiliary": ("Stroma",)}, "must be one of .* Did you mean `Stromal Fraction`"),
        ({"auxiliary": ("Proliferation",)}, "must be a column of the clinical table"),
        ({"positive": "MSI"}, "`positive` must be a value of `isMSIH`"),
        ({"target": "isMSI"}, "Did you mean `isMSIH`"),
        ({"target": "Leukocyte Fraction"}, "`target` must be no signature"),
        ({"draw_external_labels": True}, "must go with --external-clini"),
    ],
)
def test_wrong_use_is_told_before_anything_is_written(settings, options, message):
    with pytest.raises(UserError, match=message):
        run_simulate(replace(settings, **options))
    assert not settings.out.exists()


def test_tables_that_contradict_themselves_are_refused(settings, tmp_path):
    words = tmp_path / "words.csv"
    words.write_text(settings.clini.read_text().replace("0.41", "high"))
    with pytest.raises(UserError, match="`Leukocyte Fraction` must hold numbers, but has 'high'"):
        run_simulate(replace(settings, clini=words))
    shared = write_table(
        tmp_path / "shared.csv", ["PATIENT", "FILENAME"], [["P1", "a"], ["P2", "a.h5"]]
    )
    with pytest.raises(
        UserError, match="must belong to one patient, but a is claimed by P1 and P2"
    ):
        run_simulate(replace(settings, slide_table=shared))
    nobody = write_table(tmp_path / "nobody.csv", ["PATIENT", "FILENAME"], [["Q", "a"]])
    with pytest.raises(UserError, match="must have slides of patients of"):
        run_simulate(replace(settings, slide_table=nobody))


def test_slides_of_one_name_keep_their_suffix(settings, tmp_path):
    rows = [["P1", "a.svs"], ["P2", "a.tif"], ["P3", "b.svs"], ["P3", "b"]]
    slides = write_table(tmp_path / "s.csv", ["PATIENT", "FILENAME"], rows)
    found = read_tables(settings.clini, slides, settings).slides
    assert found == [("P1", "a.svs"), ("P2", "a.tif"), ("P3", "b"), ("P3", "b")]


def test_the_command_line_needs_a_table_and_a_folder_only(tables, tmp_path, capsys):
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as ended:
        main(["simulate", "--clini", str(tables[0]), "--out", str(out), "--null"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert len(list((out / "features").glob("*.h5"))) == len(CLINICAL)
    assert "null setting" in (out / "README.txt").read_text()
    with pytest.raises(SystemExit) as stopped:
        main(["simulate", "--out", str(tmp_path / "x"), "--target", "grade"])
    assert stopped.value.code == 2
    assert "`target` must be one of isMSIH, HRD" in capsys.readouterr().err


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    """Return a cohort of a number, and of another site whose table does not have it."""
    folder = tmp_path_factory.mktemp("graded")
    generator = np.random.default_rng(0)
    z = generator.multivariate_normal([0, 0], [[1, 0.5], [0.5, 1]], 120)
    rows = [
        [f"P{i:03d}", "" if i % 10 == 0 else f"{25 + 15 * a:.1f}", "" if i % 7 == 0 else f"{b:.3f}"]
        for i, (a, b) in enumerate(z)
    ]
    others = [[f"C{i:02d}", "x", "0.5"] for i in range(60)]
    config = SimulateConfig(
        folder / "out",
        clini=write_table(folder / "labels.csv", ["PATIENT", "HRD_score", "Proliferation"], rows),
        external_clini=write_table(
            folder / "other.csv", ["PATIENT", "Sex", "Proliferation"], others
        ),
        draw_external_labels=True,
        target="HRD_score",
        tiles=16,
        max_tiles=20,
    )
    return config, run_simulate(config)


def test_a_number_is_planted_by_degrees_and_truth_says_so(graded):
    config, cohort = graded
    table, truth = pd.read_csv(cohort.sources.clini), pd.read_csv(cohort.truth)
    score = table["HRD_score"]
    assert "positive" not in truth
    assert cohort.positive == ""
    z = ((score - score.mean()) / score.std()).clip(-3, 3)
    known = score.notna()
    np.testing.assert_allclose(truth["z HRD_score"][known], z[known], atol=1e-5)
    assert truth.notna().all(axis=None)
    # Log-odds of altered tiles: from 0.05 to 0.4 within two standard deviations.
    odds = np.log(truth["altered share of tumour"] / (1 - truth["altered share of tumour"]))
    expected = (np.log(0.4 / 0.6) - np.log(0.05 / 0.95)) / 2
    slope = np.polyfit(truth["z HRD_score"], odds, 1)[0]
    error = config.tumour_noise / np.sqrt(len(truth))
    assert slope == pytest.approx(expected, abs=3 * error)
    expected_r = expected / np.hypot(expected, config.tumour_noise)
    assert truth["z HRD_score"].corr(odds) == pytest.approx(expected_r, abs=0.16)
    # The bags hold it: altered tiles lie off along one direction, in tumour tiles only.
    space = FeatureSpace(0)
    axis = space.biomarker @ space.factors[TISSUES.index("TUM")]
    seen = pd.Series({name: mean @ axis for name, mean in pooled(cohort).items()})
    altered = truth.set_index("PATIENT")[["altered share of tumour", "TUM"]].prod(axis=1)
    assert seen.corr(altered) > 0.6
    assert seen.corr(table.set_index("PATIENT")["HRD_score"]) > 0.3
    stored = read_toml(config.out / "simulation.toml")["simulation"]
    assert "positive" not in stored
    assert stored["target_mean"] == pytest.approx(score.mean())
    assert stored["target_sd"] == pytest.approx(score.std())
    assert "`HRD_score`, by degrees" in (config.out / "README.txt").read_text()


def test_labels_of_another_site_are_drawn_jointly_from_the_first_table_and_say_so(graded):
    config, cohort = graded
    first, external = text(cohort.sources.clini), cohort.external
    assert external is not None
    there = text(external.sources.clini)
    assert list(there.index) == [f"C{i:02d}" for i in range(60)]
    assert external.auxiliary == ("Proliferation",)
    truth = pd.read_csv(external.truth).set_index("PATIENT")
    donors = first.loc[truth["labels of"]]
    assert there.to_numpy().tolist() == donors.to_numpy().tolist()  # the whole row of one patient
    assert (there["HRD_score"] != "").all()
    assert (there["Proliferation"] == "").any()  # what a donor lacks is lacking
    assert donors.index.nunique() > 35  # of 108, drawn 60 times: 46 on average
    ours = pd.read_csv(cohort.truth).set_index("PATIENT")["z HRD_score"]
    assert truth["z HRD_score"].tolist() == ours[truth["labels of"]].tolist()
    for bag in bags_of(external).values():
        assert bag.kind.simulated == external.simulated
    assert "labels and signatures are DRAWN" in external.simulated
    assert "DRAWN" not in cohort.simulated
    assert "are DRAWN. Each patient has" in (config.out / "README.txt").read_text()


def test_what_is_drawn_for_a_patient_depends_on_no_other_patient_there(graded, tmp_path):
    config, cohort = graded
    assert cohort.external is not None
    few = write_table(tmp_path / "few.csv", ["PATIENT"], [["C31"], ["C07"]])
    part = read_external(few, tables_of(config), config)
    whole = text(cohort.external.sources.clini).loc[["C31", "C07"]]
    assert part.clinical.to_numpy().tolist() == whole.to_numpy().tolist()
    assert list(part.clinical.index) == list(whole.index)


def test_labels_are_drawn_where_asked_for_and_missing_only(graded, tmp_path):
    config, _ = graded
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"column `HRD_score`, but has .*--draw-external-labels"):
        run_simulate(replace(config, draw_external_labels=False, out=out))
    with pytest.raises(UserError, match=r"without `HRD_score`, but .*labels\.csv has that column"):
        run_simulate(replace(config, external_clini=config.clini, out=out))
    with pytest.raises(UserError, match="`HRD_score`, whose numbers all count, but got '42'"):
        run_simulate(replace(config, positive="42", out=out))
    assert not out.exists()


def test_settings_of_earlier_folders_are_those_of_today(settings):
    run_simulate(settings)
    stored = read_toml(settings.out / "simulation.toml")["simulation"]
    assert not stored.keys() & {"draw_external_labels", "target_mean", "target_sd"}
