"""Settings in TOML: read with every key checked, and written."""

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from examples.pathology.common.errors import UserError, listing, nearest
from examples.pathology.common.files import readable, write_text

if sys.version_info >= (3, 11):
    import tomllib
else:  # the same parser under its older name
    import tomli as tomllib


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
    values: dict[str, Any] = {}
    for key, value in tables.get(section, {}).items():
        if values.setdefault(key.replace("-", "_"), value) is not value:
            raise UserError(f"{path}: `{key}` of [{section}] must be given once, but is twice.")
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
        with readable(path):
            tables: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
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


def _toml(value: Any) -> str:
    """Return a string, number, boolean or list as TOML: as JSON, but for the character DEL."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
