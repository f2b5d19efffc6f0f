import copy
import itertools
import math
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from examples.pathology.common.devices import resolve_device
from examples.pathology.common.errors import RunError, UserError
from examples.pathology.training import learner
from examples.pathology.training import model as network
from examples.pathology.training.bags import BagStore
from examples.pathology.training.fold import fit_fold, mean_and_deviation
from examples.pathology.training.learner import Learner, needs_lookahead
from examples.pathology.training.losses import Scaler, fit_scalers
from examples.pathology.training.model import JointTransformer
from examples.pathology.training.prediction import predict
from mtbalance import PAPER_COMBINATIONS
from tests.pathology.tiny import make_tables, training, write_bag


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return make_tables(tmp_path_factory.mktemp("cohort")).load()


@pytest.fixture
def small(monkeypatch):
    """Replace the network by one that trains in a millisecond."""

    def build(outputs, in_features, **_):
        return JointTransformer(
            outputs, in_features=in_features, layers=1, d_model=16, heads=2, feedforward=16
        )

    monkeypatch.setattr(network, "JointTransformer", build)


def fit(cohort, train=6, **changes):
    patients = cohort.patients
    config = training(**{"epochs": 2, "learning_rate": 1e-3, **changes})
    return fit_fold(
        cohort,
        patients[:train],
        patients[train : train + 3],
        config,
        lookahead=patients[9:12] if "autol" in config.balancer else (),
    )


# --- fitting --------------------------------------------------------------------------------------


def test_the_look_ahead_share_is_training_part_to_the_scalers(cohort, small):
    fitted = fit(cohort, train=4, balancer="autol", epochs=1)
    known = [p.known["LF"] for p in (*cohort.patients[:4], *cohort.patients[9:12]) if p.known]
    assert fitted.scalers == {"LF": Scaler(min(known), max(known))}


def test_naive_equals_a_plain_loop_over_the_sum_of_losses(cohort, small):
    """The whole protocol written out once more, without the balancer."""
    fitted = fit(cohort, balancer="naive", epochs=3, seed=5)
    bags = BagStore()
    scalers = fit_scalers(cohort.targets, cohort.patients[:6])
    torch.manual_seed(5)
    model = network.JointTransformer([2, 1], in_features=768)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01, fused=True)
    best, state = math.inf, None
    for epoch in (1, 2, 3):
        model.train()
        for i in np.random.default_rng([5, epoch]).permutation(6):
            one = cohort.patients[i]
            optimizer.zero_grad()
            outputs = model(torch.from_numpy(bags.load(one))).outputs
            loss = F.cross_entropy(outputs[0], torch.tensor([int(one.label == "MSS")]))
            if one.known:
                truth = (one.known["LF"] - scalers["LF"].low) / (
                    scalers["LF"].high - scalers["LF"].low
                )
                loss = loss + (outputs[1] - truth).square().mean()
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            validation = np.mean(
                [
                    float(
                        F.cross_entropy(
                            model(torch.from_numpy(bags.load(one))).outputs[0],
                            torch.tensor([int(one.label == "MSS")]),
                        )
                    )
                    for one in cohort.patients[6:9]
                ]
            )
        if validation < best:
            best, state = validation, copy.deepcopy(model.state_dict())
    for key, value in fitted.model.state_dict().items():
        torch.testing.assert_close(value, state[key], atol=2e-5, rtol=1e-4)


def test_the_baseline_is_naive_with_the_primary_target_alone(cohort, small, tmp_path):
    alone = make_tables(tmp_path).load(auxiliary=())
    ours, theirs = fit(cohort, balancer="baseline"), fit(alone, balancer="naive")
    assert [target.name for target in ours.targets] == ["isMSIH"]
    for key, value in ours.model.state_dict().items():
        torch.testing.assert_close(value, theirs.model.state_dict()[key], atol=0, rtol=0)


@pytest.mark.parametrize("patience", [1, 7])
@pytest.mark.parametrize("best", [1, 3])
def test_it_stops_exactly_patience_epochs_after_the_best(
    cohort, small, monkeypatch, patience, best
):
    losses = [1.0 - 0.1 * min(epoch, best) for epoch in range(1, 40)]
    script = iter(losses)
    monkeypatch.setattr(Learner, "validate", lambda *_: {"isMSIH": next(script), "LF": 0.0})
    fitted = fit(cohort, balancer="baseline", epochs=32, patience=patience)
    assert fitted.best_epoch == best
    assert len(fitted.history) == best + patience


