"""Argument checks, one wording: "`name` must be RULE, but got VALUE." plus the remedy."""

import difflib
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn


def check_at_least(name: str, value: float, bound: float) -> float:
    """Return ``value`` as a float if it is a finite number of at least ``bound``."""
    if not (math.isfinite(value) and value >= bound):
        raise ValueError(f"`{name}` must be at least {bound}, but got {value}.")
    return float(value)


def check_positive(name: str, value: float) -> float:
    """Return ``value`` as a float if it is a finite number above zero."""
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"`{name}` must be positive, but got {value}.")
    return float(value)


def check_finite(name: str, value: float) -> float:
    """Return ``value`` as a float if it is a finite number."""
    if not math.isfinite(value):
        raise ValueError(f"`{name}` must be finite, but got {value}.")
    return float(value)


def check_below_one(name: str, value: float, otherwise: str) -> float:
    """Return ``value`` as a float if it is at least 0 and below 1, where something stands still."""
    check_at_least(name, value, 0)
    if value >= 1:
        raise ValueError(f"`{name}` must be below 1, but got {value}: {otherwise}.")
    return float(value)


def check_fraction(name: str, value: float) -> float:
    """Return ``value`` as a float if it lies between 0 and 1, both included."""
    if not 0 <= value <= 1:
        raise ValueError(f"`{name}` must be between 0 and 1, but got {value}.")
    return float(value)


def check_numbers(
    name: str,
    numbers: Mapping[str, float] | Sequence[float],
    check: Callable[[str, float], float],
) -> dict[str, float] | list[float]:
    """Return a copy of numbers, by task name or in the order of the tasks, that pass a check."""
    if isinstance(numbers, Mapping):
        return {str(task): check(f"{name}[{task!r}]", each) for task, each in numbers.items()}
    if not isinstance(numbers, Sequence):
        raise TypeError(
            f"`{name}` must map task names to numbers, or be a sequence of numbers in the order "
            f"of the tasks, but got {type(numbers).__name__}."
        )
    return [check(f"{name}[{i}]", each) for i, each in enumerate(numbers)]


def numbers_in_order(
    name: str, numbers: Mapping[str, float] | Sequence[float], tasks: Sequence[str]
) -> list[float]:
    """Return numbers, by task name or in order, in the order of the tasks, if each has one."""
    if isinstance(numbers, Mapping):
        if set(numbers) != set(tasks):
            raise ValueError(
                f"`{name}` must have one number for each task ({', '.join(map(repr, tasks))}), "
                f"but has {', '.join(map(repr, numbers))}."
            )
        return [numbers[task] for task in tasks]
    if len(numbers) != len(tasks):
        raise ValueError(
            f"`{name}` must have one number for each of {len(tasks)} tasks, but has {len(numbers)}."
        )
    return list(numbers)


def check_preference(
    preference: Mapping[str, float] | Sequence[float] | None,
) -> dict[str, float] | list[float] | None:
    """Return a copy of preferences if they are finite numbers above zero, by name or in order."""
    return None if preference is None else check_numbers("preference", preference, check_positive)


def check_primary(primary: object) -> str | int | None:
    """Return a primary task if it is a name, a number of at least 0, or None."""
    if primary is None or (isinstance(primary, str) and primary):
        return primary
    if isinstance(primary, bool) or not isinstance(primary, int):
        raise TypeError(
            "`primary` must be one task's name, or its number in the order of the tasks, but got "
            f"{primary!r}."
        )
    return check_count("primary", primary, 0)


def check_named_primary(primary: object, remedy: str) -> None:
    """Raise if a strategy that is nothing without a primary task was given None."""
    if primary is None:
        raise TypeError(
            "`primary` must be one task's name, or its number in the order of the tasks, but got "
            f"None. {remedy}"
        )


def number_of_task(name: str, task: str | int, tasks: Sequence[str]) -> int:
    """Return the number of a task, given by name or by number, among the tasks."""
    if isinstance(task, str):
        if task not in tasks:
            raise ValueError(
                f"`{name}` must be one of the tasks {', '.join(map(repr, tasks))}, "
                f"but got {task!r}.{nearest(task, tasks)}"
            )
        return list(tasks).index(task)
    if task >= len(tasks):
        raise ValueError(
            f"`{name}` must be below the number of tasks, {len(tasks)}, but got {task}."
        )
    return task


