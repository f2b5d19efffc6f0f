"""Which parameters are shared, reached by some tasks, task-specific, frozen or unused."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.parameter import is_lazy


@dataclass(frozen=True)
class Use:
    """One row of an explanation.

    Attributes:
        use: What the parameters are used for.
        tensors: How many parameter tensors.
        parameters: How many numbers, as far as sizes are known.
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
        extra_bytes: Memory of the per-task gradients, tasks x balanced parameters x bytes: less
            where those of linear layers are kept as factors.
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
            f"Extra memory of per-task gradients: up to {len(self.tasks)} tasks x "
            f"{self.balanced:,} shared numbers = {self.extra_bytes / 2**20:,.1f} MiB."
        )
        return "\n".join(lines)


def explanation_of(
    tasks: tuple[str, ...],
    groups: Mapping[str, Mapping[str, Tensor]] | None,
    reached: Sequence[tuple[Tensor, set[str]]],
    model: nn.Module | None = None,
) -> Explanation:
    """Sort every known parameter, and those of ``model``, by its use.

    Args:
        tasks: All tasks.
        groups: The shared parameters of each group, by name; None: what two or more tasks reach.
        reached: Every parameter that some loss has reached, and the tasks of these losses.
        model: A model, for names and for parameters that no loss reaches.
    """
    group_of = {id(p): name for name, held in (groups or {}).items() for p in held.values()}
    tasks_of = {id(parameter): by for parameter, by in reached}
    named = [pair for held in (groups or {}).values() for pair in held.items()]
    named += [] if model is None else list(model.named_parameters())
    names = {id(parameter): name for name, parameter in named}
    known = {id(p): p for p in [*(p for _, p in named), *(p for p, _ in reached)]}

    uses: dict[str, list[Tensor]] = {}
    balanced: list[Tensor] = []
    for key, parameter in known.items():
        by = tasks_of.get(key, set())
        is_shared = len(by) > 1 if groups is None else key in group_of
        use = _use(parameter, by, tasks, is_shared=is_shared)
        if is_shared and len(groups or ()) > 1:
            use = f"{group_of[key]}: {use}"
        if is_shared and parameter.requires_grad and not is_lazy(parameter):
            balanced.append(parameter)
        uses.setdefault(use, []).append(parameter)
    rows = [
        Use(use, len(ps), sum(map(_size, ps)), tuple(names.get(id(p), "?") for p in ps))
        for use, ps in uses.items()
    ]
    return Explanation(
        tuple(sorted(rows, key=lambda row: -row.parameters)),
        sum(map(Tensor.numel, balanced)),
        len(tasks) * sum(p.numel() * p.element_size() for p in balanced),
        tasks,
    )


def _size(parameter: Tensor) -> int:
    """Return how many numbers a parameter holds: none before a lazy module's first forward pass."""
    return 0 if is_lazy(parameter) else parameter.numel()


def _use(parameter: Tensor, by: set[str], tasks: tuple[str, ...], *, is_shared: bool) -> str:
    who = ", ".join(task for task in tasks if task in by)
    if not parameter.requires_grad:
        return "frozen"
    if is_lazy(parameter):
        return ("shared, " if is_shared else "") + "lazy, of unknown size until a forward pass"
    if not by:
        return "shared, but reached by no loss yet" if is_shared else "unused"
    if not is_shared:
        return f"specific to {who}" if len(by) == 1 else f"not in `shared`, though reached by {who}"
    return "shared by all tasks" if len(by) == len(tasks) else f"shared, reached by {who} only"