def test_the_best_epoch_is_kept(cohort, small, monkeypatch):
    script = iter([0.9, 0.5, 0.7, 0.6])
    states = []

    def validate(learner, *_):
        states.append(learner.parameters())
        return {"isMSIH": next(script)}

    monkeypatch.setattr(Learner, "validate", validate)
    fitted = fit(cohort, balancer="baseline", epochs=4)
    assert fitted.best_epoch == 2
    for key, value in fitted.model.state_dict().items():
        assert torch.equal(value, states[1][key])
    assert not torch.equal(states[1]["heads.0.weight"], states[3]["heads.0.weight"])


def test_validation_is_the_mean_without_dropout(cohort, small):
    fitted = fit(cohort, balancer="naive", epochs=1)
    predictions = predict(fitted, cohort.patients[6:9])
    chosen = [p.probabilities["isMSIH"][int(p.patient.label == "MSS")] for p in predictions]
    assert fitted.history[0]["validation/isMSIH"] == pytest.approx(-np.log(chosen).mean(), rel=1e-5)


def test_a_fold_depends_on_its_seed_and_on_nothing_before_it(cohort, small):
    first = fit(cohort, balancer="pcgrad", seed=1)
    fit(cohort, balancer="pcgrad", seed=2, epochs=1)
    torch.rand(7)
    again = fit(cohort, balancer="pcgrad", seed=1)
    other = fit(cohort, balancer="pcgrad", seed=3)
    for key, value in first.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[key])
    assert not torch.equal(first.model.heads[0].weight, other.model.heads[0].weight)


def test_the_callers_random_numbers_are_left_alone(cohort, small):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    fit(cohort, balancer="autol+graddrop", epochs=1)
    assert torch.equal(torch.rand(3), expected)


def test_the_cosine_schedule_moves_once_per_epoch(cohort, small):
    rates = [r["learning_rate"] for r in fit(cohort, schedule="cosine", epochs=4).history]
    expected = [1e-3 * (1 + math.cos(math.pi * epoch / 4)) / 2 for epoch in range(4)]
    assert rates == pytest.approx(expected)
    assert {r["learning_rate"] for r in fit(cohort, epochs=3).history} == {1e-3}


