"""The table in Markdown and CSV, and what came out, in words."""

import csv
import io
import math
import re
import statistics
from collections.abc import Mapping, Sequence

from examples.digits.data import SIDE
from examples.digits.methods import BASELINE, SINGLE
from examples.digits.results import MEASURES, SCORE, Interval, Row, Table
from examples.digits.setting import TASKS

MARK = re.compile(r"(<!-- digits: (\S+) -->\n)(.*?)(<!-- digits end -->)", re.DOTALL)
BLOCKS = ("set-up", "outcome", "table")

_HEADINGS = (
    "method",
    "upper-left, %",
    "lower-right, %",
    "ink, error",
    "mean rank",
    "score, difference",
    "cost",
)


def markdown(table: Table) -> str:
    """Return the table for people."""
    lines = [_HEADINGS, ("---",) * len(_HEADINGS), *map(_cells, (table.reference, *table.rows))]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _cells(row: Row) -> list[str]:
    name = "a network per task" if row.method == SINGLE else f"`{row.method}`"
    if row.failed:
        return [name, *["failed"] * (len(_HEADINGS) - 1)]
    tasks = [_plus_minus(row.measured[task], 3 if task == "ink" else 1) for task in TASKS]
    rank = _plus_minus(row.rank, 1) if row.rank else ""
    return [name, *tasks, rank, _difference(row.corrected), _cost(row)]


def _plus_minus(interval: Interval, digits: int) -> str:
    if math.isnan(interval.half):
        return f"{interval.mean:.{digits}f}"
    return f"{interval.mean:.{digits}f} ± {interval.half:.{digits}f}"


def _difference(interval: Interval | None, digits: int = 1) -> str:
    if interval is None:
        return ""
    mean = _signed(interval.mean, digits)
    if math.isnan(interval.half):
        return mean
    text = f"{mean} [{_signed(interval.low, digits)}, {_signed(interval.high, digits)}]"
    return f"**{text}**" if interval.verdict else text


def _signed(value: float, digits: int = 1) -> str:
    text = f"{value:+.{digits}f}"
    return f"{0:.{digits}f}" if float(text) == 0 else text.replace("-", "−")


def _cost(row: Row) -> str:
    if row.cost is None or math.isnan(row.cost.ratio):
        return ""
    if math.isnan(row.cost.low):
        return f"{row.cost.ratio:.2f}"
    return f"{row.cost.ratio:.2f} [{row.cost.low:.2f}, {row.cost.high:.2f}]"


def comma_separated(table: Table) -> str:
    """Return the table for programs, with all intervals."""
    ends = ("mean", "low", "high")
    columns = ["method"]
    columns += [f"{key}_{end}" for key in MEASURES for end in ends]
    columns += [f"rank_{end}" for end in ends]
    columns += [f"{key}_difference_{end}" for key in MEASURES for end in ends]
    columns += [f"corrected_difference_{end}" for end in ends]
    columns += [f"cost_{end}" for end in ends] + ["rates", "failed"]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    for row in (table.reference, *table.rows):
        intervals = [row.measured.get(key) for key in MEASURES]
        intervals += [row.rank, *(row.differences.get(key) for key in MEASURES), row.corrected]
        cells = [cell for interval in intervals for cell in _ends(interval)]
        cost = row.cost
        cells += [_number(x) for x in (cost.ratio, cost.low, cost.high)] if cost else [""] * 3
        rates = " ".join(f"{rate:g}:{count}" for rate, count in row.rates.items())
        writer.writerow([row.method, *cells, rates, row.failed])
    return file.getvalue()


def _ends(interval: Interval | None) -> list[str]:
    if interval is None:
        return [""] * 3
    return [_number(value) for value in (interval.mean, interval.low, interval.high)]


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4f}"


def set_up(table: Table) -> str:
    """Return what was trained, in words."""
    plan, setting = table.plan, table.plan.setting
    side, overlap = SIDE + setting.shift, (SIDE - setting.shift) ** 2
    rates = _listed([f"{rate:g}" for rate in setting.rates], "or")
    missing = f"; without {_names(plan.missing)} of the catalogue" if plan.missing else ""
    return _items(
        f"**Pictures** of {side} x {side} pixels. The second digit lies {setting.shift} pixels "
        f"right of and below the first; {overlap} of the {SIDE * SIDE} pixels of each overlap.",
        f"**Parts.** 60 % of the handwritten digits make {setting.pictures:,} pictures to train "
        f"on, 20 % make {setting.held_out:,} to choose the learning rate on, and the rest "
        f"{setting.held_out:,} for the test. No digit is in two parts.",
        f"**Network.** Two hidden layers of {setting.width} units are shared; each task has a "
        "linear head.",
        f"**Training.** {setting.epochs} epochs of {setting.steps_of_epoch} steps of "
        f"Adam with {setting.batch} pictures. The learning rate rises in the first epoch to "
        f"{rates}, and falls linearly to zero. Validation chooses one, for each method in each "
        "repetition.",
        f"**Repetitions**: {_count(plan.seeds, 'seed')}. "
        f"**Methods**: {len(plan.methods)}{missing}.",
    )


def outcome(table: Table) -> str:
    """Return what came out, in words that follow from the numbers alone."""
    return _items(
        _verdicts(table),
        _power(table),
        _ranks(table),
        _reference(table),
        _costs(table),
        _rates(table),
        _failures(table),
    )


