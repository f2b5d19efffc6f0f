"""The arithmetic on rows, against dense matrices."""

import math
import weakref

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from mtbalance import _blocks, _rows
from mtbalance._blocks import column_blocks
from mtbalance._products import gramian_of, inner_products
from mtbalance._rows import (
    TaskRows,
    all_finite,
    combine,
    flat,
    length_of,
    numbers_of,
    stacked,
    sum_of,
)
from tests._device import DEVICE, on_device
from tests._samplers import DTYPES

Rows = list[list[Tensor | None]]
SHAPES = [(3,), (2, 4), (), (0,), (1, 2, 3)]


def rows_with_gaps(m: int = 3, dtype: torch.dtype = torch.float32, seed: int = 0) -> Rows:
    """Return rows of several parameters, some of which some tasks (one: all) do not reach."""
    generator = torch.Generator().manual_seed(seed)
    rows: Rows = [
        [
            on_device(torch.randn(shape, generator=generator, device="cpu")).to(dtype)
            for shape in SHAPES
        ]
        for _ in range(m)
    ]
    rows[0][1] = None
    rows[-1][2] = None
    for row in rows:
        row[3] = None
    return rows


def dense(rows: Rows) -> Tensor:
    """Return the rows as one float64 matrix, zeros where a task does not reach."""
    return torch.stack(
        [
            torch.cat(
                [
                    torch.zeros(math.prod(shape), dtype=torch.float64)
                    if tensor is None
                    else tensor.double().reshape(-1)
                    for tensor, shape in zip(row, SHAPES, strict=True)
                ]
            )
            for row in rows
        ]
    )


# --- rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 5, 7, 2**15])
@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_are_the_columns_in_order(monkeypatch, size: int, dtype: torch.dtype) -> None:
    """Whatever the block size, the blocks one after the other are the matrix."""
    monkeypatch.setitem(_blocks._BLOCK_COLUMNS, DEVICE.type, size)
    rows = rows_with_gaps(dtype=dtype)
    blocks = [block.matrix.clone() for block in column_blocks(rows)]
    assert all(block.shape[1] <= size for block in blocks)
    assert all(block.dtype == torch.promote_types(dtype, torch.float32) for block in blocks)
    assert torch.equal(torch.cat(blocks, 1).double(), dense(rows))


@pytest.mark.parametrize("together", [0, 4, 2**15])
@pytest.mark.parametrize("size", [1, 2, 5, 7, 2**15])
@pytest.mark.parametrize("small", [0, 2**13])
def test_pieces_say_where_columns_are_from(
    monkeypatch, size: int, together: int, small: int
) -> None:
    """Each column is named once, however small parameters are joined and blocks are cut."""
    monkeypatch.setitem(_blocks._BLOCK_COLUMNS, DEVICE.type, size)
    monkeypatch.setattr(_blocks, "_FEW", small)
    for module in (_rows, _blocks):
        monkeypatch.setattr(module, "TOGETHER", together)
    rows = rows_with_gaps()
    named: list[tuple[int, int]] = []
    for block in column_blocks(rows):
        at = 0
        for parameter, start, stop in block.pieces:
            columns = block.matrix[:, at : at + stop - start]
            for row, line in zip(rows, columns, strict=True):
                tensor = row[parameter]
                expected = 0 * line if tensor is None else flat(tensor)[start:stop]
                assert torch.equal(line, expected)
            named += [(parameter, entry) for entry in range(start, stop)]
            at += stop - start
        assert at == block.matrix.shape[1]
    sizes = [0 if number == 3 else math.prod(shape) for number, shape in enumerate(SHAPES)]
    assert named == [(number, entry) for number, n in enumerate(sizes) for entry in range(n)]


def test_blocks_of_mixed_dtypes_keep_each() -> None:
    """A float64 parameter among float32 ones is not rounded."""
    third = torch.full((2,), 1 / 3, dtype=torch.float64)
    rows: Rows = [[torch.ones(2), third, torch.ones(1)]]
    blocks = [block.matrix.clone() for block in column_blocks(rows)]
    assert [block.dtype for block in blocks] == [torch.float32, torch.float64, torch.float32]
    assert torch.equal(blocks[1][0], third)


