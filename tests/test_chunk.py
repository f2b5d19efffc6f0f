"""Batched passes whose operations cannot be vectorised in some steps only."""

import copy
import warnings
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from mtbalance import Balancer
from mtbalance._passes import BatchedPasses
from mtbalance.gradient import CAGrad
from mtbalance.weighting import Equal
from tests._networks import TASKS, Network, ReadsItsGradient, batch

Losses = dict[str, Tensor]


class CallsOutside(torch.autograd.Function):
    """One that leaves torch, and whose error is none of torch's, and without a word."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, slope: Tensor) -> Tensor:
        try:
            float(slope.sum())
        except RuntimeError:
            raise TypeError from None
        return slope


def tanh(x: Tensor) -> Tensor:
    return x.tanh()


def losses_of(network: Network, middle: Callable[[Tensor], Tensor], seed: int) -> Losses:
    rows = batch(seed=seed)
    hidden = middle(network.trunk(rows))
    return {
        task: (head(hidden) - rows.sum(1, keepdim=True)).square().mean()
        for task, head in network.heads.items()
    }


@pytest.mark.parametrize("bad", [ReadsItsGradient.apply, CallsOutside.apply])
@pytest.mark.parametrize("chunk", [2, 3])
def test_an_operation_that_comes_later_runs_one_by_one(bad, chunk: int) -> None:
    """Each such chunk is counted, one warns, and other steps are batched as before."""
    network = Network()
    reference = copy.deepcopy(network)
    balancer = Balancer(Equal(), CAGrad(), tasks=TASKS, shared=network.trunk, chunk=chunk)
    plain = Balancer(Equal(), CAGrad(), tasks=TASKS, shared=reference.trunk)
    found = []
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for seed, middle in enumerate((tanh, bad, tanh, bad, tanh)):
            found.append(balancer.backward(losses_of(network, middle, seed)).fallbacks)
            plain.backward(losses_of(reference, middle, seed))
    assert found == [0, 1, 0, 1, 0]
    (warning,) = told
    assert "cannot be vectorised over tasks and runs one by one" in str(warning.message)
    for one, other in zip(network.parameters(), reference.parameters(), strict=True):
        assert_close(one.grad, other.grad, rtol=1e-12, atol=1e-14)


def test_what_fails_twice_in_a_row_is_not_tried_again() -> None:
    network = Network()
    balancer = Balancer(Equal(), CAGrad(), tasks=TASKS, shared=network.trunk, chunk=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        middles = (tanh, *[ReadsItsGradient.apply] * 4)
        found = [balancer.backward(losses_of(network, m, 0)).fallbacks for m in middles]
    assert found == [0, 1, 1, 0, 0]


def test_a_chunk_after_one_that_worked() -> None:
    """In the same step: the second chunk's operation has no vectorised form."""
    network = Network(("a", "b", "c", "d"))
    reference = copy.deepcopy(network)

    def losses(of: Network) -> Losses:
        hidden = of.trunk(batch())
        other = ReadsItsGradient.apply(hidden)
        return {
            task: head(hidden if task in "ab" else other).square().mean()
            for task, head in of.heads.items()
        }

    tasks = tuple(network.heads)
    balancer = Balancer(Equal(), CAGrad(), tasks=tasks, shared=network.trunk, chunk=2)
    with pytest.warns(RuntimeWarning, match="cannot be vectorised over tasks"):
        assert balancer.backward(losses(network)).fallbacks == 1
    Balancer(Equal(), CAGrad(), tasks=tasks, shared=reference.trunk).backward(losses(reference))
    for one, other in zip(network.parameters(), reference.parameters(), strict=True):
        assert_close(one.grad, other.grad, rtol=1e-12, atol=1e-14)


def test_an_error_of_the_model_itself_is_raised_as_it_is() -> None:
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx, slope: Tensor) -> Tensor:
            raise RuntimeError("broken on purpose")

    network = Network()
    balancer = Balancer(Equal(), CAGrad(), tasks=TASKS, shared=network.trunk, chunk=3)
    assert balancer.backward(losses_of(network, tanh, 0)).fallbacks == 0
    with (
        pytest.warns(RuntimeWarning, match="one by one .broken on purpose."),
        pytest.raises(RuntimeError, match="broken on purpose") as caught,
    ):
        balancer.backward(losses_of(network, Broken.apply, 0))
    assert caught.value.__context__ is None
    balancer.backward(losses_of(network, tanh, 0))
    assert balancer.fallbacks == 1


# --- graphs are freed -----------------------------------------------------------------------------


class Saves(torch.autograd.Function):
    """An operation that saves a tensor of its own, of which a list keeps a weak reference."""

    @staticmethod
    def forward(ctx, x: Tensor, alive: list[weakref.ref[Tensor]]) -> Tensor:
        saved = torch.ones_like(x)
        alive.append(weakref.ref(saved))
        ctx.save_for_backward(saved)
        return x.clone()

    @staticmethod
    def backward(ctx, slope: Tensor) -> tuple[Tensor, None]:
        (saved,) = ctx.saved_tensors
        return slope * saved, None


@pytest.mark.parametrize("policy", ["raise", "propagate"])
@pytest.mark.parametrize("chunk", [2, 3, 4])
def test_graphs_are_freed_while_the_losses_live(chunk: int, policy: str) -> None:
    """Those of the trunk and of all heads, in the first step and in later ones."""
    network = Network(("a", "b", "c", "d"))
    tasks = tuple(network.heads)
    balancer = Balancer(
        Equal(), CAGrad(), tasks=tasks, shared=network.trunk, chunk=chunk, nonfinite=policy
    )
    for _ in range(3):
        alive: list[weakref.ref[Tensor]] = []
        inner = network.trunk(batch())
        activations = weakref.ref(inner)
        hidden = Saves.apply(inner.exp(), alive)
        losses = {
            task: Saves.apply(head(hidden).square(), alive).mean()
            for task, head in network.heads.items()
        }
        del inner
        assert all(each() is not None for each in alive)
        assert balancer.backward(losses).fallbacks == 0
        assert activations() is None
        assert [each() for each in alive] == [None] * 5
        with pytest.raises(RuntimeError, match="second time"):
            losses["d"].backward()


def test_what_a_later_chunk_needs_stays_until_then() -> None:
    network = Network(("a", "b", "c", "d"))
    trunk: list[weakref.ref[Tensor]] = []
    heads: list[weakref.ref[Tensor]] = []
    hidden = Saves.apply(network.trunk(batch()), trunk)
    losses = [Saves.apply(head(hidden), heads).mean() for head in network.heads.values()]
    leaves = list(network.parameters())
    rows = BatchedPasses(2)(losses, leaves, [True, True, True, False], lambda _: None)
    next(rows)
    assert [each() is None for each in heads] == [True, True, False, False]
    assert trunk[0]() is not None
    assert len(list(rows)) == 3
    assert [each() for each in (*heads, *trunk)] == [None] * 5
