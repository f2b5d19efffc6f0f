"""Which tasks have reached which parameters, and so what is shared."""

import itertools
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import Node

from mtbalance._explanation import Explanation, explanation_of
from mtbalance._graphs import compiled_outputs_of, reach_of
from mtbalance._hidden import hidden_by
from mtbalance._names import names_in_models
from mtbalance._row_state import Place, in_a_key
from mtbalance._shards import refuse_unsharded
from mtbalance._shared import SharedParts
from mtbalance._split import Known, LoadedSplit, split_of
from mtbalance._task_gradients import TaskGradients
from mtbalance.gradient._base import GradientStrategy
from mtbalance.weighting._base import Weighting


class ReachLog:
    """Remembers which tasks have reached which parameters, and divides them accordingly.

    Args:
        tasks: All tasks.
        shared: The shared parameters, in groups; what two or more tasks reach where none are given.
        weighting: The weighting.
        gradient: The gradient strategy.
    """

    def __init__(
        self,
        tasks: tuple[str, ...],
        shared: SharedParts,
        weighting: Weighting,
        gradient: GradientStrategy,
    ) -> None:
        self._tasks = tasks
        self._shared = shared
        self._reached: list[tuple[Tensor, set[str]]] = []
        self._orders: dict[str, list[Tensor]] = {}  # what each has reached, in order
        self._loaded = LoadedSplit()
        self._seen: set[frozenset[str]] = set()
        self._unreached_told = False
        # A plain sum is the same wherever it is made, but some weightings look at what is shared.
        # One that looks ahead takes the step of all parameters.
        looks = weighting.needs_gradients and not weighting.needs_validation
        self._outside_told = self._compiled_told = gradient.is_sum and not looks
        self._index()

    def _index(self) -> None:
        """Make what goes by identity, which copying changes."""
        self._by_id = {id(leaf): tasks for leaf, tasks in self._reached}
        self._ids = {task: set(map(id, leaves)) for task, leaves in self._orders.items()}

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_by_id", "_ids")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._index()

    def renew(self) -> bool:
        """Look whether shared modules hold other parameters than before, and return it."""
        changed = self._shared.renew()
        if changed:  # tasks may reach whatever is there now
            self._reached, self._orders, self._seen = [], {}, set()
            self._index()
        return changed

    def parameters(self) -> list[Tensor]:
        """Return every parameter that some loss has reached."""
        return [leaf for leaf, _ in self._reached]

    def note_graphs(self, losses: Mapping[str, Tensor]) -> None:
        """Look at the graphs of a set of tasks that has not been seen together before."""
        if frozenset(losses) in self._seen:
            return
        reached = {task: reach_of([loss]).leaves for task, loss in losses.items()}
        self.check(reached, losses)
        self.look_for_compiled(losses)
        self.note(reached)

    def note_again(self, losses: Mapping[str, Tensor]) -> None:
        """Look at the graphs of tasks that have been seen together, if that says what is shared."""
        if not self._shared.given:
            for task, loss in losses.items():
                self._note(task, reach_of([loss]).leaves)

    def check(self, reached: Mapping[str, Sequence[Tensor]], losses: Mapping[str, Tensor]) -> None:
        """Raise unless each loss reaches a shared parameter, and none a whole one of FSDP."""
        if frozenset(losses) not in self._seen:
            refuse_unsharded(itertools.chain(*reached.values()), given=self._shared.given)
        for task, leaves in reached.items():
            if not self._is_reached_by(leaves):
                raise self._reaches_none(f"the loss of task {task!r}", [losses[task]], leaves)

    def note(self, reached: Mapping[str, Sequence[Tensor]]) -> None:
        """Note what tasks reach, on any rank: what is shared must be the same on all."""
        self._note_all(reached)
        self._seen.add(frozenset(reached))
        self._tell_unreached()

    def note_gradients(self, gradients: TaskGradients) -> None:
        """Note what the gradients of a step reach."""
        new = [t for t in gradients.losses if not gradients.are_of(t, self._ids.get(t, set()))]
        self._note_all({task: gradients.leaves_of(task) for task in new})

    def _note_all(self, reached: Mapping[str, Sequence[Tensor]]) -> None:
        known = len(self._reached)
        for task, leaves in reached.items():
            self._note(task, leaves)
        if len(self._reached) > known:
            self._tell_outside(self._reached[known:])

    def _all_seen(self) -> bool:
        """Return whether every task has been there in some step."""
        return set().union(*self._seen) == set(self._tasks)

    def _is_reached_by(self, leaves: Iterable[Tensor]) -> bool:
        """Return whether a shared parameter is among the leaves, if any are given."""
        if not self._shared.given:
            return True
        numbers = self._shared.number_of
        return any(id(leaf) in numbers for leaf in leaves)

    def _reaches_none(
        self, who: str, losses: Iterable[Tensor], leaves: Iterable[Tensor]
    ) -> ValueError:
        if self._shared.frozen:
            why = (
                "reaches none: all that are given as `shared` are frozen (requires_grad is False). "
                "Until some are unfrozen there is nothing to balance, and loss.backward() trains "
                "the rest. Where adapters took the place of layers given one by one, give the "
                "module around them."
            )
        else:
            why = hidden_by(losses, leaves) or (
                "reaches none. Do the losses come from the modules given as `shared`? Parameters "
                "given one by one are those of the time when the Balancer was made."
            )
        return ValueError(f"{who} must reach a shared parameter, but {why}")

    def _note(self, task: str, leaves: Iterable[Tensor]) -> None:
        known = self._ids.setdefault(task, set())
        # Other leaves (an input that requires a gradient) are new tensors in every step.
        new = [
            leaf
            for leaf in leaves
            if id(leaf) not in known
            and (isinstance(leaf, nn.Parameter) or id(leaf) in self._shared.number_of)
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
        if self._shared.given:
            return None
        return split_of(self._reached, self._orders, self._loaded)

    def load(self, split: Sequence[Known] | None) -> None:
        """Go on with an inferred split; None where none was saved."""
        if split is None or self._shared.given:
            return
        self._reached, self._orders, self._loaded = [], {}, LoadedSplit(split)
        self._seen = set()
        self._index()

    @property
    def group_names(self) -> tuple[str, ...]:
        """The names that groups have been given, in the order of their numbers; () without any."""
        return self._shared.names

    # --- names for what is remembered of rows -----------------------------------------------------

    @property
    def finds_all(self) -> bool:
        """Whether all shared parameters are known from the start."""
        return self._shared.given

    def knows(self, leaf: Tensor) -> bool:
        """Return whether a parameter is shared, or may be found to be."""
        return id(leaf) in (self._shared.number_of if self._shared.given else self._by_id)

    def found(self) -> dict[Place, Tensor]:
        """Return the shared parameters that are known, by their names in a loaded state.

        Those given go by their names in their group, others by their place in the loaded split.
        """
        if not self._shared.given:
            return {(0, str(n)): leaf for n, leaf in self._loaded.found().items()}
        return {
            (number, in_a_key(name)): parameter
            for number, parameters in enumerate(self._shared.groups.values())
            for name, parameter in parameters.items()
        }

    def saved_as(self) -> dict[int, Place]:
        """Return the names of parameters in a state that is saved now, by their identity."""
        if self._shared.given:
            return {id(parameter): place for place, parameter in self.found().items()}
        return {id(leaf): (0, str(number)) for number, (leaf, _) in enumerate(self._reached)}

    def still_missing(self) -> dict[Place, Place]:
        """Return the places in the loaded split of what has not been found, and those now."""
        start = len(self._reached)
        missing = enumerate(self._loaded.not_found(), start)
        return {(0, str(before)): (0, str(now)) for now, before in missing}

    def _tell_unreached(self) -> None:
        """Warn once, when every task has been seen, of shared parameters that none reaches."""
        if self._unreached_told or not self._all_seen():
            return
        self._unreached_told = True
        unreached = [
            name
            for parameters in self._shared.groups.values()
            for name, parameter in parameters.items()
            if parameter.requires_grad and id(parameter) not in self._by_id
        ]
        if unreached:
            warnings.warn(
                f"no loss reaches {len(unreached)} of the parameters given as `shared` "
                f"({_shown(unreached)}). "
                "They get no gradient; balancer.explain() lists all.",
                UserWarning,
                stacklevel=4,
            )

    def _tell_outside(self, new: Sequence[tuple[Tensor, set[str]]]) -> None:
        """Warn once of parameters that several tasks reach though they were not given.

        A few may be left out on purpose, and are told by ``explain`` alone. More than are shared
        are not, nor are those that come later.

        Args:
            new: What has been reached for the first time, and by which tasks.
        """
        if self._outside_told or not self._shared.given:
            return
        numbers = self._shared.number_of
        outside = [leaf for leaf, by in self._reached if len(by) > 1 and id(leaf) not in numbers]
        inside = [leaf for leaf, _ in self._reached if id(leaf) in numbers]
        late = self._all_seen() and any(len(by) > 1 and id(leaf) not in numbers for leaf, by in new)
        if not late and sum(map(Tensor.numel, outside)) <= sum(map(Tensor.numel, inside)):
            return
        self._outside_told = True
        names = names_in_models(outside)
        shown = _shown([names.get(id(leaf), f"of shape {tuple(leaf.shape)}") for leaf in outside])
        warnings.warn(
            f"several tasks reach parameters that were not given as `shared` ({len(outside)}: "
            f"{shown}). They get the plain sum of weighted gradients, which nothing balances or "
            "looks at; balancer.explain() lists all.",
            UserWarning,
            stacklevel=4,
        )

    def look_for_compiled(self, losses: Mapping[str, Tensor]) -> None:
        """Warn once where graphs do not tell what is shared: inside of a compiled function."""
        if self._compiled_told or frozenset(losses) in self._seen:
            return
        outputs: dict[Node, list[set[int]]] = {}
        for loss in losses.values():
            for node, used in compiled_outputs_of(loss).items():
                outputs.setdefault(node, []).append(used)
        if all(used == by_tasks[0] for by_tasks in outputs.values() for used in by_tasks):
            return
        self._compiled_told = self._outside_told = True
        if self._shared.given:
            return
        warnings.warn(
            "what is shared cannot be inferred inside a compiled model, each of whose outputs "
            "seems to reach all of its parameters: heads in there count as shared. Name the "
            "shared modules with `shared=`.",
            UserWarning,
            stacklevel=4,
        )

    def divide(self, leaves: Iterable[Tensor]) -> tuple[dict[int, list[Tensor]], list[Tensor]]:
        """Return the shared ones of these leaves by the number of their group, and all others."""
        found = {id(leaf): leaf for leaf in leaves}
        if not self._shared.given:
            # What two tasks have reached. In the order given, like everything else.
            shared = [f for key, f in found.items() if len(self._by_id.get(key, ())) > 1]
            groups = {0: shared}
        else:
            # In the order given to the Balancer, which the graphs of a step cannot change.
            groups = {
                number: [p for p in parameters.values() if id(p) in found]
                for number, parameters in enumerate(self._shared.groups.values())
            }
        balanced = {id(leaf) for group in groups.values() for leaf in group}
        rest = [leaf for key, leaf in found.items() if key not in balanced]
        return {number: group for number, group in groups.items() if group}, rest

    def check_reached(self, losses: Mapping[str, Tensor], leaves: Sequence[Tensor]) -> None:
        """Raise if the losses of a step reach, together, no shared parameter that is given."""
        if not self._is_reached_by(leaves):
            who = f"some loss of tasks {', '.join(map(repr, losses))}"
            raise self._reaches_none(who, losses.values(), leaves)

    def check_rows(self, gradients: TaskGradients, groups: Mapping[int, Sequence[Tensor]]) -> None:
        """Raise if some task has no part in what is shared, given or inferred."""
        if not self._shared.given and len(self._tasks) == 1:
            return
        # Where tasks are absent, one may share with these alone, or nobody knows yet with whom.
        sure = self._shared.given or set(gradients.losses) == set(self._tasks)
        for task in gradients.losses:
            if any(gradients.reaches(task, leaves) for leaves in groups.values()):
                continue
            if not sure and not self._has_shared(task):
                continue
            who, reached = f"the loss of task {task!r}", gradients.leaves_of(task)
            if self._shared.given:
                raise self._reaches_none(who, [], reached)
            why = hidden_by([], reached) or (
                "shares none with the other tasks. Name the shared modules with `shared=`; frozen "
                "ones (requires_grad is False) are not reached."
            )
            raise ValueError(f"{who} must reach a shared parameter, but {why}")

    def _has_shared(self, task: str) -> bool:
        """Return whether a task is known to have reached what another one has."""
        return any(len(self._by_id[key]) > 1 for key in self._ids.get(task, ()))

    def explain(self, model: nn.Module | None = None) -> Explanation:
        """Sort every known parameter, and those of ``model``, by its use."""
        self.renew()
        groups = self._shared.groups if self._shared.given else None
        return explanation_of(self._tasks, groups, self._reached, model)


def _shown(names: Sequence[str]) -> str:
    """Return the first of some names."""
    return ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")
