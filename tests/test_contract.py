"""What holds for every strategy: the catalogue, crossed with matrices of proven structure."""

import copy
import inspect
import pickle
import re
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

import mtbalance.gradient
import mtbalance.weighting
from mtbalance.gradient import GradientStrategy, GramianStrategy
from mtbalance.weighting import AutoLambda, Weighting
from tests._catalogue import (
    GRADIENT_CASES,
    TASKS_OF_CASES,
    WEIGHTING_CASES,
    Claim,
    GradientCase,
    Trait,
    WeightingCase,
    gradient_cases,
    live,
    weighting_cases,
)
from tests._device import on_device
from tests._oracles import array, least_norm_weights
from tests._samplers import BY_NAME, DTYPES, FAMILIES, SCALES, gradients, matrix, orthogonal

# Of some matrices drawn here, strategies say that there is no answer, and fall back.
pytestmark = pytest.mark.filterwarnings("ignore:.* fell back:RuntimeWarning")

EPS = {dtype: torch.finfo(dtype).eps for dtype in DTYPES}
SEEDS = st.integers(0, 2**16)
few = settings(max_examples=25)


def size_of(rows: Tensor) -> float:
    """Return the sum of the norms of the rows, which bounds every direction by a small factor."""
    return float(rows.double().norm(dim=1).sum())


def bits(tensor: Tensor) -> bytes:
    """Return a tensor's bytes, so that NaN equals NaN and 0 does not equal -0."""
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8).cpu().numpy().tobytes()


def state_of(module: nn.Module) -> dict[str, bytes]:
    """Return everything that a module remembers."""
    return {name: bits(value) for name, value in module.state_dict().items()}


# --- the catalogue --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("package", "base", "cases"),
    [
        (mtbalance.gradient, GradientStrategy, GRADIENT_CASES),
        (mtbalance.weighting, Weighting, WEIGHTING_CASES),
    ],
    ids=["gradient", "weighting"],
)
def test_every_exported_strategy_is_in_the_catalogue(package, base, cases) -> None:
    """Whoever adds a strategy to ``__all__`` must say here what it claims."""
    exported = [getattr(package, name) for name in package.__all__]
    strategies = {
        value
        for value in exported
        if inspect.isclass(value) and issubclass(value, base) and not inspect.isabstract(value)
    }
    assert strategies
    assert strategies == {type(case.make()) for case in cases}


@pytest.mark.parametrize("package", [mtbalance.gradient, mtbalance.weighting])
def test_every_strategy_is_exported(package) -> None:
    """A class that is written but not in ``__all__`` would escape the catalogue."""
    bases = (GradientStrategy, Weighting)
    written = {
        name
        for name, value in vars(package).items()
        if inspect.isclass(value) and issubclass(value, bases)
    }
    assert written == {
        name
        for name in package.__all__
        if inspect.isclass(getattr(package, name)) and issubclass(getattr(package, name), bases)
    }


def test_names_of_cases_are_unique() -> None:
    names = [case.name for case in (*GRADIENT_CASES, *WEIGHTING_CASES)]
    assert len(set(names)) == len(names)


# --- the matrices themselves ----------------------------------------------------------------------


def _has_conflict(rows: Tensor) -> bool:
    return bool((rows.double() @ rows.double().T < 0).any())


def _two_rows(rows: Tensor, related: Callable[[Tensor, Tensor], bool]) -> bool:
    m = len(rows)
    return any(related(rows[i], rows[j]) for i in range(m) for j in range(m) if i != j)


def _units(rows: Tensor) -> Tensor:
    return rows.double() / rows.double().norm(dim=1, keepdim=True)


def _least_norm(rows: Tensor) -> float:
    """Return the distance of the rows' convex hull from zero."""
    scaled = array(rows) / float(rows.abs().max())
    weights = least_norm_weights(scaled, np.ones(len(scaled)))
    return float(np.linalg.norm(weights @ scaled)) * float(rows.abs().max())


def _spread(rows: Tensor) -> float:
    norms = rows.double().norm(dim=1)
    return float(norms.max() / norms.min())


