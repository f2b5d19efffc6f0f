"""Patients by their loss, against scikit-learn and slow loops, and the slides of the worst."""

import base64
import io
import math
import re

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.metrics import log_loss

from examples.pathology.common.errors import UserError
from examples.pathology.common.toml import write_toml
from examples.pathology.report.pages import ENVIRONMENT
from examples.pathology.report.patients import patients_of, worst_errors
from examples.pathology.results.folds import FoldResult
from examples.pathology.results.runs import Run
from examples.pathology.results.summary import RunSummary
from tests.pathology.parsing import sources_of

COLOURS = {"a": (200, 30, 30), "b": (30, 200, 30), "A/c": (30, 30, 200), "d": (200, 200, 30)}


def a_run(*tables, classes=("MSS", "MSIH"), threshold=0.3, kind="classification", folder=None):
    summary = RunSummary(
        method="naive",
        target="MSI",
        kind=kind,
        classes=classes,
        positive=classes[-1] if classes else "",
        patients=0,
        funnel=[],
        extractor="tiny",
        random_weights=False,
        note="",
        metrics={},
    )
    points = np.zeros((0, 2), dtype=np.float32)
    results = [FoldResult(table.astype(str), points, 0, 0, 0.0, threshold) for table in tables]
    return Run("naive", folder, summary, tuple(results))


def predictions(names, truth, scores, classes=("MSS", "MSIH")):
    columns = {f"MSI_{label}": scores[:, i] for i, label in enumerate(classes)}
    return pd.DataFrame({"PATIENT": names, "MSI": truth, **columns})


def drawn(seed, patients=9, classes=("MSS", "MSIH")):
    """Draw predictions of patients, of whom the last has no label."""
    random = np.random.default_rng(seed)
    truth = [*random.choice(classes, patients - 1), ""]
    names = [f"P{i}" for i in range(patients)]
    scores = random.dirichlet(np.ones(len(classes)), patients)
    return predictions(names, truth, scores, classes)


def test_the_losses_are_those_of_scikit_learn_and_sorted():
    classes = ("I", "II", "III")
    tables = [
        drawn(seed, classes=classes).replace("^P", f"P{seed}-", regex=True) for seed in (0, 1)
    ]
    tables[0].loc[0, ["MSI", "MSI_I", "MSI_II", "MSI_III"]] = ["II", 0.6, 0.0, 0.4]
    found = patients_of([a_run(*tables, classes=classes)])
    every = pd.concat(tables)
    known = every[every["MSI"] != ""].set_index("PATIENT")
    assert sorted(found["PATIENT"]) == sorted(known.index)
    assert list(found["loss"]) == sorted(found["loss"], reverse=True)
    for row in found.itertuples():
        scores = known.loc[row.PATIENT, [f"MSI_{label}" for label in classes]].astype(float)
        oracle = log_loss([row.truth], [scores.to_numpy()], labels=list(classes))
        assert row.loss == pytest.approx(oracle, rel=1e-9)
        assert row.probability == scores[f"MSI_{row.truth}"]
        assert row.truth == known.loc[row.PATIENT, "MSI"]
        assert f"MSI_{row.predicted}" == scores.idxmax()  # of more than two, the likeliest
        assert row.fold == {"0": "1", "1": "2"}[row.PATIENT[1]]
    assert found["PATIENT"][0] == "P0-0"
    assert found["loss"][0] == pytest.approx(
        -math.log(np.finfo(float).eps)
    )  # of a probability of 0


def test_one_of_two_classes_is_called_at_the_threshold_of_the_fold():
    scores = np.array([[0.7, 0.3], [0.71, 0.29], [0.4, 0.6]])
    table = predictions(["a", "b", "c"], ["MSS", "MSIH", "MSS"], scores)

    def called(threshold):
        found = patients_of([a_run(table, threshold=threshold)])
        assert set(found["fold"]) == {""}  # of an ensemble
        return dict(zip(found["PATIENT"], found["predicted"], strict=True))

    assert called(0.3) == {"a": "MSIH", "b": "MSS", "c": "MSIH"}
    assert called(0.7) == {"a": "MSS", "b": "MSS", "c": "MSS"}
    likeliest = {"a": "MSS", "b": "MSS", "c": "MSIH"}
    assert called(math.nan) == likeliest  # the validation part gave no threshold


