"""What is true of FairGrad alone; what holds for every strategy is in test_contract.py.

The oracle is the definition, on vectors: for w > 0 with <g_i, d> = w_i^(-1 / alpha) and d the
combination with these weights, d is the only solution. SciPy maximises the fairness itself.
"""

import re

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from mtbalance.gradient import FairGrad, NashMTL
from tests._oracles import array, least_norm_weights
from tests._samplers import gradients, matrix

ALPHAS = [0.2, 0.5, 1.0, 2.0, 5.0]


def distance(rows: Tensor) -> float:
    """Return how far zero is from the convex hull of the unit rows."""
    units = array(rows) / np.linalg.norm(array(rows), axis=1, keepdims=True)
    return float(np.linalg.norm(least_norm_weights(units, np.ones(len(units))) @ units))


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def test_orthogonal_rows_by_hand() -> None:
    """n^2 w = w^(-1 / alpha): w = n^(-2 alpha / (1 + alpha)), of which d has n times as much.

    For lengths 1 and 16: 16^(1/3) for alpha 1/2, 1 for 1, 16^(-1/2) for 3. On the scale of the sum
    the length is the root of 2 sqrt(1 + 16^4).
    """
    rows = torch.tensor([[1.0, 0.0], [0.0, 16.0]], dtype=torch.float64)
    for alpha, other in ((0.5, 16 ** (1 / 3)), (1.0, 1.0), (3.0, 0.25)):
        expected = torch.tensor([1.0, other], dtype=torch.float64)
        assert_close(FairGrad(alpha, "official")(rows), expected)
        length = (2 * (1 + 16**4) ** 0.5) ** 0.5
        assert_close(FairGrad(alpha)(rows), expected * length / (1 + other**2) ** 0.5)


def test_parallel_rows_by_hand() -> None:
    """Lengths 1 and 4 in one direction, alpha = 2: gains S and 4 S, w = (S^-2, S^-2 / 16).

    d is S long: S = S^-2 (1 + 4 / 16), so that S^3 = 5 / 4.
    """
    rows = torch.tensor([[1.0], [4.0]], dtype=torch.float64)
    direction = FairGrad(2.0, "official")(rows)
    assert_close(direction, torch.tensor([1.25 ** (1 / 3)], dtype=torch.float64))


@pytest.mark.parametrize("alpha", ALPHAS)
@given(rows=gradients(["generic", "conflicting", "duplicate_rows", "rank_deficient"]))
@settings(max_examples=100)
def test_every_task_gains_what_its_weight_asks_for(alpha: float, rows: Tensor) -> None:
    """w > 0 and <g_i, d> = w_i^(-1 / alpha), as inner products of vectors."""
    rows = rows[rows.any(1)]
    assume(len(rows) and distance(rows) > 1e-2)
    weights = array(FairGrad(alpha, "official").solve(rows @ rows.T))
    assert (weights > 0).all()
    gains = array(rows) @ (weights @ array(rows))
    np.testing.assert_allclose(gains, weights ** (-1 / alpha), rtol=1e-7)


@pytest.mark.parametrize("alpha", ALPHAS)
@given(rows=gradients(["unequal_norms"], scales=[1.0]))
@settings(max_examples=100)
def test_norms_over_twelve_decades(alpha: float, rows: Tensor) -> None:
    """As above. A short gradient's gain may be a small difference of larger numbers."""
    assume(distance(rows) > 1e-2)
    weights = array(FairGrad(alpha, "official").solve(rows @ rows.T)).astype(np.longdouble)
    exact = array(rows).astype(np.longdouble)
    gains = exact @ (weights @ exact)
    wanted = weights ** (-1 / np.longdouble(alpha))
    size = np.sqrt((exact * exact).sum(1))
    slack = 1e-13 * size * (weights * size).sum()
    assert (np.abs(gains - wanted) <= 1e-7 * wanted + slack).all()


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("seed", range(4))
def test_agrees_with_scipy_on_the_fairness(alpha: float, seed: int) -> None:
    """Among directions of one length the fairness is largest.

    Over the logarithms of the gains u, which are positive then: of all directions with gains that
    are a multiple of u the shortest, J^+ u, brought to length 1.
    """
    rows = array(matrix("generic", 3, 5, seed))
    inverse = np.linalg.pinv(rows)

    def loss(z: np.ndarray) -> float:
        gains = rows @ unit(inverse @ np.exp(z))
        return -np.log(gains).sum() if alpha == 1 else -(gains ** (1 - alpha)).sum() / (1 - alpha)

    z = np.zeros(3)
    for _ in range(3):  # restarted where it ended
        z = scipy.optimize.minimize(loss, z, method="BFGS", options={"gtol": 1e-9}).x
    direction = unit(array(FairGrad(alpha)(torch.tensor(rows))))
    assert unit(inverse @ np.exp(z)) @ direction == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("scale", ["sum", "official"])
@pytest.mark.filterwarnings("ignore:.* fell back")
@given(rows=gradients())
@settings(max_examples=100)
def test_alpha_of_one_is_nash(scale: str, rows: Tensor) -> None:
    fair, nash = FairGrad(1.0, scale), NashMTL(scale)
    first, second = fair(rows), nash(rows)
    assert fair.fallbacks == nash.fallbacks
    assert_close(first, second, rtol=0, atol=1e-6 * max(1e-300, float(second.norm())))


