"""Buffers of modules, given back after a forward pass that is to leave no trace."""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parameter import is_lazy

from mtbalance._names import models_of


class Buffers:
    """Saves the buffers of the modules that a model consists of, and gives them back.

    The model is searched for when parameters come that have not been seen before: that looks at
    every object of the process, which takes tenths of a second.
    """

    def __init__(self) -> None:
        self._seen: dict[int, weakref.ref[Tensor]] = {}
        self._modules: list[weakref.ref[nn.Module]] = []

    # A copy belongs to another model, and weak references cannot be pickled.
    def __reduce__(self) -> tuple[type["Buffers"], tuple[()]]:
        return Buffers, ()

    @contextmanager
    def restored(self, parameters: Sequence[Tensor]) -> Iterator[None]:
        """Give buffers of modules in training mode back, whatever happens inside.

        These are the modules of every model that holds any of the parameters, however they are
        used (compiled ones call nobody), and all others that are called. A buffer that has been
        replaced comes back unless the new one differs in shape or dtype: that is a cache which has
        grown, and whoever made it has noted its size elsewhere.

        Args:
            parameters: Parameters of the model.
        """
        saved: dict[nn.Module, list[_Saved]] = {}

        def save(module: nn.Module, _: Any = None) -> None:
            if torch.compiler.is_compiling():
                return  # the hook would become a part of the graph
            if module.training and module not in saved:
                saved[module] = [
                    _Saved(name, buffer, buffer.clone() if _is_writable(buffer) else None)
                    for name, buffer in module.named_buffers(recurse=False)
                ]

        for module in self._modules_of(parameters):
            save(module)
        handle = register_module_forward_pre_hook(save)
        try:
            yield
        finally:
            handle.remove()
            with torch.no_grad():
                for module, buffers in saved.items():
                    for buffer in buffers:
                        buffer.give_back(module)

    def _modules_of(self, parameters: Sequence[Tensor]) -> list[nn.Module]:
        """Return all modules of the models that hold any of these parameters."""
        new = [p for p in parameters if not self._has_seen(p) and isinstance(p, nn.Parameter)]
        if new:
            self._seen.update((id(p), weakref.ref(p)) for p in new)
            known = [p for ref in self._seen.values() if (p := ref()) is not None]
            # All modules, as the outermost may be a wrapper that does not live for long.
            found = [module for model in models_of(known) for module in model.modules()]
            self._modules = [weakref.ref(module) for module in found]
        met: set[nn.Module] = set()
        alive = [module for ref in self._modules if (module := ref()) is not None]
        # Anew in each step: modules come and go.
        return [inner for outer in alive for _, inner in outer.named_modules(met)]

    def _has_seen(self, parameter: Tensor) -> bool:
        ref = self._seen.get(id(parameter))
        return ref is not None and ref() is parameter


class _Saved(NamedTuple):
    name: str
    buffer: Tensor
    value: Tensor | None
    """A copy; None of what cannot be written to."""

    def give_back(self, module: nn.Module) -> None:
        now = getattr(module, self.name, None)
        if now is not self.buffer and _is_alike(now, self.buffer):
            setattr(module, self.name, self.buffer)
        if self.value is not None:
            self.buffer.copy_(self.value)


def _is_writable(buffer: Tensor) -> bool:
    """Return whether a tensor has values, each in a place of its own, that may be replaced."""
    if is_lazy(buffer) or buffer.is_inference():
        return False
    if buffer.layout != torch.strided:
        return True
    sizes = zip(buffer.shape, buffer.stride(), strict=True)
    return not any(stride == 0 and size > 1 for size, stride in sizes)


def _is_alike(one: object, other: Tensor) -> bool:
    return (
        isinstance(one, Tensor)
        and not is_lazy(one)
        and not is_lazy(other)
        and (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
    )
