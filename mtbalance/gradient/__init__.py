"""Gradient strategies: the per-task gradients, a matrix (m, p), become one direction (p,).

Each is a class with one method to write, works on plain tensors, and returns a direction on the
scale of the sum of the rows:

>>> import torch
>>> gradients = torch.tensor([[1.0, 0.0], [-1.0, 1.0]])  # the two tasks conflict
>>> PCGrad()(gradients)
tensor([0.5000, 1.5000])
"""

from typing import TYPE_CHECKING

from mtbalance._hints import getattr_of

from ._alignedmtl import AlignedMTL
from ._base import GradientStrategy, GramianStrategy, PreferringStrategy, PrimaryStrategy
from ._cagrad import CAGrad
from ._config import ConFIG
from ._dbmtl import DBMTL
from ._dualproj import DualProj
from ._fairgrad import FairGrad
from ._graddrop import GradDrop
from ._gradientcosine import GradientCosine
from ._gradops import GradOPS
from ._gradvac import GradVac
from ._imtlg import IMTLG
from ._krum import Krum
from ._mgda import MGDA
from ._moco import MoCo
from ._modo import MoDo
from ._nashmtl import NashMTL
from ._normalized import Normalized
from ._pcd import PCD
from ._pcgrad import PCGrad
from ._randomgradient import RandomGradient
from ._rowmean import RowMean
from ._sdmgrad import SDMGrad
from ._smoothed import Smoothed
from ._sum import Sum
from ._trimmedmean import TrimmedMean
from ._upgrad import UPGrad

__all__ = [
    "DBMTL",
    "IMTLG",
    "MGDA",
    "PCD",
    "AlignedMTL",
    "CAGrad",
    "ConFIG",
    "DualProj",
    "FairGrad",
    "GradDrop",
    "GradOPS",
    "GradVac",
    "GradientCosine",
    "GradientStrategy",
    "GramianStrategy",
    "Krum",
    "MoCo",
    "MoDo",
    "NashMTL",
    "Normalized",
    "PCGrad",
    "PreferringStrategy",
    "PrimaryStrategy",
    "RandomGradient",
    "RowMean",
    "SDMGrad",
    "Smoothed",
    "Sum",
    "TrimmedMean",
    "UPGrad",
]

if not TYPE_CHECKING:  # to which it would say that there is every name
    __getattr__ = getattr_of(__name__)
