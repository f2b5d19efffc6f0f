"""Names as they are compared: one spelling of what looks the same."""

import unicodedata


def composed(name: str) -> str:
    """Return a name with each accent in one character with its letter (Unicode's NFC).

    macOS stores the names of files decomposed, people type them composed: both look the same and
    are different text. Files are opened under the name that they have on disk.
    """
    return unicodedata.normalize("NFC", name)
