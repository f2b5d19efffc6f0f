"""What is done in a case, drawn from its seed. A case prints itself."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tests.fuzz._network import Head, Plan, Trunk
from tests.fuzz._strategies import KEPT, OTHERS


@dataclass(frozen=True)
class Call:
    """One call of the Balancer, or something that happens in between."""

    kind: str
    """backward, accumulate, apply, discard, load (its own state), end_epoch, restart, copy,
    zero_grad, move, reset, grow (a trunk, ``batch``: its seed), freeze (what is shared), thaw"""
    tasks: tuple[str, ...] = ()
    batch: int = 0
    faults: Mapping[str, str] = field(default_factory=dict)
    wrong: str = ""
    """How the losses are no losses: name, shape, graph or kind."""
    features: tuple[int, ...] = ()
    """Which of the trunks that are read are given as features."""
    trunk: int = 0
    """Which of them grows."""


@dataclass(frozen=True)
class Case:
    """A network, a Balancer, and what is done with them."""

    seed: int
    plan: Plan
    weighting: tuple[str, Mapping[str, Any]]
    gradient: tuple[str, Mapping[str, Any]]
    shared: tuple[str, tuple[tuple[int, ...], ...]]
    """modules, parameters, groups or inferred, and the trunks (of each group)."""
    options: Mapping[str, Any]
    scale: float | None
    calls: tuple[Call, ...]
    factors: bool = False
    """Whether gradients of linear layers in float64 are kept as factors, however small they are.
    (Those in float32 would be nearer to exact ones than gradients that are rounded to it.)"""

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.plan.heads)

    def __str__(self) -> str:
        lines = [f"seed {self.seed}: {self.weighting} + {self.gradient}"]
        lines += [f"  shared {self.shared}, options {dict(self.options)}, scale {self.scale}"]
        lines += [f"  parameters of {self.plan.dtype}{', factors' if self.factors else ''}"]
        lines += [f"  trunk {n}: {trunk}" for n, trunk in enumerate(self.plan.trunks)]
        lines += [f"  task {task}: {head}" for task, head in self.plan.heads.items()]
        lines += [f"  {n}. {call}" for n, call in enumerate(self.calls)]
        return "\n".join(lines)


def case_of(seed: int) -> Case:
    """Draw the case of a seed."""
    return _Draw(seed).case()


class _Draw:
    """Draws one case."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.seed = seed
        self.mixes = False

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def case(self) -> Case:
        rng = self.rng
        weighting = self.weighting()
        gradient = self.gradient()
        self.mixes = gradient[0] == "GradDrop"  # whose blocks are of one dtype each
        ahead = weighting[0] == "AutoLambda"
        at_features = not ahead and self.chance(0.2)
        dtype = rng.choice(["float64"] * 4 + ["float32"] * 2 + ["bfloat16", "float16"])
        if ahead:
            dtype = rng.choice(["float64", "float64", "float32"])
        plan = self.plan(dtype, at_features=at_features)
        if "kind" in weighting[1]:
            kinds = [rng.choice(["regression", "classification"]) for _ in plan.heads]
            weighting = (weighting[0], {**weighting[1], "kind": kinds})
        if "weights" in weighting[1]:
            weighting = (weighting[0], {"weights": [rng.choice([0.5, 2.0]) for _ in plan.heads]})
        shared = self.shared(plan)
        options = self.options(weighting[0], gradient)
        if options.get("every", 1) > 1 and gradient[0] == "PCGrad":
            gradient = ("PCGrad", {"order": "fixed"})
        scale = 2.0 ** rng.randint(-3, 12) if self.chance(0.2) else None
        case = Case(self.seed, plan, weighting, gradient, shared, options, scale, ())
        case = replace(case, calls=self.calls(case, at_features=at_features))
        return replace(case, factors=self.chance(0.5))

    def weighting(self) -> tuple[str, dict[str, Any]]:
        rng = self.rng
        name = rng.choice(["Equal"] * 3 + ["DWA", "Uncertainty"] * 2 + ["AutoLambda", "Constant"])
        if name == "DWA":
            return name, {"temperature": rng.choice([0.5, 2.0])}
        if name == "Constant":
            return name, {"weights": None}
        if name == "Uncertainty":
            return name, {"kind": None, "init": rng.choice([0.0, -0.7])}
        if name == "AutoLambda":
            return name, {
                "lr": 0.05,
                "init": rng.choice([0.3, 0.02]),
                "minimum": rng.choice([None, 0.01]),
                "primary": self.chance(0.5),
                "momentum": rng.choice([0.0, 0.9]),
                "nesterov": self.chance(0.3),
                "weight_decay": rng.choice([0.0, 0.1]),
            }
        return name, {}

    def gradient(self) -> tuple[str, dict[str, Any]]:
        rng = self.rng
        name = rng.choice(["Sum"] * 2 + ["GradDrop"] + ["PCGrad", "CAGrad"] * 2 + OTHERS)
        if name == "GradDrop":
            return name, {"leak": rng.choice([0.0, 0.0, 0.3, 1.0]), "seed": rng.randint(0, 99)}
        if name == "PCGrad":
            return name, rng.choice(
                [{"seed": 3}, {"seed": 4}, {"order": "fixed"}, {"expectation": True}]
            )
        if name == "CAGrad":
            return name, {"c": rng.choice([0.0, 0.4, 0.4, 1.5]), "rescale": rng.randint(0, 2)}
        if name == "Normalized":
            return name, {"scale": rng.choice(["mean", "max", "min"])}
        return name, {}

    def plan(self, dtype: str, *, at_features: bool) -> Plan:
        rng = self.rng
        kinds = ["linear"] * 3 + ["twice", "tied", "embedding", "sparse", "scalar", "transposed"]
        if dtype == "float64":
            kinds.append("complex")
        if dtype == "float16":  # of which torch itself cannot add two sparse gradients
            kinds.remove("sparse")
        kinds.append("stubborn")
        trunks = []
        for number in range(rng.randint(1, 3)):
            kind = rng.choice(kinds)
            if kind == "tied" and (number == 0 or not _is_linear(trunks[0])):
                kind = "linear"
            own = dtype
            if kind in ("linear", "scalar") and dtype in ("float64", "float32"):
                own = rng.choice([dtype] * (1 if self.mixes else 5) + ["float32"])
            if kind == "tied":
                own = trunks[0].dtype
            trunks.append(Trunk(kind, frozen=kind != "tied" and self.chance(0.07), dtype=own))
        alive = [n for n, trunk in enumerate(trunks) if not trunk.frozen]
        if not alive:
            trunks[0] = replace(trunks[0], frozen=False)
            alive = [0]
        factors = [1.0, 1.0, -0.5, 3.0, 1e-2, 20.0]
        factors += [1e-6] if dtype in ("float64", "float32") else []
        if dtype == "float16" and not at_features:  # for directions that it cannot hold
            factors.append(2e4)
        heads = {}
        for task in "abcd"[: rng.choice([1, 2, 2, 2, 3, 3, 4])]:
            read = {n for n in range(len(trunks)) if self.chance(0.6)} | {rng.choice(alive)}
            table = self.chance(0.3 if at_features else 0.4)
            heads[task] = Head(
                tuple(sorted(read)),
                own=self.chance(0.8),
                loss=rng.choice(["square", "square", "abs", "linear", "softplus"]),
                factor=rng.choice(factors),
                table=table,
            )
        return Plan(tuple(trunks), heads, dtype)

    def shared(self, plan: Plan) -> tuple[str, tuple[tuple[int, ...], ...]]:
        rng = self.rng
        every = tuple(range(len(plan.trunks)))
        kind = rng.choice(["modules", "parameters", "groups", "inferred"])
        if kind == "inferred":
            return kind, ()
        chosen = tuple(n for n in every if self.chance(0.8))
        # Each task must reach one of them that is not frozen.
        for head in plan.heads.values():
            alive = [n for n in head.trunks if not plan.trunks[n].frozen]
            if not set(alive) & set(chosen):
                chosen += (alive[0],)
        order = rng.sample(chosen, len(chosen))
        if kind == "groups":
            if any(plan.trunks[n].kind == "tied" for n in order):  # one parameter in two groups
                return "modules", (tuple(order),)
            cut = rng.randint(0, len(order))
            groups = [tuple(order[:cut]), tuple(order[cut:])]
            return kind, tuple(group for group in groups if group)
        return kind, (tuple(order),)

    def options(self, weighting: str, gradient: tuple[str, Any]) -> dict[str, Any]:
        rng = self.rng
        options: dict[str, Any] = {}
        if self.chance(0.6):
            options["nonfinite"] = rng.choice(["drop", "skip", "propagate", "drop"])
        may_keep = gradient[0] in KEPT and weighting != "AutoLambda"
        if may_keep and self.chance(0.35):
            options["every"] = rng.randint(2, 4)
        if self.chance(0.2):
            options["dtype"] = "bfloat16"
        if self.chance(0.25):
            options["chunk"] = rng.randint(1, 4)
        return options

    def calls(self, case: Case, *, at_features: bool) -> tuple[Call, ...]:
        rng = self.rng
        calls: list[Call] = []
        open_batches = 0  # accumulated and not applied
        keeps = case.options.get("every", 1) > 1
        epochs = case.weighting[0] == "DWA"  # which weighs by the two epochs before
        grown = False
        length = rng.randint(6, 10) if keeps or epochs else rng.randint(3, 8)
        if epochs and not at_features and self.chance(0.5):
            for _ in range(3):
                calls += [self.losses(case, "backward", there=0.6) for _ in range(3)]
                calls += [Call("zero_grad"), Call("end_epoch")]
            return (*calls, self.losses(case, "backward", there=1.0))
        if case.shared[0] == "inferred" and not at_features and self.chance(0.2):
            calls = [self.losses(case, "backward", there=1.0), Call("zero_grad")]
            kind = rng.choice(["copy", "copy", "restart"])  # with all of what is shared known
            return (*calls, Call(kind), self.losses(case, "backward", there=0.0))
        while len(calls) < length or open_batches:
            draw = rng.random()
            restarted = bool(calls) and calls[-1].kind in ("restart", "copy")
            if open_batches and (draw < 0.3 or len(calls) > length + 4):
                calls.append(Call("apply"))
                open_batches = 0
            elif not at_features and draw < (0.1 if keeps else 0.4):
                calls.append(self.losses(case, "accumulate", restarted=restarted))
                open_batches += not calls[-1].wrong
            elif draw < 0.8:
                call = self.losses(case, "backward", restarted=restarted)
                if at_features and not open_batches:
                    call = self.at_features(case, call)
                calls.append(call)
                open_batches *= bool(call.wrong)  # what was accumulated before an error stays
            else:
                kinds = ["end_epoch", "end_epoch", "restart", "restart", "copy", "copy", "reset"]
                kind = rng.choice(kinds + ["reset", "reset"] * keeps + ["end_epoch"] * 3 * epochs)
                if kind == "reset" and not keeps and self.chance(0.6):
                    kind = "end_epoch"
                if open_batches and self.chance(0.4):
                    kind = rng.choice(["discard", "load"])
                # What tells a parameter that has come later is not in a saved state.
                if kind in ("restart", "load") and grown and case.shared[0] != "modules":
                    continue
                if kind in ("reset", "restart", "load", "discard"):  # states hold no rows
                    open_batches = 0
                calls.append(Call(kind))
                continue
            if not (open_batches or at_features) and self.chance(0.08):
                alive = [n for n, trunk in enumerate(case.plan.trunks) if not trunk.frozen]
                grown = True
                calls.append(Call("grow", batch=rng.randint(0, 999), trunk=rng.choice(alive)))
                continue
            given = case.shared[0] != "inferred"
            if given and not (open_batches or at_features) and self.chance(0.06):
                step = replace(self.losses(case, "backward"), faults={}, wrong="")
                calls += [Call("freeze"), step, Call("thaw")]
                continue
            if calls[-1].kind in ("backward", "apply"):
                if self.chance(0.7):
                    calls.append(Call("move"))
                if self.chance(0.7):
                    calls.append(Call("zero_grad"))
        return tuple(calls)

    def losses(
        self, case: Case, kind: str, *, restarted: bool = False, there: float | None = None
    ) -> Call:
        rng = self.rng
        if there is None:
            there = 0.9 if case.options.get("every", 1) > 1 else 0.85
        if restarted and case.shared[0] == "inferred":
            there = 0.4  # what was shared before must be known
        tasks = [task for task in case.tasks if self.chance(there)] or [case.tasks[0]]
        rng.shuffle(tasks)
        faults = {}
        if self.chance(0.2):
            task = rng.choice(tasks)
            head = case.plan.heads[task]
            kinds = ["nan", "inf", "shared"] + (["own"] if head.own else [])
            faults[task] = rng.choice(kinds)
        wrong = rng.choice(["name", "shape", "graph", "kind"]) if self.chance(0.07) else ""
        return Call(kind, tuple(tasks), rng.randint(0, 10**6), faults, wrong)

    def at_features(self, case: Case, call: Call) -> Call:
        read = sorted({n for task in call.tasks for n in case.plan.heads[task].trunks})
        places = [
            place
            for place, n in enumerate(read)
            if not case.plan.trunks[n].frozen
            and all(case.plan.trunks[k].kind != "tied" for k in read)
        ]
        faults = {task: fault for task, fault in call.faults.items() if fault != "shared"}
        return replace(call, features=tuple(places), faults=faults)


def _is_linear(trunk: Trunk) -> bool:
    return trunk.kind in ("linear", "twice", "stubborn")
