"""One patient, and what is known of them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from examples.pathology.cohort.targets import Target


@dataclass(frozen=True)
class Patient:
    """One patient that is used.

    Args:
        name: The identifier in the clinical table.
        label: Value of the primary target, a number as it stands in the table; empty if it is not
            known.
        known: Auxiliary values that are known, by target: a class label, or a number in its own
            unit.
        files: Feature files, in a stable order.
        tiles: Number of tiles over all files.
        site: Where they come from; empty without folds by site.
    """

    name: str
    label: str
    known: Mapping[str, str | float]
    files: tuple[Path, ...]
    tiles: int
    site: str = ""


def known_values(patient: Patient, targets: Sequence[Target]) -> dict[str, str | float]:
    """Return what is known of a patient by target: a class, or a number in the target's unit."""
    values: dict[str, str | float] = {}
    for target in targets:
        if target is not targets[0]:
            if target.name in patient.known:
                values[target.name] = patient.known[target.name]
        elif patient.label:
            number = target.kind == "regression"
            values[target.name] = float(patient.label) if number else patient.label
    return values


def values_of(
    patients: Iterable[Patient], targets: Sequence[Target]
) -> dict[str, list[str | float]]:
    """Return by target what is known of several patients, each as `known_values` gives it."""
    values: dict[str, list[str | float]] = {target.name: [] for target in targets}
    for patient in patients:
        for name, value in known_values(patient, targets).items():
            values[name].append(value)
    return values