def _items(*sentences: str) -> str:
    return "".join(f"- {sentence}\n" for sentence in sentences if sentence)


def _verdicts(table: Table) -> str:
    if table.plan.seeds < 2:
        return "One seed says nothing about chance: the differences have no intervals."
    better, worse = (
        [row.method for row in table.compared if row.corrected and row.corrected.verdict == sign]
        for sign in (1, -1)
    )
    count = len(table.compared)
    if not (better or worse):
        return f"**None of {_count(count, 'method')} differs from equal weights beyond chance.**"
    said = [
        f"{len(names)} {'is' if len(names) == 1 else 'are'} {word} ({_names(names)})"
        for names, word in ((better, "better"), (worse, "worse"))
        if names
    ]
    rest = count - len(better) - len(worse)
    return (
        f"**Of {_count(count, 'method')}, {_listed(said)} than equal weights beyond chance; "
        f"{rest} {'does' if rest == 1 else 'do'} not differ beyond chance.**"
    )


def _power(table: Table) -> str:
    halves = [row.corrected.half for row in table.compared if row.corrected]
    if not halves or table.plan.seeds < 2:
        return ""
    return (
        f"That is a statement about {_count(table.plan.seeds, 'seed')}: half of the corrected "
        f"intervals are wider than ±{statistics.median(halves):.1f} points, and smaller "
        "differences could not be seen."
    )


def _ranks(table: Table) -> str:
    ranked = [(row.method, row.rank.mean) for row in table.rows if row.rank]
    (best, first), (worst, last) = ranked[0], ranked[-1]
    place = [method for method, _ in ranked].index(BASELINE) + 1
    return (
        f"The best mean rank of {len(ranked)} is that of `{best}` ({first:.1f}), the last that of "
        f"`{worst}` ({last:.1f}); equal weights are in place {place}."
    )


def _reference(table: Table) -> str:
    reference = table.reference
    units = ("points upper left", "points lower right", "grey values of error for ink")
    parts = []
    for task, unit in zip(TASKS, units, strict=True):
        apart, digits = reference.differences[task], 3 if task == "ink" else 1
        parts.append(f"{_signed(apart.mean, digits)}{_within(apart, digits)} {unit}")
    scores = {row.method: row.measured[SCORE].mean for row in table.rows if not row.failed}
    most = max(scores, key=lambda method: scores[method])
    gap = reference.measured[SCORE].mean - scores[most]
    return (
        "A network per task, with a learning rate of its own, differs from equal weights by "
        f"{_listed(parts)}. The highest score, of `{most}`, is {abs(gap):.1f} points "
        f"{'below' if gap > 0 else 'above'} its score."
    )


def _within(interval: Interval, digits: int) -> str:
    return "" if math.isnan(interval.half) else f" ± {interval.half:.{digits}f}"


def _costs(table: Table) -> str:
    priced = [
        (row.cost.ratio, row.method)
        for row in table.compared
        if row.cost and not math.isnan(row.cost.ratio)
    ]
    if not priced:
        return ""
    (low, cheap), (high, dear) = min(priced), max(priced)
    base = table.baseline.cost
    took = f" ({base.milliseconds:.1f} ms)" if base else ""
    return (
        f"A step costs from {low:.2f} (`{cheap}`) to {high:.2f} (`{dear}`) of a step with equal "
        f"weights{took}. The network is so small that this is mostly the time of Python."
    )


def _rates(table: Table) -> str:
    rates = table.plan.setting.rates
    counts = [sum(row.rates.get(rate, 0) for row in table.rows) for rate in rates]
    said = [f"{rate:g} in {count}" for rate, count in zip(rates, counts, strict=True)]
    return f"Of {sum(counts)} choices of a learning rate, it was {_listed(said)}."


def _failures(table: Table) -> str:
    failed = [f"`{row.method}` ({row.failed})" for row in table.rows if row.failed]
    failed += [
        f"`{row.method}` where its cost was measured ({row.cost.error})"
        for row in table.rows
        if row.cost and row.cost.error and not row.failed
    ]
    return f"Failed: {'; '.join(failed)}." if failed else "No method failed."


def blocks(table: Table) -> dict[str, str]:
    """Return the parts of the page that follow from the files."""
    return {"set-up": set_up(table), "table": markdown(table), "outcome": outcome(table)}


def filled(page: str, parts: Mapping[str, str]) -> str:
    """Return a page whose marked parts are those of a study.

    Args:
        page: Markdown, with ``<!-- digits: NAME -->`` before each part of `BLOCKS` and
            ``<!-- digits end -->`` after it.
        parts: As `blocks` returns them.

    Raises:
        ValueError: If the page has other marks.
    """
    marks = tuple(match[2] for match in MARK.finditer(page))
    if marks != BLOCKS:
        raise ValueError(f"It must have the parts {', '.join(BLOCKS)}, but has {marks}.")
    return MARK.sub(lambda match: f"{match[1]}\n{parts[match[2]]}\n{match[4]}", page)


def _names(methods: Sequence[str]) -> str:
    return _listed([f"`{method}`" for method in methods])


def _listed(words: Sequence[str], last: str = "and") -> str:
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} {last} {words[-1]}"


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"
