"""What is true of AlignedMTL alone; what holds for every strategy is in test_contract.py.

The oracles are SciPy's polar decomposition and NumPy's singular values of the rows themselves: they
know nothing of a Gramian.
"""

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from mtbalance.gradient import AlignedMTL
from tests._oracles import array
from tests._samplers import gradients, matrix

SCALES = ["min", "median", "rmse"]


def size_of(values: np.ndarray, scale: str) -> float:
    """Return s for singular values in descending order."""
    ascending = np.sort(values**2)
    return {
        "min": ascending[0],
        "median": ascending[(len(ascending) - 1) // 2],
        "rmse": ascending.mean(),
    }[scale]


def aligned(
    rows: np.ndarray, scale: str, preference: np.ndarray, least: float = 1e-9
) -> np.ndarray:
    """Return the direction by singular values: J = U S W^T is replaced by sqrt(s) U W^T."""
    u, values, w = np.linalg.svd(rows, full_matrices=False)
    kept = values > least * values.max()
    root = np.sqrt(size_of(values[kept], scale))
    return root * (preference @ u[:, kept]) @ w[kept]


def test_orthogonal_rows_by_hand() -> None:
    """Rows that are orthogonal keep their directions and get one length.

    Lengths 1, 2 and 4 have the squares 1, 4, 16: the least, the median and the mean (7).
    """
    rows = torch.diag(torch.tensor([1.0, 4.0, 2.0])).double()
    for scale, square in (("min", 1.0), ("median", 4.0), ("rmse", 7.0)):
        expected = torch.full((3,), square**0.5, dtype=torch.float64)
        assert_close(AlignedMTL(scale)(rows), expected)
    # Of the squares 1 and 16 the lower median is 1, their mean 17/2.
    for scale, square in (("min", 1.0), ("median", 1.0), ("rmse", 8.5)):
        expected = torch.tensor([square**0.5, square**0.5, 0.0], dtype=torch.float64)
        assert_close(AlignedMTL(scale)(rows[:2]), expected)


def test_a_conflict_by_hand() -> None:
    """g1 = (1, 0), g2 = (-3, 4) / 5: the eigenvectors of the Gramian are (1, 1) and (1, -1).

    g1 + g2 = (2, 4) / 5 has the eigenvalue 1 - 3/5 = 2/5, and the sum of preferences (1, 1) is
    orthogonal to the other eigenvector: with s = 2/5 the direction is the plain sum. With the
    preferences (2, 0), that is (1, 1) + (1, -1), the part of the other eigenvector, (8, -4) / 5,
    is shortened by sqrt((2/5) / (8/5)) = 1/2: (2, 4) / 5 + (4, -2) / 5.
    """
    rows = torch.tensor([[1.0, 0.0], [-0.6, 0.8]], dtype=torch.float64)
    assert_close(AlignedMTL()(rows), torch.tensor([0.4, 0.8], dtype=torch.float64))
    leaning = AlignedMTL(preference=[1.0, 1e-300])
    assert_close(leaning(rows), torch.tensor([1.2, 0.4], dtype=torch.float64))


@pytest.mark.parametrize("scale", SCALES)
@given(m=st.integers(2, 8), more=st.integers(0, 20), seed=st.integers(0, 2**16))
@settings(max_examples=60)
def test_agrees_with_the_polar_decomposition(scale: str, m: int, more: int, seed: int) -> None:
    """The nearest matrix with orthonormal rows is the orthogonal factor of the polar one."""
    rows = matrix("generic", m, m + more, seed)
    factor, _ = scipy.linalg.polar(array(rows), side="left")
    values = scipy.linalg.svdvals(array(rows))
    expected = np.sqrt(size_of(values, scale)) * factor.sum(0)
    tolerance = 1e-11 * values.max() * (values.max() / values.min()) ** 2
    assert np.linalg.norm(array(AlignedMTL(scale)(rows)) - expected) <= tolerance


INTEGERS = ["generic", "conflicting", "rank_deficient", "duplicate_rows", "opposite_rows"]


@pytest.mark.parametrize("scale", SCALES)
@given(
    rows=gradients([*INTEGERS, "zero_rows", "stationary"]),
    numbers=st.lists(st.floats(0.1, 10), min_size=8, max_size=8),
)
@settings(max_examples=150)
def test_agrees_with_singular_values(scale: str, rows: Tensor, numbers: list[float]) -> None:
    """Of any rank, with preferences, which are scaled to a mean of 1."""
    given_numbers = numbers[: len(rows)]
    direction = AlignedMTL(scale, preference=given_numbers)(rows)
    if not rows.any():
        assert not direction.any()
        return
    preference = np.array(given_numbers) / np.mean(given_numbers)
    expected = aligned(array(rows), scale, preference)
    tolerance = 1e-7 * float(rows.norm(dim=1).sum())
    assert np.linalg.norm(array(direction) - expected) <= tolerance


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("m", [2, 3, 10, 50])
def test_aligned_rows_are_orthogonal_and_equally_long(scale: str, m: int) -> None:
    """B G B = s I, where the columns of B are the weights for one preferred task each."""
    rows = matrix("generic", m, 2 * m, seed=m)
    columns = []
    for i in range(m):
        preference = np.full(m, 1e-250)
        preference[i] = 1.0
        columns.append(AlignedMTL(scale, preference=list(preference)).solve(rows @ rows.T) / m)
    b = torch.stack(columns, 1)
    gram = b @ (rows @ rows.T) @ b
    s = size_of(scipy.linalg.svdvals(array(rows)), scale)
    assert_close(gram, s * torch.eye(m, dtype=torch.float64), rtol=1e-9, atol=1e-9 * s)
    assert_close(AlignedMTL(scale)(rows).norm().item() ** 2, m * s, rtol=1e-9, atol=0)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("m", [2, 3, 8, 50])
def test_lengths_six_decades_apart(scale: str, m: int) -> None:
    """Aligned rows are as orthogonal as others: eigenvalues twelve decades apart are exact, too."""
    lengths = 10 ** torch.linspace(3, -3, m, dtype=torch.float64)
    order = torch.randperm(m, generator=torch.Generator().manual_seed(m))
    rows = (lengths[:, None] * matrix("generic", m, 2 * m, seed=m))[order]
    found = []
    for i in range(m):
        preference = np.full(m, 1e-250)
        preference[i] = 1.0
        found.append(AlignedMTL(scale, rtol=0.0, preference=list(preference))(rows) / m)
    gram = torch.stack(found) @ torch.stack(found).T
    s = size_of(scipy.linalg.svdvals(array(rows)), scale)
    assert_close(gram, gram[0, 0] * torch.eye(m, dtype=torch.float64), rtol=1e-10, atol=1e-10 * s)
    assert abs(gram[0, 0] - s) <= 1e-6 * s


@given(rows=gradients(m=(2, 8)))
@settings(max_examples=150)
def test_min_is_never_longer_than_the_sum(rows: Tensor) -> None:
    slack = 1e-7 * rows.norm(dim=1).sum()
    assert AlignedMTL()(rows).norm() <= rows.sum(0).norm() + slack


@pytest.mark.parametrize("preference", [[1.0, 3.0], {"a": 5.0, "b": 1.0}, [2.0, 2.0]])
@given(rows=gradients(m=(2, 2)))
@settings(max_examples=60)
def test_growth_holds_with_preferences(preference, rows: Tensor) -> None:
    strategy = AlignedMTL(preference=preference).bind(["a", "b"])
    assert strategy.growth is not None
    assert strategy(rows).norm() <= 1.000001 * strategy.growth * rows.norm(dim=1).sum()
    assert AlignedMTL("rmse", preference=preference).growth is None


def test_rmse_may_be_longer_than_any_multiple_of_the_norms() -> None:
    """Why its growth is not known: tasks that share a short direction get the length of the long.

    One row of length 1, and k that are short and equal: two eigenvalues, whose mean is about 1/2.
    The k rows together have the coordinate sqrt(k), so that |d| is about sqrt((1 + k) / 2).
    """
    k = 200
    rows = torch.zeros(k + 1, 2, dtype=torch.float64)
    rows[0, 0], rows[1:, 1] = 1.0, 1e-5
    length = AlignedMTL("rmse")(rows).norm().item()
    assert length == pytest.approx(((1 + k) / 2) ** 0.5, rel=1e-6)
    assert length > 9 * float(rows.norm(dim=1).sum())


@pytest.mark.parametrize("scale", SCALES)
def test_rtol_says_which_eigenvalues_count(scale: str) -> None:
    """Orthogonal rows of lengths 1, 1e-3 and 1e-5: squares 1, 1e-6 and 1e-10."""
    rows = torch.diag(torch.tensor([1e-3, 1.0, 1e-5])).double()
    for rtol, count in ((None, 3), (0.0, 3), (1e-11, 3), (1e-8, 2), (1e-5, 1), (1.0, 1)):
        direction = AlignedMTL(scale, rtol=rtol)(rows)
        kept = np.sort([1.0, 1e-3, 1e-5])[3 - count :]
        expected = np.sqrt(size_of(kept, scale))
        lengths = torch.tensor([expected, expected, expected]).double()
        lengths[[2, 0][: 3 - count]] = 0
        assert_close(direction, lengths, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("rtol", [None, 0.3])
@given(rows=gradients(m=(2, 2)))
@settings(max_examples=80)
def test_the_closed_form_is_the_decomposition(scale: str, rtol, rows: Tensor) -> None:
    """Two tasks take a formula, the same two among three with one that is zero do not."""
    strategy = AlignedMTL(scale, rtol)
    padded = torch.cat([rows, torch.zeros_like(rows[:1])])
    tolerance = 1e-7 * float(rows.norm(dim=1).sum())
    values = torch.linalg.svdvals(rows)
    if rtol is not None and abs(values[-1] ** 2 - rtol * values[0] ** 2) <= 1e-9 * values[0] ** 2:
        return  # at the very limit, rounding decides
    assert_close(strategy(padded), strategy(rows), rtol=0, atol=tolerance)


@pytest.mark.parametrize("scale", SCALES)
@given(rows=gradients(m=(2, 2)))
@settings(max_examples=80)
def test_two_tasks_on_a_device_get_the_same_weights(scale: str, rows: Tensor) -> None:
    """The formula carried by tensors, as on a GPU, and by Python's floats, as on the CPU."""
    strategy = AlignedMTL(scale, preference=[1.0, 2.0])
    gramian = rows @ rows.T
    on_cpu = strategy.weights(gramian)

    class Elsewhere(Tensor):
        is_cpu = False

    elsewhere = strategy.weights(gramian.as_subclass(Elsewhere)).as_subclass(Tensor)
    assert_close(elsewhere, on_cpu, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("scale", SCALES)
def test_two_tasks_on_a_device_wait_for_nothing(scale: str) -> None:
    """On the meta device, reading a number or copying it to the host raises."""
    weights = AlignedMTL(scale).weights(torch.empty(2, 2, dtype=torch.float64, device="meta"))
    assert weights.device.type == "meta"
    assert weights.shape == (2,)


def test_a_task_without_gradient_weighs_nothing() -> None:
    rows = torch.tensor([[1.0, 2.0], [0.0, 0.0], [2.0, -1.0]], dtype=torch.float64)
    weights = AlignedMTL().solve(rows @ rows.T)
    assert weights[1] == 0
    assert_close(weights, torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64))


def test_absent_tasks_take_their_preference_away() -> None:
    """Preferences (1, 2, 3) have the mean 2; tasks 2 and 0 keep 3/2 and 1/2."""
    strategy = AlignedMTL(preference={"a": 1.0, "b": 2.0, "c": 3.0}).bind(["a", "b", "c"])
    rows = torch.tensor([[3.0, 0.0], [0.0, 3.0]], dtype=torch.float64)
    with strategy.only(torch.tensor([2, 0])):
        assert_close(strategy(rows), torch.tensor([4.5, 1.5], dtype=torch.float64))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"scale": "mean"}, r"`scale` must be one of 'min', 'median', 'rmse', but got 'mean'\."),
        ({"rtol": -0.1}, r"`rtol` must be between 0 and 1, but got -0\.1\."),
        ({"preference": [1.0, 0.0]}, r"`preference\[1\]` must be positive, but got 0\.0\."),
    ],
)
def test_refuses_what_has_no_meaning(arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        AlignedMTL(**arguments)