STRUCTURE: dict[str, Callable[[Tensor], bool]] = {
    "generic": lambda rows: True,
    "conflicting": _has_conflict,
    "non_conflicting": lambda rows: not _has_conflict(rows),
    "rank_deficient": lambda rows: int(torch.linalg.matrix_rank(rows.double())) < min(rows.shape),
    "duplicate_rows": lambda rows: _two_rows(rows, lambda a, b: torch.equal(a, b) and a.any()),
    "opposite_rows": lambda rows: _two_rows(
        rows, lambda a, b: bool(a.any()) and any(torch.equal(b, -k * a) for k in range(1, 5))
    ),
    "zero_rows": lambda rows: not rows.any(dim=1).all(),
    "near_parallel": lambda rows: bool((_units(rows) @ _units(rows).T > 0.85).all()),
    "unequal_norms": lambda rows: len(rows) == 1 or _spread(rows) >= 2**40 / 22,
    "stationary": lambda rows: _least_norm(rows) < 1e-12 * float(rows.double().abs().max()),
}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@given(data=st.data())
@few
def test_matrices_have_the_structure_they_promise(family, data) -> None:
    """The proofs in the docstrings of ``_samplers.py``, checked on the rounded, scaled numbers."""
    rows = data.draw(gradients([family.name], dtypes=DTYPES))
    assert torch.isfinite(rows).all()
    assert STRUCTURE[family.name](rows)


def test_every_family_has_a_check() -> None:
    assert set(STRUCTURE) == set(BY_NAME)


# --- gradient strategies --------------------------------------------------------------------------


def tasks_within(case: GradientCase) -> tuple[int, int]:
    return (1, case.max_tasks)


@gradient_cases()
@given(data=st.data())
@settings(max_examples=80)
def test_direction_is_a_finite_vector_of_the_rows_dtype(case: GradientCase, data) -> None:
    """Any finite matrix, from 1e-20 to 1e20, in any dtype, gives a finite direction.

    No direction is longer than ``growth`` times the sum of the norms, up to its rounding: by that
    the Balancer judges whether it can be more than a dtype holds.
    """
    rows = data.draw(gradients(m=tasks_within(case), dtypes=DTYPES))
    before = rows.clone()
    strategy = case.make()
    direction = strategy(rows)
    assert direction.shape == rows.shape[1:]
    assert direction.dtype == rows.dtype
    assert direction.device == rows.device
    assert torch.isfinite(direction).all()
    if strategy.growth is not None:
        assert direction.double().norm() <= 1.01 * strategy.growth * size_of(rows)
    assert torch.equal(rows, before), "the input was written to"


@gradient_cases()
@given(m=st.integers(1, 6), p=st.integers(1, 30), seed=SEEDS, name=st.sampled_from(sorted(BY_NAME)))
@few
def test_low_precision_only_rounds(case: GradientCase, m, p, seed, name) -> None:
    """bfloat16 rows give what the same numbers give in float32, up to one rounding of the result.

    The random numbers are the same, since low precision is computed in float32.
    """
    family = BY_NAME[name]
    rows = matrix(name, max(m, family.least_m), max(p, family.least_p), seed, dtype=torch.bfloat16)
    exact = case.make()(rows.float())
    tolerance = (EPS[torch.bfloat16] + 1e-6) * size_of(rows)
    assert_close(case.make()(rows).float(), exact, rtol=0, atol=tolerance)


@gradient_cases()
@pytest.mark.parametrize("dtype", DTYPES)
def test_degenerate_shapes(case: GradientCase, dtype: torch.dtype) -> None:
    """One task: its gradient (times the factor that equal rows get). No parameters: no numbers."""
    row = matrix("generic", 1, 7, dtype=dtype)
    direction = case.make()(row)
    assert_close(direction.double(), case.identical * row[0].double(), rtol=2 * EPS[dtype], atol=0)
    assert case.make()(matrix("generic", 3, 1, dtype=dtype)[:, :0]).shape == (0,)


@gradient_cases()
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_zero_rows_give_zero(case: GradientCase, dtype: torch.dtype) -> None:
    zeros = torch.zeros(3, 4, dtype=dtype)
    assert torch.equal(case.make()(zeros), zeros[0])


@gradient_cases()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", SCALES)
@given(m=st.integers(1, 6), p=st.integers(1, 12), seed=SEEDS)
@settings(max_examples=5)
def test_equal_tasks_add_up(case: GradientCase, dtype, scale, m, p, seed) -> None:
    """m equal rows g give m g, the scale of the sum, times the factor of the method's formula."""
    g = matrix("generic", 1, p, seed, scale=scale, dtype=dtype)
    direction = case.make()(g.expand(m, p))
    # Two roundings of the result, and for bfloat16 and float32 some of the sum of m terms.
    assert_close(
        direction.double(), case.identical * m * g[0].double(), rtol=8 * EPS[dtype], atol=0
    )


