"""What one step of the Balancer does, against the slow and obvious way."""

import copy
import gc
import itertools
import math
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from mtbalance import (
    PAPER_COMBINATIONS,
    Balancer,
    GradientStrategy,
    GramianStrategy,
    Weighting,
    make_balancer,
)
from mtbalance.gradient import CAGrad, GradDrop, PCGrad, PreferringStrategy, Sum
from mtbalance.weighting import DWA, AutoLambda, Equal, Uncertainty
from tests._device import randn, random_state, set_random_state
from tests._networks import TASKS, Network, batch, flat_grad, gradients, raw_rows


def assert_same(actual: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    """To the last bit."""
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        if gradient is None:
            assert actual[name] is None, name
        else:
            assert torch.equal(actual[name], gradient), name


# --- the plain sum -----------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["inferred", "modules", "parameters", "groups"])
def test_equal_and_sum_is_plain_backward_to_the_last_bit(split: str) -> None:
    model = Network()
    reference = copy.deepcopy(model)
    shared = {
        "inferred": None,
        "modules": [model.trunk],
        "parameters": model.trunk.parameters(),
        "groups": {"first": model.trunk[0], "last": model.trunk[3]},
    }[split]
    balancer = Balancer(Equal(), Sum(), tasks=TASKS, shared=shared)
    for seed in range(3):  # the second and third pass accumulate
        balancer.backward(model.losses(batch(seed=seed)))
        sum(reference.losses(batch(seed=seed)).values()).backward()
    assert_same(gradients(model), gradients(reference))


def test_the_plain_sum_makes_one_backward_pass() -> None:
    """Counted where the trunk's gradient arrives; with surgery there is one pass per task."""
    for strategy, expected in ((Sum(), 1), (PCGrad(), 3)):
        model = Network()
        passes = []
        model.trunk[0].register_full_backward_hook(lambda *_, log=passes: log.append(1))
        Balancer(Equal(), strategy, tasks=TASKS, shared=model.trunk).backward(
            model.losses(batch().requires_grad_())
        )
        assert len(passes) == expected


# --- composition: raw gradients -> weights -> rows -> direction ----------------------------------


def pair(name: str, model: Network, **options: object) -> Balancer:
    if "autol" in name:
        options["optimizer"] = torch.optim.SGD(model.parameters(), lr=0.05)
    return make_balancer(name, tasks=TASKS, shared=model.trunk, **options)


@pytest.mark.parametrize("name", PAPER_COMBINATIONS)
def test_every_pair_composes_in_the_order_written_down(name: str) -> None:
    """Rows of raw gradients and the strategies alone on plain tensors give the same .grad."""
    model = Network()
    balancer = pair(name, model)
    losses = model.losses(batch())
    shared = list(model.trunk.parameters())
    rows = raw_rows(losses, shared)
    head_rows = {
        task: raw_rows({task: losses[task]}, list(model.heads[task].parameters()))[0]
        for task in TASKS
    }
    values = torch.stack([loss.detach() for loss in losses.values()])
    balancer.weighting(values)
    if "autol" in name:
        record = balancer.backward(losses, validation=lambda: model.losses(batch(seed=1)))
        weights = balancer.weighting.lambdas.double()  # already moved by this step
    else:
        alone = copy.deepcopy(balancer.weighting)
        raw = values.clone().requires_grad_()
        (weights,) = torch.autograd.grad(alone(raw).sum(), raw)
        record = balancer.backward(losses)
    alone = type(balancer.gradient)()
    assert_close(flat_grad(shared), alone(weights[:, None] * rows), rtol=1e-12, atol=1e-14)
    for number, task in enumerate(TASKS):
        head = list(model.heads[task].parameters())
        assert_close(flat_grad(head), weights[number] * head_rows[task], rtol=1e-12, atol=1e-14)
        assert_close(record.weights[task], weights[number], check_dtype=False)


@pytest.mark.parametrize("name", PAPER_COMBINATIONS)
def test_micro_batches_add_up_to_the_whole_batch(name: str) -> None:
    """Losses are means, so each of two halves enters with the factor 1/2."""
    model = Network()
    whole, halves = copy.deepcopy(model), copy.deepcopy(model)
    rows = batch(8)

    def validation(of: Network):
        return lambda: of.losses(batch(seed=1))

    pair(name, whole).backward(whole.losses(rows), validation=validation(whole))
    balancer = pair(name, halves)
    for part in rows.chunk(2):
        balancer.accumulate({task: loss / 2 for task, loss in halves.losses(part).items()})
    record = balancer.apply(validation=validation(halves))
    for one, other in zip(halves.parameters(), whole.parameters(), strict=True):
        assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-12)
    for task, loss in whole.losses(rows).items():
        assert_close(record.losses[task], loss.detach())


