"""Gradients of linear layers as factors: the same steps, without the gradients of single tasks."""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.nn.utils import parametrizations
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from mtbalance import Balancer, GradientStrategy, Weighting, _factors
from mtbalance._factors import Layer, pays
from mtbalance._places import AtParameters, Place, WithFactors
from mtbalance._seen import Seen
from mtbalance.gradient import CAGrad, GradDrop, MoDo, PCGrad, RowMean, Sum
from mtbalance.weighting import Equal, GradNorm, Uncertainty
from tests._catalogue import GRADIENT_CASES
from tests._device import DEVICE
from tests._networks import flat_grad, gradients, raw_rows

pytestmark = [
    pytest.mark.skipif(DEVICE.type != "cpu", reason="factors are for CPUs"),
    pytest.mark.skipif(not _factors.TELLS, reason="this PyTorch tells nothing of hooks"),
]

TASKS = ("a", "b", "c")


@pytest.fixture
def force(monkeypatch) -> Callable[[bool], None]:
    """Let every layer's gradients be factors, or none's."""
    return lambda pays: monkeypatch.setattr(_factors, "pays", lambda *_: pays)


@pytest.fixture
def found(monkeypatch) -> Iterator[list[int]]:
    """Collect, per step, how many weights had factors."""
    counts: list[int] = []

    choose = AtParameters.for_combinations

    def counting(place: AtParameters, seen: Seen) -> Place:
        chosen = choose(place, seen)
        counts.append(len(chosen._layers) if isinstance(chosen, WithFactors) else 0)
        return chosen

    monkeypatch.setattr(AtParameters, "for_combinations", counting)
    return counts


# --- arithmetic -----------------------------------------------------------------------------------


@st.composite
def factored(draw: st.DrawFn) -> tuple[Layer, list[list[Tensor | None]]]:
    """Draw a layer that is used once or more, and each task's gradients of its outputs."""
    size, k = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    inputs = torch.randn(sum(sizes), size, generator=g, dtype=dtype)
    inputs[draw(st.integers(0, sum(sizes) - 1))] *= draw(st.sampled_from([0.0, 1.0, 1e3]))
    layer = Layer([], sizes, inputs, k, draw(st.booleans()))
    slopes: list[list[Tensor | None]] = []
    for _ in range(draw(st.integers(1, 4))):
        parts = [torch.randn(n, k, generator=g, dtype=dtype) for n in sizes]
        missing = draw(st.lists(st.booleans(), min_size=len(sizes), max_size=len(sizes)))
        slopes.append([None if m else p for m, p in zip(missing, parts, strict=True)])
    return layer, slopes


def dense(layer: Layer, slopes: Sequence[Tensor | None]) -> Tensor:
    """Return a task's gradient of the weight, one use after the other, in float64."""
    total = torch.zeros(layer.inputs.shape[1], layer.outputs, dtype=torch.float64)
    for x, slope in zip(layer.inputs.double().split(layer.sizes), slopes, strict=True):
        for vector, numbers in zip(x, [] if slope is None else slope.double(), strict=False):
            total += torch.outer(vector, numbers)
    return total.T if layer.transposed else total


@given(factored())
def test_products_and_gradients_are_those_of_dense_gradients(case) -> None:
    layer, slopes = case
    rows = torch.stack([dense(layer, each).reshape(-1) for each in slopes])
    factors = [layer.factor(each) for each in slopes]
    largest = float((rows @ rows.T).abs().max())
    assert_close(layer.gramian(factors), rows @ rows.T, rtol=1e-13, atol=1e-13 * largest)
    for row, factor, each in zip(rows, factors, slopes, strict=True):
        assert (factor is None) == all(slope is None for slope in each)
        if factor is not None:
            gradient = layer.gradient(factor).double()
            rounding = 1e-14 if factor.dtype == torch.float64 else 1e-5
            assert_close(gradient.reshape(-1), row, rtol=0, atol=rounding * (largest**0.5 + 1))


