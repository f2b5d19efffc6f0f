"""Reading figures."""

from matplotlib.text import Text


def words(figure):
    """Return all that a figure says, in one line."""
    found = " ".join(text.get_text() for text in figure.findobj(Text))
    return " ".join(found.split())
