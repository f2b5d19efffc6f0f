"""Records in files: one row per step, written as training goes, and read again."""

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import torch.distributed
from typing_extensions import Self

from mtbalance._checks import check_count
from mtbalance._record import OF_GROUPS, OF_TASKS, Record


class RecordWriter:
    """Writes records to a file or to TensorBoard, a row per step.

    The path decides the format: ``.csv`` (a column per figure of :meth:`Record.as_dict`, empty
    where a step does not know it), ``.jsonl`` (an object per line, without what a step does not
    know), or a folder, without an ending, for TensorBoard (``pip install tensorboard``). A file
    that exists is continued. Each row is on disk when :meth:`write` returns. Of several processes
    of ``torch.distributed``, all of which have the same record, the first writes.

    Args:
        path: The file or folder.
        every: Write every n-th step only. The others cost nothing, not even a look at the record,
            which waits for the device.

    Raises:
        ValueError: If the path has another ending, or a ``.csv`` file has other columns.
        ImportError: If TensorBoard is asked for and not installed.

    Example:
        >>> import tempfile, torch
        >>> from mtbalance import make_balancer, read_log
        >>> x = torch.nn.Parameter(torch.ones(2))
        >>> balancer = make_balancer("pcgrad", tasks=("a", "b"), shared=[x])
        >>> folder = tempfile.TemporaryDirectory()
        >>> with RecordWriter(f"{folder.name}/log.csv") as writer:
        ...     for _ in range(3):
        ...         writer.write(balancer.backward({"a": x.sum(), "b": -x[0]}))
        >>> log = read_log(f"{folder.name}/log.csv")
        >>> log.steps, log.columns["conflicts"]
        ([0, 1, 2], [1.0, 1.0, 1.0])
        >>> folder.cleanup()
    """

    def __init__(self, path: str | os.PathLike[str], *, every: int = 1) -> None:
        self.path = Path(path)
        self.every = check_count("every", every)
        self._next = 0
        self._is_closed = False
        self._target: _Target | None = None
        kind = _KINDS.get(self.path.suffix, _TensorBoard)
        if kind is _TensorBoard and self.path.suffix[1:2].isalpha():  # "runs/lr0.1" is a folder
            raise ValueError(
                f"`path` must end in {' or '.join(_KINDS)}, or be a folder without an ending, for "
                f"TensorBoard, but got {str(path)!r}."
            )
        if _is_first():
            self._target = kind(self.path)

    def write(self, record: Record, step: int | None = None, **more: float) -> None:
        """Write a row.

        Args:
            record: What a step did.
            step: The number of the step; by default the one after the last. Give it where training
                is resumed: of rows with the same number, the last counts when they are read.
            **more: Further figures, such as a learning rate; the same ones in every row of a
                ``.csv``.

        Raises:
            ValueError: If a ``.csv`` file has other columns, a further figure is called as one of
                the record, or the writer has been closed.
            TypeError: If it is no record, or a further figure is no number.
        """
        if self._is_closed:
            raise ValueError(
                f"the writer of {self.path} must be open, but has been closed. Write inside of its "
                "`with` block, or make another one, which continues the file."
            )
        if not hasattr(record, "as_dict"):
            raise TypeError(
                f"`record` must be what a step returned, but got {type(record).__name__}. Give the "
                "Record itself, not its as_dict(); there is none while micro-batches are added up."
            )
        step = self._next if step is None else step
        self._next = step + 1
        if self._target is not None and step % self.every == 0:
            row = {"step": float(step), **record.as_dict()}
            for name, value in more.items():
                if name in row:
                    raise ValueError(
                        f"further figures must not be called as those of the record, but {name!r} "
                        "is one of them. Give it another name."
                    )
                row[name] = _checked(name, value)
            self._target.write(row)

    def close(self) -> None:
        """Close the file."""
        self._is_closed = True
        if self._target is not None:
            self._target.close()
            self._target = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Log(NamedTuple):
    """Figures of many steps."""

    steps: list[int]
    """Numbers of the steps, from small to large, n of them."""
    columns: dict[str, list[float]]
    """Each figure over the steps, n numbers by its name ("loss/msi"); NaN where it is not known."""

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that have a loss, in the order of the Balancer."""
        return tuple(n.removeprefix("loss/") for n in self.columns if n.startswith("loss/"))

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups of shared parameters that have figures of their own, in the order given."""
        ends = [(*name.split("/", 2), "", "")[:2] for name in self.columns]
        found = (group for group, kind in ends if group not in OF_TASKS and kind in OF_GROUPS)
        return tuple(dict.fromkeys(found))


