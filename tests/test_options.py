"""Options that trade: weights solved for now and then, rows of low precision, batched passes."""

import copy
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from mtbalance import PAPER_COMBINATIONS, Balancer, make_balancer
from mtbalance.gradient import CAGrad, GradDrop, PCGrad, Sum
from mtbalance.weighting import DWA, Equal, Uncertainty
from tests._networks import (
    TASKS,
    Network,
    ReadsItsGradient,
    batch,
    flat_grad,
    gradients,
    raw_rows,
)

# --- every ----------------------------------------------------------------------------------------


def coefficients_of(strategy: CAGrad, rows: Tensor) -> Tensor:
    """Return what the strategy gives for the rows' Gramian."""
    return strategy.solve(rows @ rows.T)


@pytest.mark.parametrize("weighting", [Equal, Uncertainty])
def test_weights_serve_until_they_are_too_old(weighting) -> None:
    """Steps 0, 3, 6 solve; the others take the weights of the last one, and today's gradients."""
    model = Network()
    shared = list(model.trunk.parameters())
    balancer = Balancer(weighting(), CAGrad(), tasks=TASKS, shared=model.trunk, every=3)
    factor = 0.5 if weighting is Uncertainty else 1.0  # e^-0 / 2, as long as nothing learns
    solution = torch.zeros(3, dtype=torch.float64)
    for step in range(7):
        model.zero_grad()
        losses = model.losses(batch(seed=step))
        rows = factor * raw_rows(losses, shared)
        if step % 3 == 0:
            solution = coefficients_of(CAGrad(), rows)
        heads = {
            task: factor * raw_rows({task: losses[task]}, list(model.heads[task].parameters()))[0]
            for task in TASKS
        }
        record = balancer.backward(losses)
        assert record.reused == (step % 3 != 0)
        assert_close(flat_grad(shared), solution @ rows, rtol=1e-10, atol=1e-12)
        assert_close(record.combination, factor * solution, check_dtype=False)
        for task, head in heads.items():
            assert_close(flat_grad(list(model.heads[task].parameters())), head)


def test_steps_between_make_one_pass_through_the_trunk() -> None:
    model = Network()
    passes: list[int] = []
    model.trunk[0].register_full_backward_hook(lambda *_: passes.append(1))
    balancer = Balancer(Equal(), CAGrad(), tasks=TASKS, shared=model.trunk, every=2)
    for expected in (3, 1, 3, 1):
        passes.clear()
        balancer.backward(model.losses(batch().requires_grad_()))
        assert len(passes) == expected


def test_other_tasks_than_before_are_solved_for() -> None:
    model = Network()
    balancer = Balancer(Equal(), CAGrad(), tasks=TASKS, shared=model.trunk, every=10)
    losses = model.losses(batch())
    assert not balancer.backward(losses).reused
    losses = model.losses(batch())
    del losses["b"]
    model.zero_grad()
    rows = raw_rows(losses, list(model.trunk.parameters()))
    record = balancer.backward(losses)
    assert not record.reused
    assert_close(flat_grad(list(model.trunk.parameters())), CAGrad()(rows), rtol=1e-9, atol=1e-12)
    losses = model.losses(batch())
    del losses["b"]
    assert balancer.backward(losses).reused


def test_every_group_keeps_its_own() -> None:
    model = Network()
    parts = {"first": model.trunk[0], "last": model.trunk[3]}
    balancer = Balancer(Equal(), CAGrad(), tasks=TASKS, shared=parts, every=2)
    solutions = {}
    losses = model.losses(batch())
    for name, part in parts.items():
        solutions[name] = coefficients_of(CAGrad(), raw_rows(losses, list(part.parameters())))
    balancer.backward(losses)
    model.zero_grad()
    losses = model.losses(batch(seed=1))
    rows = {name: raw_rows(losses, list(part.parameters())) for name, part in parts.items()}
    assert balancer.backward(losses).reused
    for name, part in parts.items():
        assert_close(flat_grad(list(part.parameters())), solutions[name] @ rows[name])


