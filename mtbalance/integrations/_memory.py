"""What modules of others remember, as a copy and as bytes."""

import io
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

Memory = list[dict[str, Any]]
"""The attributes of each module, those left out that every module has."""

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_ROOM = 2**12
"""Saved states have a multiple of this many bytes."""


def memory_of(modules: Iterable[nn.Module]) -> Memory:
    """Return a copy of what modules remember."""
    return [
        {
            name: _copied(value)
            for name, value in {**vars(module), **module._buffers}.items()
            if name not in _OF_EVERY_MODULE
        }
        for module in modules
    ]


def remember(modules: Iterable[nn.Module], memory: Memory) -> None:
    """Let modules remember what they did before."""
    for module, values in zip(modules, memory, strict=True):
        for name, value in values.items():
            setattr(module, name, _copied(value))


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    return value.copy() if _is_array(value) else value


def _is_array(value: object) -> bool:
    return (type(value).__module__, type(value).__name__) == ("numpy", "ndarray")


def packed(memories: list[Memory]) -> Tensor:
    """Return memories as bytes, after their number; what is no number is left out."""
    plain = [
        [{name: p for name, value in m.items() if (p := _plain(value))} for m in memory]
        for memory in memories
    ]
    file = io.BytesIO()
    torch.save(plain, file)
    content = file.getvalue()
    text = len(content).to_bytes(8, "little") + content
    text = text.ljust(-(-len(text) // _ROOM) * _ROOM, b" ")
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def unpacked(state: object) -> list[Memory]:
    """Return the memories in what :func:`packed` returned, or raise ValueError."""
    try:
        text = bytes(state.tolist())  # type: ignore[attr-defined]
        content = text[8 : 8 + int.from_bytes(text[:8], "little")]
        plain = torch.load(io.BytesIO(content), weights_only=True)
    except Exception:  # noqa: BLE001
        raise ValueError(
            "the saved state must be that of an aggregator of TorchJD, but is something else. Load "
            "what `state_dict()` returned."
        ) from None
    return [
        [{name: _restored(value) for name, value in m.items()} for m in memory] for memory in plain
    ]


def _plain(value: Any) -> tuple[Any, ...] | None:
    """Return a value as what every loader of tensors takes, or None."""
    if value is None or isinstance(value, bool | int | float | str):
        return "as it is", value
    if isinstance(value, Tensor):
        return "tensor", value.cpu(), str(value.device)
    if _is_array(value):
        return "array", torch.from_numpy(value)
    if isinstance(value, torch.dtype | torch.device):
        return type(value).__name__, str(value).removeprefix("torch.")
    if isinstance(value, tuple) and all(_plain(each) for each in value):
        return "tuple", [_plain(each) for each in value]
    return None


def _restored(plain: tuple[Any, ...]) -> Any:
    kind, value, *rest = plain
    if kind == "tensor":
        gone = torch.device(rest[0]).type == "cuda" and not torch.cuda.is_available()
        return value if gone else value.to(rest[0])
    if kind == "tuple":
        return tuple(_restored(each) for each in value)
    if kind == "dtype":
        return getattr(torch, value)
    if kind == "device":
        return torch.device(value)
    return value.numpy() if kind == "array" else value
