"""Balance the tasks of a multi-task model: any loss weighting with any gradient strategy.

A :class:`Balancer` stands where ``loss.backward()`` stood in the training loop:

>>> import torch
>>> from mtbalance.gradient import CAGrad
>>> from mtbalance.weighting import DWA
>>> trunk, head_a, head_b = (torch.nn.Linear(4, n) for n in (4, 1, 1))
>>> balancer = Balancer(DWA(), CAGrad(c=0.4), tasks=("a", "b"), shared=trunk)
>>> h = trunk(torch.ones(8, 4))
>>> record = balancer.backward({"a": head_a(h).square().mean(), "b": head_b(h).mean()})
>>> _ = balancer.end_epoch()

Weightings, in ``mtbalance.weighting``: ``AutoLambda``, ``Constant``, ``COSMOS``, ``DWA``,
``Equal``, ``ExcessMTL``, ``FAMO``, ``GeometricMean``, ``GO4Align``, ``GradNorm``, ``IMTLL``,
``LogLoss``, ``PBI``, ``RandomWeighting``, ``STCH``, ``Uncertainty``, ``UncertaintySoftmax``,
``WarmUp``.

Gradient strategies, in ``mtbalance.gradient``: ``AlignedMTL``, ``CAGrad``, ``ConFIG``, ``DBMTL``,
``DualProj``, ``FairGrad``, ``GradDrop``, ``GradientCosine``, ``GradOPS``, ``GradVac``, ``IMTLG``,
``Krum``, ``MGDA``, ``MoCo``, ``MoDo``, ``NashMTL``, ``Normalized``, ``PCD``, ``PCGrad``,
``RandomGradient``, ``RowMean``, ``SDMGrad``, ``Smoothed``, ``Sum``, ``TrimmedMean``, ``UPGrad``.

``make_balancer("dwa+cagrad", tasks=...)`` makes any pair of them by name. ``mtbalance.plot`` draws
what a ``RecordWriter`` has written, ``mtbalance.testing`` checks strategies of your own, and
``mtbalance.integrations`` is for other packages' training loops.
"""

from typing import TYPE_CHECKING

from mtbalance._balancer import Balancer
from mtbalance._carrying import with_tasks
from mtbalance._explanation import Explanation
from mtbalance._factory import PAPER_COMBINATIONS, make_balancer
from mtbalance._hints import getattr_of
from mtbalance._log import Log, RecordWriter, read_log
from mtbalance._record import EpochSummary, Record
from mtbalance.gradient import GradientStrategy, GramianStrategy
from mtbalance.weighting import Weighting

__all__ = [
    "PAPER_COMBINATIONS",
    "Balancer",
    "EpochSummary",
    "Explanation",
    "GradientStrategy",
    "GramianStrategy",
    "Log",
    "Record",
    "RecordWriter",
    "Weighting",
    "make_balancer",
    "read_log",
    "with_tasks",
]
__version__ = "0.1.0"

if not TYPE_CHECKING:  # to which it would say that there is every name
    __getattr__ = getattr_of(__name__)
