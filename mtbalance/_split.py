"""Which parameters are shared: what the user says, what the graphs say, and a table of both."""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mtbalance._jacobian import TaskGradients, reach_of

Shared = nn.Module | Tensor | Iterable["nn.Module | Tensor"]


def named_groups(shared: Shared | Mapping[str, Shared]) -> dict[str, dict[str, Tensor]]:
    """Return the parameters of each group, by name, in the order given, each once.

    Args:
        shared: Modules or parameters, one or several, or a mapping from group name to these.
    """
    if isinstance(shared, Mapping) and not isinstance(shared, nn.Module):
        groups = {str(name): _named_parameters(members) for name, members in shared.items()}
    else:
        groups = {"shared": _named_parameters(shared)}
    owner: dict[int, str] = {}
    for group, parameters in groups.items():
        if not parameters:
            raise ValueError(
                f"`shared` must hold parameters, but got none in group {group!r}. "
                "Leave it out to let the Balancer infer what is shared."
            )
        for name, parameter in parameters.items():
            other = owner.setdefault(id(parameter), group)
            if other != group:
                raise ValueError(
                    f"`shared` must hold each parameter in one group, but {name!r} is in "
                    f"{other!r} and {group!r}. Tied weights belong to one group."
                )
    return groups


def _named_parameters(members: Shared) -> dict[str, Tensor]:
    found: dict[int, tuple[str, Tensor]] = {}
    for prefix, member in _numbered(members):
        if isinstance(member, nn.Module):
            for name, parameter in member.named_parameters():
                found.setdefault(id(parameter), (f"{prefix}{name}", parameter))
        elif isinstance(member, Tensor):
            if not member.is_leaf:
                raise ValueError(
                    "`shared` must hold parameters, but got a tensor that was computed from others "
                    f"(shape {tuple(member.shape)}). Give the parameter itself."
                )
            found.setdefault(id(member), (f"{prefix}parameter", member))
        else:
            raise TypeError(
                f"`shared` must hold modules and parameters, but got {type(member).__name__}."
            )
    return dict(found.values())


def _numbered(members: object) -> Iterator[tuple[str, object]]:
    """Yield the members, each with a prefix for the names in it."""
    if isinstance(members, nn.Module | Tensor):
        yield "", members
    elif isinstance(members, Iterable) and not isinstance(members, str | bytes):
        for number, member in enumerate(members):
            yield f"{number}.", member
    else:
        raise TypeError(
            f"`shared` must hold modules and parameters, but got {type(members).__name__}."
        )


@dataclass(frozen=True)
class Use:
    """One row of an explanation.

    Attributes:
        use: What the parameters are used for.
        tensors: How many parameter tensors.
        parameters: How many numbers.
        names: Names of the tensors, as far as they are known.
    """

    use: str
    tensors: int
    parameters: int
    names: tuple[str, ...]


@dataclass(frozen=True)
class Explanation:
    """Which parameters are balanced, and what that costs. Print it for a table.

    Attributes:
        rows: One row per use.
        balanced: Number of numbers in the balanced (shared, not frozen) parameters.
        extra_bytes: Memory of the per-task gradients: tasks x balanced parameters x bytes.
        tasks: The tasks.
    """

    rows: tuple[Use, ...]
    balanced: int
    extra_bytes: int
    tasks: tuple[str, ...]

    def __str__(self) -> str:
        if not self.rows:
            return "No loss has been seen yet: take a step, or give explain() the losses."
        width = max(len(use) for use in ("parameters are", *(row.use for row in self.rows)))
        lines = [f"{'parameters are':{width}}  {'tensors':>8}  {'numbers':>14}"]
        lines += [
            f"{row.use:{width}}  {row.tensors:>8}  {row.parameters:>14,}" for row in self.rows
        ]
        lines.append(
            f"Extra memory of per-task gradients: {len(self.tasks)} tasks x {self.balanced:,} "
            f"shared numbers = {self.extra_bytes / 2**20:,.1f} MiB."
        )
        return "\n".join(lines)


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
        self._seen: set[frozenset[str]] = set()
        self._unreached_told = False
        self._index()

    def _index(self) -> None:
        """Make what goes by identity, which copying changes."""
        self._by_id = {id(leaf): tasks for leaf, tasks in self._reached}
        self._group_of = {
            id(parameter): number
            for number, parameters in enumerate((self._groups or {}).values())
            for parameter in parameters.values()
        }

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_by_id", "_group_of")}

    def __setstate__(self, state: dict[str, Any]) -> None:
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
        for leaf in leaves:
            tasks = self._by_id.get(id(leaf))
            if tasks is None:
                # Other leaves (an input that requires a gradient) are new tensors in every step.
                if isinstance(leaf, nn.Parameter) or id(leaf) in self._group_of:
                    self._by_id[id(leaf)] = tasks = {task}
                    self._reached.append((leaf, tasks))
            else:
                tasks.add(task)

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
        groups = self._groups or {}
        named = [pair for parameters in groups.values() for pair in parameters.items()]
        named += [] if model is None else list(model.named_parameters())
        names = {id(parameter): name for name, parameter in named}
        known = {id(p): p for p in [*(p for _, p in named), *self.parameters()]}

        uses: dict[str, list[Tensor]] = {}
        balanced: list[Tensor] = []
        for key, parameter in known.items():
            by = self._by_id.get(key, set())
            is_shared = len(by) > 1 if self._groups is None else key in self._group_of
            use = _use(parameter, by, self._tasks, is_shared=is_shared)
            if is_shared and len(groups) > 1:
                use = f"{list(groups)[self._group_of[key]]}: {use}"
            if is_shared and parameter.requires_grad:
                balanced.append(parameter)
            uses.setdefault(use, []).append(parameter)
        rows = [
            Use(use, len(ps), sum(map(Tensor.numel, ps)), tuple(names.get(id(p), "?") for p in ps))
            for use, ps in uses.items()
        ]
        return Explanation(
            tuple(sorted(rows, key=lambda row: -row.parameters)),
            sum(map(Tensor.numel, balanced)),
            len(self._tasks) * sum(p.numel() * p.element_size() for p in balanced),
            self._tasks,
        )


def _use(parameter: Tensor, by: set[str], tasks: tuple[str, ...], *, is_shared: bool) -> str:
    who = ", ".join(task for task in tasks if task in by)
    if not parameter.requires_grad:
        return "frozen"
    if not by:
        return "shared, but reached by no loss yet" if is_shared else "unused"
    if not is_shared:
        return f"specific to {who}" if len(by) == 1 else f"not in `shared`, though reached by {who}"
    return "shared by all tasks" if len(by) == len(tasks) else f"shared, reached by {who} only"