def check_choice(name: str, value: object, choices: Iterable[object]) -> None:
    """Raise unless ``value`` is one of ``choices``."""
    choices = list(choices)
    if value not in choices:
        known = ", ".join(map(repr, choices))
        hint = nearest(str(value), [str(choice) for choice in choices])
        raise ValueError(f"`{name}` must be one of {known}, but got {value!r}.{hint}")


def nearest(word: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the known word nearest to ``word``, or nothing."""
    match = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {match[0]!r}?" if match else ""


def check_gradients(gradients: Tensor) -> None:
    """Raise unless ``gradients`` is a real floating-point matrix of at least one row."""
    _check_stacked("gradients", gradients, ndim=2, shape="(m, p)", what="rows", each="row")


def check_losses(losses: Tensor) -> None:
    """Raise unless ``losses`` is a real floating-point vector with at least one entry."""
    _check_stacked("losses", losses, ndim=1, shape="(m,)", what="losses", each="loss")


def _check_stacked(
    name: str, stack: Tensor, *, ndim: int, shape: str, what: str, each: str
) -> None:
    if not isinstance(stack, Tensor):
        raise TypeError(
            f"`{name}` must be a tensor of shape {shape}, one {each} per task, but got "
            f"{type(stack).__name__}. Stack the {what} with torch.stack."
        )
    if stack.ndim != ndim or len(stack) == 0:
        raise ValueError(
            f"`{name}` must have shape {shape} with one {each} per task and m at least 1, "
            f"but got shape {tuple(stack.shape)}."
        )
    if not stack.is_floating_point():
        raise TypeError(f"`{name}` must be real and floating-point, but got {stack.dtype}.")


def check_gramian(gramian: Tensor) -> None:
    """Raise unless ``gramian`` is a square matrix of at least one row."""
    if gramian.ndim != 2 or gramian.shape[0] != gramian.shape[1] or len(gramian) == 0:
        raise ValueError(
            "`gramian` must have shape (m, m) with m at least 1, "
            f"but got shape {tuple(gramian.shape)}."
        )


def check_saved(
    owner: object,
    state: Mapping[str, object],
    *,
    counts: Sequence[str] = (),
    finite: Sequence[str] = (),
    numbers: Sequence[str] = (),
) -> None:
    """Raise if what was saved of a strategy is nothing to go on with.

    Args:
        owner: The strategy.
        state: What was saved of it, by name.
        counts: Names of what must be at least 0.
        finite: Names of what must be finite.
        numbers: Names of what must not be NaN.
    """
    rules: tuple[tuple[Sequence[str], str, Callable[[Tensor], Tensor]], ...] = (
        (counts, "at least 0", lambda value: value >= 0),
        (finite, "finite", torch.isfinite),
        (numbers, "numbers", lambda value: ~torch.isnan(value)),
    )
    for names, rule, holds in rules:
        for name in names:
            value = state.get(name)
            if isinstance(value, Tensor) and not bool(holds(value).all()):
                raise ValueError(
                    f"the saved state of {type(owner).__name__} must have `{name}` {rule}, but got "
                    f"{value.tolist()}. It was damaged, or saved after a step that went wrong."
                )


def check_kind(name: str, value: object, kind: type) -> None:
    """Raise unless ``value`` is an instance of ``kind``."""
    if not isinstance(value, kind):
        got = f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
        remedy = _remedy(name, value, kind)
        raise TypeError(f"`{name}` must be a {kind.__name__}, but got {got}.{remedy}")


def _remedy(name: str, value: object, kind: type) -> str:
    """Return what to do with a class, the other family, or another package, or nothing."""
    if isinstance(value, type) and issubclass(value, kind):
        return f" Make one: {value.__name__}(...)."
    kinds = (value if isinstance(value, type) else type(value)).__mro__
    ours = {k.__name__ for k in kinds if k.__module__.startswith("mtbalance.")}
    if name in ("weighting", "gradient") and ours & {"Weighting", "GradientStrategy"}:
        return " The weighting comes first: Balancer(weighting, gradient, ...)."
    names = {k.__name__ for k in kinds if k.__module__.partition(".")[0] == "torchjd"}
    if names & {"Aggregator", "Weighting"}:
        return " Give mtbalance.integrations.torchjd.FromTorchJD(aggregator) as `gradient`."
    return ""


def check_task_names(tasks: Sequence[str]) -> tuple[str, ...]:
    """Return the names as a tuple if they are distinct, non-empty strings."""
    if isinstance(tasks, str):
        raise TypeError(
            f"`tasks` must be a sequence of names, but got the string {tasks!r}. "
            f"For one task, give ({tasks!r},)."
        )
    if isinstance(tasks, set | frozenset):
        raise TypeError(
            "`tasks` must have an order, which is that of the rows, but got a set. Give a tuple."
        )
    names = tuple(tasks)
    for name in names:
        if not isinstance(name, str) or not name:
            raise TypeError(f"`tasks` must hold non-empty strings, but got {name!r}.")
        if name.splitlines() != [name]:
            raise ValueError(f"`tasks` must hold names of one line each, but got {name!r}.")
    if not names:
        raise ValueError("`tasks` must name at least one task, but got none.")
    repeated = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if repeated:
        raise ValueError(f"`tasks` must be distinct, but got {repeated[0]!r} more than once.")
    known: dict[str, tuple[str, str]] = {}
    for pair in itertools.combinations(names, 2) if any("/" in name for name in names) else ():
        other = known.setdefault("/".join(pair), pair)
        if other != pair:
            raise ValueError(
                f"`tasks` must have names whose pairs differ when they are joined by '/', as in "
                f"the figure 'cosine/{'/'.join(pair)}', but got both {other} and {pair}."
            )
    return names


def check_losses_by_task(
    losses: object, tasks: Sequence[str], *, may_be_empty: bool = False, with_graph: bool = True
) -> dict[str, Tensor]:
    """Return the losses in the order of the tasks, if each is named and fit to be balanced."""
    if not isinstance(losses, Mapping):
        raise TypeError(
            f"`losses` must map task names to scalar tensors, but got {type(losses).__name__}. "
            f"For instance {{{tasks[0]!r}: loss}}."
        )
    if not losses and not may_be_empty:
        raise ValueError("`losses` must hold at least one task's loss, but got none.")
    check_known_tasks("losses", losses, tasks)
    named = [name for name in tasks if name in losses]
    return {name: _checked_loss(name, losses[name], with_graph=with_graph) for name in named}


def check_known_tasks(name: str, given: Iterable[object], tasks: Sequence[str]) -> None:
    """Raise unless every name given is one of the tasks."""
    for task in given:
        if task not in tasks:
            raise ValueError(
                f"`{name}` must name tasks among {', '.join(map(repr, tasks))}, "
                f"but got {task!r}.{nearest(str(task), tasks)}"
            )


def _checked_loss(task: str, loss: object, *, with_graph: bool) -> Tensor:
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"the loss of task {task!r} must be a tensor, but got {loss!r}. "
            "Leave a task without labels out of the mapping."
        )
    if loss.numel() != 1:
        raise ValueError(
            f"the loss of task {task!r} must be a scalar, but got shape {tuple(loss.shape)}. "
            "Reduce it first, for instance with .mean()."
        )
    if not loss.is_floating_point():
        raise TypeError(
            f"the loss of task {task!r} must be real and floating-point, but got {loss.dtype}."
        )
    if with_graph and not loss.requires_grad:
        raise ValueError(
            f"the loss of task {task!r} must have a graph, but it does not require a gradient. "
            "Was it detached, computed under torch.no_grad() or torch.inference_mode(), or are all "
            "its parameters frozen? If it stands for missing labels, leave the task out."
        )
    return loss.reshape(()) if loss.ndim else loss


def check_validation(owner: object, validation: object) -> Callable[[], Mapping[str, Tensor]]:
    """Return ``validation`` if it is a function."""
    if not callable(validation):
        got = "None" if validation is None else type(validation).__name__
        raise ValueError(
            "`validation` must be a function without arguments that returns the losses of a "
            f"validation batch, but got {got}. {type(owner).__name__} looks ahead at them: "
            "call backward(losses, validation=function)."
        )
    return validation


class TakesBatches(Protocol):
    """Whatever says how many further batches it needs."""

    further_batches: tuple[int, ...]


def check_batches(owner: TakesBatches, batches: object) -> None:
    """Raise unless ``batches`` are functions, and as many as a gradient strategy needs if any."""
    if isinstance(batches, str | Mapping) or not isinstance(batches, Sequence):
        raise TypeError(
            "`batches` must be a sequence of functions without arguments that return the losses of "
            f"further batches, but got {type(batches).__name__}. For one, give (function,)."
        )
    for number, each in enumerate(batches):
        if not callable(each):
            raise TypeError(
                f"`batches[{number}]` must be a function without arguments that returns the losses "
                f"of a further batch, but got {type(each).__name__}."
            )
    name, wanted = type(owner).__name__, owner.further_batches
    if wanted and len(batches) not in wanted:
        raise ValueError(
            f"`batches` must be {' or '.join(map(str, wanted))} functions with {name}, each of "
            f"which returns the losses of a further, independent batch, but got {len(batches)}. "
            "Call backward(losses, batches=(function,))."
        )


def check_count(name: str, value: int, least: int = 1) -> int:
    """Return ``value`` if it is a whole number of at least 1, or another bound."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` must be a whole number, but got {value!r}.")
    if value < least:
        raise ValueError(f"`{name}` must be at least {least}, but got {value}.")
    return value


