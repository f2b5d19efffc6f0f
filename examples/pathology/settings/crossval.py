"""Settings: read from TOML with every key checked, written back resolved, compared between runs."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from examples.pathology.common.errors import UserError, listing, nearest
from examples.pathology.common.files import write_text

if sys.version_info >= (3, 11):
    import tomllib
else:  # the same parser under its older name
    import tomli as tomllib

LOOKAHEAD_SOURCES = ("heldout", "train")
SCHEDULES = ("constant", "cosine", "cosine-per-step")
HEADS = 6  # of the Transformer: the paper
PRECISIONS = ("float32", "tf32", "bfloat16")
Kind = Literal["classification", "regression"]


@dataclass(frozen=True)
class CohortConfig:
    """What to join, and what of it to predict.

    Args:
        clini: Clinical table, ``.csv`` or ``.xlsx``, one row per patient.
        slide_table: The patient and the file name, one row per slide.
        features: Folder of feature files (``.h5``), searched with its sub-folders.
        target: Column of the primary target. Numbers of more than 20 different values make a
            regression, anything else a classification.
        auxiliary: Columns of further targets; numbers of more than two different values make a
            regression, anything else a classification.
        kind: ``NAME=classification`` or ``NAME=regression`` for every target that is meant
            otherwise.
        cutoff: Makes two classes of a numeric primary target: at or above it, which is the
            positive one, and below. ``None``: none.
        positive: The class of ``target`` whose AUROC is reported; ``None``: the rarer one.
        complete_cases: Whether to leave out patients who lack a value of any target (the paper's
            rule) instead of using every value that is known.
        patient_column: Column of the patient in both tables.
        filename_column: Column of the file name in the slide table.
    """

    clini: Path
    slide_table: Path
    features: Path
    target: str
    _: KW_ONLY
    auxiliary: tuple[str, ...] = ()
    kind: tuple[str, ...] = ()
    cutoff: float | None = None
    positive: str | None = None
    complete_cases: bool = False
    patient_column: str = "PATIENT"
    filename_column: str = "FILENAME"

    def __post_init__(self) -> None:
        if not self.target:
            raise UserError("`target` must name a column of the clinical table, but got ''.")
        names = [self.target, *self.auxiliary]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise UserError(
                f"`auxiliary` must name each target once, but got {listing(twice)} twice."
            )
        if self.cutoff is not None and not math.isfinite(self.cutoff):
            raise UserError(f"`cutoff` must be a finite number, but got {self.cutoff}.")
        kinds = self.kinds
        if self.cutoff is not None and kinds.get(self.target) == "regression":
            raise UserError(
                f"`cutoff` makes classes of `{self.target}`, so `kind` must not make it a "
                "regression. Give one of them."
            )

    @property
    def kinds(self) -> dict[str, Kind]:
        """What `kind` says of the targets that it names.

        Raises:
            UserError: It does not read ``NAME=KIND``, or names no target.
        """
        names = [self.target, *self.auxiliary]
        kinds: dict[str, Kind] = {}
        for text in self.kind:
            name, _, given = text.rpartition("=")
            known = {kind: kind for kind in get_args(Kind)}
            if given not in known or name not in names or name in kinds:
                raise UserError(
                    f"`kind` must be NAME={' or NAME='.join(known)}, once for each of the targets "
                    f"({listing(names)}) that it is for, but got {text!r}."
                    + (nearest(given, known) if given not in known else nearest(name, names))
                )
            kinds[name] = known[given]
        return kinds


@dataclass(frozen=True)
class CrossvalConfig(CohortConfig):
    """Everything that decides what a cross-validation computes; what it is of, see `CohortConfig`.

    Args:
        out: The run folder.
        balancer: ``baseline`` (the primary target alone) or a name that ``mtbalance`` knows.
        folds: Number of folds, at least 2 (5: the paper).
        epochs: Most epochs per fold, at least 1 (32: the paper).
        patience: Epochs without a lower validation loss of the primary target before a fold stops
            (7: the paper).
        learning_rate: Of AdamW (1e-4: the paper).
        weight_decay: Of AdamW (0.01: PyTorch's default, which the paper's code uses).
        schedule: ``constant``, as the paper says nothing; ``cosine``, one step per epoch; or
            ``cosine-per-step``, which swings between the learning rate and 0 every `epochs` steps,
            as the paper's code does for several targets.
        standardize: Whether tile features are brought to mean 0 and standard deviation 1 over the
            training part. The paper does not; features of random weights, which hardly vary
            around a large mean, need it.
        lookahead_data: Where Auto-Lambda's look-ahead batches come from: ``heldout``, a tenth of
            the training part that is then not trained on, or ``train``, as in the authors' code.
        splits: A ``splits.json`` of another run to use, so that both are compared on equal folds.
        width: Width of the Transformer, a multiple of its 6 attention heads (384: the paper).
        layers: Layers of its encoder, and of its decoder (2: the paper).
        max_tiles: Most tiles per patient in a training step, drawn anew in every epoch from the
            seed; ``None``: all (the paper). Validation and test always see all.
        precision: ``float32``; ``tf32``, faster on recent NVIDIA GPUs at 10 bits of mantissa in
            matrix products; or ``bfloat16``, autocast at 7 bits.
        cache_gb: Memory for tiles; what does not fit is read again, ahead of its use.
        reference_protocol: Whether to use the choices of the paper's published code; see
            `with_reference_protocol`.
        note: A sentence for the figures and the report, such as "synthetic slides".
        seed: Of splits, initial weights, order and dropout; at least 0.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
    """

    out: Path
    balancer: str = "naive"
    folds: int = 5
    epochs: int = 32
    patience: int = 7
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    schedule: str = "constant"
    standardize: bool = False
    lookahead_data: str = "heldout"
    splits: Path | None = None
    width: int = 384
    layers: int = 2
    max_tiles: int | None = None
    precision: str = "float32"
    cache_gb: float = 4.0
    reference_protocol: bool = False
    note: str = ""
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        least = {"folds": 2, "epochs": 1, "patience": 1, "layers": 1, "seed": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise UserError(f"`{name}` must be at least {low}, but got {getattr(self, name)}.")
        if not self.learning_rate > 0:
            raise UserError(f"`learning-rate` must be above 0, but got {self.learning_rate}.")
        if not self.weight_decay >= 0:
            raise UserError(f"`weight-decay` must be at least 0, but got {self.weight_decay}.")
        if self.width < 1 or self.width % HEADS:
            raise UserError(
                f"`width` must be a multiple of {HEADS}, the attention heads, but got {self.width}."
            )
        if self.max_tiles is not None and self.max_tiles < 1:
            raise UserError(f"`max-tiles` must be at least 1, but got {self.max_tiles}.")
        if not self.cache_gb >= 0:
            raise UserError(f"`cache-gb` must be at least 0, but got {self.cache_gb}.")
        _one_of("precision", self.precision, PRECISIONS)
        _one_of("lookahead-data", self.lookahead_data, LOOKAHEAD_SOURCES)
        _one_of("schedule", self.schedule, SCHEDULES)

    def resolved(self) -> dict[str, Any]:
        """Return the settings as plain values that TOML can hold, with absolute paths."""
        values: dict[str, Any] = {}
        for name, value in asdict(self).items():
            if value is None or (name in ("kind", "note") and not value):
                continue
            plain = str(value.resolve()) if isinstance(value, Path) else value
            values[name] = list(plain) if isinstance(plain, tuple) else plain
        return values


REFERENCE_SEED = 1337  # of the splits in the paper's published code


def with_reference_protocol(config: CrossvalConfig) -> CrossvalConfig:
    """Return the settings with the choices of the paper's published code, where asked for.

    They are: complete cases alone; folds and validation parts of scikit-learn's `StratifiedKFold`
    and `train_test_split` with seed 1337 (for a regression, which that code never splits, by
    `splits.strata_of`); for several targets a cosine schedule that is stepped per patient, and none
    for the baseline; 8 epochs of patience, which an off-by-one makes of the 7 in the paper;
    Auto-Lambda looking ahead on the training stream. What the code gets wrong beyond such choices
    (frozen uncertainty weights, DWA fed the wrong loss, ...) is not repeated.
    """
    if not config.reference_protocol:
        return config
    return replace(
        config,
        complete_cases=True,
        patience=8,
        schedule="constant" if config.balancer == "baseline" else "cosine-per-step",
        lookahead_data="train",
    )


# What may differ when a run folder is taken up again: it changes where, not what, is computed.
_FREE_ON_RESUME = frozenset({"out", "device", "note", "splits", "cache_gb"})


def settings_that_differ(config: CrossvalConfig, stored: Mapping[str, Any]) -> list[str]:
    """Return ``name: old -> new`` for every setting that would change a stored run's result."""
    now = config.resolved()
    names = [f.name for f in fields(CrossvalConfig) if f.name not in _FREE_ON_RESUME]
    pairs = ((name, stored.get(name), now.get(name)) for name in names)
    return [f"{name}: {old!r} -> {new!r}" for name, old, new in pairs if old != new]