def test_a_number_has_its_squared_error_in_its_unit():
    names, truth, said = ["a", "b", "c", "d"], ["1", "10", "", "-2"], [3.0, 9.5, 7.0, -2.0]
    table = pd.DataFrame({"PATIENT": names, "MSI": truth, "MSI_pred": said})
    found = patients_of(
        [a_run(table, table.replace("^", "x", regex=True).iloc[:0], classes=(), kind="regression")]
    )
    assert list(found["PATIENT"]) == ["a", "b", "d"]
    assert list(found["loss"]) == [4.0, 0.25, 0.0]
    assert "probability" not in found


def test_over_runs_losses_are_means_and_wrong_calls_are_counted():
    tables = [
        [drawn(seed), drawn(seed + 50).assign(PATIENT=[f"Q{i}" for i in range(9)])]
        for seed in range(3)
    ]
    for fold in (0, 1):
        for each in tables[1:]:
            each[fold]["MSI"] = tables[0][fold]["MSI"]  # the truth is one
    runs = [a_run(*each) for each in tables]
    found = patients_of(runs).set_index("PATIENT")
    alone = [patients_of([run]).set_index("PATIENT") for run in runs]
    assert list(found["loss"]) == sorted(found["loss"], reverse=True)
    assert len(found) == 16
    for name, row in found.iterrows():
        mine = [each.loc[name] for each in alone]
        assert row["loss"] == pytest.approx(sum(each["loss"] for each in mine) / 3)
        assert row["probability"] == pytest.approx(sum(each["probability"] for each in mine) / 3)
        assert row["wrong"] == sum(each["truth"] != each["predicted"] for each in mine)
        assert (row["runs"], row["fold"]) == (3, "1" if name[0] == "P" else "2")