@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("small", [0, 2**13])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.complex64])
def test_rows_that_are_looked_at_once_are_as_others(monkeypatch, dtype, small, gaps) -> None:
    """What is in them is known for as long as it is there."""
    monkeypatch.setattr(_blocks, "_FEW", small)
    plain = rows_with_gaps(dtype=dtype)
    if not gaps:
        there = [[torch.ones(shape, dtype=dtype) for shape in SHAPES] for _ in plain]
        plain = [
            [one if tensor is None else tensor for tensor, one in zip(row, ones, strict=True)]
            for row, ones in zip(plain, there, strict=True)
        ]
    coefficients = torch.arange(1.0, len(plain) + 1)
    for number in (1, 2):  # other rows of the same size the second time
        rows = TaskRows([number * t if t is not None else t for t in row] for row in plain)
        copies = [[*row] for row in rows]
        (expected,) = column_blocks(copies)
        (block,) = column_blocks(rows)
        assert torch.equal(block.matrix, expected.matrix)
        assert block.pieces == expected.pieces
        assert torch.equal(gramian_of(rows), gramian_of(copies))
        found = combine(rows, coefficients, release=True)
        for one, other in zip(found, combine(copies, coefficients), strict=True):
            assert one is other is None or torch.equal(one, other)
        assert rows.layout == ([0] * len(SHAPES), set(), False)  # they are empty now


def test_blocks_of_nothing() -> None:
    assert list(column_blocks([[None, None], [None, None]])) == []
    assert list(column_blocks([[torch.empty(0)], [torch.empty(0)]])) == []  # as shards may be
    assert gramian_of([[None], [None]]).tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert combine([[None], [None]], torch.tensor([1.0, 2.0])) == [None]