def read_section(
    path: Path, section: str, known: Iterable[str], sections: Iterable[str]
) -> dict[str, Any]:
    """Read ``[section]`` of a TOML file, refusing whatever nobody would look at.

    Args:
        path: The file.
        section: The section wanted; one that is absent is empty.
        known: Keys that may stand in it, written with dashes or underscores.
        sections: Sections that may stand in the file.

    Returns:
        The values by name, with underscores.

    Raises:
        UserError: The file does not parse, or holds an unknown section or key.
    """
    tables = read_toml(path)
    sections = list(sections)
    for name, value in tables.items():
        if not isinstance(value, dict):
            raise UserError(
                f"{path}: `{name}` must stand in a section such as [{section}], but stands before "
                "any."
            )
        if name not in sections:
            raise UserError(
                f"{path}: the section [{name}] is unknown; known are {listing(sections)}."
                f"{nearest(name, sections)}"
            )
    known = {key.replace("-", "_") for key in known}
    values = {key.replace("-", "_"): value for key, value in tables.get(section, {}).items()}
    for key in values:
        if key not in known:
            raise UserError(
                f"{path}: the key `{key}` of [{section}] is unknown.{nearest(key, known)}"
            )
    return values


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        UserError: The file is missing or does not parse.
    """
    try:
        tables: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{path} must be a readable file, but {error.strerror or error}."
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} must be valid TOML, but {error}.") from error
    return tables


def write_toml(path: Path, tables: Mapping[str, Mapping[str, Any]]) -> None:
    """Write sections of strings, numbers, booleans and lists of them, atomically."""
    lines: list[str] = []
    for section, values in tables.items():
        lines.append(f"[{section}]")
        lines += [f"{_toml(key)} = {_toml(value)}" for key, value in values.items()]
        lines.append("")
    write_text(path, "\n".join(lines))


def claim_folder(out: Path, kind: str, settings: Mapping[str, Any]) -> None:
    """Mark a folder with what is made in it, ``<kind>.toml``, or check that it is the same.

    Args:
        out: The folder, made if missing; hidden files in it do not count.
        kind: What is made, such as ``demo``.
        settings: All that decides the content, as `write_toml` takes it.

    Raises:
        UserError: The folder holds another one, or other files.
    """
    path = out / f"{kind}.toml"
    if path.exists():
        stored = read_toml(path).get(kind, {})
        differing = [
            f"{name}: {stored.get(name)} -> {settings.get(name)}"
            for name in dict.fromkeys([*settings, *stored])
            if stored.get(name) != settings.get(name)
        ]
        if differing:
            raise UserError(
                f"`out` must be a new folder or one of the same {kind}, but {out} differs in "
                f"{listing(differing)}."
            )
    elif out.exists() and any(not found.name.startswith(".") for found in out.iterdir()):
        raise UserError(f"`out` must be a new or empty folder, but {out} holds other files.")
    else:
        write_toml(path, {kind: settings})


def _toml(value: Any) -> str:
    """Return a string, number, boolean or list as TOML: as JSON, but for the character DEL."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(
            f"`{name}` must be one of {listing(known)}, but got {value!r}.{nearest(value, known)}"
        )