@pytest.mark.parametrize(
    "strategy", [CAGrad(), PCGrad(order="fixed")], ids=lambda s: type(s).__name__
)
def test_weights_of_a_row_that_nearly_vanished_do_not_serve(strategy) -> None:
    """They are as large as it was small: with today's row, they would be all of the direction."""

    def losses(x: Tensor, size: float) -> dict[str, Tensor]:
        return {"a": x[0], "b": size * (x[1] - 0.5 * x[0])}

    x = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    balancer = Balancer(Equal(), strategy, tasks=("a", "b"), shared=[x], every=3)
    for size, reused in ((1e-6, False), (1.0, False), (1.0, True), (3.0, True), (3.0, False)):
        x.grad = None
        assert balancer.backward(losses(x, size)).reused == reused
        rows = torch.tensor([[1.0, 0.0], [-0.5 * size, size]], dtype=torch.float64)
        if not reused:
            assert_close(x.grad, strategy(rows), rtol=1e-9, atol=1e-12)
        assert x.grad.norm() < 3 * rows.norm()


def test_saved_weights_that_fit_no_other_rows_do_not_serve() -> None:
    """Those that were saved before this was looked at, too."""
    x = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def balancer() -> Balancer:
        return Balancer(Equal(), CAGrad(), tasks=("a", "b"), shared=[x], every=3)

    first = balancer()
    first.backward({"a": x[0], "b": 1e-6 * (x[1] - 0.5 * x[0])})
    second = balancer()
    second.load_state_dict(first.state_dict())
    assert not second.backward({"a": x[0], "b": x[1] - 0.5 * x[0]}).reused


def of_each(parameters: list[nn.Parameter]) -> dict[str, Tensor]:
    """Return losses whose rows are (2, 0) and (-1, 1) for each of the parameters."""
    first, second = (sum(p[number] for p in parameters) for number in (0, 1))
    return {"a": 2 * first, "b": second - first}


@pytest.mark.filterwarnings("ignore:no loss reaches 1 of the parameters given")
@pytest.mark.parametrize("inferred", [False, True])
def test_what_was_not_reached_on_the_day_of_solving_gets_the_right_weights(inferred: bool) -> None:
    """A group is solved for; what belongs to one that was solved for gets its weights."""
    x, y = (nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2))
    groups = None if inferred else {"first": [x], "second": [y]}
    balancer = Balancer(Equal(), CAGrad(), tasks=("a", "b"), shared=groups, every=4)
    expected = CAGrad()(torch.tensor([[2.0, 0.0], [-1.0, 1.0]], dtype=torch.float64))
    for reached, reused in (([x], False), ([x, y], inferred), ([y], True), ([x, y], True)):
        x.grad = y.grad = None
        assert balancer.backward(of_each(reached)).reused == reused
        for parameter in reached:
            assert_close(parameter.grad, expected, rtol=1e-9, atol=1e-12)


def test_kept_weights_are_saved() -> None:
    def trained() -> tuple[Network, Balancer]:
        torch.manual_seed(3)
        model = Network()
        return model, make_balancer("pcgrad", tasks=TASKS, shared=model.trunk, every=3, seed=1)

    def train(model: Network, balancer: Balancer, steps: range) -> list[bool]:
        return [balancer.backward(model.losses(batch(seed=s))).reused for s in steps]

    straight, balancer = trained()
    train(straight, balancer, range(5))
    first, balancer = trained()
    train(first, balancer, range(2))
    file = io.BytesIO()
    torch.save(balancer.state_dict(), file)
    file.seek(0)
    second, balancer = trained()
    for parameter, other in zip(second.parameters(), first.parameters(), strict=True):
        parameter.grad = other.grad
    balancer.load_state_dict(torch.load(file, weights_only=True))
    assert train(second, balancer, range(2, 5)) == [True, False, True]
    for parameter, other in zip(second.parameters(), straight.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad)


def test_reset_forgets_kept_weights() -> None:
    model = Network()
    balancer = Balancer(Equal(), CAGrad(), tasks=TASKS, shared=model.trunk, every=5)
    balancer.backward(model.losses(batch()))
    balancer.reset()
    assert not balancer.backward(model.losses(batch())).reused


@pytest.mark.parametrize("policy", ["raise", "drop", "skip"])
def test_bad_numbers_between(policy: str) -> None:
    x = nn.Parameter(torch.ones(2, dtype=torch.float64))
    balancer = Balancer(Equal(), CAGrad(), tasks=("a", "b"), shared=[x], every=5, nonfinite=policy)
    balancer.backward({"a": x.sum(), "b": (-2 * x).sum()})
    x.grad = None
    losses = {"a": x.sum() * torch.nan, "b": x.square().sum()}
    if policy == "raise":
        with pytest.raises(FloatingPointError, match="the loss of task 'a' must be finite"):
            balancer.backward(losses)
        return
    record = balancer.backward(losses)
    assert record.skipped == (policy == "skip")
    assert record.dropped == (("a",) if policy == "drop" else ())
    assert (x.grad is None) == (policy == "skip")


