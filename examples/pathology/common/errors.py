"""The two ways in which a command can end badly, told apart so that the exit code can be.

Every message is one sentence a user can act on: it names the file, column or option, says the rule
and the value found, and the remedy if there is one.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """The input or the way it was asked for is wrong; the command line exits with 2."""


class RunError(RuntimeError):
    """The request was fine but the run failed; the command line exits with 1."""


class DivergedError(RunError):
    """A loss or gradient is not finite: with a lower learning rate it may stay so."""


class OutputError(RunError):
    """Nothing can be written any more, so that going on would be work for nothing."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `` Did you mean `x`?`` for the known name nearest to ``name``, or an empty string."""
    plain = {other.casefold(): other for other in known}
    matches = get_close_matches(name.casefold(), plain, n=1, cutoff=0.5)
    return f" Did you mean `{plain[matches[0]]}`?" if matches else ""


def listing(names: Iterable[str], limit: int = 8) -> str:
    """Return ``a, b, c`` and how many more there are, so that no message runs over pages."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def one_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its kind if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