@gradient_cases(Claim.ORDER_FREE)
@given(data=st.data())
def test_order_free(case: GradientCase, data) -> None:
    rows = data.draw(gradients(m=tasks_within(case)))
    assume(not near_a_jump(case, rows))
    order = torch.tensor(data.draw(st.permutations(range(len(rows)))))
    first, second = case.make()(rows), case.make()(rows[order])
    assert_close(second, first, rtol=0, atol=tolerance_of(case, rows) * size_of(rows))


def tolerance_of(case: GradientCase, rows: Tensor) -> float:
    """Return by how much two equal answers may differ, relative to the sum of the norms.

    CAGrad's direction is the quotient of g_w by its length, which sets of rows that nearly cancel
    make as uncertain as that length. AlignedMTL's is as long as the root of an eigenvalue, which is
    known up to the root of the rounding. ConFIG, GradOPS and IMTLG invert the cosines, whose least
    eigenvalues are known to some eps; IMTLG divides by a sum that may nearly cancel.
    """
    if case.name.startswith(("CAGrad", "AlignedMTL")):
        return 1e-6
    if not case.name.startswith(("ConFIG", "GradOPS", "IMTLG")) or not rows.any():
        return 1e-13
    _, values, limit = _unit_rows_as(rows)
    return (1e-13 + 1e-14 / values[values > limit].min() ** 2) * cancelled(case, rows) ** 2


def cancelled(case: GradientCase, rows: Tensor) -> float:
    """Return how many times longer than their sum the terms are that IMTLG divides by."""
    if not case.name.startswith("IMTLG") or not rows.any():
        return 1.0
    left, values, limit = _unit_rows_as(rows)
    left, values = left[:, values > limit], values[values > limit]
    norms = np.linalg.norm(array(rows[rows.any(1)]), axis=1)
    shares = left @ (left.sum(0) / values**2) / norms
    return float(max(np.abs(shares).sum() / max(abs(shares.sum()), 1e-300), 1))


def _unit_rows_as(rows: Tensor) -> tuple[np.ndarray, np.ndarray, float]:
    """Return left vectors and singular values of the unit rows, and up to where these are zero."""
    alive = array(rows[rows.any(1)])
    norms = np.linalg.norm(alive, axis=1)
    left, values, _ = np.linalg.svd(alive / norms[:, None], full_matrices=False)
    return left, values, float(np.sqrt(1e-12 * len(alive)) * values[0])


def near_a_jump(case: GradientCase, rows: Tensor) -> bool:
    """Whether rounding decides about the direction, as the method itself says that it jumps there.

    AlignedMTL takes eigenvalues of the Gramian for zero that are about its rounding, ConFIG,
    GradOPS and IMTLG those of cosines that are about the rounding of float32; IMTLG turns the
    direction round.
    """
    if not rows.any():
        return False
    if case.name.startswith(("ConFIG", "GradOPS", "IMTLG")):
        _, values, limit = _unit_rows_as(rows)
        jumps = ((values > limit / 3) & (values < 3 * limit)).any()
        return bool(jumps) or cancelled(case, rows) >= 1e6
    if not case.name.startswith("AlignedMTL"):
        return False
    squares = torch.linalg.svdvals(rows.double() / rows.abs().max()).square()
    ratios = squares / squares.max()
    return bool(((ratios > 1e-16) & (ratios < 1e-13)).any())


@gradient_cases(Claim.ROTATES)
@given(data=st.data(), seed=SEEDS)
def test_rotates_with_the_rows(case: GradientCase, data, seed: int) -> None:
    """Inner products of rows are all that counts, and Q leaves them as they are."""
    rows = data.draw(gradients(m=tasks_within(case)))
    assume(not near_a_jump(case, rows))
    rotation = orthogonal(rows.shape[1], seed)
    first, second = case.make()(rows) @ rotation, case.make()(rows @ rotation)
    assert_close(second, first, rtol=0, atol=tolerance_of(case, rows) * size_of(rows))


@gradient_cases(Claim.ODD)
@given(data=st.data())
@few
def test_odd(case: GradientCase, data) -> None:
    """Turning all signs leaves the Gramian as it is, bit for bit, and so the weights."""
    rows = data.draw(gradients(m=tasks_within(case), dtypes=DTYPES))
    assert torch.equal(case.make()(-rows), -case.make()(rows))