@pytest.mark.parametrize("grouped", [False, True])
def test_a_bad_gradient_between_is_dropped(grouped: bool) -> None:
    """As in a step that solves: its task goes, and the weighting sees each loss once."""
    x, y = (nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2))
    groups = {"first": [x], "second": [y]} if grouped else [x, y]
    zero = torch.zeros(2, dtype=torch.float64)
    balancer = Balancer(
        DWA(), CAGrad(), tasks=("a", "b", "c"), shared=groups, every=5, nonfinite="drop"
    )

    def losses(inside: Tensor) -> dict[str, Tensor]:
        both = x + y
        return {"a": (x * inside).sqrt().sum() + y.sum(), "b": -2 * both[0] + both[1], "c": both[0]}

    balancer.backward(losses(torch.ones_like(zero)))
    assert balancer.backward(losses(torch.ones_like(zero))).reused
    x.grad = y.grad = None
    record = balancer.backward(losses(zero))  # a root at 0: the loss is finite, its slope is not
    assert (record.tasks, record.dropped, record.skipped) == (("b", "c"), ("a",), False)
    expected = CAGrad()(torch.tensor([[-2.0, 1.0], [1.0, 0.0]], dtype=torch.float64))
    for parameter in (x, y):
        assert_close(parameter.grad, expected, rtol=1e-9, atol=1e-12)
    assert balancer.weighting.count.tolist() == [2, 3, 3]
    assert not balancer.backward(losses(torch.ones_like(zero))).reused  # the task is back


@pytest.mark.parametrize("count", [2, 3, 4])
def test_what_bad_numbers_gave_is_not_kept(count: int) -> None:
    """Weights of a Gramian with NaN serve no other day, and a state saved then can be loaded."""
    x = nn.Parameter(torch.zeros(count, dtype=torch.float64))
    tasks = tuple("abcd"[:count])

    def balancer() -> Balancer:
        options = {"every": 3, "nonfinite": "propagate"}
        return Balancer(Equal(), CAGrad(), tasks=tasks, shared=[x], **options)

    def losses() -> dict[str, Tensor]:
        return {task: (n + 1) * x[n] - x[n - 1] for n, task in enumerate(tasks)}

    poisoned, resumed = balancer(), balancer()
    poisoned.backward({**losses(), "b": x[1] * torch.nan})
    resumed.load_state_dict(poisoned.state_dict())
    rows = raw_rows(losses(), [x])
    for one in (poisoned, resumed):
        x.grad = None
        assert not one.backward(losses()).reused
        assert_close(x.grad, CAGrad()(rows))


@pytest.mark.parametrize(
    ("weighting", "gradient"), [("autol", "cagrad"), ("dwa", "graddrop"), ("dwa", "sum")]
)
def test_refuses_what_cannot_be_kept(weighting: str, gradient: str) -> None:
    model = Network()
    with pytest.raises(ValueError, match="`every` must be 1 unless a GramianStrategy meets a"):
        make_balancer(
            f"{weighting}+{gradient}",
            tasks=TASKS,
            shared=model.trunk,
            every=2,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        )


# --- dtype ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", [CAGrad(), PCGrad(order="fixed"), GradDrop()])
def test_rows_of_low_precision_are_rounded_once(strategy) -> None:
    """As if the strategy met the rounded rows; its result goes to .grad unrounded."""
    model = Network().float()
    shared = list(model.trunk.parameters())
    losses = model.losses(batch().float())
    rows = raw_rows(losses, shared).to(torch.bfloat16)
    expected = copy.deepcopy(strategy)(rows.float())
    balancer = Balancer(
        Equal(), copy.deepcopy(strategy), tasks=TASKS, shared=model.trunk, dtype=torch.bfloat16
    )
    balancer.backward(losses)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    assert_close(flat_grad(shared), expected, rtol=1e-4, atol=1e-5)