def test_one_dataloader_per_task() -> None:
    """Losses that come one by one, from batches of their own, give the same as together."""
    model = Network()
    together = copy.deepcopy(model)
    batches = {task: batch(seed=number) for number, task in enumerate(TASKS)}
    pair("cagrad", together).backward(
        {task: together.losses(rows)[task] for task, rows in batches.items()}
    )
    balancer = pair("cagrad", model)
    for task in ("c", "a", "b"):  # the order of arrival does not matter
        balancer.accumulate({task: model.losses(batches[task])[task]})
    record = balancer.apply()
    assert record.tasks == TASKS
    for one, other in zip(model.parameters(), together.parameters(), strict=True):
        assert_close(one.grad, other.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["naive", "pcgrad"])
def test_accumulates_into_existing_grad(name: str) -> None:
    model = Network()
    once, twice = copy.deepcopy(model), copy.deepcopy(model)
    pair(name, once).backward(once.losses(batch()))
    balancer = pair(name, twice, **({} if name == "naive" else {"order": "fixed"}))
    balancer.backward(twice.losses(batch()))
    first = gradients(twice)
    balancer.backward(twice.losses(batch()))
    for parameter, (key, gradient) in zip(twice.parameters(), first.items(), strict=True):
        assert_close(parameter.grad, 2 * gradient, msg=key)


def test_gradients_handed_out_are_nobody_elses() -> None:
    """x + y sends one and the same gradient tensor to both; their .grad must not be one tensor."""
    x, y = (nn.Parameter(torch.zeros(3)) for _ in range(2))
    h = x + y
    Balancer(Equal(), CAGrad(), tasks=("a", "b"), shared=[x, y]).backward(
        {"a": h.sum(), "b": (2 * h).sum()}
    )
    x.grad.zero_()
    assert bool((y.grad != 0).all())


class Saved:
    """Holds a tensor that a graph saves for its backward pass."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@contextmanager
def watch_saved_tensors() -> Iterator["weakref.WeakSet[Saved]"]:
    """Collect what graphs built inside save for their backward passes, as long as it lives."""
    alive: weakref.WeakSet[Saved] = weakref.WeakSet()

    def pack(tensor: Tensor) -> Saved:
        saved = Saved(tensor)
        alive.add(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        yield alive


def test_graphs_are_freed_while_the_losses_live() -> None:
    """What the trunk has saved goes with the last task's pass, not with the last reference."""
    model = Network()
    with watch_saved_tensors() as alive:
        hidden = model.trunk(batch())
    assert len(alive) > 0
    losses = {task: head(hidden).square().mean() for task, head in model.heads.items()}
    pair("cagrad", model).backward(losses)
    gc.collect()
    assert len(alive) == 0
    with pytest.raises(RuntimeError, match="second time"):
        losses["c"].backward()


def test_graphs_that_share_nothing_are_freed_one_by_one() -> None:
    """A parameter may be the same; what the graphs have saved is each graph's own."""
    model = Network()
    with watch_saved_tensors() as alive:
        losses = {task: model.losses(batch())[task] for task in TASKS}
    pair("cagrad", model).backward(losses)
    gc.collect()
    assert len(alive) == 0
    assert len(losses) == 3


# --- any split ---------------------------------------------------------------------------------