@given(factored(), st.integers(0, 2))
def test_blocks_of_outputs_change_nothing(case, entries) -> None:
    layer, slopes = case
    factors = [layer.factor(each) for each in slopes]
    whole = layer.gramian(factors)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_factors, "_BLOCK", entries * len(factors) * len(layer.inputs))
        assert_close(
            layer.gramian(factors), whole, rtol=1e-13, atol=1e-13 * float(whole.abs().max())
        )


def test_the_gramian_is_symmetric() -> None:
    layer = Layer([], [9], torch.randn(9, 7), 5, transposed=True)
    gramian = layer.gramian([torch.randn(9, 5) for _ in range(6)])
    assert torch.equal(gramian, gramian.T)


@pytest.mark.parametrize("of_inputs", [-600, 0, 600])
@pytest.mark.parametrize("of_rows", [-600, 0, 600])
def test_products_of_rows_whose_squares_float64_does_not_hold(of_inputs, of_rows) -> None:
    inputs, slopes = torch.randn(3, 4).double(), [torch.randn(3, 2).double() for _ in range(2)]
    plain = Layer([], [3], inputs, 2, transposed=True).gramian(slopes)
    # The same gradients times 2 ** of_rows, from inputs and slopes that are far from 1 or not.
    large = Layer([], [3], inputs * 2.0**of_inputs, 2, transposed=True)
    if abs(of_rows - of_inputs) > 1000:
        pytest.skip("no float64 slopes take such inputs to such rows")
    half = (of_rows - of_inputs) // 2
    shifted = [s * 2.0**half * 2.0 ** (of_rows - of_inputs - half) for s in slopes]
    assert all(bool(torch.isfinite(s).all()) and bool((s != 0).all()) for s in shifted)
    assert torch.equal(large.gramian(shifted, [of_rows] * 2), plain)
    one, other = large.gramian(shifted, [of_rows, of_rows - 2]).diagonal() / plain.diagonal()
    assert (float(one), float(other)) == (1.0, 16.0)


def test_a_gradient_that_is_not_finite_has_products_that_are_not() -> None:
    for bad in (math.inf, math.nan):
        layer = Layer([], [2], torch.tensor([[1.0, 0.0], [0.0, 0.0]]), 1, transposed=True)
        gramian = layer.gramian([torch.ones(2, 1), torch.tensor([[1.0], [bad]])])
        assert gramian.diagonal().isfinite().tolist() == [True, False]


# --- which layers ---------------------------------------------------------------------------------


class Net(nn.Module):
    """A trunk of a layer with a weight of interest, between others."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.trunk = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), make(), nn.Tanh(), nn.LayerNorm(6))
        self.heads = nn.ModuleDict({task: nn.Linear(6, 1) for task in TASKS})
        self.double()

    def losses(self, x: Tensor) -> dict[str, Tensor]:
        h = self.trunk(x)
        goals = zip(self.heads.items(), (1.0, -2.0, 5.0), strict=True)
        return {task: (head(h) - goal * x.sum(-1, keepdim=True)).square().mean()
                for (task, head), goal in goals}  # fmt: skip


class Multiplied(nn.Module):
    """x W in some way of writing it."""

    def __init__(self, how: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))
        self.register_buffer("bias", torch.randn(6))
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        return self.how(x, self.weight, self.bias)


class Twice(nn.Module):
    """A layer that is used again on its own outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(x)))


class Recomputed(Twice):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.layer, x, use_reentrant=False)


class Offloaded(Twice):
    def forward(self, x: Tensor) -> Tensor:
        with save_on_cpu():
            return self.layer(x)


def hooked() -> nn.Module:
    layer = nn.Linear(6, 6)
    layer.weight.register_hook(lambda g: g * 0.5)
    return layer


class Tagged(nn.Parameter):
    """A parameter that may do things of its own."""


