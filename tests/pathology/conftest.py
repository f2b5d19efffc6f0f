"""Figures drawn coarsely or looked at as they are written; logs; workers that start at once."""

import logging
from pathlib import Path

import dask
import pytest
from matplotlib.figure import Figure

from examples.pathology.common.logs import OURS
from examples.pathology.figures import sheet
from tests._forks import forking

FINE = Path(__file__).parent / "figures"
"""Tests that look at how figures are laid out."""


@pytest.fixture(scope="module", autouse=True)
def _coarse_figures(request):
    """Draw all that there is, but small and without arranging it: that takes most of the time."""
    if request.path.parent == FINE:
        yield
        return
    coarse = {"savefig.dpi": 20, "figure.constrained_layout.use": False}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in coarse.items():
            patch.setitem(sheet.STYLE, name, value)
        yield


@pytest.fixture(autouse=True)
def _logs_as_before():
    """Take back what a command that runs in this process does to logging."""
    loggers = [logging.getLogger(name) for name in (None, *OURS)]
    before = [(logger, logger.level, logger.handlers[:]) for logger in loggers]
    yield
    for logger, level, handlers in before:
        logger.setLevel(level)
        logger.handlers[:] = handlers


@pytest.fixture
def drawn(monkeypatch):
    """Keep the figures that are written."""
    figures = []
    original = Figure.savefig

    def savefig(figure, *args, **options):
        figures.append(figure)
        original(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures


@pytest.fixture(scope="module")
def forked_workers():
    """Start Dask's workers as forks in this module; users' are new interpreters."""
    method = forking().get_start_method()
    with dask.config.set({"distributed.worker.multiprocessing-method": method}):
        yield