class SubsetNetwork(nn.Module):
    """The stem serves all tasks, the branch only a and b, the twig only c."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch, self.twig = (nn.Linear(4, 4) for _ in range(3))
        self.unused = nn.Linear(2, 2)
        self.double()

    def losses(self, rows: Tensor) -> dict[str, Tensor]:
        stem = self.stem(rows).tanh()
        branch = self.branch(stem)
        return {
            "a": branch.square().mean(),
            "b": (branch - 3 * rows).square().mean(),
            "c": (self.twig(stem) + rows).square().mean(),
        }


@pytest.mark.parametrize("strategy", [CAGrad(), PCGrad("fixed"), GradDrop(), Sum()])
def test_parameters_shared_by_some_tasks(strategy: GradientStrategy) -> None:
    """A task that does not reach a shared parameter has zeros there, whichever way it is split."""
    model = SubsetNetwork()
    shared = [*model.stem.parameters(), *model.branch.parameters()]
    losses = model.losses(batch())
    expected = copy.deepcopy(strategy)(raw_rows(losses, shared))
    inferred = copy.deepcopy(model)
    Balancer(Equal(), copy.deepcopy(strategy), tasks=TASKS, shared=shared).backward(losses)
    assert_close(flat_grad(shared), expected, rtol=1e-12, atol=1e-14)
    assert all(parameter.grad is not None for parameter in model.twig.parameters())
    assert all(parameter.grad is None for parameter in model.unused.parameters())
    Balancer(Equal(), copy.deepcopy(strategy), tasks=TASKS).backward(inferred.losses(batch()))
    if not isinstance(strategy, GradDrop):  # whose draws follow the order of the parameters
        for one, other in zip(model.parameters(), inferred.parameters(), strict=True):
            if other.grad is not None:
                assert_close(one.grad, other.grad, rtol=1e-12, atol=1e-14)


def test_groups_are_balanced_on_their_own() -> None:
    model = Network()
    losses = model.losses(batch())
    groups = {"first": list(model.trunk[0].parameters()), "last": list(model.trunk[3].parameters())}
    expected = {name: CAGrad()(raw_rows(losses, group)) for name, group in groups.items()}
    Balancer(Equal(), CAGrad(), tasks=TASKS, shared=groups).backward(losses)
    for name, group in groups.items():
        assert_close(flat_grad(group), expected[name], rtol=1e-12, atol=1e-14)


def test_reached_by_several_but_not_shared_gets_the_weighted_sum() -> None:
    model = Network()
    losses = model.losses(batch())
    last = list(model.trunk[3].parameters())
    expected = raw_rows(losses, last).sum(0)
    balancer = Balancer(Equal(), CAGrad(), tasks=TASKS, shared=model.trunk[0])
    with pytest.warns(UserWarning, match=r"not given as `shared` \(2: '.*: 3.weight', '"):
        balancer.backward(losses)
    assert_close(flat_grad(last), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["naive", "cagrad"])
def test_frozen_parameters_get_no_gradient(name: str) -> None:
    model = Network()
    model.trunk[0].weight.requires_grad_(False)
    pair(name, model).backward(model.losses(batch()))
    assert model.trunk[0].weight.grad is None
    assert model.trunk[0].bias.grad is not None


def test_tied_weights_count_once() -> None:
    """One weight in two modules: its gradient is the sum over both uses, in one row entry."""
    model = Network()
    second = nn.Linear(4, 6).double()
    second.weight = model.trunk[0].weight
    losses = model.losses(batch() + torch.tanh(second(batch()))[:, :4])
    shared = [*model.trunk.parameters(), second.bias]
    expected = PCGrad("fixed")(raw_rows(losses, shared))
    balancer = Balancer(Equal(), PCGrad("fixed"), tasks=TASKS, shared=[model.trunk, second])
    balancer.backward(losses)
    assert_close(flat_grad(shared), expected, rtol=1e-12, atol=1e-14)


def test_a_shared_parameter_that_no_loss_reaches_is_told_once() -> None:
    model = SubsetNetwork()
    balancer = Balancer(
        Equal(), CAGrad(), tasks=TASKS, shared=[model.stem, model.branch, model.unused]
    )
    with pytest.warns(UserWarning, match="no loss reaches 2 of the parameters .*'2.weight'"):
        balancer.backward(model.losses(batch()))
    balancer.backward(model.losses(batch()))  # a second warning would be an error here
    assert model.unused.weight.grad is None


def test_other_leaves_get_a_gradient_as_from_backward() -> None:
    """Tensor.backward fills the .grad of every leaf, an input that requires one included."""
    model = Network()
    rows = batch().requires_grad_()
    pair("cagrad", model).backward(model.losses(rows))
    expected = torch.autograd.grad(sum(model.losses(rows).values()), rows)[0]
    assert_close(rows.grad, expected)


def test_embeddings_with_sparse_gradients() -> None:
    """In the heads they stay sparse; shared ones become dense rows."""
    table, head = (nn.Embedding(5, 3, sparse=True) for _ in range(2))
    index = torch.tensor([1, 3])
    h = table(index)
    losses = {"a": (h * head(index)).sum(), "b": (h - 1).square().sum()}
    expected = CAGrad()(raw_rows_dense(losses, table.weight))
    Balancer(Equal(), CAGrad(), tasks=("a", "b"), shared=table).backward(losses)
    dense = table.weight.grad.to_dense().reshape(-1)
    assert_close(dense, expected)
    assert head.weight.grad.is_sparse


def raw_rows_dense(losses: dict[str, Tensor], parameter: Tensor) -> Tensor:
    return torch.stack(
        [
            torch.autograd.grad(loss, parameter, retain_graph=True)[0].to_dense().reshape(-1)
            for loss in losses.values()
        ]
    )


def test_complex_parameters_are_pairs_of_real_ones() -> None:
    z = nn.Parameter(torch.randn(4, dtype=torch.complex128))

    def losses() -> dict[str, Tensor]:
        return {"a": (z - 1).abs().square().sum(), "b": (z * z + 1j).abs().square().sum()}

    rows = torch.stack(
        [
            torch.view_as_real(torch.autograd.grad(loss, z)[0]).reshape(-1)
            for loss in losses().values()
        ]
    )
    for strategy in (CAGrad(), GradDrop()):
        z.grad = None
        balancer = Balancer(Equal(), copy.deepcopy(strategy), tasks=("a", "b"), shared=[z])
        balancer.backward(losses())
        assert_close(torch.view_as_real(z.grad).reshape(-1), strategy(rows))


@st.composite
def linear_problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, list[int], list[int]]:
    """Slopes and curvatures (tasks, parameters); 0 where a task does not reach a parameter.

    Every task reaches parameter 0, which is shared; others are reached by any subset of the tasks.
    Also drawn: the tasks that are active, and the further parameters that are given as shared.
    """
    m, p = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    slopes = torch.tensor(
        draw(
            st.lists(st.lists(st.integers(-3, 3), min_size=p, max_size=p), min_size=m, max_size=m)
        ),
        dtype=torch.float64,
    )
    slopes[:, 0] = slopes[:, 0] + torch.where(slopes[:, 0] >= 0, 1, -1)
    curvatures = slopes.roll(1, 0) * (slopes != 0)
    active = sorted(draw(st.sets(st.integers(0, m - 1), min_size=1)))
    shared = sorted({0, *draw(st.sets(st.integers(0, p - 1)))})
    return slopes, curvatures, active, shared


@given(linear_problems(), st.sampled_from(["naive", "cagrad", "dwa+pcgrad", "uncert+cagrad"]))
def test_any_split_any_subset_of_tasks(problem, name: str) -> None:
    """Against the formula: at 0, the loss sum_p (a_p x_p + b_p x_p^2 / 2) has the gradient a."""
    slopes, curvatures, active, shared = problem
    x = [nn.Parameter(torch.zeros((), dtype=torch.float64)) for _ in range(slopes.shape[1])]
    losses = {
        str(task): sum(
            a * p + b * p * p / 2
            for a, b, p in zip(slopes[task], curvatures[task], x, strict=True)
            if a != 0
        )
        for task in active
    }
    balancer = make_balancer(
        name,
        tasks=[str(task) for task in range(len(slopes))],
        shared=[x[i] for i in shared],
        order="fixed",
    )
    with warnings.catch_warnings():  # some shared parameters may be reached by nobody
        warnings.simplefilter("ignore", UserWarning)
        balancer.backward(losses)
    rows = slopes[active]
    if "uncert" in name:
        rows = rows / 2  # e^-0 / 2
    expected = rows.sum(0)
    expected[shared] = balancer.gradient(rows[:, shared])
    reached = (slopes[active] != 0).any(0)
    for parameter, value, is_reached in zip(x, expected, reached, strict=True):
        assert (parameter.grad is not None) == bool(is_reached)
        if is_reached:
            assert_close(parameter.grad, value, rtol=1e-10, atol=1e-12)


def test_an_error_in_a_backward_pass_leaves_nothing_behind() -> None:
    """A task whose graph is broken (here: freed) must not leave the others' rows for later."""
    model = Network()
    balancer = pair("cagrad", model)
    losses = model.losses(batch())
    losses["b"].backward(retain_graph=False)
    model.zero_grad()
    with pytest.raises(RuntimeError, match="second time"):
        balancer.backward(losses)
    with pytest.raises(RuntimeError, match="nothing has been accumulated"):
        balancer.apply()
    assert all(parameter.grad is None for parameter in model.parameters())