def tagged() -> nn.Module:
    layer = nn.Linear(6, 6)
    layer.weight = Tagged(layer.weight.detach().double())
    return layer


def hooked_module() -> nn.Module:
    layer = nn.Linear(6, 6)
    layer.register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * 2,))
    return layer


def addmm(x: Tensor, w: Tensor, b: Tensor, **factors: float) -> Tensor:
    return torch.addmm(b, x.reshape(-1, 6), w, **factors).view(x.shape)


def on_the_left(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return (w @ x.reshape(-1, 6).T).T.reshape(x.shape) + b


def sparse(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x + (x.detach().reshape(-1, 6).to_sparse() @ w).view(x.shape) + b


def bilinear(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return torch.einsum("...i,...j,ij->...i", x, x, w) + b


LAYERS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "linear": (lambda: nn.Linear(6, 6), 2),
    "without bias": (lambda: nn.Linear(6, 6, bias=False), 2),
    "x @ W": (lambda: Multiplied(lambda x, w, b: x @ w + b), 2),
    "x @ W.t()": (lambda: Multiplied(lambda x, w, b: x @ w.t()), 2),
    "addmm": (lambda: Multiplied(addmm), 2),
    "used twice": (Twice, 2),
    "hooks of the module": (hooked_module, 2),
    # Not plain products, or somebody else looks at the gradient or at what is saved: rows serve.
    "scaled": (lambda: Multiplied(lambda x, w, b: addmm(x, w, b, alpha=2)), 1),
    "W on the left": (lambda: Multiplied(on_the_left), 1),
    "an input, too": (lambda: Multiplied(lambda x, w, b: x @ w + w.square().sum()), 1),
    "W @ W": (lambda: Multiplied(lambda x, w, b: x @ (w @ w)), 1),
    "both ways": (lambda: Multiplied(lambda x, w, b: x @ w + x @ w.t()), 1),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Linear(6, 6)), 1),
    "a hook of the weight": (hooked, 1),
    "a class of its own": (tagged, 1),
    "checkpoint": (Recomputed, 1),
    "saved elsewhere": (Offloaded, 1),
    "bilinear": (lambda: Multiplied(bilinear), 1),
    "sparse inputs": (lambda: Multiplied(sparse), 1),
}
"""How to make a layer, and how many weights of its network have factors."""


def step(model: Net, x: Tensor, strategy: GradientStrategy, **options: Any) -> list[Any]:
    """Take two steps; return all that comes out."""
    balancer = Balancer(Equal(), strategy, tasks=TASKS, shared=model.trunk, **options)
    out: list[Any] = []
    for batch in (x, x[:3] * 2):
        record = balancer.backward(model.losses(batch))
        out += [*gradients(model).values(), record.gramian, record.combination, record.progress]
    return out


@pytest.mark.parametrize("shape", [(5, 4), (3, 2, 4)], ids=["matrix", "sequences"])
@pytest.mark.parametrize("name", LAYERS)
def test_steps_are_the_same(name, shape, force, found) -> None:
    make, expected = LAYERS[name]
    x = torch.randn(*shape, dtype=torch.float64)
    outs = []
    for pays_off in (False, True):
        force(pays_off)
        outs.append(step(Net(make), x, CAGrad()))
    assert found == [0, 0, expected, expected]
    for rows, factors in zip(*outs, strict=True):
        assert_close(factors, rows, rtol=1e-11, atol=1e-12)
        assert factors.stride() == rows.stride()


BY_GRAMIAN = {
    case.name: case
    for case in GRADIENT_CASES
    if (strategy := case.make()).by_gramian
    and strategy.row_means is None
    and not strategy.further_batches
}


