"""Looking at figures as they are written."""

import pytest
from matplotlib.figure import Figure


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
