"""What a Balancer saves besides the state of its strategies: one tensor, which says what it is.

A saved state is the text of a JSON object in UTF-8, a byte tensor that every safe loader takes:
``version`` (2), ``tasks`` (their names, in order), ``draws`` (the name of a gradient strategy with
a random stream), ``split`` (see ``_split``; null where what is shared was given), ``due`` (a digit
per task: 1 if it has a part in a step that is to be looked back at) and ``numbers``,
the running epoch's counts and the kept weights as hexadecimal digits of little-endian float64. A
fresh Balancer's state has the shape of a trained one's, which some loaders insist on: behind an
inferred split there are blanks. States of version 1 are the numbers alone, float64, after the
number of tasks.
"""

import json
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mtbalance._random import RandomSource
from mtbalance._split import Known

VERSION = 2
_ROOM = 2**18
"""Bytes of a state with an inferred split, for a thousand parameters and more, or a multiple."""


class Saved(NamedTuple):
    """What has been saved."""

    counts: Tensor
    """The running epoch's counts, shape (2 + 2K,), float64."""
    kept: Tensor
    """Kept weights, as in ``KeptWeights.as_tensor``, float64."""
    split: list[Known] | None
    """What tasks have reached; None where that was not saved."""
    due: tuple[str, ...] = ()
    """The tasks of the step that is to be looked back at, if there is one."""


def state_of(tasks: tuple[str, ...], saved: Saved, strategy: nn.Module) -> Tensor:
    """Return what is to be saved, shape (bytes,), uint8, on the CPU; see :func:`saved_in`."""
    numbers = [*saved.counts.tolist(), *saved.kept.tolist()]
    content = {
        "version": VERSION,
        "tasks": tasks,
        "draws": _drawing(strategy),
        "split": saved.split,
        "due": "".join(str(int(task in saved.due)) for task in tasks),
        "numbers": struct.pack(f"<{len(numbers)}d", *numbers).hex(),
    }
    return as_bytes(content)


def as_bytes(content: Mapping[str, Any]) -> Tensor:
    """Return what has been put together as the tensor that is saved."""
    text = json.dumps(content)
    if content["split"] is not None:  # which grows with the first steps
        text = text.ljust(-(-len(text) // _ROOM) * _ROOM)
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def saved_in(state: object, tasks: tuple[str, ...], strategy: nn.Module) -> Saved:
    """Return what is saved in a state, of this version or the one before.

    Args:
        state: The state.
        tasks: The tasks of the Balancer that is to go on with it.
        strategy: Its gradient strategy, whose random stream is another's if the names differ.

    Raises:
        ValueError: If it is no state of a Balancer, or one of other tasks.
    """
    if not isinstance(state, Tensor) or state.ndim != 1 or len(state) == 0:
        got = f"shape {tuple(state.shape)}" if isinstance(state, Tensor) else type(state).__name__
        raise _not_a_state(got)
    state = state.detach().cpu()
    split, due = None, ""
    if state.dtype == torch.uint8:
        numbers, split, due = _second(state, tasks, _drawing(strategy))
    else:
        numbers = _first(state, tasks)
    counts = 2 + 2 * len(tasks)
    if len(numbers) <= counts:
        raise _not_a_state(f"{len(numbers)} numbers for {len(tasks)} tasks")
    if not bool((torch.isfinite(numbers[:counts]) & (numbers[:counts] >= 0)).all()):
        raise ValueError(
            "the saved state must have counts of steps of at least 0, but got "
            f"{numbers[:counts].tolist()}. It was damaged."
        )
    waiting = tuple(task for task, digit in zip(tasks, due, strict=False) if digit == "1")
    return Saved(numbers[:counts], numbers[counts:], split, waiting)


def content_of(state: object) -> dict[str, Any]:
    """Return what a saved state holds, whatever tasks it is of, its numbers as a list of floats.

    Raises:
        ValueError: If it is no state of a Balancer with the names of tasks.
    """
    if not isinstance(state, Tensor) or state.ndim != 1 or state.dtype != torch.uint8:
        raise _not_a_state("something that has no names of tasks")
    content = _content(state.cpu())
    names, split = content.get("tasks"), content.get("split")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise _not_a_state(f"{names!r} for the names of tasks")
    if not _is_split(split, tuple(names)):
        raise _not_a_state("something else for what tasks reach")
    numbers = _numbers(content)
    if len(numbers) <= 2 + 2 * len(names) or (len(numbers) - 3) % len(names):
        raise _not_a_state(f"{len(numbers)} numbers for {len(names)} tasks")
    return {**content, "numbers": list(numbers)}


def _content(state: Tensor) -> dict[str, Any]:
    content = _object_in(bytes(state.tolist()))
    version = content.get("version")
    if version != VERSION:
        raise ValueError(
            f"the saved state must be of version {VERSION} or older, but is of version "
            f"{version!r}. Load it with the mtbalance that saved it, or a later one."
        )
    return content


def _numbers(content: Mapping[str, Any]) -> tuple[float, ...]:
    try:
        packed = bytes.fromhex(str(content.get("numbers")))
        return struct.unpack(f"<{len(packed) // 8}d", packed)
    except (ValueError, struct.error):
        raise _not_a_state("something else after the names") from None


def _second(
    state: Tensor, tasks: tuple[str, ...], draws: str
) -> tuple[Tensor, list[Known] | None, str]:
    """Return numbers, split and what is due in a state of the second version, which has names."""
    content = _content(state)
    names = content.get("tasks")
    if names != list(tasks):
        raise ValueError(
            f"the saved state must belong to {_listed(tasks)}, but has {_listed(names)}. "
            "Give `tasks` the same names in the same order, or see mtbalance.with_tasks()."
        )
    other = content.get("draws", "")
    if draws and other and other != draws:
        raise ValueError(
            f"the saved state must hold the random stream of {draws}, but has that of {other}. "
            "Give the Balancer the gradient strategy that was saved."
        )
    numbers = _numbers(content)
    split = content.get("split")
    if not _is_split(split, tasks):
        raise _not_a_state("something else for what tasks reach")
    due = str(content.get("due", ""))  # there since weightings look back
    return torch.tensor(numbers, dtype=torch.float64, device="cpu"), split, due


def _drawing(strategy: nn.Module) -> str:
    """Return the name of a strategy that draws, or nothing."""
    draws = any(isinstance(module, RandomSource) for module in strategy.modules())
    return type(strategy).__name__ if draws else ""


def _is_split(split: object, tasks: tuple[str, ...]) -> bool:
    return split is None or (
        isinstance(split, list)
        and all(isinstance(known, dict) and set(known) <= set(tasks) for known in split)
        and all(isinstance(name, str) for known in split for name in known.values())
    )


def _object_in(text: bytes) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise _not_a_state(f"{len(text)} bytes of something else")
    return content


def _first(state: Tensor, tasks: tuple[str, ...]) -> Tensor:
    """Return the numbers in a state of the first version, which counts its tasks."""
    if not state.is_floating_point():
        raise _not_a_state(f"{state.dtype}")
    if float(state[0]) != len(tasks):
        raise ValueError(
            f"the saved state must belong to {len(tasks)} tasks, but has {float(state[0]):g}."
        )
    return state[1:].double()


def _listed(names: object) -> str:
    if not isinstance(names, list | tuple):
        return repr(names)
    return f"{len(names)} tasks, " + ", ".join(map(repr, names))


def _not_a_state(got: str) -> ValueError:
    return ValueError(
        f"the saved state must be that of a Balancer, one vector, but got {got}. "
        "Load what `balancer.state_dict()` returned."
    )