def test_features_are_standardized_by_the_training_part_alone(cohort, small):
    plain = fit(cohort, balancer="naive", epochs=1).model
    assert not plain.mean.any()
    assert (plain.scale == 1).all()
    model = fit(cohort, train=4, balancer="autol", epochs=1, standardize=True).model
    bags = [BagStore().load(p) for p in (*cohort.patients[:4], *cohort.patients[9:12])]
    tiles = np.concatenate(bags).astype(np.float64)
    np.testing.assert_allclose(model.mean, tiles.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(model.scale, tiles.std(axis=0), rtol=1e-5)


def test_a_feature_that_does_not_vary_has_no_spread(tmp_path):
    tables = make_tables(tmp_path)
    for i in range(12):
        write_bag(tables.features / f"P{i:02d}-1.h5", np.full((3 + i, 768), 0.1))
    _, deviation = mean_and_deviation(BagStore(), tables.load().patients)
    assert not deviation.any()


def test_learned_weights_move_and_are_not_decayed(cohort, small, monkeypatch):
    caught = []
    original = learner._new_balancer

    def catch(*arguments):
        caught.append((arguments, original(*arguments)))
        return caught[-1][1]

    monkeypatch.setattr(learner, "_new_balancer", catch)
    fit(cohort, balancer="uncert", epochs=1)
    ((_, _, _, optimizer, _), balancer) = caught[0]
    learned = list(balancer.parameters())
    group = next(g for g in optimizer.param_groups if any(p is learned[0] for p in g["params"]))
    assert group["weight_decay"] == 0.0
    assert all(optimizer.state[parameter] for parameter in learned)


def test_a_loss_that_is_not_finite_names_fold_epoch_patient_and_target(tmp_path, small):
    tables = make_tables(tmp_path)
    write_bag(tables.features / "P02-1.h5", np.full((2, 768), 6e4))
    cohort = tables.load()
    with pytest.raises(RunError) as caught:
        fit_fold(
            cohort,
            cohort.patients[:6],
            cohort.patients[6:9],
            training(balancer="naive", epochs=3, learning_rate=1e18),
            name="fold 4",
        )
    assert str(caught.value).startswith("fold 4, epoch ")
    assert "must be finite" in str(caught.value)
    assert "patient P" in str(caught.value)


@pytest.mark.parametrize("balancer", ["autol", "autol+cagrad"])
def test_auto_lambda_looks_ahead_on_its_own_patients(cohort, small, monkeypatch, balancer):
    seen = []
    original = Learner._losses

    def spy(learner, patient, tiles):
        expected = BagStore().load(patient)
        np.testing.assert_array_equal(tiles, expected)  # each patient's own tiles
        if learner.model.training:
            seen.append(patient.name)
        return original(learner, patient, tiles)

    monkeypatch.setattr(Learner, "_losses", spy)
    fit(cohort, balancer=balancer, epochs=2)
    ahead = [name for name in seen if name in {p.name for p in cohort.patients[9:12]}]
    assert len(seen) == 2 * 2 * 6
    assert len(ahead) == 2 * 6
    assert set(ahead) == {p.name for p in cohort.patients[9:12]}


def test_famo_looks_back_at_the_patient_of_the_step(cohort, small, monkeypatch):
    seen = []
    original = Learner._losses

    def spy(learner, patient, tiles):
        if learner.model.training:
            seen.append((patient.name, torch.is_grad_enabled()))
        return original(learner, patient, tiles)

    monkeypatch.setattr(Learner, "_losses", spy)
    fit(cohort, balancer="famo", epochs=1)
    steps, looks = seen[::2], seen[1::2]
    assert [name for name, _ in looks] == [name for name, _ in steps]
    assert {graph for _, graph in steps} == {True}
    assert {graph for _, graph in looks} == {False}


def test_auto_lambda_without_patients_to_look_ahead_on_is_told(cohort, small):
    with pytest.raises(ValueError, match="`lookahead` must hold patients for autol"):
        fit_fold(cohort, cohort.patients[:6], cohort.patients[6:9], training(balancer="autol"))


@pytest.mark.parametrize("balancer", PAPER_COMBINATIONS)
def test_all_combinations_train_the_full_model(cohort, balancer):
    fitted = fit(cohort, train=4, balancer=balancer, epochs=2, learning_rate=1e-4)
    losses = [row["loss/isMSIH"] for row in fitted.history]
    assert all(math.isfinite(value) for row in fitted.history for value in row.values())
    assert losses[-1] < losses[0]
    assert {"weight/isMSIH", "weight/LF"} <= set(fitted.history[0])
    one = predict(fitted, cohort.patients[9:10])[0]
    assert one.probabilities["isMSIH"].sum() == pytest.approx(1.0)
    assert math.isfinite(one.numbers["LF"])
    assert one.embedding.shape == (384,)


def test_conflict_is_recorded_where_there_are_gradients_per_task(cohort, small):
    (row, _) = fit(cohort, balancer="pcgrad").history
    assert -1 <= row["cosine/isMSIH/LF"] <= 1


def test_any_number_of_targets_with_any_names(tmp_path, small):
    extra = {"a.b/c": [f"{i}.5" for i in range(12)], "grade": ["1", "2", "3"] * 4}
    cohort = make_tables(tmp_path, extra={**extra, "kind": ["x", "y"] * 6}).load(
        auxiliary=("LF", "a.b/c", "grade", "kind")
    )
    one = predict(fit(cohort, balancer="dwa+cagrad"), cohort.patients[:1])[0]
    assert set(one.numbers) == {"LF", "a.b/c", "grade"}
    assert set(one.probabilities) == {"isMSIH", "kind"}


def test_training_only_patients_take_part_in_every_method(cohort, small):
    """A step with the auxiliary task alone, in each of the 16 combinations."""
    unlabelled = [replace(p, label="") for p in cohort.patients[:2]]
    for balancer in PAPER_COMBINATIONS:
        fitted = fit_fold(
            cohort,
            [*unlabelled, *cohort.patients[2:6]],
            cohort.patients[6:9],
            training(balancer=balancer, epochs=1),
            lookahead=cohort.patients[9:12],
        )
        assert math.isfinite(fitted.history[0]["loss/LF"])


def test_a_cap_draws_other_tiles_in_every_epoch_and_validates_on_all(cohort, small, monkeypatch):
    seen = []
    original = Learner._losses

    def spy(learner, patient, tiles):
        seen.append((learner.model.training, patient.name, tiles[:, :8]))
        return original(learner, patient, tiles)

    monkeypatch.setattr(Learner, "_losses", spy)
    fit(cohort, balancer="naive", epochs=6, max_tiles=2, patience=9)
    of_one = [tiles for train, name, tiles in seen if train and name == "P00"]
    assert {len(tiles) for train, _, tiles in seen if train} == {2}
    assert {len(tiles) for train, _, tiles in seen if not train} == {4}
    assert len({tiles.tobytes() for tiles in of_one}) > 1
    whole = BagStore().load(cohort.patients[0])[:, :8]
    for tiles in of_one:  # real tiles, each once, in their order
        rows = [np.flatnonzero((whole == tile).all(axis=1))[0] for tile in tiles]
        assert rows == sorted(set(rows))


def test_a_schedule_per_step_swings_within_an_epoch(cohort, small, monkeypatch):
    """PyTorch's own closed form: lr (1 + cos(pi t / T)) / 2 after t steps."""
    rates = []
    original = Learner._backward

    def spy(learner, *arguments):
        rates.append(learner.optimizer.param_groups[0]["lr"])
        return original(learner, *arguments)

    monkeypatch.setattr(Learner, "_backward", spy)
    fit(cohort, balancer="naive", epochs=2, schedule="cosine-per-step")
    expected = [1e-3 * (1 + math.cos(math.pi * t / 2)) / 2 for t in range(12)]
    assert rates == pytest.approx(expected, abs=1e-12)


def test_bfloat16_computes_roughly_the_same_in_fewer_bits(cohort, small):
    plain, half = (fit(cohort, balancer="naive", epochs=1, precision=p) for p in (
        "float32", "bfloat16"
    ))  # fmt: skip
    ours, theirs = (predict(f, cohort.patients[9:12]) for f in (half, plain))
    gaps = [
        abs(a.probabilities["isMSIH"][0] - b.probabilities["isMSIH"][0])
        for a, b in zip(ours, theirs, strict=True)
    ]
    assert 0 < max(gaps) < 0.05
    assert half.precision == "bfloat16"


def test_waiting_for_tiles_is_measured(cohort, small, monkeypatch):
    original = BagStore.load

    def slow(store, patient):
        time.sleep(0.01)
        return original(store, patient)

    monkeypatch.setattr(BagStore, "load", slow)
    (row,) = fit(cohort, balancer="naive", epochs=1).history
    assert row["seconds_waiting_for_data"] > 0.02  # nine bags at 10 ms, some behind the model
    assert row["seconds_waiting_for_data"] < row["seconds"]


# --- names ----------------------------------------------------------------------------------------


def test_only_auto_lambda_looks_ahead():
    looking = {name for name in PAPER_COMBINATIONS if needs_lookahead(name, ["a", "b"])}
    assert looking == {name for name in PAPER_COMBINATIONS if name.startswith("autol")}
    assert not needs_lookahead("baseline", ["a"])


def test_an_unknown_balancer_is_told_with_the_nearest():
    with pytest.raises(UserError, match=r"`balancer` must be baseline or a name .*cagrad"):
        needs_lookahead("cagrat", ["a", "b"])


@pytest.mark.parametrize(("name", "missing"), [("constant", "weights"), ("krum", "byzantine")])
def test_a_balancer_that_needs_more_than_its_name_is_refused(name, missing):
    words = f"must need nothing but its name here: `{missing}` must be given for '{name}'"
    with pytest.raises(UserError, match=words):
        needs_lookahead(name, ["a", "b"])


def test_devices_are_checked():
    assert resolve_device("cpu") == "cpu"
    assert resolve_device("auto") in ("cpu", "cuda")
    for name in ("gpu", "cuda:99", "meta"):
        with pytest.raises(UserError, match=f"`device` must be .* but got '{name}'"):
            resolve_device(name)


def test_a_stream_goes_round_for_ever():
    stream = learner._stream(["a", "b"], np.random.default_rng(0))
    rounds = [{next(stream), next(stream)} for _ in range(5)]
    assert rounds == list(itertools.repeat({"a", "b"}, 5))


def test_means_are_over_the_steps_that_have_a_number():
    rows = [{"a": 1.0, "b": math.nan}, {"a": 2.0, "c": 5.0}, {"b": math.nan, "a": 6.0}]
    assert learner._means(rows) == {"a": 3.0, "c": 5.0}