@pytest.mark.parametrize("name", BY_GRAMIAN)
def test_every_strategy_on_gramians_takes_the_same_steps(name, force, found) -> None:
    make = LAYERS["used twice"][0]
    x = torch.randn(5, 4, dtype=torch.float64)
    outs = []
    for pays_off in (False, True):
        force(pays_off)
        torch.manual_seed(3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # fallbacks
            outs.append(step(Net(make), x, BY_GRAMIAN[name].make()))
    assert found == [0, 0, 2, 2]
    for rows, factors in zip(*outs, strict=True):
        assert_close(factors, rows, rtol=1e-8, atol=1e-9)


def test_tasks_with_inputs_of_their_own_share_a_layer(force, found) -> None:
    """Each task's loss reaches one use of the trunk alone."""
    outs = []
    for pays_off in (False, True):
        force(pays_off)
        model = Net(lambda: nn.Linear(6, 6))
        balancer = Balancer(Equal(), PCGrad(), tasks=TASKS, shared=model.trunk)
        batches = {task: torch.randn(n, 4).double() for n, task in enumerate(TASKS, 2)}
        torch.manual_seed(7)
        losses = {task: model.losses(batches[task])[task] for task in TASKS}
        rows = raw_rows(losses, list(model.trunk.parameters()))
        record = balancer.backward(losses)
        assert_close(record.gramian, rows @ rows.T, rtol=1e-11, atol=1e-12)
        torch.manual_seed(0)
        outs.append([*gradients(model).values()])
    assert found == [0, 2]
    assert_close(outs[0], outs[1], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", ["groups", "inferred", "every", "retain", "scaler", "learned"])
def test_options_take_the_same_steps(kind, force, found) -> None:
    outs = []
    for pays_off in (False, True):
        force(pays_off)
        model = Net(lambda: nn.Linear(6, 6))
        groups = {"first": model.trunk[:2], "second": model.trunk[2:]}
        shared = {"groups": groups, "inferred": None}.get(kind, model.trunk)
        weighting = Uncertainty(kind="regression") if kind == "learned" else Equal()
        every = 2 if kind == "every" else 1
        balancer = Balancer(weighting, CAGrad(), tasks=TASKS, shared=shared, every=every)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if kind == "scaler" else None
        out: list[Any] = []
        for seed in range(4):
            torch.manual_seed(seed)
            losses = model.losses(torch.randn(5, 4).double())
            if seed == 2:
                del losses["b"]
            balancer.backward(losses, scaler=scaler, retain_graph=kind == "retain")
            if kind == "retain":
                balancer.backward(losses)
            out += gradients(model).values()
            out += [p.grad.clone() for p in weighting.parameters()]
        outs.append(out)
    assert any(found)
    assert_close(outs[0], outs[1], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-6), (torch.bfloat16, 3e-2)])
def test_factors_are_kept_in_the_dtype_of_rows(dtype, rounding, force, found) -> None:
    outs = []
    for pays_off, options in ((False, {}), (True, {"dtype": dtype})):
        force(pays_off)
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).double()
        model = Net(lambda: nn.Linear(6, 6))
        balancer = Balancer(Equal(), PCGrad(), tasks=TASKS, shared=model.trunk, **options)
        balancer.backward(model.losses(x))
        outs.append(flat_grad(list(model.trunk.parameters())))
    assert found == [0, 2]
    difference = (outs[0] - outs[1]).norm() / outs[0].norm()
    assert 1e-3 * rounding < difference < rounding  # rounded, and no more than that


def test_autocast_makes_rows(force, found) -> None:
    force(True)
    model = Net(lambda: nn.Linear(6, 6)).float()
    balancer = Balancer(Equal(), CAGrad(), tasks=TASKS, shared=model.trunk)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model.losses(torch.randn(5, 4))
    balancer.backward(losses)
    assert found == [0]


