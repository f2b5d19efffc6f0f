import csv

import pytest

from examples.pathology.common.errors import RunError
from examples.pathology.features import ledger
from examples.pathology.features.ledger import (
    LEDGER_COLUMNS,
    ExtractSummary,
    LedgerKeeper,
    SlideRow,
    write_ledger,
)

ROWS = (
    SlideRow("a", "tiling", "ok", tiles_kept=5, seconds=1.0),
    SlideRow("a", "features", "ok", tiles_kept=5, seconds=3.0),
    SlideRow("b", "tiling", "ok", "finished before", tiles_kept=7, seconds=99, skipped=True),
    SlideRow("b", "features", "ok", "finished before", tiles_kept=7, seconds=99, skipped=True),
    SlideRow("c", "tiling", "empty", "glass", tiles_kept=0, seconds=0.5),
    SlideRow("d", "tiling", "excluded", "flat"),
)
LATE = (
    SlideRow("e", "tiling", "ok", tiles_kept=2),
    SlideRow("e", "features", "failed", "disk full"),
)


def test_the_summary_counts_slides_not_rows(tmp_path):
    good = ExtractSummary(ROWS, tmp_path / "ledger.csv", found=4, seconds=5)
    counts = (good.slides, good.tiled, good.done, good.skipped, good.empty, good.excluded)
    assert (*counts, good.failed, good.exit_code) == (4, 2, 2, 1, 1, 1, 0, 0)
    assert good.funnel == "4 slides -> 2 tiled -> 2 with features"
    assert "(1 finished before, 12 tiles in all); 1 empty, 1 excluded, 0 failed" in str(good)
    assert "tiling 1.5 s, features 3.0 s in 5.0 s" in str(good)  # of this run


def test_failures_and_an_early_end_are_seen_by_the_exit_code(tmp_path):
    bad = ExtractSummary((*ROWS, *LATE), tmp_path, found=5, seconds=5)
    assert bad.funnel == "5 slides -> 3 tiled -> 2 with features"
    assert bad.exit_code == 1
    early = ExtractSummary(ROWS, tmp_path, found=9, seconds=5, stopped="it rained.")
    assert early.exit_code == 1
    assert early.funnel == "9 slides -> 2 tiled -> 2 with features"
    assert str(early).endswith("Stopped early, 5 not looked at: it rained.")


def test_the_ledger_is_a_table_that_others_can_read(tmp_path):
    rows = [SlideRow('odd, "name"\n.svs', "tiling", "failed", "why, then?"), *ROWS]
    write_ledger(tmp_path / "ledger.csv", rows)
    with (tmp_path / "ledger.csv").open(encoding="utf-8", newline="") as file:
        read = list(csv.DictReader(file))
    assert tuple(read[0]) == LEDGER_COLUMNS
    assert [row["slide"] for row in read] == [row.slide for row in rows]
    assert (read[0]["reason"], read[0]["tiles_kept"], read[1]["tiles_kept"]) == (
        "why, then?", "", "5",
    )  # fmt: skip


def rows_of(slide, status="ok"):
    return (SlideRow(slide, "tiling", "ok"), SlideRow(slide, "features", status))


def names_in(path):
    with path.open(encoding="utf-8", newline="") as file:
        return [row["slide"] for row in csv.DictReader(file)]


def test_the_keeper_has_the_rows_in_the_order_of_the_slides(tmp_path, monkeypatch):
    path = tmp_path / "out" / "ledger.csv"
    keeper = LedgerKeeper(path, ["a", "b", "c"], None)
    keeper.take_down(rows_of("c", "failed"))
    assert not path.exists()  # not after every slide
    monkeypatch.setattr(ledger, "LEDGER_PERIOD_S", -1.0)
    keeper.take_down(rows_of("a", "failed"))
    assert names_in(path) == ["a", "a", "c", "c"]
    keeper.close()
    assert keeper.rows == (*rows_of("a", "failed"), *rows_of("c", "failed"))


@pytest.mark.parametrize("limit", [0, 2])
def test_the_keeper_ends_a_run_at_one_failure_too_many(limit, tmp_path):
    keeper = LedgerKeeper(tmp_path / "ledger.csv", "abcd", limit)
    keeper.take_down(rows_of("a"))
    for slide in "bcd"[:limit]:
        keeper.take_down(rows_of(slide, "failed"))
    with pytest.raises(RunError, match=f"^more than {limit} slides failed.$"):
        keeper.take_down(rows_of("d", "failed"))
    keeper.close()
    assert names_in(tmp_path / "ledger.csv") == [n for n in "abcd"[: limit + 1] + "d" for _ in "12"]
