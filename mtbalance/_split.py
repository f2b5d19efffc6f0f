"""Which parameters tasks have reached, in words that hold in another process, too.

A parameter is known by a task that reaches it: by its name in the modules that hold it, its shape,
and, among those for which both are equal (tensors that no module holds), by its turn in the order
of the task's graph and by how many there are. Where that number differs, nothing is guessed.
"""

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from mtbalance._names import names_in_models

Known = dict[str, str]
"""By what each task that has reached a parameter knows it."""


def known_as(parameters: Sequence[Tensor]) -> list[str]:
    """Return by what a task knows the parameters that it reaches, in the order of its graph."""
    names = names_in_models(parameters)
    kinds = [f"{names.get(id(p), 'a parameter')} {tuple(p.shape)}" for p in parameters]
    total, turn = Counter(kinds), Counter[str]()
    found = []
    for kind in kinds:
        turn[kind] += 1
        found.append(f"{kind}, {turn[kind]} of {total[kind]}")
    return found


def split_of(
    reached: Sequence[tuple[Tensor, set[str]]],
    orders: Mapping[str, Sequence[Tensor]],
    loaded: "LoadedSplit",
) -> list[Known]:
    """Return what is to be saved.

    Args:
        reached: Every parameter with the tasks that have reached it.
        orders: What each task has reached since the start or the last loading.
        loaded: What has been loaded.
    """
    before = loaded.known()
    found: dict[int, Known] = {id(leaf): dict(before.get(id(leaf), {})) for leaf, _ in reached}
    for task, parameters in orders.items():
        for parameter, name in zip(parameters, known_as(parameters), strict=True):
            found[id(parameter)][task] = name
    return [*found.values(), *loaded.missing()]


class LoadedSplit:
    """What a saved state knows of parameters, each of which is found when a task reaches it.

    Args:
        split: What has been saved.
    """

    def __init__(self, split: Sequence[Known] = ()) -> None:
        self._split = list(split)
        self._found: list[Tensor | None] = [None] * len(self._split)
        self._waiting = {task for known in self._split for task in known}

    def find(self, task: str, parameters: Sequence[Tensor]) -> Iterator[tuple[Tensor, set[str]]]:
        """Yield the parameters that are found, with the tasks that have reached them.

        Args:
            task: A task; only its first time counts.
            parameters: What it reaches, in the order of its graph.
        """
        if task not in self._waiting:
            return
        self._waiting.discard(task)
        numbers = {known[task]: i for i, known in enumerate(self._split) if task in known}
        strangers = set()
        matched = 0
        for parameter, name in zip(parameters, known_as(parameters), strict=True):
            number = numbers.get(name)
            if number is not None and (
                self._found[number] is None or self._found[number] is parameter
            ):
                del numbers[name]
                matched += 1
                self._found[number] = parameter
                yield parameter, set(self._split[number])
            else:
                strangers.add(_kind(name))
        if numbers and (not matched or strangers & set(map(_kind, numbers))):
            warnings.warn(
                f"{len(numbers)} of the parameters that the loss of task {task!r} reached before "
                "the state was saved cannot be told from others: whether they are shared is "
                "inferred anew. Name the shared modules with `shared=`, and nothing depends on it.",
                UserWarning,
                stacklevel=2,
            )

    def known(self) -> dict[int, Known]:
        """Return by what tasks knew those that have been found, by their identity."""
        pairs = zip(self._split, self._found, strict=True)
        return {id(found): known for known, found in pairs if found is not None}

    def found(self) -> dict[int, Tensor]:
        """Return those that have been found, by their place in the split."""
        return {n: found for n, found in enumerate(self._found) if found is not None}

    def not_found(self) -> list[int]:
        """Return the places of the others."""
        return [n for n, found in enumerate(self._found) if found is None]

    def missing(self) -> list[Known]:
        """Return what has not been found, for the next state."""
        return [self._split[number] for number in self.not_found()]


def _kind(name: str) -> str:
    return name.rpartition(", ")[0]
