"""What is raised where a property does not hold, and how numbers are compared."""

import copy
import pickle
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch
from torch import Tensor

_Module = TypeVar("_Module", bound=torch.nn.Module)


class Violation(AssertionError):  # noqa: N818
    """A property does not hold. The message says which, where, and both numbers.

    Args:
        who: The strategy.
        name: The property.
        says: What the property says, in words.
        where: One call that makes the input again.
        proof: What is true of the input, and why.
        found: What was found, and what should have been.
    """

    def __init__(self, who: str, name: str, says: str, where: str, proof: str, found: str) -> None:
        super().__init__(who, name, says, where, proof, found)
        self.who, self.name, self.says = who, name, says
        self.where, self.proof, self.found = where, proof, found

    def __str__(self) -> str:
        proof = "\n    ".join(self.proof.splitlines())
        return (
            f"{self.who} breaks {self.name!r}: {self.says}.\n"
            f"  found: {self.found}\n"
            f"  at:    {self.where}\n"
            f"    {proof}"
        )


class Mismatch(Exception):  # noqa: N818
    """Two numbers that should agree do not; who checks a property adds its name and the input."""


class _Subject(Protocol):
    @property
    def name(self) -> str: ...


class _Property(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def says(self) -> str: ...


class _Sample(Protocol):
    @property
    def proof(self) -> str: ...


@contextmanager
def told_of(subject: _Subject, prop: _Property, sample: _Sample) -> Iterator[None]:
    """Raise what goes wrong inside as a :class:`Violation` of a property by a subject."""

    def violation(found: str) -> Violation:
        where = f"mtbalance.testing.{sample}"
        return Violation(subject.name, prop.name, prop.says, where, sample.proof, found)

    try:
        yield
    except Mismatch as mismatch:
        raise violation(str(mismatch)) from None
    except Exception as error:
        raise violation(f"it raised {type(error).__name__}: {error}") from error


def require(truth: object, found: str) -> None:
    """Raise :class:`Mismatch` with these words unless something is true."""
    if not truth:
        raise Mismatch(found)


def require_close(got: Tensor, expected: Tensor, atol: float, what: str = "entry") -> None:
    """Require that two tensors differ by at most ``atol`` in every entry, and are not NaN."""
    require(
        got.shape == expected.shape,
        f"got shape {tuple(got.shape)}, but expected {tuple(expected.shape)}",
    )
    one, other = got.detach().double().reshape(-1), expected.detach().double().reshape(-1)
    off = (one - other).abs()
    wrong = ~((off <= atol) | (one == other))  # equal infinities are equal; NaN is not close
    if wrong.any():
        i = int(torch.where(wrong, off.nan_to_num(torch.inf), -1.0).argmax())
        raise Mismatch(
            f"{what} {i}: got {float(one[i])!r}, but expected {float(other[i])!r} "
            f"(they differ by {float(off[i]):.3g}, and may by {atol:.3g})"
        )


def require_equal(got: Tensor, expected: Tensor, what: str = "entry", least: float = 0.0) -> None:
    """Require that two tensors agree in shape, dtype and every number, without any rounding.

    But for what is less than ``least``.
    """
    require(got.dtype == expected.dtype, f"got {got.dtype}, but expected {expected.dtype}")
    require_close(got, expected, least, what)


def copies_of(module: _Module) -> dict[str, _Module]:
    """Return copies of a module, by what they are called; pickled where its class can be found."""
    kind = type(module)
    copies = {"copied": copy.deepcopy(module)}
    if getattr(sys.modules.get(kind.__module__), kind.__qualname__, None) is kind:
        copies["pickled"] = pickle.loads(pickle.dumps(module))
    return copies


def bits(tensor: Tensor) -> bytes:
    """Return a tensor's bytes, so that NaN equals NaN and 0 does not equal -0."""
    flat = tensor.detach().reshape(-1).contiguous().view(torch.uint8).cpu()
    return bytes(flat.tolist())


def state_of(module: torch.nn.Module) -> dict[str, bytes]:
    """Return everything that a module remembers."""
    return {name: bits(value) for name, value in module.state_dict().items()}


def is_of_rows(name: str) -> bool:
    """Return whether an entry of a state is of the rows of one task: ``.../<task>/<parameter>``."""
    return name.rpartition(".")[2].count("/") > 1


def entries_of(state: Mapping[str, Tensor], task: int) -> dict[str, Tensor]:
    """Return what a weighting's state holds of the task with a number, by name.

    All but streams of random numbers has one entry per task; rows have a name each, which is
    returned without the number.
    """
    found = {}
    for name, value in state.items():
        if is_of_rows(name):
            group, number, rest = name.split("/", 2)
            if number == str(task):
                found[f"{group}/*/{rest}"] = value
        elif "random" not in name:
            found[name] = value[task]
    return found


def require_same_state(got: torch.nn.Module, expected: dict[str, bytes]) -> None:
    """Require that a module remembers what is given, bit for bit."""
    now = state_of(got)
    changed = sorted(
        name for name in now.keys() | expected.keys() if now.get(name) != expected.get(name)
    )
    if changed:
        value = got.state_dict().get(changed[0])
        raise Mismatch(f"the state {', '.join(changed)} differs; {changed[0]} is now {value}")
