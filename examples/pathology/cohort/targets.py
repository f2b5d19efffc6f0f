"""What a column of the clinical table is to predict: classes, or a number."""

import logging
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from statistics import median

import numpy as np
import pandas as pd

from examples.pathology.common.errors import UserError, listing, nearest
from examples.pathology.common.names import looks, told_apart
from examples.pathology.settings.cohort import CohortConfig, Kind

logger = logging.getLogger(__name__)

# Numbers with more different values than this are a measurement, not names of classes.
MAX_CLASSES = 20
MAX_AUXILIARY_CLASSES = 2

FAR = 100.0
"""One number that makes the range so many times as wide is told. In samples of 40 from a log-normal
distribution, one in a thousand has such a number where the logarithm has sd 2, and none of 100,000
where it has sd 1."""

MOST = float(np.finfo(np.float32).max) / 3
"""Largest number of a regression."""

CALLED, FOLD = "pred", "fold"
"""Columns of predictions: what the primary target is called, and who of the folds says so."""


@dataclass(frozen=True)
class Target:
    """One column to predict.

    Args:
        name: The column.
        kind: ``classification`` or ``regression``.
        classes: The class labels in order of the logits; empty for a regression.
        positive: The class whose AUROC is reported; empty for a regression.
        cutoff: Where numbers were cut into the two classes, in their unit; ``None``: nowhere.
    """

    name: str
    kind: Kind
    classes: tuple[str, ...] = ()
    positive: str = ""
    cutoff: float | None = None

    @property
    def width(self) -> int:
        """Width of the head: the number of classes, or 1."""
        return len(self.classes) if self.kind == "classification" else 1

    @property
    def columns(self) -> list[str]:
        """Columns of predictions: a probability of every class, or the number."""
        return [f"{self.name}_{label}" for label in self.classes or ("pred",)]

    @property
    def main(self) -> int:
        """Which of these is that of the positive class, or of the number."""
        return self.classes.index(self.positive) if self.classes else 0


def kind_of(column: "pd.Series[str]", most_classes: int) -> Kind:
    """Return what a column is taken for: numbers of more different values make a regression."""
    values = {value for value in column if value}
    measured = all(map(_is_number, values)) and len(set(map(Decimal, values))) > most_classes
    return "regression" if measured else "classification"


def one_spelling(column: "pd.Series[str]") -> "pd.Series[str]":
    """Return a column of classes where equal numbers are one: 1 and 1.0 both become 1.

    The shortest spelling stays; a number that is always spelled alike stays as it is.
    """
    spellings: dict[Decimal, list[str]] = defaultdict(list)
    for value in sorted(set(column), key=lambda value: (len(value), value)):
        if _is_number(value):
            spellings[Decimal(value)].append(value)
    first = {value: several[0] for several in spellings.values() for value in several}
    return column.map(lambda value: first.get(value, value))


def spelled_as(classes: Sequence[str], column: "pd.Series[str]") -> "pd.Series[str]":
    """Return a column where numbers that equal a class are spelled as the class is."""
    numbers = {Decimal(label): label for label in classes if _is_number(label)}

    def spelled(value: str) -> str:
        if value in classes or not _is_number(value):
            return value
        return numbers.get(Decimal(value), value)

    return column.map(spelled)


def refuse_look_alikes(name: str, column: "pd.Series[str]", table: Path) -> None:
    """Raise if two classes of a column are equal but for case, spaces, or what nobody sees."""
    labels: dict[str, str] = {}
    for value in sorted(set(column)):
        if (other := labels.setdefault(looks(value), value)) != value:
            raise UserError(
                f"{table}: `{name}` must spell each class in one way, but has {told_apart(other)} "
                f"and {told_apart(value)}. Write both alike if they are one, or name them apart."
            )


def words_among_numbers(column: "pd.Series[str]", most_classes: int) -> dict[str, int]:
    """Return how often each word stands in a column that `kind_of` takes for numbers without them.

    The most frequent comes first; there are none in classes, nor in nothing but numbers.
    """
    words = Counter(value for value in column if value and not _is_number(value))
    numbers = [value for value in column if _is_number(value)]
    measured = len(set(map(Decimal, numbers))) > most_classes and len(numbers) > words.total()
    return dict(words.most_common()) if measured else {}


def cut_classes(cutoff: float) -> tuple[str, str]:
    """Return the names of the classes below a cut-off, and at or above it."""
    return f"<{cutoff:.15g}", f">={cutoff:.15g}"


def cut(name: str, column: "pd.Series[str]", cutoff: float, table: Path) -> "pd.Series[str]":
    """Return a column whose numbers are cut into two classes; what is not known stays empty.

    Raises:
        UserError: It holds words.
    """
    refuse_words(name, column, table)
    below, above = cut_classes(cutoff)
    return column.map(lambda cell: cell and (above if float(cell) >= cutoff else below))


def refuse_words(name: str, column: "pd.Series[str]", table: Path) -> None:
    """Raise if a column holds anything but numbers and empty cells."""
    if strange := sorted({value for value in column if value and not _is_number(value)}):
        raise UserError(
            f"{table}: `{name}` must hold numbers, but has {listing(map(repr, strange))}."
        )


def refuse_too_large(name: str, values: Mapping[str, float], table: Path) -> None:
    """Raise if single precision cannot hold a regression's number, by patient, or differences."""
    for patient, value in values.items():
        if abs(value) > MOST:
            raise UserError(
                f"{table}: `{name}` must be numbers up to {MOST:.3g}, which single precision can "
                f"hold, but is {value:g} for patient {patient}. Use a larger unit."
            )