# --- absent tasks ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAPER_COMBINATIONS)
def test_an_absent_task_has_no_row_and_keeps_its_state(name: str) -> None:
    """With b absent, the step is that of a Balancer that knows only a and c."""
    model = Network()
    other = copy.deepcopy(model)
    balancer = pair(name, model)
    before = {k: v.clone() for k, v in balancer.weighting.state_dict().items() if v.shape == (3,)}
    losses = model.losses(batch())
    del losses["b"]
    record = balancer.backward(losses, validation=lambda: model.losses(batch(seed=1)))
    assert record.tasks == ("a", "c")
    assert record.absent == ("b",)
    assert all(parameter.grad is None for parameter in model.heads["b"].parameters())
    for key, value in before.items():
        assert torch.equal(balancer.weighting.state_dict()[key][1], value[1]), key
    for parameter in balancer.weighting.parameters():
        assert parameter.grad[1] == 0
        assert parameter.grad[0] != 0

    if "graddrop" in name:
        return  # draws one number per coordinate, whoever is there: compared above in other tests
    options = {}
    if "autol" in name:
        options["optimizer"] = torch.optim.SGD(other.parameters(), lr=0.05)
    two = make_balancer(name, tasks=("a", "c"), shared=other.trunk, **options)
    losses = other.losses(batch())
    del losses["b"]

    def validation() -> dict[str, Tensor]:
        values = other.losses(batch(seed=1))
        if "autol" in name:  # the three-task Balancer counts b's validation loss too
            return {"a": values["a"] + values["b"], "c": values["c"]}
        return values

    two.backward(losses, validation=validation)
    for one, expected in zip(model.trunk.parameters(), other.trunk.parameters(), strict=True):
        assert_close(one.grad, expected.grad, rtol=1e-9, atol=1e-12)