def check_row_dtype(dtype: object) -> None:
    """Raise unless ``dtype`` is None or a real floating-point dtype."""
    if dtype is None or (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        return
    raise TypeError(
        f"`dtype` must be None or a real floating-point dtype, but got {dtype!r}. "
        "For instance torch.bfloat16."
    )


def check_process_group(group: object) -> None:
    """Raise unless ``group`` is None or a process group that this process belongs to."""
    if group is None:
        return
    distributed = torch.distributed
    if not distributed.is_available() or not isinstance(group, distributed.ProcessGroup):
        raise TypeError(
            "`process_group` must be None or a torch.distributed.ProcessGroup that holds this "
            f"process, but got {group!r}."
        )


def averages_rows(must: str, got: str, strategy: object) -> ValueError:
    """Return the error of an option that does not go with means of rows over steps."""
    return ValueError(
        f"{must} with {type(strategy).__name__}, but got {got}. It averages the gradients of "
        "parameters over steps, and needs those of each."
    )


def check_generator(generator: object) -> None:
    """Raise unless ``generator`` is None or a generator on the CPU."""
    if generator is None:
        return
    if not isinstance(generator, torch.Generator) or generator.device.type != "cpu":
        raise ValueError(
            "`generator` must be a torch.Generator on the CPU (draws on other devices are seeded "
            f"from it), but got {generator!r}."
        )


class HasFallbacks(Protocol):
    """Whatever counts its fallbacks."""

    fallbacks: int


def fallbacks_of(owner: nn.Module) -> int:
    """Return how often a strategy, and those that it wraps, have fallen back."""
    found = {owner: None}  # those of `modules()`, which takes longer, as it makes their names, too
    stack = [owner]
    while stack:
        held = [m for m in stack.pop()._modules.values() if m is not None and m not in found]
        found.update(dict.fromkeys(held))
        stack += held
    return sum(getattr(module, "fallbacks", 0) for module in found)


def count_fallback(owner: HasFallbacks, reason: str) -> None:
    """Count a fallback of a strategy, and warn of its first."""
    owner.fallbacks += 1
    if owner.fallbacks == 1:
        warnings.warn(
            f"{type(owner).__name__} fell back: {reason}. Further cases are only counted "
            "(`fallbacks` in the record).",
            RuntimeWarning,
            stacklevel=3,
        )
