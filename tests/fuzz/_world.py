"""What a case is about: a network, its Balancer, its optimizer and its gradient scaler."""

import copy
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mtbalance import Balancer, gradient, weighting
from tests.fuzz._cases import Call, Case
from tests.fuzz._network import DTYPES, Network
from tests.fuzz._oracle import numbers
from tests.fuzz._strategies import Array

RATE = 0.05


class World:
    """A network, its Balancer, its optimizer and its gradient scaler."""

    def __init__(self, case: Case) -> None:
        self.case = case
        torch.manual_seed(case.seed)
        self.network = Network(case.plan)
        self.order = [name for name, _ in self.network.named_parameters()]
        self.optimizer = self.new_optimizer()
        self.balancer = self.new_balancer()
        self.scaler = None
        if case.scale is not None:
            self.scaler = torch.amp.GradScaler("cpu", init_scale=case.scale)
        self.watch()

    def watch(self) -> None:
        """Look at what hooks on accumulated gradients see."""
        self.fired: list[str] = []
        self.seen: dict[str, Array] = {}
        """``.grad`` when the first of them was called."""
        for name in [name for name, p in self.named().items() if p.requires_grad]:
            self.watch_one(name)

    def watch_one(self, name: str) -> None:
        """Look at what is accumulated for a parameter."""

        def note(parameter: Tensor) -> None:
            del parameter
            if not self.fired:
                self.seen = self.grads()
            self.fired.append(name)

        self.named()[name].register_post_accumulate_grad_hook(note)

    def grads(self) -> dict[str, Array]:
        """Return what is in ``.grad``, by the name of the parameter."""
        named = self.named()
        return {n: numbers(p.grad).copy() for n, p in named.items() if p.grad is not None}

    def new_optimizer(self) -> torch.optim.Optimizer:
        name, options = self.case.weighting
        wanted = {}
        if name == "AutoLambda":
            wanted = {k: options[k] for k in ("momentum", "weight_decay")}
            wanted["nesterov"] = options["nesterov"] and options["momentum"] > 0
        named = dict(self.network.named_parameters())
        return torch.optim.SGD([named[name] for name in self.order], lr=RATE, **wanted)

    def new_balancer(self) -> Balancer:
        case = self.case
        name, options = case.weighting
        made = {k: v for k, v in options.items() if k in ("temperature", "kind", "init", "weights")}
        if name == "AutoLambda":
            made = {k: options[k] for k in ("lr", "init", "minimum")}
            made["optimizer"] = self.optimizer
            made["primary"] = case.tasks[:1] if options["primary"] else None
        kind, chosen = case.shared
        parts = [[self.network.trunks[n] for n in group] for group in chosen]
        shared: Any = None
        if kind == "modules":
            shared = parts[0]
        elif kind == "parameters":
            shared = list(dict.fromkeys(p for part in parts[0] for p in part.parameters()))
        elif kind == "groups":
            shared = {f"group {n}": part for n, part in enumerate(parts)}
        options = dict(case.options)
        if "dtype" in options:
            options["dtype"] = DTYPES[options["dtype"]]
        within = [gradient.Sum()] if case.gradient[0] == "Normalized" else []
        return Balancer(
            getattr(weighting, name)(**made),
            getattr(gradient, case.gradient[0])(*within, **case.gradient[1]),
            tasks=case.tasks,
            shared=shared,
            **options,
        )

    def restarted(self) -> "World":
        """Return a new process's world, with the saved states loaded."""
        other = copy.copy(self)
        other.network = copy.deepcopy(self.network)
        _copy_grads(self.network, other.network)
        other.optimizer = other.new_optimizer()
        other.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        other.balancer = other.new_balancer()
        other.balancer.load_state_dict(copy.deepcopy(self.balancer.state_dict()))
        _copy_grads(self.balancer, other.balancer)
        other.watch()
        return other

    def copied(self) -> "World":
        """Return a deep copy."""
        other = copy.copy(self)
        other.network, other.optimizer, other.balancer = copy.deepcopy(
            (self.network, self.optimizer, self.balancer)
        )
        _copy_grads(self.network, other.network)
        _copy_grads(self.balancer, other.balancer)
        other.watch()
        return other

    def named(self) -> dict[str, Tensor]:
        """Return all parameters, those that the weighting learns included."""
        learned = {f"weighting {n}": p for n, p in self.balancer.weighting.named_parameters()}
        return dict(self.network.named_parameters()) | learned

    # --- calls ------------------------------------------------------------------------------------

    def do(self, call: Call) -> Any:
        """Make a call of the library, or what happens in between."""
        if call.kind in ("backward", "accumulate"):
            losses, outputs = self.network(call.tasks, call.batch, call.faults)
            losses = _wrong(losses, call.wrong)
            keywords: dict[str, Any] = {"scaler": self.scaler}
            if call.kind == "accumulate":
                return self.balancer.accumulate(losses, **keywords)
            if call.features:
                keywords["features"] = [outputs[n] for n in call.features]
            return self.balancer.backward(losses, **keywords, **self.validation(call))
        if call.kind == "apply":
            return self.balancer.apply(scaler=self.scaler, **self.validation(call))
        if call.kind == "end_epoch":
            return self.balancer.end_epoch()
        if call.kind == "reset":
            return self.balancer.reset()
        if call.kind == "discard":
            return self.balancer.discard()
        if call.kind == "load":
            return self.balancer.load_state_dict(copy.deepcopy(self.balancer.state_dict()))
        if call.kind in ("freeze", "thaw"):
            for n in {n for group in self.case.shared[1] for n in group}:
                frozen = call.kind == "freeze" or self.case.plan.trunks[n].frozen
                self.network.trunks[n].requires_grad_(not frozen)
        if call.kind == "grow":
            self.grow(call)
        if call.kind == "zero_grad":
            for parameter in self.named().values():
                parameter.grad = None
        elif call.kind == "move":
            self.move()
        return None

    def grow(self, call: Call) -> None:
        """Let a trunk have a layer more, or its last one another weight."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(call.batch)
            gone, new = self.network.trunks[call.trunk].grow()
        (name,) = (name for name, p in self.network.named_parameters() if p is new)
        held = self.optimizer.param_groups[0]["params"]
        if gone is None:
            held.append(new)
            self.order = [*self.order, name]
        else:
            held[self.order.index(name)] = new
            self.optimizer.state.pop(gone, None)
        self.watch_one(name)

    def validation(self, call: Call) -> dict[str, Any]:
        if self.case.weighting[0] != "AutoLambda":
            return {}
        return {"validation": lambda: self.network(self.case.tasks, call.batch + 1)[0]}

    def move(self) -> None:
        """Let an optimizer take a step, unless a gradient is not finite."""
        parameters = list(self.named().values())
        found = [p for p in parameters if p.grad is not None]
        if not all(np.isfinite(numbers(p.grad)).all() for p in found):
            for parameter in parameters:
                parameter.grad = None
            return
        grads = [p.grad for p in found]
        for p in found:
            dense = p.grad.to_dense() if p.grad.is_sparse else p.grad
            p.grad = dense / (self.case.scale or 1.0)
        length = math.sqrt(sum(float(np.square(numbers(p.grad)).sum()) for p in found))
        for p in found:
            p.grad = p.grad / max(1.0, length)
        self.optimizer.step()
        with torch.no_grad():
            for p in self.balancer.parameters():
                if p.grad is not None:
                    p.sub_(RATE * p.grad)
        for p, grad in zip(found, grads, strict=True):
            p.grad = grad


def _copy_grads(old: torch.nn.Module, new: torch.nn.Module) -> None:
    for p, q in zip(old.parameters(), new.parameters(), strict=True):
        q.grad = None if p.grad is None else p.grad.clone()


def _wrong(losses: dict[str, Tensor], how: str) -> dict[str, Any]:
    first = next(iter(losses))
    if how == "name":
        return {**losses, "somebody": losses[first]}
    spoilt: dict[str, Any] = {
        "shape": lambda: losses[first] + torch.zeros(2),
        "graph": lambda: losses[first].detach(),
        "kind": lambda: float(losses[first].detach()),
    }
    return {**losses, first: spoilt[how]()} if how else losses
