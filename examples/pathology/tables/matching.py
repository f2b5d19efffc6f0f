"""Names in tables and names of files: the one place that decides which mean the same slide."""

import re
from collections import defaultdict
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path, PurePosixPath, PureWindowsPath

from examples.pathology.common.errors import UserError
from examples.pathology.common.names import composed

TIFF_SUFFIXES = frozenset((".btf", ".tif", ".tiff"))
"""What OpenSlide does not read of these, tifffile does."""

FLAT_SUFFIXES = frozenset((".bmp", ".jpeg", ".jpg", ".png"))
"""Pictures without a pyramid, which Pillow reads."""

# fmt: off
SLIDE_SUFFIXES = TIFF_SUFFIXES | FLAT_SUFFIXES | frozenset((
    ".bif", ".czi", ".dcm", ".mrxs", ".ndpi", ".qptiff", ".scn", ".svs", ".svslide", ".vms", ".vmu",
))
# fmt: on
# Identifiers of a study look alike: below this, the nearest one is as a rule another patient's.
NEAR = 0.9


def slide_key(name: str, table: Path, column: str = "FILENAME") -> str:
    """Return the relative path of a slide without the suffix of a slide or feature file.

    Args:
        name: What the table says.
        table: The table, for the error.
        column: Its column, for the error.

    Raises:
        UserError: The name is absolute or climbs out of its folder.
    """
    relative = PurePosixPath(name.replace("\\", "/"))
    if relative.is_absolute() or PureWindowsPath(name).drive or ".." in relative.parts:
        raise UserError(
            f"{table}: `{column}` must be a path inside the folder of slides or features, but "
            f"got {name!r}."
        )
    if relative.suffix.lower() in {*SLIDE_SUFFIXES, ".h5"}:
        relative = relative.with_suffix("")
    return str(relative)


def match_files(keys: Iterable[str], files: Iterable[str]) -> dict[str, list[str]]:
    """Find the files that each key may mean, or the other way round: the rule is symmetric.

    Tried in turn: the same relative path; the same stem in any folder; and the same stem but for
    what follows a dot, on either side, which is how TCGA names differ with and without their UUID.
    The first that finds anything decides; more than one file is ambiguous, and for the caller to
    refuse. Composed and decomposed names are the same.

    Args:
        keys: Relative paths without suffix.
        files: Relative paths of files without suffix.

    Returns:
        The sorted candidates of every key, as `files` has them.
    """
    by_path: dict[str, list[str]] = defaultdict(list)
    by_stem: dict[str, list[str]] = defaultdict(list)
    by_prefix: dict[str, list[str]] = defaultdict(list)
    for path in sorted(set(files)):
        by_path[composed(path)].append(path)
        stem = PurePosixPath(composed(path)).name
        by_stem[stem].append(path)
        for prefix in _prefixes(stem):
            by_prefix[prefix].append(path)
    found: dict[str, list[str]] = {}
    for key in keys:
        path = composed(key)
        stem = PurePosixPath(path).name
        shorter = (by_stem[prefix] for prefix in _prefixes(stem) if prefix in by_stem)
        found[key] = (
            by_path.get(path) or by_stem.get(stem) or by_prefix.get(stem) or next(shorter, [])
        )
    return found


def near_matches(names: Iterable[str], candidates: Iterable[str]) -> dict[str, str]:
    """Guess what a name that has no partner was meant to be, among those that have none either.

    Tried in turn: equal but for case, spaces, separators and leading zeros; one the beginning of
    the other (a patient's and a sample's barcode); nearly the same letters.

    Args:
        names: Names without a partner.
        candidates: Names on the other side without a partner.

    Returns:
        The nearest candidate of every name that has a near one.
    """
    open_names = {name: _plain(name) for name in names}
    free = {_plain(candidate): candidate for candidate in sorted(candidates, reverse=True)}
    near = {}
    # A candidate that is surely another name's is no guess for the rest: hence pass by pass.
    for guess in (_equal, _beginning, _alike):
        found = {
            name: other
            for name, plain in open_names.items()
            if plain and (other := guess(plain, free)) is not None
        }
        near.update({name: free[other] for name, other in found.items()})
        open_names = {name: plain for name, plain in open_names.items() if name not in found}
        taken = set(found.values())
        free = {plain: candidate for plain, candidate in free.items() if plain not in taken}
    return near


def _equal(plain: str, candidates: Iterable[str]) -> str | None:
    return plain if plain in candidates else None


def _beginning(plain: str, candidates: Iterable[str]) -> str | None:
    for other in candidates:
        if f"{other}-".startswith(f"{plain}-") or f"{plain}-".startswith(f"{other}-"):
            return other
    return None


def _alike(plain: str, candidates: Iterable[str]) -> str | None:
    return next(iter(get_close_matches(plain, list(candidates), n=1, cutoff=NEAR)), None)


def _plain(name: str) -> str:
    """Return a name without what people type differently."""
    words = re.findall(r"[^\W\d_]+|\d+", composed(name).casefold())
    return "-".join(word.lstrip("0") or "0" for word in words)


def _prefixes(stem: str) -> list[str]:
    """Return the parts of a stem before each of its dots, longest first."""
    return [stem[:i] for i in range(len(stem) - 1, 0, -1) if stem[i] == "."]
