"""The loop is a plain loop where nothing is balanced, and every strategy goes through it."""

import inspect
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, mean_squared_error, r2_score

import mtbalance
from examples.digits.data import data_of, stream
from examples.digits.methods import BASELINE, PAIRS, SINGLE, WRAPPED, balancer_of, catalogue, check
from examples.digits.setting import TASKS
from examples.digits.study import Job, attempt
from examples.digits.training import Network, Training, train
from mtbalance import _factory
from tests.digits._small import TINY


def plain_loop(seed, rate, tasks=TASKS):
    """Sum the losses, go back once, and step: no Balancer anywhere."""
    data = data_of(seed, TINY)
    network = Network(TINY, seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=rate)
    order, step = stream(seed, "batches"), 0
    ink = (data.train.ink - data.train.ink.mean()) / data.train.ink.std()
    for _ in range(2):
        for picked in torch.randperm(120, generator=order).split(40):
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1, (step + 1) / 3) * (1 - step / 6)
            h = network.trunk(data.train.pixels[picked])
            upper, lower, grey = (network.heads[task](h) for task in TASKS)
            losses = {
                "upper-left": F.cross_entropy(upper, data.train.upper_left[picked]),
                "lower-right": F.cross_entropy(lower, data.train.lower_right[picked]),
                "ink": (grey[:, 0] - ink[picked]).square().mean(),
            }
            optimizer.zero_grad()
            sum(losses[task] for task in tasks).backward()
            optimizer.step()
            step += 1
    return network, data


@pytest.mark.parametrize("seed", [0, 1])
def test_equal_weights_train_as_a_plain_loop_does(seed):
    network, data = plain_loop(seed, 0.02)
    for part, found in zip(
        (data.validation, data.test), train("sum", seed, 0.02, TINY), strict=True
    ):
        with torch.no_grad():
            out = network(part.pixels)
        mean, deviation = data.train.ink.mean(), data.train.ink.std()
        ink = out["ink"] * deviation + mean
        classes = {task: out[task].argmax(1) for task in TASKS[:2]}
        assert found.upper_left == pytest.approx(
            accuracy_score(part.upper_left, classes["upper-left"]), abs=1e-6
        )
        assert found.lower_right == pytest.approx(
            accuracy_score(part.lower_right, classes["lower-right"]), abs=1e-6
        )
        assert found.ink == pytest.approx(mean_squared_error(part.ink, ink) ** 0.5, abs=1e-4)
        assert found.explained == pytest.approx(r2_score(part.ink, ink), abs=1e-3)
        shares = (found.upper_left, found.lower_right, found.explained)
        assert found.score == pytest.approx(sum(shares) / 3)


@pytest.mark.parametrize("method", ["sum", f"{SINGLE}:ink"])
def test_parameters_are_those_of_a_plain_loop(method):
    tasks = TASKS if method == "sum" else ("ink",)
    network, _ = plain_loop(0, 0.02, tasks)
    training = Training(method, 0, 0.02, TINY)
    for _ in range(TINY.epochs):
        for batch in training.epoch():
            training.step(batch)
        training.end_epoch()
    for ours, plain in zip(training.network.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-7)


def test_a_network_per_task_learns_its_task_alone():
    training = Training(f"{SINGLE}:lower-right", 0, 0.02, TINY)
    before = {name: value.clone() for name, value in training.network.named_parameters()}
    training.step(next(training.epoch()))
    moved = {
        name.rpartition(".")[0]
        for name, value in training.network.named_parameters()
        if not torch.equal(value, before[name])
    }
    assert moved == {"trunk.1", "trunk.3", "heads.lower-right"}
    measured = training.measure(training.data.test)
    assert measured.score == measured.lower_right
    assert [math.isnan(x) for x in (measured.upper_left, measured.ink, measured.explained)] == [
        True
    ] * 3


def test_all_methods_see_the_same():
    first, *others = (
        Training(name, 5, 0.01, TINY) for name in ("sum", "rlw", "autolambda", "modo")
    )
    batches = [batch.sources for _ in range(2) for batch in first.epoch()]
    assert len(batches) == 6
    for other in others:
        for a, b in zip(first.network.parameters(), other.network.parameters(), strict=True):
            assert torch.equal(a, b)
        seen = []
        for _ in range(2):
            for batch in other.epoch():
                seen.append(batch.sources)
                other.step(batch)  # drawing more does not change the batches
            other.end_epoch()
        assert all(torch.equal(a, b) for a, b in zip(seen, batches, strict=True))


