"""Reading the weights of a network without running code from the file, checked before any is used.

A file that cannot be used gets one sentence that says why. Nothing is ever loaded in part.
"""

import hashlib
import io
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from examples.pathology.common.errors import UserError, listing, one_line

_ZIP, _PICKLE = b"PK", b"\x80"

_HARMLESS = re.compile(
    r"torch\._utils .*|torch\.storage .*|collections OrderedDict.*|torch .*Storage", re.DOTALL
)
"""What the pickle of an ordinary checkpoint names."""

_WRAPPERS = ("model", "state_dict")
"""Keys under which checkpoints keep their tensors, if not at the top."""


class CheckpointError(UserError):
    """A checkpoint cannot be used; the message says why."""


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint by name, without running code from it.

    Args:
        path: A file written by ``torch.save`` that holds ``{name: tensor}``, alone or as its entry
            ``model`` or ``state_dict``; or a ``.safetensors`` file.

    Raises:
        CheckpointError: If the file is missing, empty, truncated, not a checkpoint, or names code.
    """
    if not path.is_file():
        raise CheckpointError(f"The weights file must exist, but {path} does not.")
    if path.stat().st_size == 0:
        raise CheckpointError(
            f"The weights file must hold a network, but {path} is truncated to nothing: it has "
            "0 bytes. Download it again."
        )
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    for key in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise CheckpointError(
            f"The weights file must hold tensors by name, but {path} holds "
            f"{type(content).__name__}."
        )
    for name, value in content.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"The weights file must hold tensors by name, but in {path} `{name}` is "
                f"{type(value).__name__}."
            )
    return content


def _read_safetensors(path: Path) -> object:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise _damaged(path, error) from error


def _read_torch(path: Path) -> object:
    with path.open("rb") as file:
        head = file.read(2)
    if not (head == _ZIP[: len(head)] or head.startswith(_PICKLE)):
        raise CheckpointError(
            "The weights file must be one that torch.save wrote, but "
            f"{path} is not a checkpoint: it begins with {head!r}. If it is a web page, the "
            "download failed; download the file again."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle protocol of files refused below
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        code = _code_in(path)
        if code is None:
            raise _damaged(path, error) from error
        raise CheckpointError(
            f"The weights file must hold tensors only, but {path} would run code when opened "
            f"(`{code}`). It was not opened; download the weights from their authors."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> CheckpointError:
    what = one_line(error).partition(". ")[0]  # torch goes on about what may be the matter
    return CheckpointError(
        f"The weights file must be a complete checkpoint, but {path} is truncated or damaged "
        f"({what}). Download it again."
    )


def _code_in(path: Path) -> str | None:
    """Return the first function or class that a pickle names and torch refuses, if any."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
                data = archive.read(name)
        else:
            data = path.read_bytes()
        for name in _globals(data):
            if not _HARMLESS.fullmatch(name):
                return name.replace(" ", ".")
    except (zipfile.BadZipFile, StopIteration, ValueError, OSError):
        pass  # damaged beyond looking for code
    return None


def _globals(data: bytes) -> Iterator[str]:
    """Yield ``module name`` of what a stream of pickles imports; nothing is executed."""
    stream = io.BytesIO(data)
    texts: list[str] = []
    while stream.tell() < len(data):  # old checkpoints are several pickles in a row
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name == "GLOBAL":
                yield str(argument)
            elif opcode.name == "STACK_GLOBAL":
                yield " ".join(texts[-2:])
            elif isinstance(argument, str):
                texts.append(argument)


def check_entries(
    found: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    *,
    network: str,
    path: Path,
    file_name: Callable[[str], str] = lambda name: name,
) -> dict[str, Tensor]:
    """Check that a checkpoint has exactly a network's entries, each of its shape and finite.

    Args:
        found: The tensors of the file by the network's names.
        expected: The network's entries.
        network: Name of the network, for messages.
        path: The file, for messages.
        file_name: Gives the file's name of an entry from the network's.

    Returns:
        The tensors by the network's names, ready for ``load_state_dict(..., strict=True)``.

    Raises:
        CheckpointError: If anything is missing, too much, of another shape or not finite.
    """
    missing, unknown = expected.keys() - found.keys(), found.keys() - expected.keys()
    if missing or unknown:
        parts = [
            f"{verb} {len(names)} ({listing(sorted(map(file_name, names)), 3)})"
            for verb, names in (("lacks", missing), ("has other ones:", unknown))
            if names
        ]
        raise CheckpointError(
            f"The weights file must have exactly the entries of {network}, but "
            f"{path} {' and '.join(parts)}. Nothing was loaded."
        )
    for name, value in found.items():
        if value.shape != expected[name].shape:
            raise CheckpointError(
                f"`{file_name(name)}` must have the shape {tuple(expected[name].shape)}, but in "
                f"{path} it has {tuple(value.shape)}. Nothing was loaded."
            )
        if not torch.isfinite(value).all():
            raise CheckpointError(
                f"`{file_name(name)}` must be finite, but in {path} it has NaN or infinite "
                "values. Nothing was loaded."
            )
    return dict(found)
