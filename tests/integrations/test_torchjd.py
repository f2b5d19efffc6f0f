"""TorchJD's aggregators here, and ours there, against the real package."""

import copy
import doctest
import importlib
import io
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from mtbalance import Balancer, GradientStrategy, with_tasks
from mtbalance._random import RandomSource
from mtbalance.gradient import CAGrad, Normalized, PCGrad, Smoothed
from mtbalance.weighting import Constant, Equal
from tests._catalogue import GRADIENT_CASES, GradientCase
from tests._device import DEVICE
from tests._networks import TASKS, Network, batch, gradients, raw_rows
from tests._samplers import random_gradients

pytest.importorskip("torchjd", reason='needs TorchJD: pip install "mtbalance[torchjd]"')

from torchjd import aggregation as jd
from torchjd.autojac import jac_to_grad, mtl_backward

from mtbalance.integrations.torchjd import FromTorchJD, as_aggregator

pytestmark = pytest.mark.filterwarnings(
    "ignore:You are solving a parameterized problem that is not DPP:UserWarning"  # NashMTL
)

PREFERENCE = torch.tensor([1.0, 2.0, 0.5])  # float32, unlike the gradients
MAKERS: dict[str, Callable[[], jd.Aggregator]] = {
    "AlignedMTL": jd.AlignedMTL,
    "CAGrad": lambda: jd.CAGrad(c=0.4),
    "ConFIG": jd.ConFIG,
    "Constant": lambda: jd.Constant(PREFERENCE.double()),
    "DualProj": jd.DualProj,
    "ExcessMTL": jd.ExcessMTL,
    "FairGrad": lambda: jd.FairGrad(alpha=1.0),
    "GradDrop": jd.GradDrop,
    "GradVac": jd.GradVac,
    "IMTLG": jd.IMTLG,
    "Krum": lambda: jd.Krum(n_byzantine=0),
    "MGDA": jd.MGDA,
    "Mean": jd.Mean,
    "NashMTL": lambda: jd.NashMTL(n_tasks=3),
    "PCD": jd.PCD,
    "PCGrad": jd.PCGrad,
    "Random": jd.Random,
    "Sum": jd.Sum,
    "TrimmedMean": lambda: jd.TrimmedMean(1),
    "UPGrad": jd.UPGrad,
    # Weightings that TorchJD leaves its users to make aggregators of.
    "CRMOGM": lambda: jd.GramianWeightedAggregator(jd.CRMOGMWeighting(jd.MGDAWeighting())),
    "CRMOGM of ExcessMTL": lambda: jd.WeightedAggregator(
        jd.CRMOGMWeighting(jd.ExcessMTL().weighting)
    ),
}
REMEMBER = ("CRMOGM", "CRMOGM of ExcessMTL", "ExcessMTL", "GradVac", "NashMTL", "PCD")
BY_MATRIX = ("ConFIG", "CRMOGM of ExcessMTL", "ExcessMTL", "GradDrop", "NashMTL", "TrimmedMean")


def make(name: str) -> jd.Aggregator:
    try:
        return MAKERS[name]()
    except (ImportError, NameError) as error:
        pytest.skip(f"TorchJD lacks a solver: {error}")


def network() -> Network:
    torch.manual_seed(0)
    return Network()


def balancer_of(model: Network, aggregator: jd.Aggregator, **options: Any) -> Balancer:
    options = {"tasks": TASKS, "shared": model.trunk, **options}
    return Balancer(Equal(), FromTorchJD(aggregator), **options)