def test_low_precision_is_what_is_kept() -> None:
    """Between the passes and apply(), nothing else holds the gradients."""
    model = Network().float()
    balancer = Balancer(Equal(), CAGrad(), tasks=TASKS, shared=model.trunk, dtype=torch.bfloat16)
    balancer.accumulate(model.losses(batch().float()))
    pending = balancer._pending
    kept = pending.rows(TASKS, list(pending.leaves.values()))
    assert {t.dtype for row in kept for t in row if t is not None} == {torch.bfloat16}


@pytest.mark.parametrize("strategy", [Sum(), CAGrad(), PCGrad(), GradDrop()], ids=repr)
def test_sums_of_micro_batches_do_not_lose_small_terms(strategy) -> None:
    """Added up in bfloat16, a thousand thousandths are a half."""
    parts, whole = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(()))
    for x, count in ((parts, 1000), (whole, 1)):
        balancer = Balancer(
            Equal(), copy.deepcopy(strategy), tasks=("a",), shared=[x], dtype=torch.bfloat16
        )
        for _ in range(count):
            balancer.accumulate({"a": x / count})
        balancer.apply()
    assert_close(parts.grad, whole.grad, rtol=1e-3, atol=0)


# --- chunk ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 2, 3, 8])
@pytest.mark.parametrize("name", ["cagrad", "dwa+pcgrad", "graddrop"])
def test_batched_passes_give_what_single_ones_do(chunk: int, name: str) -> None:
    model = Network()
    reference = copy.deepcopy(model)
    for each, options in ((model, {"chunk": chunk}), (reference, {})):
        balancer = make_balancer(name, tasks=TASKS, shared=each.trunk, **options)
        for seed in range(2):
            record = balancer.backward(each.losses(batch(seed=seed)))
            assert record.fallbacks == 0
    for (key, one), other in zip(
        gradients(model).items(), gradients(reference).values(), strict=True
    ):
        assert_close(one, other, rtol=1e-11, atol=1e-13, msg=key)


def test_batched_passes_leave_heads_to_their_tasks() -> None:
    """The batched pass fills with zeros; a head that one loss reaches is still not shared."""
    model = Network()
    balancer = Balancer(Equal(), CAGrad(), tasks=TASKS, chunk=3)
    balancer.backward(model.losses(batch()))
    uses = {row.use for row in balancer.explain(model=model).rows}
    assert uses == {"shared by all tasks", *(f"specific to {task}" for task in TASKS)}


def test_what_cannot_be_batched_runs_one_by_one_and_is_counted() -> None:
    model = Network()
    reference = copy.deepcopy(model)

    def losses(of: Network) -> dict[str, Tensor]:
        hidden = ReadsItsGradient.apply(of.trunk(batch()))
        return {task: head(hidden).square().mean() for task, head in of.heads.items()}

    balancer = Balancer(Equal(), CAGrad(), tasks=TASKS, shared=model.trunk, chunk=3)
    with pytest.warns(RuntimeWarning, match="Balancer fell back: the backward pass cannot be vec"):
        record = balancer.backward(losses(model))
    assert record.fallbacks == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert balancer.backward(losses(model)).fallbacks == 0  # not tried again
    plain = Balancer(Equal(), CAGrad(), tasks=TASKS, shared=reference.trunk)
    for _ in range(2):
        plain.backward(losses(reference))
    for one, other in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


# --- what a step waits for ------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", [Sum(), PCGrad(), CAGrad(), CAGrad(c=0.0), GradDrop()])
@pytest.mark.parametrize("weighting", [Equal, DWA, Uncertainty])
def test_a_step_for_two_tasks_reads_nothing_from_the_device(weighting, strategy) -> None:
    """On the meta device there are no numbers: reading one raises, as it would wait on a GPU."""
    with torch.device("meta"):
        trunk, heads = nn.Linear(4, 3), nn.ModuleDict({t: nn.Linear(3, 1) for t in ("a", "b")})
        balancer = Balancer(
            weighting(),
            copy.deepcopy(strategy),
            tasks=("a", "b"),
            shared=trunk,
            nonfinite="propagate",
        ).to("meta")
        for parameter in balancer.parameters():
            parameter.requires_grad_(False)  # learned weights are watched for the first steps
        hidden = trunk(torch.ones(5, 4)).tanh()
        record = balancer.backward({t: head(hidden).square().mean() for t, head in heads.items()})
    assert all(p.grad is not None and p.grad.is_meta for p in trunk.parameters())
    assert record.tasks == ("a", "b")