@pytest.fixture
def folder(tmp_path):
    """A run folder, and thumbnails in one colour for each of the slides."""
    features = tmp_path / "features"
    for name, colour in COLOURS.items():
        path = features / "thumbnails" / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (900, 600), colour).save(path)
    (features / "masks").mkdir()
    Image.new("RGB", (9, 6)).save(features / "masks" / "e.jpg")  # of another tool
    write_toml(tmp_path / "config.toml", {"crossval": {"features": str(features)}})
    rows = ["P0,a", "P1,b", "P1,c", "P1,d", "P1,a", "P2,e"]
    lines = [f"slide,{name},{who},used," for who, name in (row.split(",") for row in rows)]
    lines = ["item,name,patient,status,reason", *lines, "slide,z,P0,excluded,no feature file"]
    (tmp_path / "ledger.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path


def pictures_of(text):
    """Return the colour and size of every picture of a page, by the name below it."""
    found = {}
    for card in text.split("<figure>")[1:]:
        if data := re.search(r"base64,([^']+)'", card):
            picture = Image.open(io.BytesIO(base64.b64decode(data[1])))
            name = re.search(r"<figcaption>([^<]*)<", card)[1]
            found[name] = picture.getpixel((picture.width // 2, picture.height // 2)), picture.size
    return found


def page_of(groups, out, count=12):
    template = "{% from 'parts.html.j2' import worst %}{{ worst(found) }}"
    found = worst_errors(groups, out, count)
    return ENVIRONMENT.from_string(template).render(found=found)


def test_the_worst_are_shown_with_their_own_slides(folder):
    names = ["P0", "P1", "P2", "P3"]
    scores = np.array([[0.9, 0.1], [0.2, 0.8], [0.4, 0.6], [0.9, 0.1]])
    table = predictions(names, ["MSIH", "MSS", "MSIH", "MSS"], scores)
    run = a_run(table, table.iloc[:0], folder=folder)
    text = page_of({"<naive>": [run]}, folder, 3)
    assert [re.sub("<[^>]*>", "", each) for each in re.findall("<b>(.*?)</b>", text)] == [
        "&lt;naive&gt;", "1. P0", "2. P1", "3. P2"
    ]  # fmt: skip
    assert "MSIH → called MSS</div>\n<div>P(MSIH) = 0.1, loss 2.3</div>" in text
    losses = [-math.log(p) for p in (0.1, 0.2, 0.6, 0.9)]
    share = 100 * sum(losses[:3]) / sum(losses)
    assert f"The 3 largest, from 0.511 to 2.3, are {share:.0f} % of the sum." in text
    assert re.findall("<figcaption>(.*?)<", text) == ["a", "b", "c", "d", "a", "e"]
    shown = pictures_of(text)
    assert shown.keys() == {"a", "b", "c", "d"}  # of P1 three of four; of e another tool's mask
    assert text.count("<img loading='lazy'") == 4
    for name, colour in COLOURS.items():
        seen, size = shown[name.removeprefix("A/")]
        assert size == (480, 320)
        assert np.abs(np.subtract(seen, colour)).max() < 6
    assert "<span style='color: rgb(0, 158, 115)'>■</span>&nbsp;kept" in text
    written = pd.read_csv(folder / "patients.csv", keep_default_na=False)
    assert list(written["PATIENT"]) == ["P0", "P1", "P2", "P3"]
    assert list(written["slides"]) == ["a", "b; c; d; a", "e", ""]
    assert list(written["run"]) == ["<naive>"] * 4
    assert written["loss"].to_numpy() == pytest.approx(losses)


def test_a_picture_is_small_however_hard_it_is_to_compress(folder):
    noise = np.random.default_rng(0).integers(0, 255, (700, 900, 3), dtype=np.uint8)
    path = folder / "features/thumbnails/a.jpg"
    Image.fromarray(noise).save(path, quality=95)
    run = a_run(drawn(0, patients=2), folder=folder)
    (card,) = worst_errors({"naive": [run]}, folder, 1)[0]["cards"]
    ((_, picture),) = card["pictures"]
    assert 10_000 < len(picture) <= 40_100
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"a.jpg must be there as it was written, .* Delete it"):
        worst_errors({"naive": [run]}, folder, 1)


def test_slides_are_listed_where_no_thumbnail_is_theirs(folder):
    (folder / "features").rename(folder / "moved")
    run = a_run(drawn(0), drawn(0).iloc[:0], folder=folder)
    text = page_of({"naive": [run]}, folder)
    assert f"<p>No thumbnails: {folder / 'features'} has none of these slides.</p>" in text
    assert sources_of(f"<html>{text}</html>") == []
    assert "<figcaption>b</figcaption>" in text


def test_two_thumbnails_that_may_be_meant_are_not_guessed_between(folder):
    thumbnails = folder / "features/thumbnails"
    for name in ("b.one", "b.two"):
        (thumbnails / "b.jpg").rename(thumbnails / f"{name}.jpg") if name == "b.one" else Image.new(
            "RGB", (9, 9)
        ).save(thumbnails / f"{name}.jpg")
    run = a_run(drawn(0), drawn(0).iloc[:0], folder=folder)
    shown = pictures_of(page_of({"naive": [run]}, folder))
    assert "b" not in shown
    assert "a" in shown


def test_a_run_without_any_error_has_a_page(folder):
    table = pd.DataFrame({"PATIENT": ["P0", "P1"], "MSI": ["1.5", "2"], "MSI_pred": ["1.5", "2"]})
    text = page_of({"naive": [a_run(table, classes=(), kind="regression", folder=folder)]}, folder)
    assert "The 2 largest, from 0 to 0, are 0 % of the sum." in text
    assert "<div>1.5 → predicted 1.5</div>\n<div>loss 0</div>" in text
    assert "The loss is the squared error, in the unit of the target squared." in text


def test_nobody_with_a_label_is_nothing_to_show(tmp_path):
    unlabelled = drawn(0).assign(MSI="")
    assert worst_errors({"ensemble": [a_run(unlabelled)]}, tmp_path, 3) == []
    assert worst_errors({"all": [a_run(unlabelled), a_run(unlabelled)]}, tmp_path, 3) == []
    assert not (tmp_path / "patients.csv").exists()