@gradient_cases(Claim.HOMOGENEOUS)
@given(data=st.data(), scale=st.sampled_from(SCALES))
def test_homogeneous_bit_for_bit(case: GradientCase, data, scale: float) -> None:
    """A power of two changes exponents only: nothing may depend on the scale, not even rounding."""
    rows = data.draw(gradients(m=tasks_within(case), dtypes=DTYPES, scales=[1.0]))
    assert torch.equal(case.make()(rows * scale), case.make()(rows) * scale)


@gradient_cases(Claim.HOMOGENEOUS)
@given(m=st.integers(1, 6), p=st.integers(1, 12), seed=SEEDS, exponent=st.floats(-20, 20))
@few
def test_homogeneous(case: GradientCase, m, p, seed, exponent) -> None:
    """For other factors up to rounding (generic rows, which no rounding turns into conflicts)."""
    rows = matrix("generic", m, p, seed)
    expected = case.make()(rows) * 10**exponent
    atol = tolerance_of(case, rows) * size_of(rows) * 10**exponent
    assert_close(case.make()(rows * 10**exponent), expected, rtol=0, atol=atol)


@gradient_cases(Claim.DOUBLES)
@given(data=st.data())
def test_tasks_listed_twice_double_the_direction(case: GradientCase, data) -> None:
    rows = data.draw(gradients(m=(1, 4)))
    assume(not near_a_jump(case, rows))
    expected = 2 * case.make()(rows)
    atol = tolerance_of(case, rows) * size_of(rows)
    assert_close(case.make()(torch.cat([rows, rows])), expected, rtol=0, atol=atol)


@gradient_cases(Claim.IGNORES_ZERO_ROWS)
@given(data=st.data())
def test_tasks_without_gradient_change_nothing(case: GradientCase, data) -> None:
    """A task whose gradient is zero everywhere (no labels in this batch) is as good as absent."""
    rows = data.draw(gradients(m=(1, case.max_tasks - 2)))
    assume(not near_a_jump(case, rows))
    position = data.draw(st.integers(0, len(rows)))
    zeros = torch.zeros(data.draw(st.integers(1, 2)), rows.shape[1], dtype=rows.dtype)
    padded = torch.cat([rows[:position], zeros, rows[position:]])
    expected = case.make()(rows)
    assert_close(
        case.make()(padded), expected, rtol=0, atol=tolerance_of(case, rows) * size_of(rows)
    )


@gradient_cases(Claim.SUM_WITHOUT_CONFLICT)
@given(data=st.data())
def test_is_the_sum_where_nothing_conflicts(case: GradientCase, data) -> None:
    """Exactly: the rows are small integers times a power of two."""
    rows = data.draw(gradients(["non_conflicting"], m=tasks_within(case), dtypes=DTYPES))
    assert torch.equal(case.make()(rows), rows.sum(0))


@gradient_cases(Claim.NO_CONFLICT_LEFT)
@given(data=st.data())
@settings(max_examples=150)
def test_no_task_conflicts_with_the_direction(case: GradientCase, data) -> None:
    """<g_i, d> >= 0, up to the rounding of d, whose parts are as long as the sum of the rows."""
    rows = data.draw(gradients(m=tasks_within(case)))
    direction = case.make()(rows)
    slack = 1e-12 * rows.norm(dim=1) * size_of(rows)
    assert (rows @ direction >= -slack).all()