def read_log(path: str | os.PathLike[str]) -> Log:
    """Read what a :class:`RecordWriter` wrote to a ``.csv`` or ``.jsonl`` file.

    Of rows with the same step the last counts. A last line that was cut off, as by a killed
    process, is left out.

    Raises:
        ValueError: If the file has another ending, or is no such file.
        OSError: If it cannot be read.
    """
    path = Path(path)
    if path.suffix not in _READERS:
        raise ValueError(
            f"`path` must end in {' or '.join(_READERS)}, but got {str(path)!r}. TensorBoard reads "
            "its own files."
        )
    text = path.read_text(encoding="utf-8")
    lines = text[: text.rfind("\n") + 1].splitlines()
    try:
        return log_of(_READERS[path.suffix](lines))
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{path} must hold rows of a RecordWriter, but does not ({error!r})."
        ) from error


def log_of(rows: Iterable[Mapping[str, float] | Record]) -> Log:
    """Return records, or rows with or without a "step", as columns."""
    found: dict[int, Mapping[str, float]] = {}
    for number, row in enumerate(rows):
        figures = row.as_dict() if isinstance(row, Record) else row
        found[int(figures.get("step", number))] = figures
    steps = sorted(found)
    names = dict.fromkeys(name for step in steps for name in found[step] if name != "step")
    columns = {name: [float(found[step].get(name, math.nan)) for step in steps] for name in names}
    return Log(steps, columns)


def _checked(name: str, value: object) -> float:
    """Return a further figure as a number."""
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise TypeError(
            f"`{name}` must be a number, as figures are, but got {value!r}. Leave it out of a row "
            "that has none; in a .csv, give NaN."
        ) from None


class _Target(Protocol):
    def __init__(self, path: Path) -> None: ...

    def write(self, row: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class _Lines:
    """A text file that is continued; what a killed process left of a line is cut off first."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+", encoding="utf-8", newline="")
        self._file.seek(0)
        text = self._file.read()
        whole = text.rfind("\n") + 1
        self.first = text[:whole].partition("\n")[0].rstrip("\r")
        if whole < len(text):
            self._file.truncate(len(text[:whole].encode()))

    def append(self, line: str) -> None:
        self._file.write(line + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class _Csv:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines = _Lines(path)
        self._header = next(csv.reader([self._lines.first]), None) if self._lines.first else None

    def write(self, row: Mapping[str, float]) -> None:
        if self._header is None:
            self._header = list(row)
            self._lines.append(_joined(self._header))
        if self._header != list(row):
            odd = sorted(set(self._header) ^ set(row)) or list(row)
            raise ValueError(
                f"a row of {self._path} must have the columns of its first line, but differs in "
                f"{', '.join(odd)}. Write other tasks or figures to another file, or to a .jsonl."
            )
        self._lines.append(_joined([_text(value) for value in row.values()]))

    def close(self) -> None:
        self._lines.close()


class _JsonLines:
    def __init__(self, path: Path) -> None:
        self._lines = _Lines(path)

    def write(self, row: Mapping[str, float]) -> None:
        # JSON has no NaN, and infinity only in Python's dialect.
        known = {name: _number(value) for name, value in row.items() if not math.isnan(value)}
        self._lines.append(json.dumps(known))

    def close(self) -> None:
        self._lines.close()


class _TensorBoard:
    def __init__(self, path: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                f"{str(path)!r} has no ending and so is for TensorBoard, which is not installed. "
                "Run `pip install tensorboard`, or let `path` end in .csv or .jsonl."
            ) from error
        self._writer: Any = SummaryWriter(str(path))

    def write(self, row: Mapping[str, float]) -> None:
        for name, value in row.items():
            if name != "step" and not math.isnan(value):
                self._writer.add_scalar(name, value, int(row["step"]))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


_KINDS: dict[str, type[_Target]] = {".csv": _Csv, ".jsonl": _JsonLines}


def _rows_of_csv(lines: Sequence[str]) -> list[dict[str, float]]:
    header, *rows = csv.reader(lines)
    return [
        {name: float(text or "nan") for name, text in zip(header, row, strict=True)} for row in rows
    ]


def _rows_of_json(lines: Sequence[str]) -> list[dict[str, float]]:
    return [{name: float(value) for name, value in json.loads(line).items()} for line in lines]


_READERS = {".csv": _rows_of_csv, ".jsonl": _rows_of_json}


def _joined(fields: Sequence[str]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(fields)
    return line.getvalue()


def _number(value: float) -> float | str:
    """Return a number as JSON can say it, whole ones without a point."""
    if math.isinf(value):
        return repr(value)
    return int(value) if value == int(value) and abs(value) < 2**53 else float(value)


def _text(value: float) -> str:
    return "" if math.isnan(value) else str(_number(value))


def _is_first() -> bool:
    ranks = torch.distributed
    return not (ranks.is_available() and ranks.is_initialized()) or ranks.get_rank() == 0