def test_a_parameter_known_to_be_shared_stays_so_when_its_partner_is_absent() -> None:
    """Inferred from the first step; the second has one task, whose lone row CAGrad scales."""
    model = Network(("a", "b"))
    balancer = Balancer(Equal(), CAGrad(c=0.5, rescale=0), tasks=("a", "b"))
    balancer.backward(model.losses(batch()))
    model.zero_grad()
    losses = {"a": model.losses(batch())["a"]}
    shared = list(model.trunk.parameters())
    expected = 1.5 * raw_rows(losses, shared)[0]  # one task: d = g (1 + c)
    balancer.backward(losses)
    assert_close(flat_grad(shared), expected, rtol=1e-12, atol=1e-14)


def test_a_task_never_active_is_reported_at_the_end_of_the_epoch() -> None:
    model = Network()
    balancer = pair("dwa+cagrad", model)
    for _ in range(2):
        losses = model.losses(batch())
        del losses["c"]
        balancer.backward(losses)
    with pytest.warns(UserWarning, match=r"no step of this epoch \(2 steps\) .* for 'c'"):
        summary = balancer.end_epoch()
    assert summary.never_active == ("c",)
    assert summary.active == {"a": 2, "b": 2, "c": 0}
    assert balancer.end_epoch().steps == 0  # an epoch without a step is no news


# --- the record --------------------------------------------------------------------------------


def test_cosines_are_those_of_their_pairs() -> None:
    """One number for each two of the tasks that are there, read from the device together."""
    x = nn.Parameter(torch.zeros(5, dtype=torch.float64))
    g = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    g[2] = 0
    balancer = Balancer(Equal(), PCGrad(), tasks=("a", "b", "absent", "c", "d"), shared=[x])
    record = balancer.backward({task: x @ row for task, row in zip("abcd", g, strict=True)})
    expected = {
        (one, other): 0.0 if "c" in (one, other) else float(torch.cosine_similarity(u, v, 0))
        for (one, u), (other, v) in itertools.combinations(zip("abcd", g, strict=True), 2)
    }
    assert list(record.cosines) == list(expected)
    figures = record.as_dict()
    for (one, other), cosine in expected.items():
        assert float(record.cosines[one, other]) == pytest.approx(cosine, abs=1e-12)
        assert figures[f"cosine/{one}/{other}"] == pytest.approx(cosine, abs=1e-12)
    assert math.isnan(figures["cosine/a/absent"])
    assert math.isnan(figures["cosine/absent/c"])


def test_record_by_hand() -> None:
    """Two parameters, gradients (3, 4) and (0, -1): norms 5 and 1, cosine -4/5.

    PCGrad: g1 - (-4/1)(0,-1)... gives (3, 0); g2 - (-4/25)(3, 4) = (12/25, -9/25). d is their sum.
    """
    x = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    g = torch.tensor([[3.0, 4.0], [0.0, -1.0]], dtype=torch.float64)
    losses = {"a": x @ g[0], "b": x @ g[1]}
    balancer = Balancer(Equal(), PCGrad(), tasks=("a", "b"), shared=[x])
    record = balancer.backward(losses)
    d = torch.tensor([3 + 12 / 25, -9 / 25], dtype=torch.float64)
    assert_close(x.grad, d)
    figures = record.as_dict()
    assert figures["loss/a"] == 0
    assert figures["weight/b"] == 1
    assert figures["gradient_norm/a"] == pytest.approx(5)
    assert figures["gradient_norm/b"] == pytest.approx(1)
    assert figures["cosine/a/b"] == pytest.approx(-0.8)
    assert figures["conflicts"] == 1
    # d = alpha_a g_a + alpha_b g_b with alpha_b = 1 + 4 and alpha_a = 1 + 4/25
    share = (1 + 4 / 25) * (3 * d[0] + 4 * d[1]) / (d @ d)
    assert figures["share/a"] == pytest.approx(float(share))
    assert figures["share/a"] + figures["share/b"] == pytest.approx(1)
    assert all(isinstance(value, float) for value in figures.values())
    assert not record.gramian.requires_grad


def test_history_keeps_none_by_default() -> None:
    from collections import deque

    model = Network()
    balancer = pair("pcgrad", model)
    balancer.backward(model.losses(batch()))
    assert len(balancer.history) == 0
    balancer.history = deque(maxlen=2)
    records = [balancer.backward(model.losses(batch())) for _ in range(3)]
    assert list(balancer.history) == records[1:]


def test_shares_of_a_coordinatewise_strategy_sum_to_one() -> None:
    model = Network()
    record = pair("graddrop", model).backward(model.losses(batch()))
    assert float(sum(record.shares.values())) == pytest.approx(1)
    direction = flat_grad(list(model.trunk.parameters()))
    model.zero_grad()
    rows = raw_rows(model.losses(batch()), list(model.trunk.parameters()))
    assert_close(record.progress, rows @ direction, rtol=1e-9, atol=1e-12)


# --- explain -----------------------------------------------------------------------------------