@gradient_cases(Claim.HOMOGENEOUS)
@pytest.mark.parametrize("scale", [2.0**-1000, 2.0**-560, 2.0**560, 2.0**1000])
def test_rows_whose_squares_float64_does_not_hold(case: GradientCase, scale: float) -> None:
    """Powers of two change nothing but the scale."""
    rows = torch.randn(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    assert_close(case.make()(rows * scale) / scale, case.make()(rows), rtol=1e-12, atol=1e-12)


@gradient_cases()
def test_claim_to_work_by_coordinates_agrees_with_the_class(case: GradientCase) -> None:
    """The Balancer hands columns over in blocks exactly where ``coordinatewise`` is set."""
    strategy = case.make()
    assert strategy.coordinatewise == (Claim.COORDINATEWISE in case.claims)
    rows = torch.tensor([[1.0, 0.0, 3.0], [-1.0, 1.0, 0.0], [0.5, -1.0, -1.0]])
    whole = case.make()(rows)
    strategy.start()
    parts = torch.cat([strategy.on_columns(rows[:, :2], 0), strategy.on_columns(rows[:, 2:], 2)])
    if strategy.coordinatewise:
        assert_close(parts, whole)
    elif case.name != "CAGrad-no-radius":
        assert (parts - whole).abs().max() > 1e-3


@gradient_cases()
@pytest.mark.parametrize("family", ["generic", "conflicting", "stationary", "zero_rows"])
def test_the_default_device_is_not_taken_for_the_rows(case: GradientCase, family: str) -> None:
    """As after torch.set_default_device("cuda") with rows on the CPU: "meta" has no numbers."""
    for m in (2, 5) if "expectation" in case.name else (2, 5, 20):
        rows = matrix(family, m, 30)
        expected = case.make()(rows)
        strategy = case.make()
        with torch.device("meta"):
            assert torch.equal(strategy(rows), expected)


@gradient_cases()
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bad_numbers_come_out_bad(case: GradientCase, bad: float, dtype: torch.dtype) -> None:
    """A gradient scaler must see them; a Gramian strategy has not even drawn a random number."""
    strategy = case.make()
    rows = matrix("conflicting", 3, 6, dtype=dtype)
    strategy(rows)
    before = state_of(strategy)
    poisoned = rows.clone()
    poisoned[1, 2] = bad
    direction = strategy(poisoned)
    assert not torch.isfinite(direction[2])
    if isinstance(strategy, GramianStrategy):
        assert direction.isnan().all()
        assert state_of(strategy) == before
    assert torch.isfinite(strategy(rows)).all()


@gradient_cases()
def test_opposite_infinities_come_out_bad(case: GradientCase) -> None:
    rows = torch.tensor([[float("inf"), 1.0], [-float("inf"), 1.0]])
    assert not torch.isfinite(case.make()(rows)[0])


@gradient_cases()
def test_rows_with_a_graph(case: GradientCase) -> None:
    """Gradients made with ``create_graph=True`` give the same numbers."""
    rows = matrix("conflicting", 3, 6)
    expected = case.make()(rows)
    assert_close(case.make()(rows.clone().requires_grad_()).detach(), expected)


@gradient_cases()
def test_memory_layout_does_not_matter(case: GradientCase) -> None:
    rows = matrix("conflicting", 3, 6)
    assert torch.equal(case.make()(rows.T.contiguous().T), case.make()(rows))


def continues_like(first: nn.Module, second: nn.Module, use: Callable[[nn.Module], Tensor]) -> None:
    """Check that two modules answer alike, bit for bit, for three more steps."""
    for _ in range(3):
        assert bits(use(first)) == bits(use(second))


@gradient_cases()
def test_state_travels(case: GradientCase) -> None:
    """Mid-run, a strategy loaded, copied or pickled goes on as the original does."""
    rows = matrix("conflicting", 4, 20, dtype=torch.float32)
    strategy = case.make()
    for _ in range(3):
        strategy(rows)
    fresh = case.make()
    fresh.load_state_dict(strategy.state_dict(), strict=True)
    for other in (fresh, copy.deepcopy(strategy), pickle.loads(pickle.dumps(strategy))):
        continues_like(copy.deepcopy(strategy), other, lambda s: s(rows))


@gradient_cases()
def test_copies_do_not_share_state(case: GradientCase) -> None:
    rows = matrix("conflicting", 4, 20)
    strategy = case.make()
    twin = copy.deepcopy(strategy)
    strategy(rows)
    saved = state_of(twin)
    twin_answers = twin(rows)
    assert bits(twin_answers) == bits(case.make()(rows))
    assert state_of(strategy).keys() == saved.keys()


@gradient_cases()
def test_reset_goes_back_to_the_start(case: GradientCase) -> None:
    rows = matrix("conflicting", 4, 20)
    strategy = case.make()
    start = state_of(strategy)
    strategy(rows)
    strategy.reset()
    assert state_of(strategy) == start
    continues_like(strategy, case.make(), lambda s: s(rows))


@gradient_cases()
def test_the_global_generator_is_left_alone(case: GradientCase) -> None:
    before = torch.get_rng_state()
    case.make()(matrix("conflicting", 4, 20))
    assert torch.equal(torch.get_rng_state(), before)


@gradient_cases()
def test_repr_names_the_settings(case: GradientCase) -> None:
    strategy = case.make()
    text = repr(strategy)
    assert text.startswith(type(strategy).__name__ + "(")
    settings_of = [name for name in vars(strategy) if name in ("c", "rescale", "leak", "order")]
    for name in settings_of:
        assert f"{name}=" in text


@gradient_cases()
@pytest.mark.parametrize(
    ("gradients", "error", "words"),
    [
        ([[1.0, 2.0]], TypeError, "`gradients` must be a tensor of shape (m, p)"),
        (torch.ones(3), ValueError, "`gradients` must have shape (m, p)"),
        (torch.ones(2, 3, 4), ValueError, "but got shape (2, 3, 4)."),
        (torch.ones(0, 3), ValueError, "m at least 1, but got shape (0, 3)."),
        (torch.ones(2, 3, dtype=torch.int64), TypeError, "but got torch.int64."),
        (torch.ones(2, 3, dtype=torch.complex64), TypeError, "but got torch.complex64."),
    ],
)
def test_refuses_what_is_not_a_matrix_of_gradients(
    case: GradientCase, gradients: object, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=re.escape(words)):
        case.make()(gradients)  # type: ignore[arg-type]


# --- weightings -----------------------------------------------------------------------------------


def lists_of_losses(least: float, most: float) -> st.SearchStrategy[list[list[float]]]:
    """Draw the losses of a few epochs of one step each."""
    losses = st.lists(st.floats(least, most), min_size=TASKS_OF_CASES, max_size=TASKS_OF_CASES)
    return st.lists(losses, min_size=1, max_size=5)


ANY_LOSSES = lists_of_losses(1e-6, 1e6)


def losses_of(*values: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def run(
    weighting: Weighting, steps: int, seed: int = 0, dtype: torch.dtype = torch.float32
) -> list:
    """Train for a while, an epoch every two steps, and return the weighted losses as bytes."""
    rng = torch.Generator().manual_seed(seed)
    seen = []
    for step in range(steps):
        drawn = torch.rand(TASKS_OF_CASES, generator=rng, dtype=dtype, device="cpu")
        losses = on_device(drawn) + 0.1
        seen.append(bits(live(weighting, losses)))
        if step % 2:
            weighting.end_epoch()
    return seen


@weighting_cases()
@pytest.mark.parametrize("dtype", DTYPES)
@given(epochs=ANY_LOSSES)
@few
def test_weighted_losses_are_finite_and_of_the_losses_dtype(
    case: WeightingCase, dtype: torch.dtype, epochs: list
) -> None:
    weighting = case.make()
    for values in epochs:
        losses = losses_of(*values, dtype=dtype)
        weighted = live(weighting, losses)
        assert weighted.shape == losses.shape
        assert weighted.dtype == torch.promote_types(dtype, weighted.dtype)
        if not list(weighting.parameters()):
            assert weighted.dtype == dtype
        assert torch.isfinite(weighted).all()
        weighting.end_epoch()


def weights_of(weighting: Weighting, losses: Tensor) -> Tensor:
    """Return d objective / d losses."""
    losses = losses.clone().requires_grad_()
    (weights,) = torch.autograd.grad(weighting(losses).sum(), losses)
    return weights


@weighting_cases(Trait.SUMS_TO_M)
@given(epochs=ANY_LOSSES, count=st.integers(1, TASKS_OF_CASES))
@few
def test_weights_sum_to_the_number_of_active_tasks(case: WeightingCase, epochs, count) -> None:
    weighting = case.make()
    for values in epochs:
        live(weighting, losses_of(*values))
        weighting.end_epoch()
    with weighting.only(torch.arange(count)):
        weights = weights_of(weighting, torch.ones(count))
    assert_close(weights.sum(), torch.tensor(float(count)))


@weighting_cases(Trait.POSITIVE)
@given(epochs=lists_of_losses(0.1, 10.0))
@few
def test_weights_are_positive(case: WeightingCase, epochs) -> None:
    """For losses whose ratios leave the exponential functions in these weights above zero."""
    weighting = case.make()
    for values in epochs:
        live(weighting, losses_of(*values))
        weighting.end_epoch()
    assert (weights_of(weighting.eval(), torch.ones(TASKS_OF_CASES)) > 0).all()


@weighting_cases(Trait.LINEAR)
def test_weighted_losses_are_the_weights_times_the_losses(case: WeightingCase) -> None:
    weighting = case.make()
    run(weighting, 5)
    weighting.eval()
    losses = losses_of(0.5, 2.0, 3.0)
    assert_close(weighting(losses), weights_of(weighting, losses) * losses)


@weighting_cases(Trait.STARTS_EQUAL)
def test_starts_with_equal_weights(case: WeightingCase) -> None:
    weights = weights_of(case.make(), losses_of(0.5, 2.0, 3.0))
    assert torch.equal(weights, weights[:1].expand(TASKS_OF_CASES))


@weighting_cases()
def test_remembers_exactly_what_it_says(case: WeightingCase) -> None:
    """Whatever learns or remembers is in ``state_dict``, and training changes it."""
    weighting = case.make()
    weighting(torch.ones(TASKS_OF_CASES))
    weighting.reset()
    start = state_of(weighting)
    run(weighting, 3)
    if Trait.STATELESS in case.traits:
        assert start == {}
    else:
        assert state_of(weighting) != start
    moves = bool(list(weighting.parameters()))
    assert moves == (Trait.LEARNS_BY_GRADIENT in case.traits)


@weighting_cases()
@pytest.mark.parametrize("steps", [1, 4, 7])
def test_state_of_weightings_travels(case: WeightingCase, steps: int) -> None:
    """In the middle of an epoch or at its end: what is loaded or copied goes on bit for bit.

    A fresh weighting need not have seen a loss: loading tells it how many tasks there are.
    """
    original = case.make()
    run(original, steps)
    fresh, bound = case.make(), case.make()
    bound.bind([str(i) for i in range(TASKS_OF_CASES)])
    for other in (fresh, bound):
        other.load_state_dict(original.state_dict(), strict=True)
        assert state_of(other) == state_of(original)
    copied, pickled = copy.deepcopy(original), pickle.loads(pickle.dumps(original))
    expected = run(original, 4, seed=1)
    for other in (fresh, bound, copied, pickled):
        if isinstance(other, AutoLambda):
            # What is not part of a weighting: the optimizer and its parameters.
            assert not {"lr", "optimizer"} & set(other.state_dict())
        assert run(other, 4, seed=1) == expected
    assert state_of(fresh) == state_of(original)


@weighting_cases()
def test_reset_forgets_everything(case: WeightingCase) -> None:
    weighting = case.make().bind([str(i) for i in range(TASKS_OF_CASES)])
    start = state_of(weighting)
    first = run(weighting, 5)
    weighting.reset()
    assert state_of(weighting) == start
    assert run(weighting, 5) == first


@weighting_cases()
def test_absent_tasks_are_left_as_they_were(case: WeightingCase) -> None:
    """State of a task that is absent from a step does not change, whatever its shape."""
    weighting = case.make()
    run(weighting, 5)
    before = copy.deepcopy(weighting.state_dict())
    active = torch.tensor([2, 0])
    with weighting.only(active):
        weighted = live(weighting, losses_of(0.7, 0.2), active)
    assert weighted.shape == (2,)
    for name, value in weighting.state_dict().items():
        if "random" not in name:
            assert bits(value[1]) == bits(before[name][1]), name
    assert weighting(torch.ones(TASKS_OF_CASES)).shape == (TASKS_OF_CASES,)


@weighting_cases()
def test_numbers_of_absent_tasks_pick_the_right_weights(case: WeightingCase) -> None:
    """With state that differs by task, tasks (2, 0) get the weights of tasks 2 and 0.

    Weights that are normalised over the active tasks keep their ratio. Those that depend on all
    losses are looked at in another order.
    """
    weighting = case.make()
    run(weighting, 5)
    weighting.eval()
    if Trait.COUPLED in case.traits:
        losses, order = losses_of(0.5, 2.0, 3.0), torch.tensor([2, 0, 1])
        everyone = weights_of(weighting, losses)
        with weighting.only(order):
            assert_close(weights_of(weighting, losses[order]), everyone[order])
        return
    everyone = weights_of(weighting, torch.ones(TASKS_OF_CASES))
    with weighting.only(torch.tensor([2, 0])):
        two = weights_of(weighting, torch.ones(2))
    expected = everyone[[2, 0]]
    if Trait.SHARED_OUT in case.traits:
        two, expected = two / two.sum(), expected / expected.sum()
    assert_close(two, expected)


@weighting_cases()
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_losses_come_out_bad_and_leave_no_trace(case: WeightingCase, bad: float) -> None:
    """The bad task's memory stays as it was, and everybody's stays finite."""
    weighting = case.make()
    run(weighting, 5)
    before = copy.deepcopy(weighting.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # AutoLambda says that it did nothing
        if list(weighting.parameters()):
            weighted = weighting(losses_of(0.5, bad, 1.0))  # its parameters are the optimizer's
        else:
            weighted = live(weighting, losses_of(0.5, bad, 1.0))
    assert not torch.isfinite(weighted[1])
    for name, value in weighting.state_dict().items():
        if "random" not in name:
            assert bits(value[1]) == bits(before[name][1]), name
            assert torch.isfinite(value).all(), name


@weighting_cases()
def test_evaluation_changes_nothing(case: WeightingCase) -> None:
    weighting = case.make()
    run(weighting, 5)
    weighting.eval()
    before = state_of(weighting)
    weighting(losses_of(3.0, 4.0, 5.0))
    assert state_of(weighting) == before


@weighting_cases()
def test_weights_reach_the_losses_graph_once(case: WeightingCase) -> None:
    """The weights themselves are constants for the model: no second path to its parameters."""
    weighting = case.make()
    run(weighting, 5)
    x = torch.tensor(2.0, requires_grad=True)
    losses = torch.stack([x, x.square(), 3 * x])
    weighting.eval()
    (slope,) = torch.autograd.grad(weighting(losses).sum(), x)
    weights = weights_of(weighting, losses.detach())
    assert_close(slope, weights @ torch.tensor([1.0, 4.0, 3.0]))


@weighting_cases()
def test_the_number_of_tasks_is_fixed(case: WeightingCase) -> None:
    weighting = case.make()
    weighting(torch.ones(TASKS_OF_CASES))
    with pytest.raises(ValueError, match=r"`losses` must hold one loss for each of the 3 tasks"):
        weighting(torch.ones(2))
    with (
        weighting.only(torch.tensor([0])),
        pytest.raises(ValueError, match=r"for each of the 1 tasks .* but got 3\."),
    ):
        weighting(torch.ones(3))
    with pytest.raises(RuntimeError, match="must belong to one set of tasks"):
        weighting.bind(["a", "b"])


@weighting_cases()
def test_state_of_another_number_of_tasks_is_refused(case: WeightingCase) -> None:
    if case.name == "Uncertainty-kinds" or not case.make().bind(list("abc")).state_dict():
        return
    saved = case.make().bind(["a", "b"]).state_dict()
    if set(saved) == {"random._extra_state"}:  # nothing of any task
        return
    with pytest.raises(RuntimeError, match="size mismatch"):
        case.make().bind(["a", "b", "c"]).load_state_dict(saved)


@weighting_cases()
def test_only_is_over_even_after_an_error(case: WeightingCase) -> None:
    weighting = case.make()
    weighting(torch.ones(TASKS_OF_CASES))
    with pytest.raises(KeyError), weighting.only(torch.tensor([1])):
        raise KeyError
    assert weighting(torch.ones(TASKS_OF_CASES)).shape == (TASKS_OF_CASES,)


@weighting_cases()
def test_num_tasks_before_binding(case: WeightingCase) -> None:
    with pytest.raises(RuntimeError, match=r"must be bound to its tasks first"):
        _ = case.make().num_tasks


@weighting_cases()
def test_repr_of_weightings(case: WeightingCase) -> None:
    weighting = case.make()
    assert repr(weighting).startswith(type(weighting).__name__ + "(")
    for name in inspect.signature(type(weighting)).parameters:
        if name in vars(weighting):
            assert f"{name}=" in repr(weighting)


@weighting_cases()
@pytest.mark.parametrize(
    ("losses", "error", "words"),
    [
        ([1.0, 2.0, 3.0], TypeError, "`losses` must be a tensor of shape (m,)"),
        (torch.tensor(1.0), ValueError, "`losses` must have shape (m,)"),
        (torch.ones(1, 3), ValueError, "but got shape (1, 3)."),
        (torch.ones(0), ValueError, "m at least 1, but got shape (0,)."),
        (torch.ones(3, dtype=torch.int64), TypeError, "but got torch.int64."),
    ],
)
def test_refuses_what_is_not_a_vector_of_losses(
    case: WeightingCase, losses: object, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=re.escape(words)):
        case.make()(losses)  # type: ignore[arg-type]
