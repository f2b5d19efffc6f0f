"""Names as they are compared: one spelling of what looks the same."""

import re
import unicodedata

DASHES = "\u2212\u2043\u02d7"
"""Minus, bullet and modifier: they look like dashes and are none to Unicode."""


def composed(name: str) -> str:
    """Return a name with each accent in one character with its letter (Unicode's NFC).

    macOS stores the names of files decomposed, people type them composed: both look the same and
    are different text. Files are opened under the name that they have on disk.
    """
    return unicodedata.normalize("NFC", name)


def looks(name: str) -> str:
    """Return what all names that look like this one have in common.

    Case, spaces, invisible characters, kinds of dashes and of letters (Unicode's NFKC) are no
    difference: Word writes U+2011 for a hyphen that must not break.
    """
    plain = unicodedata.normalize("NFKC", name).casefold()
    return "".join(map(_seen, "".join(plain.split())))


def _seen(character: str) -> str:
    category = unicodedata.category(character)
    if category == "Cf":  # zero-width spaces and joiners, soft hyphens, marks of direction
        return ""
    return "-" if category == "Pd" or character in DASHES else character


def told_apart(name: str) -> str:
    """Return a name in quotes, with what may look like something else as its number."""
    return re.sub(r"[^\w\x00-\x7f]", lambda found: ascii(found[0])[1:-1], repr(name))
