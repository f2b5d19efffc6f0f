"""Cohorts whose biomarker shows where it is told to: in tumour tiles, or where a signature does.

The label of a patient and a signature ``z`` are drawn first, then written as a clinical table that
`simulate` makes bags for. Tissue shows ``z`` as its share of lymphocytes. With an overlap of 0 the
label alters tumour tiles and does not know ``z``; with 1 it alters none, and positive patients have
a higher ``z`` and so more lymphocytes; between them, both effects shrink and grow in proportion.
What is *recorded* of ``z`` is drawn later: the bags of all cells with one overlap are the same, and
so is what the biomarker alone can be told by.
"""

import math
from pathlib import Path

import numpy as np
import pandas as pd

from examples.pathology.settings.simulate import SimulateConfig
from examples.pathology.simulation.composition import (
    LEUKOCYTES,
    LYMPHOCYTES,
    MSI,
    NEGATIVE_SHARE,
    SIGNATURES,
)
from examples.pathology.simulation.tables import generator_of
from examples.pathology.tables.reading import PATIENT
from examples.pathology.tables.writing import write_table

PREVALENCE = 0.3
"""Of the biomarker, in every cohort and in every first so many of its patients."""

TUMOUR_SHARE, TUMOUR_SHIFT, CORRELATION = 0.3, 4.5, 0.65
"""What tells the biomarker with an overlap of 0: the share of altered tumour tiles in the median
positive patient, and how far these lie off; with one of 1: the correlation of ``z`` with the label.
Who counts these tiles among 24 without an error reaches an AUROC of 0.78 with either.
"""


def planned(
    out: Path, names: list[str], *, overlap: float, tiles: int, seed: int
) -> SimulateConfig:
    """Write the clinical table of some patients and return the simulation of their bags.

    Args:
        out: The folder of the simulation; the table lies beside it.
        names: Of the patients; their order decides who is positive.
        overlap: Between 0 and 1.
        tiles: Of every patient.
        seed: Of everything random; what a patient is depends on it and on name and label alone.
    """
    correlation = overlap * CORRELATION
    distance = correlation / math.sqrt(PREVALENCE * (1 - PREVALENCE))
    rows = []
    for number, name in enumerate(names):
        positive = math.floor((number + 1) * PREVALENCE) > math.floor(number * PREVALENCE)
        within, *others = generator_of(seed, "planned", name).standard_normal(4)
        z = distance * (positive - PREVALENCE) + math.sqrt(1 - correlation**2) * within
        of = dict.fromkeys((LEUKOCYTES, LYMPHOCYTES), z)
        rest = (signature for signature in SIGNATURES if signature not in of)
        of.update(zip(rest, others, strict=True))  # they know neither the label nor z
        cells = np.array(MSI.mean) + np.array(MSI.sd) * [of[name] for name in SIGNATURES]
        rows.append((name, MSI.positive if positive else MSI.negative, *cells))
    table = out.with_suffix(".csv")
    write_table(table, pd.DataFrame(rows, columns=[PATIENT, MSI.target, *SIGNATURES]))
    odds, altered = (math.log(share / (1 - share)) for share in (NEGATIVE_SHARE, TUMOUR_SHARE))
    odds += (1 - overlap) * (altered - odds)
    return SimulateConfig(
        out,
        clini=table,
        target=MSI.target,
        auxiliary=(LEUKOCYTES,),
        positive=MSI.positive,
        tiles=10 * tiles,  # their median; nearly all have the most
        max_tiles=tiles,
        tumour_shift=TUMOUR_SHIFT,
        tumour_share=1 / (1 + math.exp(-odds)),
        lymphocyte_shift=0.0,
        seed=seed,
    )


def recorded(value: float, strength: float, name: str, seed: int) -> float:
    """Return what is recorded of a signature, both in the signature's unit.

    Args:
        value: Of the signature that the tissue shows.
        strength: The correlation of the two over patients, between 0 and 1.
        name: Of the patient.
        seed: Of what is recorded beside the signature.
    """
    number = SIGNATURES.index(LEUKOCYTES)
    mean, sd = MSI.mean[number], MSI.sd[number]
    noise = float(generator_of(seed, "recorded", name).standard_normal())
    return mean + strength * (value - mean) + math.sqrt(1 - strength**2) * sd * noise
