"""Names in tables and names of files: the one place that decides which mean the same slide."""

import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path, PurePosixPath, PureWindowsPath

from examples.pathology.common.errors import UserError, listing
from examples.pathology.common.names import composed

logger = logging.getLogger(__name__)

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
# The GDC's names of slides end in a UUID. A TCGA barcode before it names the slide by itself, and
# whatever is hexadecimal may be a part of the UUID. Elsewhere, "S18-77.A2" and "S18-77.20240131"
# are other slides than "S18-77": only a whole UUID is one, or its first block if it has a letter.
TCGA_TAIL = re.compile(r"(?<=.)\.[0-9a-f-]{2,}$", re.IGNORECASE)
UUID_TAIL = re.compile(
    r"(?<=.)\.([0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|(?=[0-9]*[a-f])[0-9a-f]{8})$",
    re.IGNORECASE,
)


def slide_name(name: str, table: Path, column: str = "FILENAME") -> str:
    """Return the relative path of a slide, of whose suffixes only that of feature files is dropped.

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
    return str(relative.with_suffix("") if relative.suffix.lower() == ".h5" else relative)


def slide_key(name: str, table: Path, column: str = "FILENAME") -> str:
    """Return the relative path of a slide without the suffix of a slide or feature file.

    The arguments and errors are those of `slide_name`.
    """
    path = slide_name(name, table, column)
    return path if name.lower().endswith(".h5") else without_suffix(path)


def comparable(name: str) -> str:
    """Return a path as paths are compared: composed, the suffix of a slide in lower case."""
    path = composed(name)
    suffix = slide_suffix(path)
    return path[: len(path) - len(suffix)] + suffix


def slide_suffix(path: str) -> str:
    """Return the suffix of a slide, in lower case; empty if a path has none."""
    suffix = PurePosixPath(path).suffix.lower()
    return suffix if suffix in SLIDE_SUFFIXES else ""


def without_suffix(path: str) -> str:
    """Return a path without the suffix of a slide."""
    return path[: len(path) - len(slide_suffix(path))]


def shared_paths(names: Iterable[str]) -> set[str]:
    """Return the paths without suffix that slides of several suffixes share."""
    slides = {name for name in map(comparable, names) if slide_suffix(name)}
    count = Counter(map(without_suffix, slides))
    return {path for path in count if count[path] > 1}


def match_files(keys: Iterable[str], files: Iterable[str]) -> dict[str, list[str]]:
    """Find the files that each key may mean.

    Tried in turn: the same path; that without the suffix of a slide; the same name in another
    folder; that but for the suffix of one of them, or for what all files end in; and that but for
    a UUID, which TCGA names have or lack. The first that finds anything decides; more than one file
    is ambiguous, and for the caller to refuse. Composed and decomposed names are the same.

    Where the file of a key is missing, that of another slide is none of its own. Hence:

    - What is another key's by its path is no other's, unless they differ in a UUID alone.
    - Of two folders, one must be the end of the other, unless that is so of no key and no file:
      then the folders are another tree's.
    - Two suffixes must be the same. A file without one is nobody's if slides of several suffixes
      share its name, as nobody knows which of them it was made of.

    Args:
        keys: Relative paths, with or without the suffix of a slide.
        files: Relative paths of files, likewise.

    Returns:
        The sorted candidates of every key, as `files` has them.
    """
    keys, paths = list(keys), sorted(set(files))
    shelves = _Shelves(keys, paths)
    found = {key: shelves.exact(comparable(key)) for key in keys}
    owned = {file for own in found.values() for file in own}
    for key, own in found.items():
        if not own:
            path = comparable(key)
            free = (
                [file for file in candidates if file not in owned]
                for candidates in shelves.near(path)
            )
            found[key] = next(filter(None, free), []) or shelves.with_or_without_uuid(path)
    return found


def folders_agree(name: str, other: str) -> bool:
    """Tell whether the folder of one path is the end of the other's, as no folder is of any."""
    one, two = (PurePosixPath(composed(path)).parent.parts for path in (name, other))
    shared = min(len(one), len(two))
    return one[len(one) - shared :] == two[len(two) - shared :]


def log_other_folders(found: Mapping[str, Sequence[str]], table: Path, column: str) -> None:
    """Warn of keys whose only file is in another folder: it may be another slide's.

    Args:
        found: The candidates of every key.
        table: The table of the keys.
        column: Its column.
    """
    apart = [
        f"{key} with {own[0]}"
        for key, own in found.items()
        if len(own) == 1 and not folders_agree(key, own[0])
    ]
    if apart:
        logger.warning(
            "%s: no folder of `%s` is among those of the files, so that names alone are matched: "
            "%s. Write the files' folders if these are other slides.",
            table,
            column,
            listing(apart, 3),
        )


