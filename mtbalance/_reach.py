"""Which tasks have reached which parameters, and so what is shared."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from mtbalance._explanation import Explanation, explanation_of
from mtbalance._graphs import reach_of
from mtbalance._split import Known, LoadedSplit, split_of
from mtbalance._task_gradients import TaskGradients


class ReachLog:
    """Remembers which tasks have reached which parameters, and divides them accordingly.

    Args:
        tasks: All tasks.
        groups: The shared parameters of each group, by name; None: what two or more tasks reach.
    """

    def __init__(self, tasks: tuple[str, ...], groups: dict[str, dict[str, Tensor]] | None) -> None:
        self._tasks = tasks
        self._groups = groups
        self._reached: list[tuple[Tensor, set[str]]] = []
        self._orders: dict[str, list[Tensor]] = {}  # what each has reached, in order
        self._loaded = LoadedSplit()
        self._seen: set[frozenset[str]] = set()
        self._unreached_told = False
        self._index()

    def _index(self) -> None:
        """Make what goes by identity, which copying changes."""
        self._by_id = {id(leaf): tasks for leaf, tasks in self._reached}
        self._ids = {task: set(map(id, leaves)) for task, leaves in self._orders.items()}
        self._group_of = {
            id(parameter): number
            for number, parameters in enumerate((self._groups or {}).values())
            for parameter in parameters.values()
        }

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_by_id", "_ids", "_group_of")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._orders, self._loaded = {}, LoadedSplit()  # pickled before there were any
        self.__dict__.update(state)
        self._index()

    def parameters(self) -> list[Tensor]:
        """Return every parameter that some loss has reached."""
        return [leaf for leaf, _ in self._reached]

    def note_graphs(self, losses: Mapping[str, Tensor]) -> None:
        """Look at the graphs of a set of tasks that has not been seen together before."""
        if frozenset(losses) in self._seen:
            return
        reached = {task: reach_of([loss]).leaves for task, loss in losses.items()}
        self.check(reached)
        self.note(reached)

    def check(self, reached: Mapping[str, Sequence[Tensor]]) -> None:
        """Raise unless each task reaches a shared parameter."""
        for task, leaves in reached.items():
            self._check_reaches_shared(task, leaves)

    def note(self, reached: Mapping[str, Sequence[Tensor]]) -> None:
        """Note what tasks reach, on any rank: what is shared must be the same on all."""
        for task, leaves in reached.items():
            self._note(task, leaves)
        self._seen.add(frozenset(reached))
        self._tell_unreached()

    def note_gradients(self, gradients: TaskGradients, *, check: bool = False) -> None:
        """Note what the gradients of a step reach.

        Args:
            gradients: The gradients.
            check: Whether to raise if a task's reach no shared parameter (where graphs do not
                tell).
        """
        for task in gradients.losses:
            leaves = gradients.leaves_of(task)
            if check:
                self._check_reaches_shared(task, leaves)
            self._note(task, leaves)

    def _check_reaches_shared(self, task: str, leaves: Sequence[Tensor]) -> None:
        if self._groups is not None and not any(id(leaf) in self._group_of for leaf in leaves):
            raise ValueError(
                f"the loss of task {task!r} must reach a shared parameter, but reaches none. Does "
                "it come from the modules given as `shared`, as they were when the Balancer was "
                "made?"
            )

    def _note(self, task: str, leaves: Iterable[Tensor]) -> None:
        known = self._ids.setdefault(task, set())
        # Other leaves (an input that requires a gradient) are new tensors in every step.
        new = [
            leaf
            for leaf in leaves
            if id(leaf) not in known
            and (isinstance(leaf, nn.Parameter) or id(leaf) in self._group_of)
        ]
        for leaf, tasks in self._loaded.find(task, new):
            self._mark(leaf, tasks)
        for leaf in new:
            self._mark(leaf, {task})
        known.update(map(id, new))
        self._orders.setdefault(task, []).extend(new)

    def _mark(self, leaf: Tensor, tasks: set[str]) -> None:
        if id(leaf) in self._by_id:
            self._by_id[id(leaf)] |= tasks
        else:
            self._by_id[id(leaf)] = tasks
            self._reached.append((leaf, tasks))

    def split(self) -> list[Known] | None:
        """Return what is to be saved of an inferred split; None where it is given."""
        if self._groups is not None:
            return None
        return split_of(self._reached, self._orders, self._loaded)

    def load(self, split: Sequence[Known] | None) -> None:
        """Go on with an inferred split; None where none was saved."""
        if split is None or self._groups is not None:
            return
        self._reached, self._orders, self._loaded = [], {}, LoadedSplit(split)
        self._seen = set()
        self._index()

    def _tell_unreached(self) -> None:
        """Warn once, when every task has been seen, of shared parameters that none reaches."""
        if self._unreached_told or set().union(*self._seen) != set(self._tasks):
            return
        self._unreached_told = True
        unreached = [
            name
            for parameters in (self._groups or {}).values()
            for name, parameter in parameters.items()
            if parameter.requires_grad and id(parameter) not in self._by_id
        ]
        if unreached:
            shown = ", ".join(map(repr, unreached[:3])) + (", ..." if len(unreached) > 3 else "")
            warnings.warn(
                f"no loss reaches {len(unreached)} of the parameters given as `shared` ({shown}). "
                "They get no gradient; balancer.explain() lists all.",
                UserWarning,
                stacklevel=4,
            )

    def divide(self, leaves: Iterable[Tensor]) -> tuple[dict[int, list[Tensor]], list[Tensor]]:
        """Return the shared ones of these leaves by the number of their group, and all others."""
        found = {id(leaf): leaf for leaf in leaves}
        if self._groups is None:
            # What two tasks have reached. In the order given, like everything else.
            shared = [f for key, f in found.items() if len(self._by_id.get(key, ())) > 1]
            groups = {0: shared}
        else:
            # In the order given to the Balancer, which the graphs of a step cannot change.
            groups = {
                number: [p for p in parameters.values() if id(p) in found]
                for number, parameters in enumerate(self._groups.values())
            }
        balanced = {id(leaf) for group in groups.values() for leaf in group}
        rest = [leaf for key, leaf in found.items() if key not in balanced]
        return {number: group for number, group in groups.items() if group}, rest

    def check_inferred(
        self, gradients: TaskGradients, groups: Mapping[int, Sequence[Tensor]]
    ) -> None:
        """Raise if what is shared was inferred, and some task has no part in it."""
        if self._groups is not None or len(self._tasks) == 1:
            return
        if set(gradients.losses) != set(self._tasks):
            return
        shared = list(groups.get(0, ()))
        for task, row in zip(
            gradients.losses, gradients.rows(list(gradients.losses), shared), strict=True
        ):
            if all(gradient is None for gradient in row):
                raise ValueError(
                    f"the loss of task {task!r} must reach a shared parameter, but shares none "
                    "with the other tasks. Name the shared modules with `shared=`."
                )

    def explain(self, model: nn.Module | None = None) -> Explanation:
        """Sort every known parameter, and those of ``model``, by its use."""
        return explanation_of(self._tasks, self._groups, self._reached, model)
