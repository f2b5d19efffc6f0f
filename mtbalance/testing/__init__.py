"""Hold strategies, yours as well, to the contract of the library and to what you claim of them.

Needs nothing but torch; ``import mtbalance`` does not load it.

>>> import torch
>>> from mtbalance import GramianStrategy
>>> class Halves(GramianStrategy):
...     def weights(self, gramian):
...         return torch.arange(1.0, len(gramian) + 1).to(gramian) / 2
>>> try:
...     check_gradient_strategy(Halves)
... except Violation as violation:
...     print(violation.name)
one_task_is_its_gradient

A failure names the property, the call that makes the matrix again, the proof of its structure and
both numbers. ``python -m mtbalance.testing`` prints what holds of the strategies of the library.
"""

from ._check import Report, check_differ, check_gradient_strategy, properties_of
from ._check_weighting import check_weighting, traits_of
from ._claims import CLAIMED, Claim
from ._contract import ALWAYS
from ._matrices import (
    BY_NAME,
    DTYPES,
    FAMILIES,
    SCALES,
    Family,
    Sample,
    matrix,
    orthogonal,
)
from ._property import Property, Subject
from ._table import gradient_table, weighting_table
from ._traits import HAVING, WEIGHTINGS
from ._violation import Violation
from ._weighting import (
    TASKS,
    LossSample,
    Trait,
    WeightingProperty,
    WeightingSubject,
    train_step,
    weights_of,
)

__all__ = [
    "ALWAYS",
    "BY_NAME",
    "CLAIMED",
    "DTYPES",
    "FAMILIES",
    "HAVING",
    "SCALES",
    "TASKS",
    "WEIGHTINGS",
    "Claim",
    "Family",
    "LossSample",
    "Property",
    "Report",
    "Sample",
    "Subject",
    "Trait",
    "Violation",
    "WeightingProperty",
    "WeightingSubject",
    "check_differ",
    "check_gradient_strategy",
    "check_weighting",
    "gradient_table",
    "matrix",
    "orthogonal",
    "properties_of",
    "train_step",
    "traits_of",
    "weighting_table",
    "weights_of",
]
