"""The properties of every strategy that the library exports, found by trial, as Markdown."""

import inspect
import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import mtbalance.gradient
import mtbalance.weighting
from mtbalance import Balancer
from mtbalance._optimizers import each_optimizer
from mtbalance.gradient import GradientStrategy, Sum, UPGrad
from mtbalance.weighting import Equal, Weighting

from ._check import properties_of, trials
from ._check_weighting import traits_of
from ._claims import Claim
from ._matrices import matrix
from ._step import take_step
from ._violation import bits, is_of_rows
from ._weighting import PARAMETERS, TASKS, Trait, optimizer_of_a_point, train

_GRADIENT_COLUMNS = {
    "never in conflict": Claim.NO_CONFLICT_LEFT,
    "scale-free": Claim.SCALE_FREE,
    "order-free": Claim.ORDER_FREE,
    "linear": Claim.LINEAR_IN_SCALES,
    "sum without conflict": Claim.SUM_WITHOUT_CONFLICT,
    "zero rows ignored": Claim.IGNORES_ZERO_ROWS,
}
_WEIGHTING_COLUMNS = {
    "sums to m": Trait.SUMS_TO_M,
    "positive": Trait.POSITIVE,
    "linear": Trait.LINEAR,
    "starts equal": Trait.STARTS_EQUAL,
    "by gradient": Trait.LEARNS_BY_GRADIENT,
}
_COLUMNS_OF_COST = ("deterministic", "state", "passes", "memory")


_REQUIRED: dict[str, Callable[[int], object]] = {
    "alpha": lambda _: 0.5,
    "byzantine": lambda _: 0,
    "epochs": lambda _: 2,
    "optimizer": lambda _: optimizer_of_a_point(),
    "primary": lambda _: 0,
    "strategy": lambda _: UPGrad(),
    "trim": lambda _: 1,
    "weighting": lambda _: Equal(),
    "weights": lambda m: [2.0**i for i in range(m)],
}
"""What options that have no default are in the tables, for m tasks called "0", "1" and so on."""

_FAST = {"lr": 0.3, "beta": 0.9}
"""What learns or remembers shall go far within a trial."""


def _maker(kind: type, m: int) -> Callable[[], Any]:
    """Return what makes a strategy of this class for m tasks, with its defaults."""
    parameters = inspect.signature(kind).parameters.values()
    needed = [p.name for p in parameters if p.default is p.empty and p.name not in _FAST]
    unknown = sorted(set(needed) - set(_REQUIRED))
    if unknown:
        raise TypeError(f"{kind.__name__} needs {unknown}: say in `_REQUIRED` what they are here.")
    fast = {each.name: _FAST[each.name] for each in parameters if each.name in _FAST}
    return lambda: kind(**{**{name: _REQUIRED[name](m) for name in needed}, **fast})


def _exported(module: ModuleType, base: type) -> list[type]:
    """Return the strategies of a family that can be made."""
    kinds = (getattr(module, name) for name in module.__all__)
    return sorted(
        (
            kind
            for kind in kinds
            if inspect.isclass(kind) and issubclass(kind, base) and not inspect.isabstract(kind)
        ),
        key=lambda kind: kind.__name__.lower(),
    )


def gradient_table(seeds: Iterable[int] = range(3)) -> str:
    """Return what was found of the gradient strategies, a Markdown table."""
    given, rows = tuple(seeds), []
    for kind in _exported(mtbalance.gradient, GradientStrategy):
        make = _maker(kind, TASKS)
        determined, state = _state_of_gradient(make)
        found = properties_of(make, seeds=given)
        if "per" in state:  # what is remembered may count in a later step
            found &= properties_of(make, seeds=given, steps=1)
            found &= properties_of(make, seeds=given, steps=2)
        cells = [_mark(claim in found) for claim in _GRADIENT_COLUMNS.values()]
        cost = _cost(partial(_with_gradient, kind))
        rows.append([f"`{kind.__name__}`", *cells, determined, state, *cost])
    return _markdown(["gradient", *_GRADIENT_COLUMNS, *_COLUMNS_OF_COST], rows)


def weighting_table(seeds: Iterable[int] = range(3)) -> str:
    """Return what was found of the weightings, a Markdown table."""
    given, rows = tuple(seeds), []
    for kind in _exported(mtbalance.weighting, Weighting):
        found = traits_of(_maker(kind, TASKS), seeds=given)
        cells = [_mark(trait in found) for trait in _WEIGHTING_COLUMNS.values()]
        cost = _cost(partial(_with_weighting, kind))
        rows.append([f"`{kind.__name__}`", *cells, *_state_of_weighting(kind), *cost])
    return _markdown(["weighting", *_WEIGHTING_COLUMNS, *_COLUMNS_OF_COST], rows)


def _with_gradient(kind: type, m: int) -> Balancer:
    return Balancer(Equal(), _maker(kind, m)(), tasks=_names(m))