def test_explain_counts_every_kind_of_parameter() -> None:
    model = SubsetNetwork()
    model.stem.bias.requires_grad_(False)
    balancer = Balancer(Equal(), CAGrad(), tasks=TASKS, shared=[model.stem, model.branch])
    table = balancer.explain(model.losses(batch()), model=model)
    counts = {row.use: (row.tensors, row.parameters) for row in table.rows}
    assert counts == {
        "shared by all tasks": (1, 16),
        "frozen": (1, 4),
        "shared, reached by a, b only": (2, 20),
        "specific to c": (2, 20),
        "unused": (2, 6),
    }
    assert table.balanced == 36
    assert table.extra_bytes == 3 * 36 * 8
    assert "3 tasks x 36 shared numbers" in str(table)
    assert model.stem.weight.grad is None  # the graphs were only looked at


def test_explain_infers_from_the_steps_so_far() -> None:
    model = SubsetNetwork()
    balancer = Balancer(Equal(), CAGrad(), tasks=TASKS)
    balancer.backward(model.losses(batch()))
    uses = {row.use: row.names for row in balancer.explain(model=model).rows}
    assert uses["shared by all tasks"] == ("stem.weight", "stem.bias")
    assert uses["shared, reached by a, b only"] == ("branch.weight", "branch.bias")


def test_explain_before_anything_is_known() -> None:
    model = SubsetNetwork()
    inferred = Balancer(Equal(), CAGrad(), tasks=TASKS)
    assert "give explain() the losses" in str(inferred.explain())
    given = Balancer(Equal(), CAGrad(), tasks=TASKS, shared=[model.stem])
    assert "shared, but reached by no loss yet" in str(given.explain())
    assert given.explain().extra_bytes == 3 * 20 * 8


# --- your own strategies -----------------------------------------------------------------------


class MaxCoordinate(GradientStrategy):
    """Needs whole rows: scales the sum by the largest entry of the matrix."""

    def forward(self, gradients: Tensor) -> Tensor:
        return gradients.sum(0) * gradients.abs().max()


def test_a_strategy_of_ones_own_gets_the_whole_matrix() -> None:
    model = Network()
    losses = model.losses(batch())
    shared = list(model.trunk.parameters())
    rows = raw_rows(losses, shared)
    Balancer(Equal(), MaxCoordinate(), tasks=TASKS, shared=shared).backward(losses)
    assert_close(flat_grad(shared), rows.sum(0) * rows.abs().max())


class Whole(GradientStrategy):
    """The sum, in every other place in memory."""

    def forward(self, gradients: Tensor) -> Tensor:
        return torch.stack([gradients.sum(0), torch.zeros_like(gradients[0])], 1)[:, 0]


class WrongShapes:
    """Strategies whose author forgot to reduce, or divided by zero."""

    class Direction(GradientStrategy):
        def forward(self, gradients: Tensor) -> Tensor:
            return gradients

    class Weights(GramianStrategy):
        def weights(self, gramian: Tensor) -> Tensor:
            return gramian

    class NoTensor(GramianStrategy):
        def weights(self, gramian: Tensor) -> Tensor:
            return [1.0] * len(gramian)

    class Losses(Weighting):
        def forward(self, losses: Tensor) -> Tensor:
            return losses.sum()

    class NotFinite(Weighting):
        def forward(self, losses: Tensor) -> Tensor:
            return losses / 0


@pytest.mark.parametrize(
    ("weighting", "strategy", "words"),
    [
        (Equal, WrongShapes.Direction, "Direction must return one direction, shape"),
        (Equal, WrongShapes.Weights, "Weights.weights must return one weight per row, a tensor"),
        (Equal, WrongShapes.NoTensor, r"a tensor of shape \(3,\), but got \[1.0, 1.0, 1.0\]"),
        (WrongShapes.Losses, CAGrad, "Losses must return one weighted loss per task, shape"),
        (WrongShapes.NotFinite, CAGrad, "NotFinite must give finite weights, but gives"),
    ],
)
def test_mistakes_in_strategies_of_ones_own_leave_no_trace(weighting, strategy, words) -> None:
    """Two groups, so that the first could have been written before the second failed."""
    model = Network()
    groups = {"first": model.trunk[0], "last": model.trunk[3]}
    balancer = Balancer(weighting(), strategy(), tasks=TASKS, shared=groups)
    with pytest.raises((ValueError, FloatingPointError), match=words):
        balancer.backward(model.losses(batch()))
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("strategy", [CAGrad(c=0.0), GradDrop(leak=1.0), Whole()], ids=type)
def test_complex_parameters_beside_real_ones(strategy) -> None:
    """As two real numbers each, wherever in memory they are, and conjugated lazily or not."""
    x, z = nn.Parameter(randn(3)), nn.Parameter(torch.complex(randn(2), randn(2)))
    h = nn.Parameter(torch.complex(randn(4), randn(4)))
    factors = torch.complex(randn(4), randn(4))
    losses = {
        "a": x.sum() * 2 + (z * (1 + 2j)).abs().sum() + (h.conj() * factors).sum().real,
        "b": x.square().sum() + (z.conj() * (2 - 1j)).real.sum() + z.imag.square().sum(),
    }
    expected = torch.autograd.grad(sum(losses.values()), [x, z, h], retain_graph=True)
    Balancer(Equal(), strategy, tasks=("a", "b"), shared=[x, z]).backward(losses)
    for parameter, gradient in zip((x, z, h), expected, strict=True):
        assert_close(parameter.grad, gradient)


