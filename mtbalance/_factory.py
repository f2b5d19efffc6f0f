"""Balancers by the names that the papers use."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from typing_extensions import Unpack

from mtbalance import gradient, weighting
from mtbalance._balancer import Balancer
from mtbalance._checks import nearest
from mtbalance._options import Options
from mtbalance.gradient import GradientStrategy
from mtbalance.weighting import Weighting

WEIGHTINGS: dict[str, type[Weighting]] = {
    "equal": weighting.Equal,
    "naive": weighting.Equal,
    "uncert": weighting.Uncertainty,
    "uncertainty": weighting.Uncertainty,
    "dwa": weighting.DWA,
    "autol": weighting.AutoLambda,
    "autolambda": weighting.AutoLambda,
    "constant": weighting.Constant,
    "randomweighting": weighting.RandomWeighting,
    "rlw": weighting.RandomWeighting,
    "geometricmean": weighting.GeometricMean,
    "gls": weighting.GeometricMean,
    "logloss": weighting.LogLoss,
    "imtll": weighting.IMTLL,
    "imtl-l": weighting.IMTLL,
    "uncertaintysoftmax": weighting.UncertaintySoftmax,
    "uw-so": weighting.UncertaintySoftmax,
    "stch": weighting.STCH,
    "famo": weighting.FAMO,
    "cosmos": weighting.COSMOS,
    "pbi": weighting.PBI,
    "go4align": weighting.GO4Align,
    "gradnorm": weighting.GradNorm,
    "excessmtl": weighting.ExcessMTL,
}
GRADIENTS: dict[str, type[GradientStrategy]] = {
    "sum": gradient.Sum,
    "none": gradient.Sum,
    "graddrop": gradient.GradDrop,
    "pcgrad": gradient.PCGrad,
    "cagrad": gradient.CAGrad,
    "gradvac": gradient.GradVac,
    "alignedmtl": gradient.AlignedMTL,
    "aligned": gradient.AlignedMTL,
    "nashmtl": gradient.NashMTL,
    "nash": gradient.NashMTL,
    "upgrad": gradient.UPGrad,
    "dualproj": gradient.DualProj,
    "mgda": gradient.MGDA,
    "config": gradient.ConFIG,
    "dbmtl": gradient.DBMTL,
    "imtlg": gradient.IMTLG,
    "moco": gradient.MoCo,
    "fairgrad": gradient.FairGrad,
    "randomgradient": gradient.RandomGradient,
    "gradientcosine": gradient.GradientCosine,
    "gradops": gradient.GradOPS,
    "pcd": gradient.PCD,
    "krum": gradient.Krum,
    "trimmedmean": gradient.TrimmedMean,
    "modo": gradient.MoDo,
    "sdmgrad": gradient.SDMGrad,
}

_REQUIRED = {
    "optimizer": "it is the model's optimizer, from which {} reads learning rates; several, "
    "or None to assign it later, to `balancer.weighting.optimizer`.",
    "primary": "it is the task that {} favours, which nobody can choose but you.",
    "byzantine": "it is how many gradients {} takes for outliers.",
    "trim": "it is how many entries {} leaves out at each end.",
    "weights": "{} has a number for each task, which nobody can choose but you.",
}
"""What options are that strategies have no default for."""

PAIRS = {"imtl": "imtll+imtlg", "dbmtl": "logloss+dbmtl"}
"""Methods that are a weighting and a gradient strategy; with "+", a class of that name alone."""

_PAPER_WEIGHTINGS = ("uncert", "dwa", "autol")
_PAPER_GRADIENTS = ("graddrop", "pcgrad", "cagrad")
PAPER_COMBINATIONS: tuple[str, ...] = (
    "naive",
    *_PAPER_WEIGHTINGS,
    *_PAPER_GRADIENTS,
    *(f"{w}+{g}" for w in _PAPER_WEIGHTINGS for g in _PAPER_GRADIENTS),
)
"""The 16 balancing approaches that El Nahhas et al. (2024, arXiv:2403.03891) compare."""


def make_balancer(name: str, **options: Unpack[Options]) -> Balancer:
    """Make a Balancer from a name such as ``"dwa+cagrad"``, ``"pcgrad"`` or ``"naive"``.

    Args:
        name: A weighting, a gradient strategy, or one of each, joined by "+": the class in lower
            case (``geometricmean``, ``cagrad``) or the short name of its paper (``gls``,
            ``uncert``, ``dwa``, ``autol``, ``rlw``, ``imtl-l``, ``uw-so``, ``famo``, ``nash``,
            ``aligned``); ``imtl`` and ``dbmtl`` are both of their halves (``dwa+dbmtl`` has the
            class of that name). What is not named is ``equal`` (or
            ``naive``) or ``sum`` (or ``none``).
        **options: Arguments of the Balancer (``tasks``, ``shared``, ``nonfinite``) and of the two
            strategies (``temperature``, ``c``, ``optimizer``, ...). One that several take, such as
            ``seed``, goes to each of them; one that only other strategies take goes unused, so that
            one call serves every name. ``primary`` is several tasks for ``autol`` and one for
            gradient strategies: make a pair that differs in it from the classes. ``optimizer`` is
            the model's, several, or None to assign it later to ``balancer.weighting.optimizer``.

    Raises:
        ValueError: If a part of the name is unknown, or there are two of one kind.
        TypeError: If no strategy takes an option, or a required one is missing.

    Example:
        >>> balancer = make_balancer("dwa+cagrad", tasks=("msi", "tme"), temperature=1.0, c=0.5)
        >>> balancer.weighting, balancer.gradient
        (DWA(temperature=1.0), CAGrad(c=0.5, rescale=1))
    """
    weighting_class, gradient_class = _parse(name)
    weighting_options = _taken_by(weighting_class, options)
    gradient_options = _taken_by(gradient_class, options)
    balancer_options = _taken_by(Balancer, options)
    kinds: set[type] = {Balancer, *WEIGHTINGS.values(), *GRADIENTS.values()}
    known = {parameter for kind in kinds for parameter in _parameters(kind)}
    for option in options:
        if option not in known:
            raise TypeError(
                f"`{option}` must be an option of the Balancer or of a strategy."
                + _meant(option, (weighting_class, gradient_class, Balancer))
            )
    if "tasks" not in options:
        raise TypeError("`tasks` must name the tasks, but it is missing.")
    _check_required(name, weighting_class, options)
    _check_required(name, gradient_class, options)
    return Balancer(
        weighting_class(**weighting_options), gradient_class(**gradient_options), **balancer_options
    )


def _parse(name: str) -> tuple[type[Weighting], type[GradientStrategy]]:
    if not isinstance(name, str):
        raise TypeError(
            f"`name` must be a string such as 'dwa+cagrad', but got {type(name).__name__}. With "
            "strategies of your own, make a Balancer of them."
        )
    weightings: list[type[Weighting]] = []
    gradients: list[type[GradientStrategy]] = []
    words = [part.strip() for part in name.lower().split("+")]
    whole = [w if len(words) > 1 and w in GRADIENTS else PAIRS.get(w, w) for w in words]
    for word in "+".join(whole).split("+"):
        if word in WEIGHTINGS:
            weightings.append(WEIGHTINGS[word])
        elif word in GRADIENTS:
            gradients.append(GRADIENTS[word])
        else:
            raise ValueError(
                f"`name` must be made of weightings ({', '.join(WEIGHTINGS)}) and gradient "
                f"strategies ({', '.join(GRADIENTS)}), or be {', '.join(PAIRS)}, but got {word!r}."
                + nearest(word, [*WEIGHTINGS, *GRADIENTS, *PAIRS])
            )
    if len(weightings) > 1 or len(gradients) > 1:
        raise ValueError(
            f"`name` must hold at most one weighting and one gradient strategy, but got {name!r}."
        )
    return (weightings or [weighting.Equal])[0], (gradients or [gradient.Sum])[0]


def _check_required(name: str, kind: type, options: Mapping[str, Any]) -> None:
    for option, parameter in inspect.signature(kind).parameters.items():
        if parameter.default is parameter.empty and option not in options:
            raise TypeError(
                f"`{option}` must be given for {name!r}, but it is missing: "
                f"{_REQUIRED[option].format(kind.__name__)}"
            )


def _parameters(kind: type) -> list[str]:
    named = inspect.signature(kind).parameters
    return [name for name in named if name not in ("weighting", "gradient")]


def _meant(option: str, kinds: Sequence[type]) -> str:
    """Return the option of these that is nearest, if one is near, and what each of them takes."""
    options = {kind.__name__: _parameters(kind) for kind in kinds}
    takes = [f"{kind} takes {', '.join(names)}" for kind, names in options.items() if names]
    near = nearest(option, [name for names in options.values() for name in names])
    return f"{near} {'; '.join(takes)}."


def _taken_by(kind: type, options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: options[name] for name in _parameters(kind) if name in options}