def test_every_epoch_is_ended_after_its_steps(monkeypatch):
    told = []
    for name in ("backward", "after_step", "end_epoch"):
        original = getattr(mtbalance.Balancer, name)

        def spy(self, *arguments, _name=name, _original=original, **options):
            told.append(_name)
            return _original(self, *arguments, **options)

        monkeypatch.setattr(mtbalance.Balancer, name, spy)
    train("dwa", 0, 0.01, TINY)
    assert told == [*["backward", "after_step"] * 3, "end_epoch"] * 2


@pytest.mark.parametrize(("method", "further"), [("autolambda", 1), ("modo", 2)])
def test_further_batches_are_training_pictures(method, further):
    training = Training(method, 0, 0.01, TINY)
    seen = []
    original = training.losses
    training.losses = lambda batch: (seen.append(batch), original(batch))[1]
    batch = next(training.epoch())
    training.step(batch)
    assert seen[0] is batch
    assert len(seen) == 1 + further
    known = {tuple(pair) for pair in training.data.train.sources.tolist()}
    for number, other in enumerate(seen[1:], 1):
        assert {tuple(pair) for pair in other.sources.tolist()} <= known
        assert not any(torch.equal(other.sources, one.sources) for one in seen[:number])


def test_the_same_training_twice_is_the_same_and_touches_no_global_state():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = train("pcgrad", 1, 0.03, TINY)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(8)
    assert repr(train("pcgrad", 1, 0.03, TINY)) == repr(first)


def test_what_a_weighting_learns_is_in_the_optimizer():
    training = Training("uncertainty", 0, 0.01, TINY)
    (learned,) = training.balancer.parameters()
    before = learned.clone()
    for batch in training.epoch():
        training.step(batch)
    assert not torch.equal(learned, before)
    assert training.optimizer.param_groups[1]["lr"] == training.optimizer.param_groups[0]["lr"]
    assert list(training.balancer.weighting.kind) == [
        "classification",
        "classification",
        "regression",
    ]


def test_the_learning_rate_rises_in_the_first_epoch_and_falls_to_zero():
    training = Training("sum", 0, 0.5, TINY)
    rates = []
    for _ in range(TINY.epochs):
        for batch in training.epoch():
            rates.append(training.optimizer.param_groups[0]["lr"])
            training.step(batch)
    expected = [1 / 3, 2 / 3 * 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    assert rates == pytest.approx([0.5 * share for share in expected])


@pytest.mark.parametrize("method", catalogue())
def test_every_method_trains(method):
    done = attempt(Job(method, 0, 0.01), TINY)
    assert (done.error, done.warning) == ("", "")


def test_the_catalogue_is_that_of_make_balancer():
    names = catalogue()
    assert names[0] == BASELINE
    assert len(set(names)) == len(names)
    assert {*PAIRS, *WRAPPED} < set(names)
    known = {**_factory.WEIGHTINGS, **_factory.GRADIENTS}
    plain = {known[name] for name in names if name in known}
    assert plain == set(known.values()) - {mtbalance.weighting.Equal}
    for family in (mtbalance.weighting, mtbalance.gradient):
        for public in family.__all__:  # wrappers, too
            kind = getattr(family, public)
            if issubclass(kind, torch.nn.Module) and not inspect.isabstract(kind):
                assert any(public.lower() in name for name in names) or public == "Equal", public


def test_strategies_are_told_only_what_they_must_be():
    pcgrad = balancer_of("pcgrad", shared=None, optimizer=None, seed=3).gradient
    primary = balancer_of("pcgrad(primary)", shared=None, optimizer=None, seed=3).gradient
    cosine = balancer_of("gradientcosine", shared=None, optimizer=None, seed=3).gradient
    assert (pcgrad.primary, primary.primary, cosine.primary) == (None, "upper-left", "upper-left")


def test_unknown_methods_are_told():
    check("nash")
    with pytest.raises(ValueError, match="Did you mean 'cagrad'"):
        check("cagard")


def test_a_network_that_has_gone_astray_is_an_error():
    training = Training("sum", 0, 0.01, TINY)
    with torch.no_grad():
        training.network.heads["ink"].bias.fill_(math.inf)
    with pytest.raises(FloatingPointError, match="not finite"):
        training.measure(training.data.test)


def test_the_last_pictures_that_fill_no_batch_are_left_out():
    setting = replace(TINY, pictures=130)
    assert [len(batch) for batch in Training("sum", 0, 0.01, setting).epoch()] == [40] * 3
    assert setting.steps == 6