class _Shelf:
    """Files by their paths, and by every end of these."""

    def __init__(self, moved: bool) -> None:
        self.by_path: dict[str, list[str]] = defaultdict(list)
        self._by_end: dict[str, list[str]] = defaultdict(list)
        self._moved = moved  # the folders are another tree's

    def add(self, path: str, file: str) -> None:
        self.by_path[path].append(file)
        for end in _ends(path):
            self._by_end[end].append(file)

    def find(self, path: str) -> list[str]:
        """Return the files whose path is the end of this one, or the other way round."""
        ends = _ends(path)
        found = [*self._by_end.get(path, [])]
        found += [file for end in ends[1:] for file in self.by_path.get(end, [])]
        return sorted(found) or [*self._by_end.get(ends[-1], [])] * self._moved


class _Shelves:
    """Files by all that a key may call them."""

    def __init__(self, keys: Sequence[str], files: Sequence[str]) -> None:
        moved = _of_other_trees(keys, files)
        self._full, self._plain, self._bare = _Shelf(moved), _Shelf(moved), _Shelf(moved)
        self._suffixes: dict[str, set[str]] = defaultdict(set)
        for name in map(comparable, (*keys, *files)):
            self._suffixes[without_suffix(name)] |= {slide_suffix(name)} - {""}
        self._ending = _shared_ending(files)
        for file in files:
            path = comparable(file)
            self._full.add(path, file)
            plain = without_suffix(path).removesuffix(self._ending).removesuffix(".ome")
            if plain != path:
                self._plain.add(plain, file)
            if (bare := _without_uuid(plain)) != plain:
                self._bare.add(bare, file)

    def exact(self, path: str) -> list[str]:
        """Return the files of this path; if there are none, those without its suffix."""
        plain = self._full.by_path.get(without_suffix(path), [])
        return self._full.by_path.get(path) or self._fitting(path, plain)

    def near(self, path: str) -> Iterator[list[str]]:
        """Return the files of this name in any folder, then those of a shorter or longer one."""
        yield self._full.find(path)
        yield self._fitting(path, self._full.find(without_suffix(path)))
        if self._ending or not slide_suffix(path):
            yield self._fitting(path, self._plain.find(without_suffix(path)))

    def with_or_without_uuid(self, path: str) -> list[str]:
        """Return the files that have a UUID if the path has none, and the other way round."""
        plain = without_suffix(path)
        bare = _without_uuid(plain)
        if bare == plain:
            return self._fitting(path, self._bare.find(bare))
        return self._fitting(path, self._full.find(bare) or self._plain.find(bare))

    def _fitting(self, path: str, files: Iterable[str]) -> list[str]:
        """Return the files with the suffix of a path, and those without any that must be its."""
        suffix, name = slide_suffix(path), _ends(without_suffix(path))[-1]
        fits = []
        for file in files:
            own = slide_suffix(file) if _ends(comparable(file))[-1] != name else ""
            twins = self._suffixes[without_suffix(path)] | self._suffixes[comparable(file)]
            # A flat picture beside a slide is no slide, and does not change its name.
            twins -= set() if suffix in FLAT_SUFFIXES else FLAT_SUFFIXES
            if not suffix or own == suffix or (not own and twins <= {suffix}):
                fits.append(file)
        return fits


def _ends(path: str) -> list[str]:
    """Return a path and all its ends, longest first."""
    parts = path.split("/")
    return ["/".join(parts[i:]) for i in range(len(parts))]


def _shared_ending(files: Iterable[str]) -> str:
    """Return what follows the last dot of every file, as where a tool adds ".features" to all."""
    endings = Counter(PurePosixPath(without_suffix(file)).suffix for file in files)
    return next(iter(endings)) if len(endings) == 1 and endings.total() > 1 else ""


def _of_other_trees(keys: Iterable[str], files: Iterable[str]) -> bool:
    """Tell whether no folder of a key is the end of one of a file, nor the other way round."""
    one, two = (
        {composed(name).rpartition("/")[0] for name in names} - {""} for names in (keys, files)
    )
    ends, others = ({end for path in paths for end in _ends(path)} for paths in (one, two))
    return not (one & others or two & ends)


def _without_uuid(path: str) -> str:
    """Return a path without the UUID at its end."""
    folder, slash, name = path.rpartition("/")
    tail = TCGA_TAIL if name.upper().startswith("TCGA-") else UUID_TAIL
    return f"{folder}{slash}{tail.sub('', name)}"


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
    words = re.findall(r"[^\W\d_]+|\d+", composed(without_suffix(name)).casefold())
    return "-".join(word.lstrip("0") or "0" for word in words)