def warn_of_far_value(name: str, values: Mapping[str, float], table: Path) -> None:
    """Warn if one number makes the range of a regression more than `FAR` times as wide.

    A regression is scaled to [0, 1] by its smallest and largest value: 1e9 for "missing" leaves
    nothing of the differences between the others. Several patients may have such a code: its
    repetitions count as one, while far measurements differ from each other and keep each other
    company.
    """
    low, high = min(values.values(), default=0.0), max(values.values(), default=0.0)
    for code in (low, high):
        who = [patient for patient, value in values.items() if value == code]
        others = [value for value in values.values() if value != code]
        rest = max(others, default=0.0) - min(others, default=0.0)
        if len(others) >= 3 and 0 < rest * FAR < high - low:
            text = (
                "%s: `%s` of patient%s %s is %g and lies so far from all others that these differ "
                "by %.2g of the range in which values are scaled. Correct it if it is an error, or "
                "leave the cell empty if it stands for a missing value."
            )
            several, share = "s" * (len(who) > 1), rest / (high - low)
            logger.warning(text, table, name, several, listing(sorted(who)), code, share)


def make_target(
    name: str, kind: Kind, values: Sequence[str | float], config: CohortConfig
) -> Target:
    """Return what a column is to predict, given what is known of the patients used.

    Raises:
        UserError: There are too few or too many values, or `positive` is none of them.
    """
    table, primary = config.clini, name == config.target
    found = sorted(set(map(str, values)))
    if len(found) < 2:
        raise UserError(
            f"{table}: `{name}` must have at least 2 values among the patients used, but has "
            f"{listing(found) or 'none'}."
        )
    if kind == "regression":
        if primary and config.positive is not None:
            raise UserError(
                f"`positive` must be left out for `{name}`, a regression, but got "
                f"{config.positive!r}. Give --cutoff to make two classes of it."
            )
        return Target(name, "regression")
    if len(found) > MAX_CLASSES:
        remedy = f" Give --kind {name}=regression, or --cutoff." * all(map(_is_number, found))
        raise UserError(
            f"{table}: `{name}` must have at most {MAX_CLASSES} classes, but has {len(found)} "
            f"values.{remedy}"
        )
    positive = rarer_class([str(value) for value in values])
    if not primary:
        return Target(name, "classification", tuple(found), positive)
    if config.cutoff is not None:
        positive = cut_classes(config.cutoff)[1]
    if config.positive is not None:
        positive = config.positive
    if positive not in found:
        raise UserError(
            f"`positive` must be a value of `{name}` ({listing(found)}), but got {positive!r}."
            f"{nearest(positive, found)}"
        )
    return Target(name, "classification", tuple(found), positive, config.cutoff)


def rarer_class(labels: Sequence[str]) -> str:
    """Return the rarest label, what a biomarker looks for; of equally rare ones the last."""
    counts = Counter(labels)
    return min(sorted(counts, reverse=True), key=lambda label: counts[label])


def foreign_values(target: Target, column: "pd.Series[str]") -> "pd.Series[str]":
    """Return the cells of a column, not yet cut, that are no value of a trained target."""
    numbers = target.kind == "regression" or target.cutoff is not None
    known = _is_number if numbers else target.classes.__contains__
    return column[[bool(value) and not known(value) for value in column]]


def refuse_foreign_values(
    target: Target, column: "pd.Series[str]", table: Path, remedy: str = ""
) -> None:
    """Raise if an external table has `foreign_values` of a target; the first patients are named."""
    foreign = foreign_values(target, column)
    if foreign.empty:
        return
    values = sorted(set(foreign))
    numbers = target.kind == "regression" or target.cutoff is not None
    must = "hold numbers" if numbers else f"be one of {listing(target.classes)}, as in training"
    raise UserError(
        f"{table}: `{target.name}` must {must}, but has {listing(map(repr, values))} for "
        f"{len(foreign)} of {len(column)} patients ({listing(map(str, foreign.index), 5)})."
        f"{nearest(values[0], target.classes)}{remedy}"
    )


def describe(target: Target, known: Sequence[str | float]) -> str:
    """Return in words what a target is, and the values that are known."""
    if target.kind == "regression":
        numbers = sorted(map(float, known))
        return f"regression, {numbers[0]:g} to {numbers[-1]:g}, median {median(numbers):g}"
    counts = Counter(known)
    share = counts[target.positive] / len(known)
    classes = ", ".join(f"{label} ({counts[label]})" for label in target.classes)
    return f"classification, {classes}; positive is {target.positive}, prevalence {share:.3f}"


def _is_number(value: str) -> bool:
    try:
        return "_" not in value and math.isfinite(float(value))  # 1_000 is a number to Python alone
    except ValueError:
        return False


def prediction_columns(targets: Sequence[Target]) -> list[str]:
    """Return the columns of ``predictions.csv``; the table of all folds has `FOLD` as well.

    Raises:
        UserError: Two of them have the same name.
    """
    columns = ["PATIENT"]
    for i, target in enumerate(targets):
        columns.append(target.name)
        if i > 0 or target.kind == "regression":
            columns.append(f"{target.name}_pred")
        columns += [f"{target.name}_{label}" for label in target.classes]
    columns.append(CALLED)
    twice = sorted(name for name, count in Counter([*columns, FOLD]).items() if count > 1)
    if twice:
        raise UserError(
            f"The columns of predictions.csv (`{CALLED}` and `{FOLD}` are two of them) must have "
            f"different names, but two targets or classes give {listing(twice)}. Rename a column "
            "of the clinical table."
        )
    return columns
