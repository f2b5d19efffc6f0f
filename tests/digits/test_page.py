"""What is written follows from the numbers, and the page in docs/ from its files."""

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from examples.digits import costs, study
from examples.digits.costs import Cost
from examples.digits.figure import TABLE, digest, draw
from examples.digits.methods import SINGLE
from examples.digits.page import BLOCKS, blocks, comma_separated, filled
from examples.digits.results import tabulate
from tests.digits._small import done, plan_of

DOCS = Path(__file__).parents[2] / "docs"
FOLDER, PAGE = DOCS / "digits", DOCS / "digits.md"
METHODS = ("pcgrad", "mgda", "dwa")
COSTS = {
    "sum": Cost(1, 1, 1, 2.5),
    "mgda": Cost(1.5, 1.4, 1.6, 3.75),
    "dwa": Cost(1.02, math.nan, math.nan, 2.6),
}


def table_of(apart, seeds=5, failing=(), costs=COSTS):
    """A study in which methods differ from the baseline by so many points, and by chance."""
    plan = plan_of(*METHODS, seeds=seeds)
    rng = np.random.default_rng(1)
    trainings = []
    for job in plan.jobs:
        share = 0.8 + apart.get(job.method, 0) / 100 + rng.normal(0, 1e-3)
        values = (share, share, 1 - share, share)
        error = "ValueError: it does not work" if job.method in failing else ""
        trainings.append(done(job.method, job.seed, job.rate, values, error=error))
    return tabulate(plan, trainings, costs)


def outcome(*arguments, **options):
    return blocks(table_of(*arguments, **options))["outcome"]


def test_ties_are_called_ties():
    words = outcome({})
    assert "**None of 3 methods differs from equal weights beyond chance.**" in words
    assert "better" not in words
    assert "That is a statement about 5 seeds" in words


def test_differences_are_told_with_their_sign():
    words = outcome({"mgda": 5, "dwa": -5})
    assert (
        "**Of 3 methods, 1 is better (`mgda`) and 1 is worse (`dwa`) than equal weights beyond "
        "chance; 1 does not differ beyond chance.**" in words
    )
    assert "The best mean rank of 4 is that of `mgda` (1.0), the last that of `dwa` (4.0)" in words


def test_one_seed_says_nothing_about_chance():
    words = outcome({"mgda": 5}, seeds=1)
    assert words.startswith("- One seed says nothing about chance")
    assert "nan" not in words


def test_the_reference_is_compared():
    words = outcome({f"{SINGLE}:{task}": 5 for task in ("upper-left", "lower-right", "ink")})
    assert "differs from equal weights by +5.0 ± 0." in words
    assert "grey values of error for ink" in words
    assert "points below its score" in words


def test_costs_and_choices_are_told():
    words = outcome({})
    assert "from 1.02 (`dwa`) to 1.50 (`mgda`) of a step with equal weights (2.5 ms)" in words
    assert "Of 20 choices of a learning rate, it was 0.01 in " in words
    assert "from" not in outcome({}, costs={}).partition("Of 20 choices")[0].replace(
        "from equal weights", ""
    )


def test_failures_are_told():
    table = table_of({}, failing=("dwa",))
    parts = blocks(table)
    assert "Failed: `dwa` (ValueError: it does not work)." in parts["outcome"]
    assert "| `dwa` | failed | failed | failed | failed | failed | failed |" in parts["table"]
    assert "No method failed." in outcome({})


def test_the_table_for_people():
    lines = blocks(table_of({"mgda": 5}))["table"].splitlines()
    assert len(lines) == 2 + 1 + 4
    assert {line.count("|") for line in lines} == {8}
    assert lines[2].startswith("| a network per task | 80.")
    assert lines[3].startswith("| `mgda` | 85.")
    assert " **+5.0 [+" in lines[3]
    assert lines[3].endswith(" 1.50 [1.40, 1.60] |")
    base = next(line for line in lines if line.startswith("| `sum`"))
    assert base.split(" | ")[5] == ""
    assert "−0.0" not in "".join(lines)
    assert "+0.0" not in "".join(lines)


PLAIN = "a\n" + "".join(
    f"<!-- digits: {name} -->\nold\n<!-- digits end -->\nb\n" for name in BLOCKS
)


def test_a_page_is_filled_between_its_marks_and_again():
    parts = {name: f"new {name}\n" for name in BLOCKS}
    once = filled(PLAIN, parts)
    assert "old" not in once
    assert all(f"new {name}\n" in once for name in BLOCKS)
    assert once.startswith("a\n<!-- digits: set-up -->\n")
    assert once.endswith("<!-- digits end -->\nb\n")
    assert filled(once, parts) == once


@pytest.mark.parametrize("page", ["", PLAIN.replace("outcome", "outcomes"), PLAIN * 2])
def test_a_page_with_other_marks_is_refused(page):
    with pytest.raises(ValueError, match="must have the parts set-up, outcome, table"):
        filled(page, dict.fromkeys(BLOCKS, ""))


def test_the_figure_says_which_table_it_shows(tmp_path):
    for apart in ({}, {"mgda": 50, "dwa": -5}):
        table = table_of(apart, failing=("pcgrad",))
        draw(table, tmp_path / "a.png")
        with Image.open(tmp_path / "a.png") as picture:
            assert picture.text[TABLE] == digest(table)
    assert digest(table_of({})) != digest(table)


def test_the_page_cannot_disagree_with_the_files():
    table = tabulate(*study.read(FOLDER), costs.read(FOLDER))
    parts = blocks(table)
    page = PAGE.read_text()
    assert filled(page, parts) == page
    assert (FOLDER / "table.md").read_text() == parts["table"]
    assert (FOLDER / "table.csv").read_text() == comma_separated(table)
    with Image.open(FOLDER / "digits.png") as picture:
        assert picture.text[TABLE] == digest(table)
    assert (FOLDER / "digits.png").stat().st_size < 200_000
    assert {path.name for path in FOLDER.iterdir()} == {
        "costs.csv",
        "digits.png",
        "setting.json",
        "table.csv",
        "table.md",
        "trainings.csv",
    }
