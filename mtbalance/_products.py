"""Inner products of rows.

They are accumulated in float64, or faster in float32 where what is solved with them is shown to be
the same but for rounding.
"""

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from mtbalance._blocks import column_blocks
from mtbalance._rows import ONE_THREAD, Rows, at_least_float32, flat, layout_of, sum_of

_NARROW = 8
"""Up to this many rows, the lower triangle row by row is faster than the whole product."""
_TINY = 2**12
"""Up to this many entries it is not: calls are what takes time."""
_SHORT = 2**17
"""Up to this many columns, products in float64 cost little."""
_BLOCK_COLUMNS, _BLOCK_ENTRIES = 2**18, 2**20
"""So many at least of one of them are in a block of products in float32. Each block starts the
threads of the CPU anew, which wait for each other: where other programs keep these busy, much
longer than the products take."""
_RUN = 512
"""How many products are added up in float32. Equal numbers, the worst case, are 5e-7 to 4e-6 off
then, by the processor."""
_INDEPENDENT = 0.01
"""What the smallest eigenvalue of the rows' cosines must be, for products in float32 to serve.

Products off by e (times the rows' lengths) are the exact ones of rows that are off by e / (2 times
that eigenvalue): at 0.01 and for normal numbers (e = 5e-9) as much as rounding to float32 is."""
_SQUARES = (1e-20, 1e30)
"""Squared lengths for which float32 holds the products of entries, and their sums."""


def gramian_of(rows: Rows, exponents: Sequence[int] = ()) -> Tensor:
    """Return the inner products of the rows, shape (m, m), in float64.

    float64 holds the squares of every float32 and bfloat16 number, so nothing over- or underflows,
    and small combinations of large rows keep their length. Where rows are long and far from
    dependent, products are made in float32, 512 of them are added up in it, and these sums in
    float64: they are off by some 1e-8 of the rows' lengths (5e-6 at most was seen), which is less
    than rounding in the backward pass has cost.

    Args:
        rows: The rows, m of them.
        exponents: What powers of two to divide each row by first, for float64 rows whose squares
            float64 does not hold; between -1000 and 1000.
    """
    if not exponents and _may_be_float32(rows):
        gramian = _in_float32(rows)
        if _are_independent(gramian):
            return gramian
    total: Tensor | None = None
    for block in column_blocks(rows, torch.float64):
        if exponents:
            factors = block.matrix.new_tensor([2.0**-exponent for exponent in exponents])
            block.matrix.mul_(factors[:, None])  # a copy of the rows in any case
        product = _inner_products_within(block.matrix)
        total = product if total is None else total + product.to(total.device)
    if total is None:
        return torch.zeros(len(rows), len(rows), dtype=torch.float64, device="cpu")
    return torch.tril(total) + torch.tril(total, -1).T


def _may_be_float32(rows: Rows) -> bool:
    """Return whether products in float32 save time, and would be what they say."""
    layout = layout_of(rows)
    if sum(layout.sizes) <= _SHORT:
        return False
    serve = (
        device.type == "cpu" and at_least_float32(dtype).to_real() == torch.float32
        for dtype, _, device in layout.kinds
    )
    return all(serve) and _keeps_float32()


def _keeps_float32() -> bool:
    """Return whether float32 matrices are multiplied in float32, which users may give up."""
    precision = getattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision", None)
    if precision is None:  # PyTorch before 2.9
        precision = {"highest": "ieee"}.get(torch.get_float32_matmul_precision())
    by_environment = os.environ.get("DNNL_DEFAULT_FPMATH_MODE", "STRICT").upper()
    return precision in ("none", "ieee") and by_environment == "STRICT"


def _in_float32(rows: Rows) -> Tensor:
    """Return the inner products of rows on the CPU, made in float32 run by run."""
    m = len(rows)
    total = torch.zeros(m, m, dtype=torch.float64, device="cpu")
    with torch.autocast("cpu", enabled=False):
        columns = max(_BLOCK_COLUMNS, _BLOCK_ENTRIES // m)
        for block in column_blocks(rows, torch.float32, {"cpu": columns}):
            runs = block.matrix.shape[1] // _RUN
            parts = block.matrix[:, : runs * _RUN].view(m, runs, _RUN).transpose(0, 1)
            total += torch.bmm(parts, parts.mT).sum(0, dtype=torch.float64)
            tail = block.matrix[:, runs * _RUN :].double()
            total += tail @ tail.T
    return total


def _are_independent(gramian: Tensor) -> bool:
    """Return whether rows are so far from dependent that errors of products stay small."""
    least, most = _SQUARES
    squares = gramian.diagonal()
    if not all(least <= square <= most for square in squares.tolist()):
        return False
    lengths = squares.sqrt()
    shifted = gramian / (lengths * lengths[:, None])
    shifted.diagonal().sub_(_INDEPENDENT)
    return int(torch.linalg.cholesky_ex(shifted).info) == 0


def products_between(rows: Rows, exponent: int = 0) -> Tensor:
    """Return the inner products of the first m of 2 m rows with the others, shape (m, m).

    Accumulated in float64, as those of :func:`gramian_of`.

    Args:
        rows: The rows, 2 m of them.
        exponent: What power of two to divide all of them by first; see :func:`gramian_of`.
    """
    m = len(rows) // 2
    total = torch.zeros(m, m, dtype=torch.float64, device="cpu")
    for block in column_blocks(rows, torch.float64):
        matrix = block.matrix.mul_(2.0**-exponent) if exponent else block.matrix
        total = total.to(matrix.device) + matrix[:m] @ matrix[m:].T
    return total


def _inner_products_within(matrix: Tensor) -> Tensor:
    """Return matrix @ matrix.T, of which only the lower triangle counts."""
    m = len(matrix)
    if m > _NARROW or matrix.numel() <= _TINY or matrix.device.type != "cpu":
        return matrix @ matrix.T
    product = matrix.new_zeros(m, m)
    for i in range(m):
        torch.mv(matrix[: i + 1], matrix[i], out=product[i, : i + 1])
    return product


def inner_products(rows: Rows, vector: Sequence[Tensor | None]) -> Tensor:
    """Return the inner product of each row with ``vector``, shape (m,), in float64.

    Taken in the numbers' own dtype (at least float32) piece by piece, and added up in float64: for
    float32 the error is about 1e-8 of the product of the norms, a tenth of what rounding the
    numbers themselves to float32 may have cost. Unlike the Gramian, nothing is solved with these.
    """
    products: list[list[Tensor]] = [[] for _ in rows]
    for parameter, whole in enumerate(vector):
        if whole is None:
            continue
        numbers = flat(whole)
        dtype = at_least_float32(numbers.dtype)  # real, of complex ones too
        size = ONE_THREAD if numbers.device.type == "cpu" else max(1, len(numbers))
        pieces = torch.split(numbers.to(dtype), size)
        for row, found in zip(rows, products, strict=True):
            tensor = row[parameter]
            if tensor is not None:
                others = torch.split(flat(tensor).to(dtype), size)
                # Not their dot product, which starts threads for so few numbers.
                found += [(p * other).sum() for p, other in zip(pieces, others, strict=True)]
    sums = [sum_of([p.double() for p in found], ()) for found in products]
    return torch.stack([total.to(sums[0].device) for total in sums])
