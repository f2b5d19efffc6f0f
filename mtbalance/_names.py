"""Names that all processes give to the same parameter."""

import gc
import itertools
from collections.abc import Mapping, Sequence
from typing import TypeVar

from torch import Tensor, nn

T = TypeVar("T")


class Names:
    """Names that all ranks give to the same parameter.

    Parameters given to the Balancer go by their group; others by their place in the model that
    holds the given ones, so that a head which no loss of this rank has reached yet is found, too.
    What is in no such model goes by the task that reaches it first.
    """

    def __init__(self) -> None:
        self.by_id: dict[int, str] = {}
        self.by_name: dict[str, Tensor] = {}
        self._given: set[int] = set()

    def give(self, group: str, parameters: Mapping[str, Tensor]) -> None:
        """Name a group of parameters that all ranks have been given."""
        for name, parameter in parameters.items():
            self._add(f"{group}: {name}", parameter)
            self._given.add(id(parameter))

    def _add(self, name: str, parameter: Tensor) -> None:
        if id(parameter) not in self.by_id and name not in self.by_name:
            self.by_id[id(parameter)] = name
            self.by_name[name] = parameter

    def of(self, task: str, leaves: Sequence[Tensor]) -> list[str]:
        """Return the names of the leaves that a task reaches; what is no parameter has none."""
        parameters = [leaf for leaf in leaves if isinstance(leaf, nn.Parameter)]
        if any(id(parameter) not in self.by_id for parameter in parameters):
            self.add_model(parameters)
            for parameter in parameters:
                number = sum(name.startswith(f"{task} reaches") for name in self.by_name)
                shape = tuple(parameter.shape)
                self._add(f"{task} reaches number {number}, of shape {shape}", parameter)
        return [self.by_id[id(leaf)] for leaf in leaves if id(leaf) in self.by_id]

    def add_model(self, reached: Sequence[Tensor] = ()) -> None:
        """Name all parameters of the model.

        Args:
            reached: Parameters that a task reaches. Unless some have been given, the model is what
                holds all of these, and with none of these, every model of this process.
        """
        roots = {root: {id(p) for p in root.parameters()} for root in outermost_modules()}
        wanted = self._given or {id(parameter) for parameter in reached}
        if wanted:
            model = _connected(roots, wanted if self._given else {id(reached[0])})
            if not self._given and not wanted <= set().union(*(roots[root] for root in model)):
                return  # which of several models there are differs from rank to rank
            roots = {root: roots[root] for root in model}
        for name, parameter in _unique_names(list(roots)).items():
            self._add(name, parameter)
            if wanted:
                self._given.add(id(parameter))


def names_in_models(parameters: Sequence[Tensor]) -> dict[int, str]:
    """Return names of parameters, by their identity, that are unique in the models they are of."""
    named = _unique_names(models_of(parameters))
    return {id(parameter): name for name, parameter in named.items()}


def models_of(parameters: Sequence[Tensor]) -> list[nn.Module]:
    """Return the outermost modules that hold any of the parameters, or share any with these."""
    roots = {root: {id(p) for p in root.parameters()} for root in outermost_modules()}
    return _connected(roots, {id(parameter) for parameter in parameters})


def outermost_modules() -> list[nn.Module]:
    """Return every module of this process that no other holds."""
    modules = [module for module in alive(nn.Module) if "_modules" in module.__dict__]
    inner = {id(child) for module in modules for child in module.children()}
    return [module for module in modules if id(module) not in inner]


def alive(kind: type[T]) -> list[T]:
    """Return every object of a kind in this process.

    A list of all objects would hold tuples that other threads are building, which ends there in a
    SystemError. So the list is made, read and let go within one call, during which no other thread
    runs, and tells classes only; objects of these refer to them.
    """
    classes = set(map(type, itertools.chain.from_iterable(map(gc.get_objects, [None]))))
    kinds = {each for each in classes if issubclass(each, kind)}
    return [found for found in gc.get_referrers(*kinds) if type(found) in kinds]


def _connected(roots: Mapping[nn.Module, set[int]], wanted: set[int]) -> list[nn.Module]:
    """Return the modules that hold any of the parameters, and those that share any with these."""
    found: list[nn.Module] = []
    known = set(wanted)
    while True:
        more = [root for root, held in roots.items() if root not in found and held & known]
        if not more:
            return found
        found += more
        known = known.union(*(roots[root] for root in more))


def _unique_names(roots: Sequence[nn.Module]) -> dict[str, Tensor]:
    """Return parameters by the class of a module that holds them and their name in it.

    Of the modules that hold a parameter, the smallest serves that makes its name unique, so that
    names depend neither on what a rank wraps around its model nor on the order of modules. Modules
    that hold it directly come last: their class says little.
    """
    modules = {id(module): module for root in roots for module in root.modules()}
    held = [(module, dict(module.named_parameters())) for module in modules.values()]
    names: dict[str, set[int]] = {}
    candidates: dict[int, list[tuple[bool, int, int, str]]] = {}
    parameters: dict[int, Tensor] = {}
    for module, members in held:
        kind, inner = type(module).__qualname__, sum(1 for _ in module.modules())
        for name, parameter in members.items():
            full = f"{kind}: {name}"
            names.setdefault(full, set()).add(id(parameter))
            candidate = ("." not in name, len(members), inner, full)
            candidates.setdefault(id(parameter), []).append(candidate)
            parameters[id(parameter)] = parameter
    chosen: dict[str, Tensor] = {}
    for key, found in candidates.items():
        unique = [full for *_, full in sorted(found) if len(names[full]) == 1]
        if unique:
            chosen[unique[0]] = parameters[key]
    return chosen