def test_autocast_does_not_reach_products_of_factors() -> None:
    layer = Layer([], [5], torch.randn(5, 4), 3, transposed=True)
    factors = [torch.randn(5, 3) for _ in range(2)]
    gramian, gradient = layer.gramian(factors), layer.gradient(factors[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer.gramian(factors), gramian)
        assert torch.equal(layer.gradient(factors[0]), gradient)


# --- errors, and what is not finite ---------------------------------------------------------------


@pytest.mark.parametrize("nonfinite", ["raise", "drop", "skip", "propagate"])
@pytest.mark.parametrize("where", ["loss", "gradient", "gradient, scaled"])
def test_what_is_not_finite(nonfinite, where, force) -> None:
    outs = []
    for pays_off in (False, True):
        force(pays_off)
        model = Net(lambda: nn.Linear(6, 6))
        balancer = Balancer(Equal(), PCGrad(), tasks=TASKS, shared=model.trunk, nonfinite=nonfinite)
        torch.manual_seed(0)
        losses = model.losses(torch.randn(5, 4).double())
        bad = losses["b"] * math.inf if where == "loss" else (losses["b"] * 0).sqrt()
        losses["b"] = losses["b"] + bad
        try:
            scaler = torch.amp.GradScaler("cpu") if "scaled" in where else None
            record = balancer.backward(losses, scaler=scaler)
        except FloatingPointError as error:
            outs.append([str(error)])
            assert all(g is None for g in gradients(model).values())
        else:
            assert record.overflow == (scaler is not None and nonfinite != "propagate")
            names = [record.dropped, record.tasks, record.nonfinite]
            outs.append([str((record.skipped, names)), *gradients(model).values()])
    for rows, factors in zip(*outs, strict=True):
        if isinstance(rows, Tensor):
            assert_close(factors, rows, rtol=1e-11, atol=1e-12, equal_nan=True)
        else:
            assert factors == rows


def test_inputs_that_were_written_to_raise_as_autograd_does(force) -> None:
    force(True)
    model = Net(lambda: nn.Linear(6, 6))
    balancer = Balancer(Equal(), PCGrad(), tasks=TASKS, shared=model.trunk)
    x = torch.randn(5, 4).double()
    losses = model.losses(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        balancer.backward(losses)
    assert all(g is None for g in gradients(model).values())


def test_a_graph_serves_once(force) -> None:
    force(True)
    model = Net(lambda: nn.Linear(6, 6))
    balancer = Balancer(Equal(), PCGrad(), tasks=TASKS, shared=model.trunk)
    losses = model.losses(torch.randn(5, 4).double())
    balancer.backward(losses)
    with pytest.raises(RuntimeError, match="second time"):
        balancer.backward(losses)


# --- who asks for rows ----------------------------------------------------------------------------

ROWS: dict[str, Callable[[], tuple[Weighting, GradientStrategy, dict[str, Any]]]] = {
    "GradDrop": lambda: (Equal(), GradDrop(), {}),
    "RowMean": lambda: (Equal(), RowMean(PCGrad(), beta=0.5), {}),
    "GradNorm": lambda: (GradNorm(), PCGrad(), {}),
    "chunk": lambda: (Equal(), PCGrad(), {"chunk": 2}),
}


def test_products_of_two_batches_take_rows(force, found) -> None:
    force(True)
    model = Net(lambda: nn.Linear(6, 6))
    balancer = Balancer(Equal(), MoDo(gamma=0.01), tasks=TASKS, shared=model.trunk)
    x, *others = torch.randn(3, 5, 4).double()
    balancer.backward(model.losses(x), batches=[lambda x=x: model.losses(x) for x in others])
    assert not any(found)


@pytest.mark.parametrize("name", ROWS)
def test_whoever_asks_for_rows_gets_rows(name, force, found) -> None:
    force(True)
    weighting, strategy, options = ROWS[name]()
    model = Net(lambda: nn.Linear(6, 6))
    balancer = Balancer(weighting, strategy, tasks=TASKS, shared=model.trunk, **options)
    balancer.backward(model.losses(torch.randn(5, 4).double()))
    assert not any(found)


def test_micro_batches_have_rows(force, found) -> None:
    force(True)
    model = Net(lambda: nn.Linear(6, 6))
    balancer = Balancer(Equal(), PCGrad(), tasks=TASKS, shared=model.trunk)
    for _ in range(2):
        balancer.accumulate(model.losses(torch.randn(5, 4).double()))
    balancer.apply()
    assert not found


def test_one_pass_of_a_sum_has_no_factors_and_a_dropping_one_has(force, found) -> None:
    force(True)
    model = Net(lambda: nn.Linear(6, 6))
    for nonfinite in ("raise", "drop"):
        balancer = Balancer(Equal(), Sum(), tasks=TASKS, shared=model.trunk, nonfinite=nonfinite)
        balancer.backward(model.losses(torch.randn(5, 4).double()))
    assert found == [2]


def test_an_inferred_split_is_known_before_factors_are_made(force, found) -> None:
    """A head is no shared layer, whatever its size."""
    force(True)
    model = Net(lambda: nn.Linear(6, 6))
    balancer = Balancer(Equal(), PCGrad(), tasks=TASKS)
    losses = model.losses(torch.randn(5, 4).double())
    rows = raw_rows(losses, list(model.trunk.parameters()))
    record = balancer.backward(losses)
    assert found == [2]
    assert_close(record.gramian, rows @ rows.T, rtol=1e-11, atol=1e-12)


# --- what it is for -------------------------------------------------------------------------------


class Sizes(TorchDispatchMode):
    """Counts the products of matrices of one size."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.made = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.made += func is torch.ops.aten.mm.default and out.numel() == self.size
        return out


@pytest.mark.parametrize("tasks", [2, 5])
def test_no_gradient_of_a_single_task_is_made(tasks, force) -> None:
    names = [str(n) for n in range(tasks)]
    made = []
    for pays_off in (False, True):
        force(pays_off)
        trunk, heads = nn.Linear(37, 41), nn.Linear(41, tasks)
        balancer = Balancer(Equal(), PCGrad(), tasks=names, shared=trunk)
        outputs = heads(trunk(torch.randn(3, 37)))
        losses = {name: outputs[:, n].square().mean() for n, name in enumerate(names)}
        with Sizes(37 * 41) as sizes:
            balancer.backward(losses)
        made.append(sizes.made)
    assert made == [tasks, 1]


def test_small_layers_and_many_vectors_make_rows() -> None:
    layer = torch.empty(1024, 1024)
    assert pays(layer, 128, 1024, 2)
    assert pays(layer, 128, 1024, 16)
    assert not pays(layer, 4096, 1024, 2)
    assert not pays(torch.empty(32, 32), 32, 32, 2)  # calls would cost more


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_layers_without_inputs_and_batches_without_vectors_make_rows() -> None:
    """As an expert has to which no token goes in some step."""
    assert not pays(torch.empty(1024, 1024), 0, 1024, 2)
    assert not pays(torch.empty(1024, 0), 128, 0, 2)
    torch.manual_seed(0)
    used, idle, empty = nn.Linear(1024, 300), nn.Linear(1024, 300), nn.Linear(0, 300)
    rows, whom = torch.randn(4, 1024), torch.tensor([0, 2])
    hidden = (used(rows) + empty(rows[:, :0])).index_add(0, whom[:0], idle(rows[whom[:0]]))
    losses = {"a": hidden.square().mean(), "b": (hidden - 1).abs().mean()}
    shared = [used, idle, empty]
    parameters = [p for layer in shared for p in layer.parameters()]
    expected = raw_rows(losses, parameters).sum(0)
    balancer = Balancer(Equal(), CAGrad(c=0.0), tasks=("a", "b"), shared=shared)
    balancer.backward(losses)
    assert_close(flat_grad(parameters), expected)


def test_one_task_makes_rows_and_no_detour() -> None:
    assert not pays(torch.empty(1024, 1024), 512, 1024, 1)
