"""Names of strategies, and every strategy at work in a Balancer."""

import re
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from typing_extensions import get_type_hints

from mtbalance import Balancer, make_balancer
from mtbalance._factory import GRADIENTS, PAIRS, WEIGHTINGS
from mtbalance._options import Options
from mtbalance.gradient import DBMTL, IMTLG, CAGrad
from mtbalance.weighting import DWA, IMTLL, Equal, LogLoss
from tests._catalogue import GRADIENT_CASES, GradientCase
from tests._networks import TASKS, Network, batch, flat_grad, raw_rows

CHOICES: dict[str, object] = {"weights": [1, 2, 3], "byzantine": 0, "trim": 1}
"""Options that nobody can choose but the user."""


@pytest.mark.parametrize("names", [WEIGHTINGS, GRADIENTS])
def test_every_strategy_goes_by_its_class_in_lower_case(names: dict[str, type]) -> None:
    for kind in names.values():
        assert names[kind.__name__.lower()] is kind


@pytest.mark.parametrize("name", [*WEIGHTINGS, *GRADIENTS, *PAIRS])
def test_every_name_makes_a_balancer(name: str) -> None:
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    choices = dict(CHOICES)
    if name in GRADIENTS:  # of a weighting, several tasks may be primary
        choices["primary"] = TASKS[0]
    balancer = make_balancer(name, tasks=TASKS, optimizer=optimizer, **choices)
    expected = {**WEIGHTINGS, **GRADIENTS}
    for word in PAIRS.get(name, name).split("+"):
        assert (
            type(balancer.weighting) is expected[word] or type(balancer.gradient) is expected[word]
        )


def test_options_are_those_of_what_is_made() -> None:
    """To type checkers, too: an option that several take has the types of all of them."""
    spelt = {"torch": torch, "nn": nn, "Tensor": Tensor}
    types: dict[str, list[Any]] = {}
    for kind in {Balancer, *WEIGHTINGS.values(), *GRADIENTS.values()}:
        for name, hint in get_type_hints(kind.__init__, localns=spelt).items():
            types.setdefault(name, []).append(hint)
    for name in ("weighting", "gradient", "return"):
        del types[name]
    written = get_type_hints(Options, localns=spelt)
    found = {name: alternatives(hint) for name, hint in written.items()}
    assert found == {name: set().union(*map(alternatives, types[name])) for name in types}


_OF_THE_BALANCER = "Balancer takes tasks, shared, process_group, nonfinite, every, dtype, chunk."


@pytest.mark.parametrize(
    ("name", "option", "words"),
    [
        (
            "dwa+cagrad",
            "temprature",
            "Did you mean 'temperature'? DWA takes temperature; CAGrad takes c, rescale; ",
        ),
        ("cagrad", "calpha", "CAGrad takes c, rescale; "),  # not another's `alpha`
        ("dwa+cagrad", "calpha", "DWA takes temperature; CAGrad takes c, rescale; "),
        (
            "pcgrad",
            "shard",
            "Did you mean 'shared'? PCGrad takes order, expectation, primary, seed, generator; ",
        ),
        ("naive", "calpha", ""),
    ],
)
def test_an_unknown_option(name: str, option: str, words: str) -> None:
    """What is meant, an option of what is made and not of some other strategy, comes first."""
    text = f"`{option}` must be an option of the Balancer or of a strategy. {words}"
    with pytest.raises(TypeError, match=f"^{re.escape(text + _OF_THE_BALANCER)}$"):
        make_balancer(name, tasks=TASKS, **{option: 1.0})


def test_a_name_is_a_string() -> None:
    with pytest.raises(TypeError, match=r"`name` must be a string such as 'dwa.cagrad', but got N"):
        make_balancer(None, tasks=TASKS)


def alternatives(hint: Any) -> set[Any]:
    """Return the types of a union, and the values of what is literal."""
    if get_origin(hint) in (Union, UnionType):
        return set().union(*map(alternatives, get_args(hint)))
    return set(get_args(hint)) if get_origin(hint) is Literal else {hint}


def test_a_method_of_two_halves() -> None:
    balancer = make_balancer(" IMTL ", tasks=TASKS)
    assert (type(balancer.weighting), type(balancer.gradient)) == (IMTLL, IMTLG)
    with pytest.raises(ValueError, match="at most one weighting and one gradient strategy, but"):
        make_balancer("imtl+cagrad", tasks=TASKS)
    with pytest.raises(ValueError, match=r"or be imtl, dbmtl, but got 'imlt'. Did you mean 'imtl"):
        make_balancer("imlt", tasks=TASKS)
    assert type(make_balancer("gls+cagrad", tasks=TASKS).gradient) is CAGrad


def test_a_method_that_has_the_name_of_its_half() -> None:
    for name, weighting in (("dbmtl", LogLoss), ("dwa+dbmtl", DWA), ("dbmtl+equal", Equal)):
        balancer = make_balancer(name, tasks=TASKS, beta=0.5)
        assert (type(balancer.weighting), type(balancer.gradient)) == (weighting, DBMTL)
        assert balancer.gradient.beta == 0.5


@pytest.mark.filterwarnings("ignore:Krum fell back:RuntimeWarning")  # two tasks are too few
@pytest.mark.parametrize("present", ["abc", "ca", "b"])
@pytest.mark.parametrize("case", GRADIENT_CASES, ids=lambda case: case.name)
def test_a_balancer_does_what_the_strategy_does_alone(case: GradientCase, present: str) -> None:
    """On the matrix of the rows of the tasks that are there, in their order."""
    model = Network()
    losses = {task: loss for task, loss in model.losses(batch()).items() if task in present}
    shared = list(model.trunk.parameters())
    expected = case.make()(raw_rows(losses, shared))
    balancer = Balancer(Equal(), case.make(), tasks=TASKS, shared=model.trunk)
    further = [lambda: model.losses(batch())] if balancer.gradient.further_batches else []
    balancer.backward(losses, batches=further)  # which are that batch again, as for it alone
    assert_close(flat_grad(shared), expected, rtol=1e-9, atol=1e-11)