def _with_weighting(kind: type, m: int) -> Balancer:
    return Balancer(_maker(kind, m)(), Sum(), tasks=_names(m))


def _names(m: int) -> list[str]:
    return [str(i) for i in range(m)]


def _mark(found: bool) -> str:  # noqa: FBT001
    return "yes" if found else "–"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _is_stream(name: str) -> bool:
    """Whether an entry of a state is a stream of random numbers."""
    return name.endswith("_extra_state")


def _size(module: nn.Module) -> int:
    """Return how many numbers a module remembers, streams of random ones aside."""
    state = module.state_dict().items()
    return sum(value.numel() for name, value in state if not _is_stream(name))


def _reseed(module: nn.Module) -> None:
    """Let the random numbers of a module start elsewhere."""
    for each in module.modules():
        generator = getattr(each, "generator", None)
        if isinstance(generator, torch.Generator):
            generator.manual_seed(2**20 + 1)


def _state_of_gradient(make: Callable[[], GradientStrategy]) -> tuple[str, str]:
    """Return whether a strategy draws nothing that counts, and what it remembers."""
    sizes, answers = [], []
    for p, elsewhere in ((8, False), (16, False), (16, True)):
        strategy = make()
        if elsewhere:
            _reseed(strategy)
        with trials():
            directions = [strategy(matrix("conflicting", TASKS, p, seed)) for seed in range(9)]
        answers.append([bits(direction) for direction in directions])
        sizes.append(_size(strategy))
    draws = answers[1] != answers[2]
    per_parameter = (sizes[1] - sizes[0]) / 8
    return _mark(not draws), _kinds_of_state(draws, per_parameter, sizes[0] - 8 * per_parameter)


def _state_of_weighting(kind: type) -> tuple[str, str]:
    """Return whether a weighting draws nothing that counts, and what it remembers."""
    weighting, other = _maker(kind, TASKS)(), _maker(kind, TASKS)()
    _reseed(other)
    with trials():
        draws = train(weighting, 4) != train(other, 4)
    state = weighting.state_dict().items()
    of_rows = sum(value.numel() for name, value in state if is_of_rows(name))
    size = _size(weighting) - of_rows
    return _mark(not draws), _kinds_of_state(draws, of_rows / PARAMETERS, size)


def _kinds_of_state(draws: bool, per_parameter: float, rest: float) -> str:  # noqa: FBT001
    """Return in words what is remembered, of which ``rest`` numbers whatever the parameters."""
    words = [
        f"{_multiple(per_parameter)} per parameter" if per_parameter else "",
        f"{rest / TASKS:g} per task" if rest and rest % TASKS == 0 else "",
        f"{rest:g} numbers" if rest and rest % TASKS else "",
        "random stream" if draws else "",
    ]
    return ", ".join(word for word in words if word) or "–"


def _multiple(count: float) -> str:
    return "m" if count == TASKS else f"{count:g}"


def _cost(make: Callable[[int], Balancer]) -> tuple[str, str]:
    """Return backward passes through the shared part, and gradients of it held, for m tasks."""
    few, many = _used(make, 3), _used(make, 5)
    return _formula(few[0], many[0]), _formula(few[1], many[1])


def _formula(at_three: float, at_five: float) -> str:
    """Return the linear function of m that has these values at 3 and 5."""
    slope = (at_five - at_three) / 2
    rest = at_three - 3 * slope
    if slope == 0:
        return f"{rest:g}"
    times = "m" if slope == 1 else f"{slope:g} m"
    return times if rest == 0 else f"{times} {'+' if rest > 0 else '-'} {abs(rest):g}"


def _used(make: Callable[[int], Balancer], m: int) -> tuple[float, float]:
    """Count the passes of the third step, and the gradients of the shared part there at once."""
    with torch.device("cpu"):
        balancer = make(m)
        shared = nn.Parameter(torch.tensor([1.0, -1.0]))
        for each in each_optimizer(getattr(balancer.weighting, "optimizer", None)):
            each.param_groups[0]["params"] = [shared]
        rows = _Rows(shared)

        def losses() -> dict[str, Tensor]:
            gradients = matrix("conflicting", m, 2, 3, dtype=torch.float32)
            return {str(i): (row @ shared - 9).square() for i, row in enumerate(gradients)}

        for _ in range(3):
            shared.grad = None
            rows.clear()
            with trials():
                take_step(balancer, losses)
    return rows.passes, rows.most


class _Rows:
    """Counts the gradients of a parameter that arrive, and those that are there at one time."""

    def __init__(self, shared: nn.Parameter) -> None:
        self.shared = shared
        self.clear()
        shared.register_hook(self.see)  # type: ignore[no-untyped-call]

    def clear(self) -> None:
        self.passes = self.most = 0
        self._alive: list[weakref.ref[Tensor]] = []

    def see(self, gradient: Tensor) -> None:
        self.passes += 1
        self._alive = [each for each in self._alive if each() is not None]
        self._alive.append(weakref.ref(gradient))
        self.most = max(self.most, len(self._alive))
