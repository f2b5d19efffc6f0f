"""Weightings: the task losses (m,) become weighted losses (m,), whose sum is the objective.

Each is a class with one method to write and works on plain tensors:

>>> import torch
>>> Equal()(torch.tensor([0.5, 2.0]))
tensor([0.5000, 2.0000])
"""

from typing import TYPE_CHECKING

from mtbalance._hints import getattr_of

from ._auto_lambda import AutoLambda
from ._base import Step, Weighting
from ._constant import Constant
from ._cosmos import COSMOS
from ._dwa import DWA
from ._equal import Equal
from ._excess_mtl import ExcessMTL
from ._famo import FAMO
from ._geometric_mean import GeometricMean
from ._go4align import GO4Align
from ._gradnorm import GradNorm
from ._imtll import IMTLL
from ._log_loss import LogLoss
from ._pbi import PBI
from ._random_weighting import RandomWeighting
from ._stch import STCH
from ._uncertainty import Uncertainty
from ._uncertainty_softmax import UncertaintySoftmax
from ._warm_up import WarmUp

__all__ = [
    "COSMOS",
    "DWA",
    "FAMO",
    "IMTLL",
    "PBI",
    "STCH",
    "AutoLambda",
    "Constant",
    "Equal",
    "ExcessMTL",
    "GO4Align",
    "GeometricMean",
    "GradNorm",
    "LogLoss",
    "RandomWeighting",
    "Step",
    "Uncertainty",
    "UncertaintySoftmax",
    "WarmUp",
    "Weighting",
]

if not TYPE_CHECKING:  # to which it would say that there is every name
    __getattr__ = getattr_of(__name__)
