"""Looking at figures as they are written, and workers that start at once."""

import dask
import pytest
from matplotlib.figure import Figure

from tests._forks import forking


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
