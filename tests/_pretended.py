"""A device that is not there: tensors on it compute on the CPU, and every wait of the host counts.

On a GPU, the host runs ahead of the device until it asks for a number (``item``, ``tolist``, ``if``
on a tensor, ``nonzero``) or copies between the two from memory that is not pinned: then it waits
until all that was asked of the device is done. Here the same operations are counted as they pass
PyTorch's dispatcher, with their results as they are, so that whatever depends on the numbers (a
look for NaN, a solver) takes the way that it takes on a GPU.

The device is called ``lazy`` as autograd and all of PyTorch know that name, and no ordinary build
computes there.
"""

import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from typing_extensions import Self

DEVICE = torch.device("lazy:0")
LIBRARY = str(Path(__file__).parents[1] / "mtbalance")
READS = {
    "_local_scalar_dense",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "_linalg_check_errors",
    "_linalg_eigh",
    "_linalg_svd",
    "_unique2",
    "unique_dim",
}
"""Operations that tell the host something of the numbers, or need to know it."""


class _Elsewhere(Tensor):
    """A tensor that says that it is on the device; its numbers are ``here``."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> Self:
        made = Tensor._make_wrapper_subclass(
            cls,
            here.shape,
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device=DEVICE,
        )
        made.here = here
        return made

    def __repr__(self) -> str:
        return f"elsewhere({self.here})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _computed(function, args, kwargs)[0]


class _Making(TorchFunctionMode):
    """Sends Python's numbers over in a tensor, and fetches them in one, as PyTorch does inside."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is Tensor.tolist:
            return function(args[0].cpu())
        if function is Tensor.__getitem__:
            tensor, index = args
            parts = index if isinstance(index, tuple) else (index,)
            args = tensor, tuple(torch.tensor(p) if isinstance(p, list) else p for p in parts)
        if function is Tensor.new_tensor:
            like, numbers = args
            kwargs = {"dtype": like.dtype, "device": like.device} | kwargs
            function, args = torch.tensor, (numbers,)
        if function in (torch.tensor, torch.as_tensor) and kwargs.get("device") == DEVICE:
            return function(*args, **kwargs | {"device": "cpu"}).to(DEVICE)
        return function(*args, **kwargs)


class Pretended(TorchDispatchMode):
    """While it is on, ``DEVICE`` can be computed on.

    Attributes:
        waits: Where the host has waited for the device, as file:line of the library, innermost
            first. To count those of a step, clear it before.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self._making = _Making()

    def __enter__(self) -> Self:
        self._making.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._making.__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found, waits = _computed(function, args, kwargs)
        if waits:
            self.waits.append(_place())
        return found


def _computed(function: Any, args: Sequence[Any], kwargs: Any) -> tuple[Any, bool]:
    """Return what an operation gives, where it gives it, and whether the host waits for it."""
    kwargs = dict(kwargs or {})
    name = function.overloadpacket.__name__
    wanted = kwargs.get("device")
    there = torch.device(wanted) == DEVICE if wanted is not None else _any_there((args, kwargs))
    waits = _waits(name, args, kwargs, there=there)
    if wanted is not None and there:
        kwargs["device"] = torch.device("cpu")
    here_args, here = tree_map_only(_Elsewhere, lambda t: t.here, (args, kwargs))
    found = function(*here_args, **here)
    if function._schema.is_mutable:  # what it writes to keeps its place
        return (args[0] if isinstance(found, Tensor) else found), waits
    if there:
        found = tree_map_only(Tensor, _Elsewhere, found)
    return found, waits


def _waits(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], *, there: bool) -> bool:
    """Return whether the host waits for an operation whose result is on the device, or not."""
    if name == "_to_copy":
        # What is to go over is copied once more before the host goes on, if it does not wait.
        goes_over = there and kwargs.get("non_blocking", False)
        return isinstance(args[0], _Elsewhere) != there and not goes_over
    if name == "copy_":
        return isinstance(args[0], _Elsewhere) != isinstance(args[1], _Elsewhere)
    if not there:
        return False
    if name == "where":  # brings a scalar that is a tensor over there
        return not all(isinstance(each, _Elsewhere) for each in args)
    if name in ("index", "index_put_"):
        indices = [each for each in args[1] if each is not None]
        masks = any(each.dtype in (torch.bool, torch.uint8) for each in indices)
        return masks or not all(isinstance(each, _Elsewhere) for each in indices)
    return name in READS


def _any_there(values: Any) -> bool:
    return any(isinstance(each, _Elsewhere) for each in tree_leaves(values))


def _place() -> str:
    frames = [f for f in traceback.extract_stack() if f.filename.startswith(LIBRARY)]
    return " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(frames[-3:]))