def doubled(equal: Equal, how: str) -> None:
    if how == "hook":
        equal.register_forward_hook(lambda module, given, result: result * 2)
    else:
        equal.forward = lambda losses: losses * 2


@pytest.mark.parametrize("how", ["hook", "forward"])
def test_what_is_put_onto_a_weighting_counts(how: str) -> None:
    x, weighting = nn.Parameter(torch.ones(2)), Equal()
    doubled(weighting, how)
    weighting.extra = nn.Parameter(torch.ones(()))
    balancer = Balancer(weighting, Sum(), tasks=("a", "b"), shared=[x])
    record = balancer.backward({"a": x.sum(), "b": 3 * x.sum()})
    assert x.grad.tolist() == [8.0, 8.0]
    assert [float(weight) for weight in record.weights.values()] == [2.0, 2.0]


class ByNumber(PreferringStrategy):
    """Asks whose rows they are, whether or not somebody prefers one."""

    def weights(self, gramian: Tensor) -> Tensor:
        return 1.0 + self.numbers_of_rows(gramian).to(gramian)


def test_a_strategy_may_ask_whose_rows_they_are() -> None:
    x = nn.Parameter(torch.ones(2))
    balancer = Balancer(Equal(), ByNumber(), tasks=("a", "b", "c"), shared=[x])
    for losses, expected in (("abc", 1 + 2 * 3 + 3 * 5), ("ac", 1 + 3 * 5)):
        x.grad = None
        factors = {"a": 1, "b": 3, "c": 5}
        balancer.backward({task: factors[task] * x.sum() for task in losses})
        assert x.grad.tolist() == [expected] * 2


class HeldTwice(GradientStrategy):
    """Falls back within a strategy that it knows by two names."""

    def __init__(self) -> None:
        super().__init__()
        self.one = self.other = PCGrad()

    def forward(self, gradients: Tensor) -> Tensor:
        self.one.fallbacks += 1
        return gradients.sum(0)


def test_a_fallback_counts_once_however_often_it_is_held() -> None:
    x = nn.Parameter(torch.ones(2))
    balancer = Balancer(Equal(), HeldTwice(), tasks=("a", "b"), shared=[x])
    assert [balancer.backward({"a": x.sum(), "b": -x[0]}).fallbacks for _ in range(2)] == [1, 1]


def test_big_parameters_are_read_in_blocks() -> None:
    """600,000 columns span several blocks; the result is that of the whole matrix."""
    x = nn.Parameter(torch.randn(600_000, dtype=torch.float64))
    y = nn.Parameter(torch.randn(3, dtype=torch.float64))

    def losses() -> dict[str, Tensor]:
        return {"a": (x - 1).square().sum() + y.sum(), "b": (x + 2).abs().sum() - y.square().sum()}

    rows = raw_rows(losses(), [x, y])
    for strategy in (CAGrad(), GradDrop(seed=3)):
        x.grad = y.grad = None
        balancer = Balancer(Equal(), copy.deepcopy(strategy), tasks=("a", "b"), shared=[x, y])
        balancer.backward(losses())
        assert_close(flat_grad([x, y]), strategy(rows), rtol=1e-10, atol=1e-12)


# --- weightings that learn ---------------------------------------------------------------------


def test_uncertainty_learns_through_the_users_optimizer() -> None:
    """d/ds of e^-s L / 2 + s / 2 at s = 0 is (1 - L) / 2."""
    model = Network()
    balancer = Balancer(Uncertainty(), CAGrad(), tasks=TASKS, shared=model.trunk)
    losses = model.losses(batch())
    balancer.backward(losses)
    values = torch.stack([loss.detach() for loss in losses.values()])
    assert_close(balancer.weighting.log_var.grad, ((1 - values) / 2).float())


@pytest.mark.parametrize("fused", [False, True])
def test_learned_weights_that_reach_no_optimizer_are_reported(fused: bool) -> None:
    model = Network()
    balancer = Balancer(Uncertainty(), Sum(), tasks=TASKS, shared=model.trunk)
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    for _ in range(2):  # the first comparison may be chance
        balancer.backward(model.losses(batch()))
        optimizer.step()
    with pytest.warns(UserWarning, match=r"Add balancer.parameters\(\) to the optimizer"):
        balancer.backward(model.losses(batch()))
    optimizer.step()
    balancer.backward(model.losses(batch()))  # once is enough


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("every", [1, 4])
def test_learned_weights_in_an_optimizer_are_not_reported(every: int, fused: bool) -> None:
    """Also when several backward passes come before a step. (Warnings are errors.)"""
    model = Network()
    balancer = Balancer(Uncertainty(), Sum(), tasks=TASKS, shared=model.trunk)
    optimizer = torch.optim.AdamW([*model.parameters(), *balancer.parameters()], fused=fused)
    for step in range(12):
        balancer.backward(model.losses(batch()))
        if step % every == every - 1:
            optimizer.step()
            optimizer.zero_grad()


