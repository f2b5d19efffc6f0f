"""What is shared is what the shared modules hold when a step is made, and somebody is told."""

import copy
import gc
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.testing import assert_close

from mtbalance import Balancer, make_balancer
from mtbalance.gradient import CAGrad, GradDrop, PCGrad, Sum
from mtbalance.weighting import Equal, Uncertainty
from tests._device import randn
from tests._networks import TASKS, Network, batch, flat_grad, gradients, raw_rows


class Adapter(nn.Module):
    """A frozen layer with a low-rank addition, as of LoRA."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        generator = torch.Generator().manual_seed(0)
        self.down = nn.Parameter(randn(2, 4, generator=generator).double())
        self.up = nn.Parameter(randn(6, 2, generator=generator).double())

    def forward(self, rows: Tensor) -> Tensor:
        return self.layer(rows) + rows @ self.down.T @ self.up.T


def with_adapter(model: Network) -> None:
    model.trunk[0] = Adapter(model.trunk[0])


def with_norms(model: Network) -> None:
    parametrizations.weight_norm(model.trunk[3])


def with_assigned(model: Network) -> None:
    model.load_state_dict({k: v + 0.1 for k, v in model.state_dict().items()}, assign=True)


def with_another_layer(model: Network) -> None:
    """The old one is freed first, so that the new one may take over its identity."""
    del model.trunk[3]
    gc.collect()
    torch.manual_seed(1)
    model.trunk.insert(3, nn.Linear(6, 5).double())


def with_more_layers(model: Network) -> None:
    torch.manual_seed(1)
    model.trunk.append(nn.Linear(5, 5).double())


class Scaled(nn.Module):
    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, rows: Tensor) -> Tensor:
        return rows * self.weight


def with_tied_head(model: Network) -> None:
    """A parameter that is known as a head's becomes the trunk's, too."""
    model.trunk.append(Scaled(model.heads["a"].weight))


CHANGES = [
    with_adapter,
    with_norms,
    with_assigned,
    with_another_layer,
    with_more_layers,
    with_tied_head,
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["pcgrad", "cagrad", "graddrop", "naive"])
def test_shared_modules_may_change_between_steps(
    change: Callable[[Network], None], name: str
) -> None:
    """A Balancer made before the change does what one does that is made after it."""
    model = Network()
    balancer = make_balancer(name, tasks=TASKS, shared=model.trunk)
    balancer.backward(model.losses(batch()))
    change(model)
    model.zero_grad()
    balancer.gradient.reset()
    balancer.backward(model.losses(batch()))
    actual = gradients(model)
    model.zero_grad()
    make_balancer(name, tasks=TASKS, shared=model.trunk).backward(model.losses(batch()))
    for key, expected in gradients(model).items():
        assert (actual[key] is None) == (expected is None), key
        assert expected is None or torch.equal(actual[key], expected), key


@pytest.mark.parametrize("change", CHANGES)
def test_groups_change_with_their_modules(change: Callable[[Network], None]) -> None:
    model = Network()
    groups = {"first": model.trunk, "second": nn.Linear(4, 4)}
    tables = []
    first = Balancer(Equal(), CAGrad(), tasks=TASKS, shared=groups, every=2)
    with pytest.warns(UserWarning, match="no loss reaches 2 of the parameters given"):
        first.backward(model.losses(batch()))
    change(model)
    for balancer in (first, Balancer(Equal(), CAGrad(), tasks=TASKS, shared=groups)):
        with warnings.catch_warnings(action="ignore"):
            balancer.backward(model.losses(batch()))
        tables.append(str(balancer.explain(model=model)))
    assert tables[0] == tables[1]


def test_a_change_between_micro_batches() -> None:
    """What is gone gets the plain sum of what was accumulated for it, and disturbs nobody else."""
    model = Network()
    balancer = Balancer(Equal(), PCGrad("fixed"), tasks=TASKS, shared=model.trunk)
    kept, gone = (list(model.trunk[number].parameters()) for number in (0, 3))
    earlier = raw_rows(model.losses(batch()), [*kept, *gone])
    balancer.accumulate(model.losses(batch()))
    with_another_layer(model)
    new = list(model.trunk[3].parameters())
    rows = raw_rows(model.losses(batch(seed=1)), [*kept, *new])
    balancer.accumulate(model.losses(batch(seed=1)))
    with pytest.warns(UserWarning, match=r"not given as `shared` \(2: "):
        balancer.apply()
    rows[:, :30] += earlier[:, :30]
    assert_close(flat_grad([*kept, *new]), PCGrad("fixed")(rows), rtol=1e-12, atol=1e-12)
    assert_close(flat_grad(gone), earlier[:, 30:].sum(0), rtol=1e-12, atol=1e-12)


def test_a_copied_model_goes_on_with_its_own_modules() -> None:
    model = Network()
    model.balancer = Balancer(Equal(), PCGrad("fixed"), tasks=TASKS, shared=model.trunk)
    model.balancer.backward(model.losses(batch()))
    other = copy.deepcopy(model)
    for each in (model, other):
        with_more_layers(each)
        each.zero_grad()
        each.balancer.backward(each.losses(batch()))
    for one, two in zip(gradients(model).values(), gradients(other).values(), strict=True):
        assert torch.equal(one, two)


def test_a_balancer_within_what_it_balances() -> None:
    """As in a Lightning module that gives itself."""
    model = Network()
    model.balancer = Balancer(Equal(), PCGrad("fixed"), tasks=TASKS, shared=model)
    other = copy.deepcopy(model)
    for each in (model, other):
        each.balancer.backward(each.losses(batch()))
    for one, two in zip(gradients(model).values(), gradients(other).values(), strict=True):
        assert torch.equal(one, two)


def test_what_a_weighting_within_learns_is_not_balanced() -> None:
    """It gets its own gradient, and nobody is told that it had none."""
    model = Network()
    model.balancer = Balancer(Uncertainty(), PCGrad("fixed"), tasks=TASKS, shared=model)
    model.balancer.backward(model.losses(batch()))
    log_var = model.balancer.weighting.log_var
    assert log_var.grad is not None
    rows = model.balancer.explain(model=model).rows
    shown = [name for row in rows if row.use.startswith("shared") for name in row.names]
    assert "trunk.0.weight" in shown
    assert not any("log_var" in name for name in shown)


def test_the_identities_of_what_is_gone_are_not_given_to_others() -> None:
    model = Network()
    balancer = Balancer(Equal(), CAGrad(), tasks=TASKS, shared=model.trunk)
    for step in range(20):
        with_another_layer(model)
        model.trunk[3].weight.grad = None
        record = balancer.backward(model.losses(batch(seed=step)))
        assert record.gradient_norms["a"] > 0
        shared = balancer.explain(model=model).rows
        assert sum(row.tensors for row in shared if row.use == "shared by all tasks") == 4


# --- who is told ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["naive", "pcgrad", "graddrop", "dwa+cagrad"])
def test_a_frozen_trunk_is_an_error_in_every_step(name: str) -> None:
    model = Network()
    balancer = make_balancer(name, tasks=TASKS, shared=model.trunk)
    model.trunk.requires_grad_(False)
    with pytest.raises(ValueError, match=r"reaches none: all that are given as `shared` are froz"):
        balancer.backward(model.losses(batch()))
    model.trunk.requires_grad_(True)
    balancer.backward(model.losses(batch()))
    model.zero_grad()
    model.trunk.requires_grad_(False)
    with pytest.raises(ValueError, match=r"reaches none: all that are given as `shared` are froz"):
        balancer.backward(model.losses(batch()))
    assert all(parameter.grad is None for parameter in model.parameters())
    model.trunk[3].requires_grad_(True)
    balancer.backward(model.losses(batch()))
    assert model.trunk[3].weight.grad is not None


@pytest.mark.parametrize("tasks", [TASKS, ("a", "b"), ("c",)])
def test_an_inferred_trunk_that_is_frozen_later(tasks: tuple[str, ...]) -> None:
    """Also of those tasks that have no partner in the step."""
    model = Network()
    balancer = Balancer(Equal(), CAGrad(), tasks=TASKS)
    balancer.backward(model.losses(batch()))
    model.zero_grad()
    model.trunk.requires_grad_(False)
    losses = {task: loss for task, loss in model.losses(batch()).items() if task in tasks}
    words = rf"loss of task '{tasks[0]}' must reach .* frozen ones \(requires_grad is False\) are n"
    with pytest.raises(ValueError, match=words):
        balancer.backward(losses)
    assert all(parameter.grad is None for parameter in model.parameters())
    model.trunk.requires_grad_(True)
    balancer.backward({task: model.losses(batch())[task] for task in tasks})


def test_a_task_that_is_not_known_to_share() -> None:
    """Who has not met a partner yet may be alone with its parameters."""
    model = Network()
    balancer = Balancer(Equal(), CAGrad(), tasks=TASKS)
    for _ in range(2):
        balancer.backward({"a": model.losses(batch())["a"]})
    assert model.trunk[0].weight.grad is not None


def test_adapters_in_place_of_layers_given_one_by_one() -> None:
    model = Network()
    balancer = Balancer(Equal(), CAGrad(), tasks=TASKS, shared=[model.trunk[0]])
    with_adapter(model)
    with pytest.raises(ValueError, match=r"frozen .* adapters took .* module around them"):
        balancer.backward(model.losses(batch()))


def test_features_of_a_frozen_trunk() -> None:
    model = Network()
    balancer = Balancer(Equal(), CAGrad(), tasks=TASKS, shared=model.trunk)
    model.trunk.requires_grad_(False)
    with pytest.raises(ValueError, match=r"`features` must be outputs .* or from frozen ones"):
        balancer.backward(model.losses(batch()), features=model.trunk(batch()))


@pytest.mark.filterwarnings("ignore:several tasks reach:UserWarning")  # before the error
@pytest.mark.parametrize("strategy", [CAGrad(), Sum()])
def test_a_trunk_that_is_no_longer_the_shared_one(strategy) -> None:
    """Parameters given one by one are a snapshot: the first step without them says so."""
    model = Network()
    balancer = Balancer(Equal(), strategy, tasks=TASKS, shared=model.trunk.parameters())
    balancer.backward(model.losses(batch()))
    model.zero_grad()
    model.trunk = copy.deepcopy(model.trunk)
    with pytest.raises(ValueError, match=r"reaches none\. .* given one by one are those of the ti"):
        balancer.backward(model.losses(batch()))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_task_that_no_longer_reaches_the_trunk() -> None:
    model = Network()
    balancer = Balancer(Equal(), CAGrad(), tasks=TASKS, shared=model.trunk)
    balancer.backward(model.losses(batch()))
    losses = model.losses(batch())
    losses["b"] = model.heads["b"](torch.ones(1, 5).double()).mean()
    with pytest.raises(ValueError, match="loss of task 'b' must reach a shared parameter, but rea"):
        balancer.backward(losses)


@pytest.mark.parametrize("name", ["dwa+cagrad", "gradnorm", "excessmtl"])
def test_heads_given_for_the_trunk(name: str) -> None:
    """Also to weightings that look at gradients of what is shared."""
    model = Network()
    balancer = make_balancer(name, tasks=TASKS, shared=model.heads)
    with pytest.warns(UserWarning, match=r"several tasks reach .* not given as `shared` \(4: "):
        balancer.backward(model.losses(batch()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        balancer.backward(model.losses(batch()))  # told once


def test_a_few_parameters_may_be_left_out_on_purpose() -> None:
    """As tokens that attend to each other, one per task; `explain` lists them."""
    model = Network()
    balancer = Balancer(Equal(), CAGrad(), tasks=TASKS, shared=[model.trunk[0]])
    model.trunk[3].requires_grad_(False)
    model.trunk[3].bias.requires_grad_(True)
    balancer.backward(model.losses(batch()))
    assert "not in `shared`, though reached by a, b, c" in str(balancer.explain(model=model))


@pytest.mark.parametrize("strategy", [CAGrad(), GradDrop()])
def test_what_comes_later_is_told(strategy) -> None:
    model = Network()
    shared = [model.trunk[0], model.trunk[3]]
    balancer = Balancer(Equal(), strategy, tasks=TASKS, shared=shared)
    balancer.backward(model.losses(batch()))
    model.trunk.append(Scaled(nn.Parameter(torch.ones(1, 5).double())))
    with pytest.warns(UserWarning, match=r"not given as `shared` \(1: 'Sequential: 5.weight'\)"):
        balancer.backward(model.losses(batch()))


@pytest.mark.parametrize("name", ["dwa", "autol"])
def test_for_a_plain_sum_it_makes_no_difference(name: str) -> None:
    """Nor for Auto-Lambda, which looks at all parameters."""
    model = Network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    balancer = make_balancer(name, tasks=TASKS, shared=model.heads, optimizer=optimizer)
    balancer.backward(model.losses(batch()), validation=lambda: model.losses(batch(seed=1)))


def test_nothing_shared() -> None:
    with pytest.raises(ValueError, match=r"`shared` must hold parameters, but got \{\}"):
        Balancer(Equal(), CAGrad(), tasks=TASKS, shared={})


# --- where graphs do not tell ---------------------------------------------------------------------


class Both(nn.Module):
    def __init__(self, model: Network) -> None:
        super().__init__()
        self.model = model

    def forward(self, rows: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.model.losses(rows).values())


def test_the_inferred_split_of_a_compiled_model() -> None:
    """Every output of a compiled function seems to reach all that it computes with."""
    torch.compiler.reset()
    model = Network()
    losses = torch.compile(Both(model), backend="aot_eager")(batch())
    balancer = Balancer(Equal(), CAGrad(), tasks=TASKS)
    with pytest.warns(UserWarning, match=r"cannot be inferred inside a compiled model.*`shared=`"):
        balancer.backward(dict(zip(TASKS, losses, strict=True)))
    torch.compiler.reset()


def test_a_compiled_trunk_tells_what_is_shared() -> None:
    torch.compiler.reset()
    model = Network()
    expected = gradients_of_inferred(model)
    model.trunk = torch.compile(model.trunk, backend="aot_eager")
    actual = gradients_of_inferred(model)
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other)
    torch.compiler.reset()


def gradients_of_inferred(model: Network) -> list[Tensor | None]:
    model.zero_grad()
    Balancer(Equal(), CAGrad(), tasks=TASKS).backward(model.losses(batch()))
    return list(gradients(model).values())