@pytest.mark.parametrize("size", [1, 4, 2**15])
def test_gramian_is_the_product(monkeypatch, size: int) -> None:
    monkeypatch.setitem(_blocks._BLOCK_COLUMNS, DEVICE.type, size)
    rows = rows_with_gaps()
    matrix_of = dense(rows)
    gramian = gramian_of(rows)
    assert gramian.dtype == torch.float64
    assert_close(gramian, matrix_of @ matrix_of.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gramian_neither_overflows_nor_underflows(dtype: torch.dtype) -> None:
    """Squares of the largest and least normal numbers of a dtype are plain float64 numbers."""
    for extreme in (torch.finfo(dtype).max, torch.finfo(dtype).tiny):
        rows = [
            [torch.tensor([extreme, 0.0], dtype=dtype)],
            [torch.tensor([extreme, 0.0]).to(dtype)],
        ]
        expected = float(rows[0][0][0]) ** 2
        assert torch.equal(gramian_of(rows), torch.full((2, 2), expected, dtype=torch.float64))


def test_gramian_keeps_small_differences_of_large_rows() -> None:
    """(g - h) of float32 rows that differ in the last bit: |g - h|^2 by hand is (2^-23)^2."""
    g = torch.tensor([1.0, 1.0])
    h = torch.tensor([1.0 + 2.0**-23, 1.0])
    difference = torch.tensor([1.0, -1.0], dtype=torch.float64)
    gramian = gramian_of([[g], [h]])
    # 1 + 2^-22 + 2^-46 is a float64 number, so the Gramian is exact.
    assert float(difference @ gramian @ difference) == 2.0**-46


def test_inner_products_with_a_vector() -> None:
    rows = rows_with_gaps()
    vector = rows_with_gaps(2, seed=1)[1]
    vector[2] = None
    expected = dense(rows) @ dense([vector])[0]
    assert_close(inner_products(rows, vector), expected)


def test_inner_products_of_complex_parameters() -> None:
    """They are those of the real numbers in them, and nothing is said of imaginary parts."""
    rows: Rows = [[on_device(torch.tensor([1 + 2j, 3 - 1j]))], [None]]
    vector = [on_device(torch.tensor([2 - 1j, 1 + 1j]))]
    assert inner_products(rows, vector).tolist() == [2 - 2 + 3 - 1, 0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_combination_of_rows(dtype: torch.dtype) -> None:
    """Against the dense product, rounded once; None where no task reaches."""
    rows = rows_with_gaps(dtype=dtype)
    coefficients = torch.tensor([0.5, -2.0, 3.0], dtype=torch.float64)
    directions = combine(rows, coefficients)
    assert directions[3] is None
    expected = coefficients @ dense(rows)
    reached = [d for d in directions if d is not None]
    assert all(d.dtype == dtype for d in reached)
    assert [d.shape for d in reached] == [s for i, s in enumerate(SHAPES) if i != 3]
    actual = torch.cat([d.reshape(-1) for d in reached]).double()
    eps = max(torch.finfo(dtype).eps, 1e-15)
    assert_close(actual, expected, rtol=eps, atol=16 * torch.finfo(torch.float32).eps)


def test_combination_does_not_write_to_the_rows() -> None:
    rows = rows_with_gaps()
    before = dense(rows)
    combine(rows, torch.tensor([1.0, 2.0, 3.0]))
    assert torch.equal(dense(rows), before)


def test_combination_may_release_the_rows() -> None:
    """Each parameter's rows go before the next direction is made."""
    rows = rows_with_gaps()
    expected = combine(rows, torch.tensor([1.0, 2.0, 3.0]))
    alive = [weakref.ref(tensor) for row in rows for tensor in row if tensor is not None]
    released = combine(rows, torch.tensor([1.0, 2.0, 3.0]), release=True)
    assert all(tensor() is None for tensor in alive)
    for one, other in zip(released, expected, strict=True):
        assert one is other is None or torch.equal(one, other)


def test_combination_with_the_dtypes_of_other_tensors() -> None:
    rows: Rows = [[torch.ones(2, dtype=torch.bfloat16)]]
    (direction,) = combine(rows, torch.tensor([1 / 3]), [torch.zeros(2)])
    assert direction is not None
    assert direction.dtype == torch.float32
    assert_close(direction, torch.full((2,), 1 / 3))  # not rounded to bfloat16


def test_coefficients_on_a_device_are_not_read() -> None:
    """On the meta device reading any value raises."""
    rows: Rows = [[torch.ones(2, device="meta"), None], [torch.ones(2, device="meta"), None]]
    direction, nothing = combine(rows, torch.ones(2, dtype=torch.float64, device="meta"))
    assert direction is not None
    assert (direction.shape, direction.dtype, nothing) == ((2,), torch.float32, None)


def test_low_precision_is_accumulated_in_float32() -> None:
    """1 + 8 * 2^-9 is a bfloat16 number, but adding 2^-9 to 1 is lost in bfloat16 every time."""
    rows: Rows = [[torch.ones(1, dtype=torch.bfloat16)]]
    rows += [[torch.full((1,), 2.0**-9, dtype=torch.bfloat16)] for _ in range(8)]
    (total,) = combine(rows, torch.ones(9))
    assert total is not None
    assert float(total) == 1 + 2.0**-6


def test_flat_of_sparse_and_complex() -> None:
    sparse = torch.tensor([[0.0, 2.0], [0.0, 3.0]]).to_sparse()
    assert torch.equal(flat(sparse), torch.tensor([0.0, 2.0, 0.0, 3.0]))
    assert torch.equal(flat(torch.tensor([1 + 2j])), torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_all_finite_sees_one_bad_entry(bad: float) -> None:
    good = torch.ones(1000)
    spoiled = good.clone()
    spoiled[577] = bad
    assert all_finite([good, None, torch.ones(0), good.double()])
    assert not all_finite([good, None, spoiled])
    assert all_finite([])
    assert all_finite([None])


def test_all_finite_is_not_fooled_by_large_entries() -> None:
    """The norm overflows float32, no entry does."""
    assert all_finite([torch.full((100,), torch.finfo(torch.float32).max)])
    assert all_finite([torch.full((100,), 1e300, dtype=torch.float64)])


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0])
@pytest.mark.parametrize("place", range(6))
def test_a_length_is_that_of_all_entries_large_and_small(place: int, bad: float) -> None:
    """Small tensors go together, others alone: no entry of either is overlooked."""
    big = torch.full((2**14,), 2.0)  # of length 256
    tensors = [
        *(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 12.0]).double(), torch.tensor([84.0j])),
        *(torch.tensor([[0.0, 3612.0]]).to_sparse(), big, torch.zeros(3).half()),
    ]
    length = length_of([None, torch.ones(0), *tensors])
    assert length is not None
    assert math.hypot(256, 3613) <= float(length) * 1.000001
    assert float(length) <= 5 + 12 + 84 + 3612 + 256
    if bad == 0:
        return
    tensors[place] = tensors[place].clone()
    (tensors[place]._values() if tensors[place].is_sparse else tensors[place])[..., -1] = bad
    length = length_of(tensors)
    assert length is not None
    assert not math.isfinite(float(length))
    assert not all_finite(tensors)


def test_nothing_has_no_length() -> None:
    assert length_of([None, torch.ones(0)]) is None


def test_numbers_are_read_whatever_their_dtype_and_graph() -> None:
    one = torch.tensor(0.5, dtype=torch.bfloat16, requires_grad=True) * 1
    assert numbers_of([one, torch.tensor(1e300, dtype=torch.float64)]) == [0.5, 1e300]
    assert numbers_of([]) == []


def test_stacked_takes_the_common_dtype() -> None:
    assert stacked([torch.tensor(1.0).bfloat16(), torch.tensor(2.0).half()]).dtype == torch.float32
    assert stacked([torch.tensor(1.0), torch.tensor(2.0).double()]).dtype == torch.float64


def test_sum_of_nothing_is_zero() -> None:
    assert sum_of([], (2, 2)).tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert sum_of([], (2, 2)).dtype == torch.float64
    assert torch.equal(sum_of([torch.ones(2), torch.ones(2)], (2,)), torch.tensor([2.0, 2.0]))