def test_auto_lambda_leaves_parameters_and_random_numbers_alone() -> None:
    model = Network(dropout=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    balancer = Balancer(AutoLambda(optimizer), Sum(), tasks=TASKS, shared=model.trunk)
    before = [parameter.clone() for parameter in model.parameters()]
    losses = model.losses(batch())
    state = random_state()
    masks = []
    handle = model.trunk[2].register_forward_hook(lambda *io: masks.append(io[2] == 0))
    for _ in range(2):
        balancer.backward(losses, validation=lambda: model.losses(batch()))
        losses = model.losses(batch())
    handle.remove()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert not torch.equal(masks[0], masks[2])  # each validation batch draws anew
    set_random_state(state)
    again = []
    model.trunk[2].register_forward_hook(lambda *io: again.append(io[2] == 0))
    model.losses(batch())
    assert torch.equal(again[0], masks[1])  # and the training stream is where it would be without


def test_auto_lambda_moves_the_weights_that_help_validation() -> None:
    """By hand: two tasks pull x in opposite directions, validation wants only the first."""
    x = nn.Parameter(torch.zeros((), dtype=torch.float64))
    optimizer = torch.optim.SGD([x], lr=0.5)
    weighting = AutoLambda(optimizer, primary=["a"], lr=0.01, init=0.1)
    balancer = Balancer(weighting, Sum(), tasks=("a", "b"), shared=[x])
    balancer.backward(
        {"a": (x - 1).square(), "b": (x + 1).square()}, validation=lambda: {"a": (x - 1).square()}
    )
    # Adam's first step has length lr and the sign of the derivative: up for a, down for b.
    assert_close(weighting.lambdas, torch.tensor([0.11, 0.09]), rtol=1e-5, atol=0)
    # .grad uses the new weights: 0.11 * (-2) + 0.09 * 2
    assert_close(x.grad, torch.tensor(-0.04, dtype=torch.float64), rtol=1e-5, atol=0)


def test_dwa_sees_raw_losses_through_the_balancer() -> None:
    """Losses 4, 4 then 2, 4: ratios 1/2 and 1, weights 2 softmax(1/4, 1/2)."""
    x = nn.Parameter(torch.ones(2))
    balancer = Balancer(DWA(), Sum(), tasks=("a", "b"), shared=[x])
    for scale in (4.0, 2.0):
        balancer.backward({"a": scale * x.sum() / 2, "b": 4 * x.prod()})
        balancer.end_epoch()
    record = balancer.backward({"a": x.sum(), "b": x.sum()})
    expected = 2 * torch.softmax(torch.tensor([0.25, 0.5]), 0)
    assert_close(torch.stack(list(record.weights.values())), expected)


def test_module_apply_still_visits_modules() -> None:
    seen = []
    nn.ModuleList([pair("cagrad", Network())]).apply(lambda module: seen.append(type(module)))
    assert Balancer in seen
    assert CAGrad in seen


def test_deepcopy_of_model_and_balancer_together() -> None:
    model = Network()
    balancer = pair("pcgrad", model)
    balancer.backward(model.losses(batch()))
    model.zero_grad()
    other_model, other = copy.deepcopy((model, balancer))
    other.backward(other_model.losses(batch()))
    balancer.backward(model.losses(batch()))
    for one, two in zip(model.parameters(), other_model.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad)
    assert str(other.explain(model=other_model)) == str(balancer.explain(model=model))


@pytest.mark.parametrize("name", ["sum", "pcgrad", "cagrad", "graddrop", "autol+graddrop"])
def test_gradients_have_the_memory_layout_of_their_parameters(name: str) -> None:
    """As after `loss.backward()`: optimizers and `torch.compile` look at strides."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)).to(
        memory_format=torch.channels_last
    )
    transposed = nn.Parameter(torch.randn(2, 5).T)
    optimizer = torch.optim.SGD([*model.parameters(), transposed], lr=0.1)
    shared = [model, transposed]
    balancer = make_balancer(name, tasks=("a", "b"), shared=shared, optimizer=optimizer)

    def losses() -> dict[str, Tensor]:
        out = model(torch.ones(1, 3, 7, 7)).mean((2, 3)) @ transposed.T
        return {"a": out.square().mean(), "b": -out.mean()}

    balancer.backward(losses(), validation=losses)
    for parameter in (*model.parameters(), transposed):
        assert parameter.grad.stride() == parameter.stride()