def losses_there(model: Network, rows: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return the losses of ``Network.losses`` and what the heads get."""
    hidden = model.trunk(rows)
    targets = [rows.sum(1, keepdim=True) * (-2.0) ** number for number in range(len(TASKS))]
    heads = zip(model.heads.values(), targets, strict=True)
    return [(head(hidden) - target).square().mean() for head, target in heads], hidden


def step(model: nn.Module) -> None:
    """Go on by so little that training does not magnify what rounding differs by."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad, alpha=1e-3)
                parameter.grad = None


def test_every_aggregator_is_tested() -> None:
    kinds = {name for name in jd.__all__ if issubclass(getattr(jd, name), jd.Aggregator)}
    bases = {"Aggregator", "GramianWeightedAggregator", "WeightedAggregator"}
    assert kinds - bases <= MAKERS.keys()


@pytest.mark.parametrize("name", MAKERS)
def test_an_aggregator_does_here_what_it_does_there(name: str) -> None:
    """Four steps of a network, with draws from a stream of our own."""
    aggregator, model = make(name), network()
    other, there = copy.deepcopy(aggregator), copy.deepcopy(model)
    balancer, stream = balancer_of(model, aggregator), RandomSource()
    for number in range(4):
        rows = batch(seed=number)
        balancer.backward(model.losses(rows))
        losses, hidden = losses_there(there, rows)
        mtl_backward(losses, hidden, parallel_chunk_size=1)
        with stream.as_global_stream([DEVICE]):
            jac_to_grad(there.trunk.parameters(), other)
        expected = gradients(there)
        for parameter, gradient in gradients(model).items():
            assert_close(gradient, expected[parameter], rtol=1e-6, atol=1e-6)
        step(model)
        step(there)
    assert balancer.gradient.by_gramian == (name not in BY_MATRIX)


@pytest.mark.parametrize("name", ["AlignedMTL", "ConFIG", "UPGrad"])
def test_preferences_of_another_dtype(name: str) -> None:
    make(name)  # or skip, without its solver
    rows, kind = random_gradients(3, 7).double(), getattr(jd, name)
    mine = FromTorchJD(kind(pref_vector=PREFERENCE))(rows)
    assert_close(mine, kind(pref_vector=PREFERENCE.double())(rows), rtol=1e-6, atol=1e-6)


def test_the_scale() -> None:
    """The docstring says which aggregators give the mean of equal rows, CAGrad (1 + c) times."""
    row = torch.tensor([3.0, 4.0]).double()
    own = {"Constant": 3.5, "FairGrad": 3**0.5 / 5, "NashMTL": 1 / 5, "CAGrad": 1.4}
    own |= dict.fromkeys(("ConFIG", "GradDrop", "GradVac", "PCGrad", "Sum"), 3.0)
    for name in MAKERS:
        try:
            direction = FromTorchJD(MAKERS[name]())(row.expand(3, 2))
        except (ImportError, NameError):
            continue
        assert_close(direction, own.get(name, 1.0) * row, rtol=1e-3, atol=1e-3)
    rows = random_gradients(3, 7).double()
    assert_close(FromTorchJD(jd.Mean(), scale="rows")(rows), rows.sum(0))
    assert_close(FromTorchJD(jd.TrimmedMean(0), scale="rows")(rows), rows.sum(0))
    assert_close(FromTorchJD(jd.Sum(), scale=0.5)(rows), rows.sum(0) / 2)
    with pytest.raises(ValueError, match="`scale` must be positive, but got 0"):
        FromTorchJD(jd.Sum(), scale=0)


def test_weighted_rows_and_low_precision() -> None:
    """Rows arrive with their weights; a matrix is made in float32 of bfloat16."""
    model = network().float()
    rows = batch().float()
    balancer = Balancer(
        Constant([1, 2, 3]),
        FromTorchJD(jd.ConFIG()),
        tasks=TASKS,
        shared=model.trunk,
        dtype=torch.bfloat16,
    )
    balancer.backward(model.losses(rows))
    low = copy.deepcopy(model)
    low.zero_grad()
    matrix = raw_rows(low.losses(rows), list(low.trunk.parameters()))
    matrix = matrix * torch.tensor([[1.0], [2.0], [3.0]])
    expected = jd.ConFIG()(matrix)
    actual = torch.cat([p.grad.flatten() for p in model.trunk.parameters()])
    assert_close(actual, expected, rtol=0.05, atol=0.02 * float(expected.abs().max()))
    assert FromTorchJD(jd.ConFIG())(matrix.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["MGDA", "TrimmedMean", "ConFIG"])
def test_rows_that_are_not_finite_give_nan(name: str) -> None:
    rows = random_gradients(3, 4)
    rows[1, 2] = torch.inf
    direction = FromTorchJD(make(name))(rows)
    assert direction.isnan()[2]
    assert direction.isnan().all() == (name != "TrimmedMean")  # which looks at single columns


# --- what they remember, and draw -----------------------------------------------------------------


def trained(steps: int, model: Network, balancer: Balancer, first: int = 0) -> Tensor:
    """Train from a step on; return the last direction."""
    for number in range(first, first + steps):
        balancer.backward(model.losses(batch(seed=number)))
        direction = torch.cat([p.grad.flatten() for p in model.trunk.parameters()])
        step(model)
    return direction


def groups_of(model: Network) -> dict[str, nn.Module]:
    return {"below": model.trunk[0], "above": model.trunk[3]}


@pytest.mark.parametrize("name", [*REMEMBER, "PCGrad", "GradDrop"])
def test_what_is_remembered_and_drawn_travels(name: str) -> None:
    """Through torch.save, to a fresh Balancer, with two groups of parameters."""
    model = network()
    balancer = balancer_of(model, make(name), shared=groups_of(model))
    trained(3, model, balancer)
    file = io.BytesIO()
    torch.save(balancer.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(model)
    fresh = balancer_of(other, make(name), shared=groups_of(other))
    fresh.load_state_dict(torch.load(file, weights_only=True))
    copied_model, copied = copy.deepcopy((model, balancer))
    expected = trained(3, model, balancer, 3)
    assert torch.equal(trained(3, other, fresh, 3), expected)
    assert torch.equal(trained(3, copied_model, copied, 3), expected)


@pytest.mark.parametrize("name", REMEMBER)
def test_groups_remember_for_themselves(name: str) -> None:
    """Each group does what an aggregator of its own does."""
    model = network()
    balancer = balancer_of(model, make(name), shared=groups_of(model))
    alone = {group: FromTorchJD(make(name)) for group in ("below", "above")}
    order = {"below": 0, "above": 1}
    for strategy in alone.values():  # draws go on from group to group
        strategy.random.generator = balancer.gradient.random.generator
    for number in range(3):
        step(model)
        state = balancer.gradient.random.generator.get_state()
        balancer.backward(model.losses(batch(seed=number)))
        after = balancer.gradient.random.generator.get_state()
        balancer.gradient.random.generator.set_state(state)
        for group in sorted(alone, key=order.__getitem__):
            parts = list(groups_of(model)[group].parameters())
            rows = raw_rows(model.losses(batch(seed=number)), parts)
            direction = torch.cat([p.grad.flatten() for p in parts])
            assert_close(direction, alone[group](rows), rtol=1e-6, atol=1e-9)
        assert torch.equal(balancer.gradient.random.generator.get_state(), after)


@pytest.mark.parametrize("name", REMEMBER)
def test_a_step_that_writes_nothing_is_not_remembered(name: str) -> None:
    """It ends in the second group of parameters, after the first one's direction."""
    outcomes = []
    for spoilt in (False, True):
        model = network()
        balancer = balancer_of(model, make(name), shared=groups_of(model))
        trained(2, model, balancer)
        if spoilt:
            strategy = balancer.gradient
            take, places = strategy.take, strategy.random.places()

            def fail(active: Tensor | slice, group: int, take: Any = take) -> None:
                take(active, group)
                if group == 1:
                    raise RuntimeError("spoilt")

            strategy.take = fail
            with pytest.raises(RuntimeError, match="spoilt"):
                balancer.backward(model.losses(batch(seed=9)))
            strategy.take = take
            strategy.random.follow(places)  # draws are not taken back
        outcomes.append(trained(2, model, balancer, 2))
    assert torch.equal(*outcomes)


@pytest.mark.parametrize("name", [*REMEMBER, "PCGrad", "GradDrop"])
def test_reset(name: str) -> None:
    model = network()
    balancer = balancer_of(model, make(name))
    start = copy.deepcopy(model.state_dict())
    first = trained(2, model, balancer)
    balancer.reset()
    model.load_state_dict(start)
    assert torch.equal(trained(2, model, balancer), first)


def test_the_global_stream_stays() -> None:
    before = torch.get_rng_state()
    FromTorchJD(jd.PCGrad())(random_gradients(4, 5))
    assert torch.equal(torch.get_rng_state(), before)


def test_states_of_others_are_refused() -> None:
    one, other = FromTorchJD(jd.GradVac()), FromTorchJD(jd.MGDA())
    with pytest.raises(ValueError, match=r"must be that of MGDA.* in 1 groups"):
        other.load_state_dict(one.state_dict())
    with pytest.raises(ValueError, match="Give the Balancer the same aggregator"):
        one.load_state_dict(other.state_dict())
    one.bind(TASKS)
    with pytest.raises(RuntimeError, match="Make a new strategy"):
        one.bind(("x", "y"))
    with pytest.raises(ValueError, match="is something else"):
        one.set_extra_state(torch.zeros(3, dtype=torch.uint8))


def test_the_given_aggregator_is_copied() -> None:
    given = jd.GradVac()
    FromTorchJD(given)(random_gradients(3, 4))
    assert given.gramian_weighting._phi_t is None


def test_hooks_of_an_aggregator_see_the_rows() -> None:
    aggregator, shapes = jd.MGDA(), []
    aggregator.register_forward_pre_hook(lambda _, given: shapes.append(given[0].shape))
    strategy = FromTorchJD(aggregator)
    strategy(random_gradients(3, 4))
    assert shapes == [(3, 4)]
    assert not strategy.by_gramian


def test_the_examples_run() -> None:
    failed, _ = doctest.testmod(sys.modules[FromTorchJD.__module__])
    assert failed == 0


# --- errors ---------------------------------------------------------------------------------------


def test_an_aggregator_as_a_strategy_says_how() -> None:
    model = network()
    remedy = r"but got MGDA\. Give mtbalance.integrations.torchjd.FromTorchJD\(aggregator\)"
    with pytest.raises(TypeError, match=remedy):
        Balancer(Equal(), jd.MGDA(), tasks=TASKS, shared=model.trunk)
    with pytest.raises(TypeError, match=r"got the class MGDA\. Give mtb"):
        Balancer(Equal(), jd.MGDA, tasks=TASKS, shared=model.trunk)
    with pytest.raises(
        TypeError, match=r"got MGDAWeighting\. Give mtb.*\(aggregator\) as `gradient`"
    ):
        Balancer(jd.MGDAWeighting(), CAGrad(), tasks=TASKS, shared=model.trunk)
    with pytest.raises(TypeError, match=r"`aggregator` must be a Aggregator, but got CAGrad\."):
        FromTorchJD(CAGrad())
    with pytest.raises(TypeError, match="`strategy` must be a GradientStrategy"):
        as_aggregator(jd.MGDA())


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchjd", None)
    monkeypatch.delitem(sys.modules, "mtbalance.integrations.torchjd")
    with pytest.raises(ImportError, match=r'Run `pip install "mtbalance\[torchjd\]"`'):
        importlib.import_module("mtbalance.integrations.torchjd")


@pytest.mark.parametrize("name", ["GradVac", "MGDA"])
def test_a_saved_state_for_other_tasks(name: str) -> None:
    """One that remembers says that it cannot; the same tasks, or one that does not, can."""
    model = network()

    def make(*tasks: str) -> Balancer:
        strategy = FromTorchJD(getattr(jd, name)())
        return Balancer(Equal(), strategy, tasks=tasks, shared=model.trunk)

    old, same, other = make(*TASKS), make(*TASKS), make("c", "a")
    old.backward(model.losses(batch()))
    state = with_tasks(old.state_dict(), same)
    assert all(torch.equal(state[key], value) for key, value in old.state_dict().items())
    if name == "GradVac":
        words = r"FromTorchJD must know .*'_extra_state' .* from a, b, c to c, a, but does not"
        with pytest.raises(ValueError, match=words):
            with_tasks(old.state_dict(), other)
        return
    other.load_state_dict(with_tasks(old.state_dict(), other))
    assert other.end_epoch().active == {"c": 1, "a": 1}


# --- ours there -----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", GRADIENT_CASES, ids=lambda case: case.name)
def test_a_strategy_does_there_what_it_does_here(case: GradientCase) -> None:
    """In several calls, on one stream each, also from a state that was saved."""
    strategy, other = case.make(), case.make()
    if strategy.further_batches:
        with pytest.raises(ValueError, match="must need no further batches"):
            as_aggregator(strategy)
        return
    aggregator = as_aggregator(strategy)
    assert isinstance(aggregator, jd.Aggregator)
    assert repr(aggregator) == f"as_aggregator({strategy!r})"
    rows = [random_gradients(4, 9, seed) for seed in range(4)]
    expected = [other(each) for each in rows]
    for each, direction in zip(rows[:2], expected[:2], strict=True):
        assert_close(aggregator(each), direction, rtol=1e-6, atol=1e-6)
    fresh = as_aggregator(case.make())
    fresh.load_state_dict(copy.deepcopy(aggregator.state_dict()))
    for each in rows[2:]:
        assert torch.equal(aggregator(each), fresh(each))
    fresh.reset()
    for each, direction in zip(rows, expected, strict=True):
        assert_close(fresh(each), direction, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("optimized", [False, True])
@pytest.mark.parametrize("ours", [PCGrad, CAGrad, lambda: Smoothed(Normalized(CAGrad()), 0.5)])
def test_jac_to_grad_takes_ours(ours: Callable[[], GradientStrategy], optimized: bool) -> None:
    model = network()
    there = copy.deepcopy(model)
    balancer = Balancer(Equal(), ours(), tasks=TASKS, shared=model.trunk)
    balancer.backward(model.losses(batch()))
    losses, hidden = losses_there(there, batch())
    mtl_backward(losses, hidden, parallel_chunk_size=1)
    weights = jac_to_grad(
        there.trunk.parameters(), as_aggregator(ours()), optimize_gramian_computation=optimized
    )
    for name, gradient in gradients(model).items():
        assert_close(gradient, gradients(there)[name])
    assert weights.shape == (3,)
