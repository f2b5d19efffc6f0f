"""What has been accumulated is kept, copied or discarded, and none of that in silence."""

import copy
import pickle
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from mtbalance import Balancer
from mtbalance.gradient import CAGrad
from mtbalance.weighting import DWA, Equal
from tests._networks import TASKS, Network, batch, gradients

FIRST, SECOND = batch(seed=1), batch(seed=2)
KEPT = r"What was accumulated before is kept; balancer.discard\(\) drops it\."


def model_and_balancer(**options: object) -> tuple[Network, Balancer]:
    torch.manual_seed(0)
    model = Network()
    return model, Balancer(Equal(), CAGrad(), tasks=TASKS, shared=model.trunk, **options)


def after(*batches: Tensor) -> dict[str, Tensor | None]:
    """Return what a step of these micro-batches writes."""
    model, balancer = model_and_balancer()
    for rows in batches:
        balancer.accumulate(model.losses(rows))
    balancer.apply()
    return gradients(model)


def assert_same(some: dict[str, Tensor | None], others: dict[str, Tensor | None]) -> None:
    for (name, one), other in zip(some.items(), others.values(), strict=True):
        assert_close(one, other, rtol=1e-12, atol=1e-12, msg=name)


class NoBackward(torch.autograd.Function):
    """Whose backward pass fails."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("out of memory.")


Losses = dict[str, Tensor]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda losses: {**losses, "c": losses["c"].detach()}, "'c' must have a graph"),
        (lambda losses: {**losses, "d": losses["c"]}, "`losses` must name tasks among"),
        (lambda losses: {**losses, "c": NoBackward.apply(losses["c"])}, r"out of memory\."),
    ],
)
@pytest.mark.parametrize("policy", ["raise", "drop"])
def test_a_micro_batch_is_added_as_a_whole_or_not_at_all(
    broken: Callable[[Losses], Losses], message: str, policy: str
) -> None:
    model, balancer = model_and_balancer(nonfinite=policy)
    balancer.accumulate(model.losses(FIRST))
    losses = broken(model.losses(SECOND))
    if policy == "drop":  # what is marked as not finite belongs to the micro-batch, too
        losses["a"] = losses["a"] * torch.nan
    with pytest.raises((ValueError, RuntimeError), match=f"{message}.* {KEPT}"):
        balancer.accumulate(losses)
    with pytest.raises((ValueError, RuntimeError), match=f"{message}.* {KEPT}"):
        balancer.backward(broken(model.losses(SECOND)))
    assert balancer.apply().nonfinite == ()
    assert_same(gradients(model), after(FIRST))


def test_an_error_in_the_first_micro_batch_says_nothing_of_others() -> None:
    model, balancer = model_and_balancer()
    with pytest.raises(TypeError) as caught:
        balancer.accumulate(list(model.losses(FIRST).values()))
    assert "accumulated before" not in str(caught.value)


def test_a_step_that_fails_half_way_through_adding_is_discarded() -> None:
    """Sums that do not fit into memory may come after some that do."""
    model, balancer = model_and_balancer()
    balancer.accumulate(model.losses(FIRST))
    add, added = balancer._pending.add, []

    def failing(row):
        if added:
            raise torch.OutOfMemoryError("out of memory.")
        added.append(row)
        add(row)

    balancer._pending.add = failing
    with pytest.raises(torch.OutOfMemoryError, match="before is discarded, as the step is over"):
        balancer.accumulate(model.losses(SECOND))
    del balancer._pending.add
    balancer.backward(model.losses(FIRST))
    assert_same(gradients(model), after(FIRST))


def test_a_loss_that_is_not_finite_ends_the_step() -> None:
    model, balancer = model_and_balancer()
    balancer.accumulate(model.losses(FIRST))
    losses = model.losses(SECOND)
    losses["b"] = losses["b"] * torch.inf
    with pytest.raises(FloatingPointError, match="accumulated before is discarded, as the step is"):
        balancer.accumulate(losses)
    balancer.backward(model.losses(FIRST))
    assert_same(gradients(model), after(FIRST))


def test_discard_drops_what_was_accumulated_and_nothing_else() -> None:
    torch.manual_seed(0)
    model = Network()
    balancer = Balancer(DWA(), CAGrad(), tasks=TASKS, shared=model.trunk)
    balancer.backward(model.losses(FIRST))
    state = copy.deepcopy(balancer.state_dict())
    model.zero_grad()
    balancer.discard()  # nothing, and no error
    balancer.accumulate(model.losses(SECOND))
    balancer.discard()
    for key, value in balancer.state_dict().items():
        assert torch.equal(value, state[key]), key
    with pytest.raises(RuntimeError, match="nothing has been accumulated"):
        balancer.apply()
    balancer.backward(model.losses(FIRST))
    assert_same(gradients(model), after(FIRST))


def test_loading_a_state_discards_with_a_warning() -> None:
    model, balancer = model_and_balancer()
    state = copy.deepcopy(balancer.state_dict())
    balancer.load_state_dict(state)  # nothing to warn of
    balancer.accumulate(model.losses(SECOND))
    with pytest.raises(ValueError, match="version"):  # a state that is refused changes nothing
        balancer.load_state_dict(
            {"_extra_state": torch.tensor(list(b'{"version": 99}'), dtype=torch.uint8)}
        )
    balancer.apply()
    model.zero_grad()
    balancer.accumulate(model.losses(SECOND))
    for owner, prefix in ((balancer, ""), (nn.ModuleDict({"b": balancer}), "b.")):
        balancer.accumulate(model.losses(SECOND))
        with pytest.warns(UserWarning, match=re.escape("since the last apply() is discarded, as")):
            owner.load_state_dict({prefix + key: value for key, value in state.items()})
        balancer.backward(model.losses(FIRST))
        assert_same(gradients(model), after(FIRST))
        model.zero_grad()


Pair = tuple[Network, Balancer]
COPIES: dict[str, Callable[[Pair], Pair]] = {
    "deepcopy": copy.deepcopy,
    "balancer first": lambda pair: copy.deepcopy(pair[::-1])[::-1],
    "pickle": lambda pair: pickle.loads(pickle.dumps(pair)),
    "twice": lambda pair: copy.deepcopy(pickle.loads(pickle.dumps(pair))),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("shared", ["given", "inferred"])
def test_a_copy_goes_on_with_what_was_accumulated(how: str, shared: str) -> None:
    """The rows are those of the copied parameters, and the original goes on alone."""
    model, balancer = model_and_balancer()
    if shared == "inferred":
        balancer = Balancer(Equal(), CAGrad(), tasks=TASKS)
    balancer.accumulate(model.losses(FIRST))
    others = COPIES[how]((model, balancer))
    for each, its in (others, (model, balancer)):
        its.accumulate(each.losses(SECOND))
        assert len(its._pending.leaves) == len(list(each.parameters()))
        its.apply()
        assert_same(gradients(each), after(FIRST, SECOND))
        its.backward(each.losses(FIRST))  # which nothing is left for


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda b: pickle.loads(pickle.dumps(b))])
def test_a_copy_without_the_model_is_refused(copied: Callable[[Balancer], Balancer]) -> None:
    """Its gradients would go to parameters that nobody trains."""
    model, balancer = model_and_balancer()
    balancer.accumulate(model.losses(FIRST))
    other = copied(balancer)
    with pytest.raises(RuntimeError, match="this Balancer was copied without it after accumulate"):
        other.apply()
    other.discard()
    with pytest.raises(RuntimeError, match="nothing has been accumulated"):
        other.apply()
    balancer.apply()
    assert_same(gradients(model), after(FIRST))


def test_a_copy_of_parameters_that_no_module_holds() -> None:
    x = nn.Parameter(torch.tensor([1.0, 2.0]))
    balancer = Balancer(Equal(), CAGrad(), tasks=("a",), shared=[x])
    balancer.accumulate({"a": x.square().sum()})
    other_x, other = copy.deepcopy((x, balancer))
    other.apply()
    balancer.apply()
    assert torch.equal(other_x.grad, x.grad)