# --- compiled models ------------------------------------------------------------------------------


class Compiled(nn.Module):
    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, rows: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.network.losses(rows).values())


@contextmanager
def compiling(*, donate: bool) -> Iterator[None]:
    """Start from nothing compiled, and say whether buffers are given away."""
    from torch._functorch import config

    if not hasattr(config, "donated_buffer"):
        pytest.skip("this torch does not donate buffers")
    torch.compiler.reset()
    with config.patch(donated_buffer=donate):
        yield
    torch.compiler.reset()


@pytest.mark.parametrize("strategy", [Sum(), CAGrad(), GradDrop()])
def test_compiled_models(strategy) -> None:
    """Without donated buffers they are as any other; the backend makes no difference to that."""
    model = Network()
    reference = copy.deepcopy(model)
    with compiling(donate=False):
        compiled = torch.compile(Compiled(model), backend="aot_eager")
        losses = dict(zip(TASKS, compiled(batch()), strict=True))
        for each, given in ((model, losses), (reference, reference.losses(batch()))):
            balancer = Balancer(Equal(), copy.deepcopy(strategy), tasks=TASKS, shared=each.trunk)
            balancer.backward(given)
    for (key, one), other in zip(
        gradients(model).items(), gradients(reference).values(), strict=True
    ):
        assert_close(one, other, rtol=1e-10, atol=1e-12, msg=key)


class Donating(nn.Module):
    """A network whose compiled graph saves an intermediate that nobody else holds."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())
        self.heads = nn.ModuleList([nn.Linear(8, 1), nn.Linear(8, 1)])

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.trunk(rows)
        return self.heads[0](hidden).square().mean(), self.heads[1](hidden).mean()


def test_a_graph_compiled_for_several_passes_gives_nothing_away() -> None:
    """The backward graph is compiled in the first pass, which already keeps it for the next."""
    model = Donating()
    reference = copy.deepcopy(model)
    with compiling(donate=True):
        compiled = torch.compile(model, backend="aot_eager")
        for each in (compiled, reference):
            first, second = each(torch.ones(5, 4))
            balancer = Balancer(Equal(), CAGrad(), tasks=("a", "b"), shared=each.trunk)
            balancer.backward({"a": first, "b": second})
    assert_close(flat_grad(list(model.parameters())), flat_grad(list(reference.parameters())))


def test_donated_buffers_are_named() -> None:
    """A model that has been trained with plain backward passes has given its buffers away."""
    model = Donating()
    with compiling(donate=True):
        compiled = torch.compile(model, backend="aot_eager")
        sum(compiled(torch.ones(5, 4))).backward()
        model.zero_grad()
        first, second = compiled(torch.ones(5, 4))
        balancer = Balancer(Equal(), CAGrad(), tasks=("a", "b"), shared=model.trunk)
        with pytest.raises(RuntimeError, match="donated_buffer = False before the compiled model"):
            balancer.backward({"a": first, "b": second})
    assert all(parameter.grad is None for parameter in model.parameters())


def test_with_donated_buffers_one_pass_is_enough_for_the_sum() -> None:
    model = Donating()
    reference = copy.deepcopy(model)
    with compiling(donate=True):
        first, second = torch.compile(model, backend="aot_eager")(torch.ones(5, 4))
        balancer = Balancer(DWA(), Sum(), tasks=("a", "b"), shared=model.trunk)
        balancer.backward({"a": first, "b": second})
    sum(reference(torch.ones(5, 4))).backward()
    assert_close(flat_grad(list(model.parameters())), flat_grad(list(reference.parameters())))


# --- the default device ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAPER_COMBINATIONS)
def test_the_default_device_is_not_taken_for_the_models(name: str) -> None:
    """As after torch.set_default_device("cuda") with a model that stays on the CPU.

    On the meta device reading a number raises, and so does mixing it with the CPU.
    """
    model = Network()
    reference = copy.deepcopy(model)
    later = batch(seed=1)
    for each, device in ((model, "meta"), (reference, "cpu")):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        balancer = make_balancer(name, tasks=TASKS, shared=each.trunk, optimizer=optimizer)
        losses = each.losses(batch())
        with torch.device(device):
            record = balancer.backward(losses, validation=lambda of=each: of.losses(later))
            balancer.end_epoch()
            balancer.load_state_dict(balancer.state_dict())
            assert record.as_dict()
    for one, other in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