@pytest.mark.parametrize("seed", range(5))
def test_the_limits_of_fairness(seed: int) -> None:
    """Near 0 that of the sum if no task loses; for large alpha that of the largest least gain.

    The first is the sum's projection on the cone of directions from which no task loses.
    The second is the direction of the shortest convex combination of the rows (by duality).
    """
    rows = matrix("generic", 4, 12, seed)
    total = array(rows.sum(0))
    back, _ = scipy.optimize.nnls(array(rows).T, -total)
    fairest = unit(total + back @ array(rows))
    assert unit(array(FairGrad(1e-3)(rows))) @ fairest == pytest.approx(1, abs=1e-4)
    shortest = unit(least_norm_weights(array(rows), np.ones(4)) @ array(rows))
    direction = unit(array(FairGrad(500.0)(rows)))
    assert direction @ shortest == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("alpha", ALPHAS)
@given(rows=gradients(["generic", "conflicting", "unequal_norms", "zero_rows"], m=(1, 6)))
@settings(max_examples=60)
def test_the_length_on_the_scale_of_the_sum(alpha: float, rows: Tensor) -> None:
    """sqrt(m |G|_F) for m rows that are not zero, and the same direction as the official one."""
    alive = rows[rows.any(1)]
    assume(len(alive) and distance(alive) > 1e-2)
    direction = array(FairGrad(alpha)(rows))
    length = np.sqrt(len(alive) * np.linalg.norm(array(alive) @ array(alive).T))
    assert np.linalg.norm(direction) == pytest.approx(length, rel=1e-9)
    official = array(FairGrad(alpha, "official")(rows))
    assert unit(official) @ unit(direction) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("factor", [1e-12, 1e-3, 7.0, 1e12])
def test_the_official_scale_grows_with_a_power(alpha: float, factor: float) -> None:
    rows = matrix("generic", 4, 12)
    expected = FairGrad(alpha, "official")(rows) * factor ** ((1 - alpha) / (1 + alpha))
    assert_close(FairGrad(alpha, "official")(factor * rows), expected, rtol=1e-9, atol=0)


@pytest.mark.filterwarnings("ignore:FairGrad fell back")
@pytest.mark.parametrize("alpha", ALPHAS)
@given(rows=gradients(["stationary", "opposite_rows"], m=(2, 8)))
@settings(max_examples=60)
def test_no_direction_where_none_serves_all(alpha: float, rows: Tensor) -> None:
    """Some convex combination of the rows that are not zero vanishes: zero, and counted."""
    alive = rows[rows.any(1)]
    strategy = FairGrad(alpha)
    direction = strategy(rows)
    if distance(alive) < 1e-9:
        assert not direction.any()
        assert strategy.fallbacks == 1
    else:
        assert strategy.fallbacks == 0
        assert (alive @ direction > 0).all()


def test_the_fallback_is_not_silent() -> None:
    strategy = FairGrad()
    words = "FairGrad fell back: a convex combination of the task gradients vanishes"
    with pytest.warns(RuntimeWarning, match=re.escape(words)):
        strategy(torch.tensor([[1.0, 0.0], [-5.0, 0.0]]))
    assert strategy.fallbacks == 1


@pytest.mark.filterwarnings("ignore:FairGrad fell back. Newton's method:RuntimeWarning")
@pytest.mark.parametrize("alpha", [0.01, 0.05, 20.0, 100.0, 1e4])
@pytest.mark.parametrize("name", ["unequal_norms", "near_parallel", "generic", "zero_rows"])
@given(seed=st.integers(0, 999), m=st.integers(2, 8))
@settings(max_examples=10)
def test_extreme_fairness_stays_finite(alpha: float, name: str, seed: int, m: int) -> None:
    """However far powers of norms lie beyond float64, and without conflict where none is asked."""
    rows = matrix(name, m, 12, seed)
    for scale in ("sum", "official"):
        strategy = FairGrad(alpha, scale)
        assert torch.isfinite(strategy(rows)).all()


@pytest.mark.parametrize("alpha", [0.01, 5.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_official_weights_fit_into_the_rows_dtype(alpha: float, dtype: torch.dtype) -> None:
    """Of gradients 1e-22 long, weights of 1e44 would be asked for alpha = 1000: no float32."""
    rows = (1e-22 * matrix("generic", 3, 9)).to(dtype)
    strategy = FairGrad(alpha, "official")
    assert float(strategy.solve(rows.double() @ rows.double().T).max()) <= 1.0001e38
    direction = strategy(rows).double()
    assert torch.isfinite(direction).all()
    assert (rows.double() @ direction > 0).all()


@pytest.mark.parametrize("m", [1, 2, 5])
def test_gramians_that_are_not_finite_come_out_as_nan(m: int) -> None:
    for bad in (torch.nan, torch.inf):
        gramian = torch.eye(m, dtype=torch.float64)
        gramian[-1, -1] = bad
        assert FairGrad().weights(gramian).isnan().all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"alpha": 0.0}, "`alpha` must be positive, but got 0.0."),
        ({"alpha": float("inf")}, "`alpha` must be positive, but got inf."),
        ({"scale": "mean"}, "`scale` must be one of 'sum', 'official', but got 'mean'."),
    ],
)
def test_refuses_what_has_no_meaning(arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        FairGrad(**arguments)
