"""Which site a patient comes from."""

import re
from collections.abc import Iterable

import pandas as pd

from examples.pathology.settings.cohort import TCGA_SITE

_BARCODE = re.compile(r"TCGA-([0-9A-Z]{2})(-|$)", re.IGNORECASE)


def sites_of(patients: Iterable[str], column: str, table: pd.DataFrame) -> dict[str, str]:
    """Return the site of every patient, empty where it is not known.

    Args:
        patients: Their names.
        column: A column of the table; or ``tcga-site``, for XX of a barcode TCGA-XX-....
        table: Indexed by patient; not looked at for ``tcga-site``.
    """
    if column != TCGA_SITE:
        return {name: str(table.loc[name, column]) for name in patients}
    found = {name: _BARCODE.match(name) for name in patients}
    return {name: match[1].upper() if match else "" for name, match in found.items()}
