"""Ranks with parts of a batch do what one process does with the whole batch."""

from typing import Any
from unittest import mock

import pytest
import torch

from mtbalance import PAPER_COMBINATIONS, _factors
from tests.distributed.harness import ALONE, Here, Pool
from tests.distributed.runs import (
    CATALOGUE,
    CHOICES,
    Outcome,
    assert_equal,
    ddp,
    plain,
    same_everywhere,
    train,
)

TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-6}
WRAPPERS: dict[str, dict[str, bool] | None] = {
    "no wrapper": None,
    "DDP": {},
    "DDP, finding unused parameters": {"find_unused_parameters": True},
    "DDP, gradients as views": {"gradient_as_bucket_view": True},
    "DDP, static graph": {"static_graph": True},
}


def train_all(
    here: Here, wrapper: str, names: tuple[str, ...], options: dict[str, Any]
) -> dict[str, Outcome]:
    """Train with every pair; one round trip for all of them."""
    arguments = WRAPPERS[wrapper]
    wrap = plain if arguments is None else ddp(**arguments)
    options = {"warmup_epochs": 0, **options}  # of the one that takes it
    return {name: train(here, name, wrap=wrap, **options) for name in names}


def assert_all_equal(
    pool: Pool,
    wrapper: str,
    tolerance: float,
    names: tuple[str, ...] = PAPER_COMBINATIONS,
    **options: Any,
) -> None:
    ranks = pool.run(train_all, wrapper, names, options)
    alone = train_all(ALONE, wrapper, names, options)
    for name in names:
        outcomes = [outcomes[name] for outcomes in ranks]
        assert_equal(outcomes, alone[name], tolerance, name)
        same_everywhere(outcomes)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_every_pair_trains_as_one_process_would(two: Pool, wrapper: str) -> None:
    """Several steps with momentum, learned weights, epochs and a look ahead, in float64."""
    assert_all_equal(two, wrapper, 1e-12)


@pytest.mark.parametrize("wrapper", ["no wrapper", "DDP"])
def test_the_rest_of_the_catalogue(two: Pool, wrapper: str) -> None:
    assert_all_equal(two, wrapper, 1e-11, CATALOGUE, **CHOICES)


@pytest.mark.parametrize("wrapper", ["no wrapper", "DDP"])
def test_every_pair_in_float32(two: Pool, wrapper: str) -> None:
    """One step: further ones would measure how training magnifies what rounding differs by."""
    assert_all_equal(two, wrapper, 1e-6, steps=1, precision=torch.float32)


def train_with_factors(here: Here, wrapper: str, names: tuple[str, ...]) -> dict[str, Outcome]:
    with mock.patch.object(_factors, "pays", return_value=True):
        return train_all(here, wrapper, names, {})


@pytest.mark.parametrize("wrapper", ["no wrapper", "DDP"])
def test_gradients_that_are_factors_in_one_process(two: Pool, wrapper: str) -> None:
    """Several average whole gradients, of which factors are no means."""
    names = ("equal+pcgrad", "uncert+cagrad")
    ranks = two.run(train_with_factors, wrapper, names)
    alone = train_with_factors(ALONE, wrapper, names)
    for name in names:
        assert_equal([outcomes[name] for outcomes in ranks], alone[name], 1e-12, name)


@pytest.mark.parametrize("wrapper", ["no wrapper", "DDP"])
def test_micro_batches(two: Pool, wrapper: str) -> None:
    """Accumulated on every rank, averaged once."""
    assert_all_equal(two, wrapper, 1e-12, micro=2)


@pytest.mark.parametrize("wrapper", ["no wrapper", "DDP", "DDP, finding unused parameters"])
def test_what_is_shared_may_be_inferred(two: Pool, wrapper: str) -> None:
    """The order of inferred parameters must not depend on the number of processes either.

    Where DDP finds unused parameters, all outputs of the model go through one operation, which
    does not mix them: heads are not shared.
    """
    assert_all_equal(two, wrapper, 1e-12, shared=None)
