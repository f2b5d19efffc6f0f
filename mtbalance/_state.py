"""What a Balancer saves besides the state of its strategies: one tensor, which says what it is.

A saved state is the text of a JSON object in UTF-8, a byte tensor that every safe loader takes:
``version`` (2), ``tasks`` (their names, in order) and ``numbers``, the running epoch's counts and
the kept weights as hexadecimal digits of little-endian float64, so that a fresh Balancer's state
has the shape of a trained one's. States of version 1 are the numbers alone, float64, after the
number of tasks.
"""

import json
import struct
from typing import Any, NamedTuple

import torch
from torch import Tensor

VERSION = 2


class Saved(NamedTuple):
    """What has been saved."""

    counts: Tensor
    """The running epoch's counts, shape (2 + 2K,), float64."""
    kept: Tensor
    """Kept weights, as in ``KeptWeights.as_tensor``, float64."""


def state_of(tasks: tuple[str, ...], saved: Saved) -> Tensor:
    """Return what is to be saved, shape (bytes,), uint8, on the CPU."""
    numbers = [*saved.counts.tolist(), *saved.kept.tolist()]
    content = {
        "version": VERSION,
        "tasks": tasks,
        "numbers": struct.pack(f"<{len(numbers)}d", *numbers).hex(),
    }
    return torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8, device="cpu")


def saved_in(state: object, tasks: tuple[str, ...]) -> Saved:
    """Return what is saved in a state, of this version or the one before.

    Args:
        state: The state.
        tasks: The tasks of the Balancer that is to go on with it.

    Raises:
        ValueError: If it is no state of a Balancer, or one of other tasks.
    """
    if not isinstance(state, Tensor) or state.ndim != 1 or len(state) == 0:
        got = f"shape {tuple(state.shape)}" if isinstance(state, Tensor) else type(state).__name__
        raise _not_a_state(got)
    state = state.detach().cpu()
    numbers = _numbers_of(state, tasks) if state.dtype == torch.uint8 else _first(state, tasks)
    counts = 2 + 2 * len(tasks)
    if len(numbers) <= counts:
        raise _not_a_state(f"{len(numbers)} numbers for {len(tasks)} tasks")
    return Saved(numbers[:counts], numbers[counts:])


def _numbers_of(state: Tensor, tasks: tuple[str, ...]) -> Tensor:
    """Return the numbers in a state that names its tasks."""
    content = _object_in(bytes(state.tolist()))
    version = content.get("version")
    if version != VERSION:
        raise ValueError(
            f"the saved state must be of version {VERSION} or older, but is of version "
            f"{version!r}. Load it with the mtbalance that saved it, or a later one."
        )
    names = content["tasks"]
    if names != list(tasks):
        raise ValueError(
            f"the saved state must belong to {len(tasks)} tasks, {_listed(tasks)}, but has "
            f"{len(names)}, {_listed(names)}. Give `tasks` the same names in the same order."
        )
    packed = bytes.fromhex(content["numbers"])
    numbers = struct.unpack(f"<{len(packed) // 8}d", packed)
    return torch.tensor(numbers, dtype=torch.float64, device="cpu")


def _object_in(text: bytes) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise _not_a_state(f"{len(text)} bytes that are none")
    return content


def _first(state: Tensor, tasks: tuple[str, ...]) -> Tensor:
    """Return the numbers in a state of the first version, which counts its tasks."""
    if float(state[0]) != len(tasks):
        raise ValueError(
            f"the saved state must belong to {len(tasks)} tasks, but has {float(state[0]):g}."
        )
    return state[1:].double()


def _listed(names: object) -> str:
    return ", ".join(map(repr, names)) if isinstance(names, list | tuple) else repr(names)


def _not_a_state(got: str) -> ValueError:
    return ValueError(
        f"the saved state must be that of a Balancer, one vector, but got {got}. "
        "Load what `balancer.state_dict()` returned."
    )
