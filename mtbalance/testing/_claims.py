"""What may be true of a gradient strategy, and need not: its claims."""

import enum

import torch
from torch import Tensor

from ._matrices import Sample, orthogonal
from ._property import Property, Subject, rounding, size_of
from ._violation import require, require_close

_WIDE = (torch.float32, torch.float64)
_DOUBLE = (torch.float64,)
_EXACT_SCALES = (1.0,)
_UNHELD = tuple(2.0**k for k in (-1000, -560, 560, 1000))


class Claim(enum.Enum):
    """What may be true of a gradient strategy d(J); random ones with their draws held fixed."""

    ORDER_FREE = "d(PJ) = d(J) for every permutation P of the tasks"
    ROTATES = "d(JQ) = d(J) Q for every orthogonal Q"
    ODD = "d(-J) = -d(J)"
    HOMOGENEOUS = "d(sJ) = s d(J) for s > 0"
    DOUBLES = "listing every task twice doubles d"
    IGNORES_ZERO_ROWS = "a task whose gradient is zero changes nothing"
    SUM_WITHOUT_CONFLICT = "d is the plain sum where no pair of rows conflicts"
    NO_CONFLICT_LEFT = "<g_i, d> >= 0 for every task"
    COORDINATEWISE = "each coordinate of d depends on its own column alone"
    SCALE_FREE = "d points the same way, whatever positive factor one task's gradient gets"
    LINEAR_IN_SCALES = "d is linear in positive factors of the tasks' gradients"


def _integer(sample: Sample, low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, (), generator=sample.draws(), device="cpu"))


def order_free(subject: Subject, sample: Sample) -> None:
    """Swapped rows give the same direction."""
    rows = sample.rows()
    order = torch.randperm(len(rows), generator=sample.draws(), device="cpu").to(rows.device)
    subject.close(subject(rows[order]), subject(rows), rows)


def rotates(subject: Subject, sample: Sample) -> None:
    """Inner products of rows are all that counts, and Q leaves them as they are."""
    rows = sample.rows()
    rotation = orthogonal(rows.shape[1], sample.seed)
    subject.close(subject(rows @ rotation), subject(rows) @ rotation, rows)


def odd(subject: Subject, sample: Sample) -> None:
    """Turning all signs leaves the Gramian as it is, bit for bit, and so the weights."""
    rows = sample.rows()
    subject.equal(subject(-rows), -subject(rows), rows)


def homogeneous_in_powers_of_two(subject: Subject, sample: Sample) -> None:
    """A power of two changes exponents only: nothing may depend on the scale, not even rounding.

    But terms of very unequal rows may be less than the dtype holds in full.
    """
    rows = sample.but(scale=1.0).rows()
    scaled, least = subject(sample.rows()), torch.finfo(rows.dtype).tiny
    subject.equal(scaled, subject(rows) * sample.scale, rows, sample.scale, least=least)


def homogeneous(subject: Subject, sample: Sample) -> None:
    """For other factors up to rounding (generic rows, which no rounding turns into conflicts).

    The scaled rows are rounded themselves, which nearly dependent ones make more of.
    """
    rows = sample.rows()
    draw = torch.rand((), generator=sample.draws(), dtype=torch.float64, device="cpu")
    factor = 10 ** (40 * float(draw) - 20)
    subject.close(subject(rows * factor), subject(rows) * factor, rows, 10 * factor)


def squares_out_of_range(subject: Subject, sample: Sample) -> None:
    """Powers of two change nothing but the scale, also where float64 does not hold squares."""
    rows = sample.but(scale=1.0).rows()
    atol = 1e-12 * max(1.0, float(subject(rows).abs().max()))
    require_close(subject(sample.rows()) / sample.scale, subject(rows), atol, "coordinate")


def doubles(subject: Subject, sample: Sample) -> None:
    """Tasks that are listed twice double the direction."""
    rows = sample.rows()
    subject.close(subject(torch.cat([rows, rows])), 2 * subject(rows), rows)


def ignores_zero_rows(subject: Subject, sample: Sample) -> None:
    """A task whose gradient is zero everywhere (no labels in this batch) is as good as absent."""
    rows = sample.rows()
    place = _integer(sample, 0, len(rows))
    zeros = rows.new_zeros(_integer(sample.but(seed=sample.seed + 1), 1, 2), rows.shape[1])
    padded = torch.cat([rows[:place], zeros, rows[place:]])
    subject.close(subject(padded), subject(rows), rows)


def sum_without_conflict(subject: Subject, sample: Sample) -> None:
    """Exactly where the rows are small integers times a power of two.

    Others, near-parallel ones, have a cosine of at least 1 - 2 / 16 with each other.
    """
    rows = sample.rows()
    same = subject.equal if sample.family == "non_conflicting" else subject.close
    same(subject(rows), rows.sum(0), rows)


def no_conflict_left(subject: Subject, sample: Sample) -> None:
    """<g_i, d> >= 0, up to the rounding of d, whose parts are as long as the sum of the rows."""
    rows = sample.rows()
    direction = subject(rows).double()
    relative = subject.slack_at(rows) + rounding(rows.dtype)
    slack = relative * size_of(rows) * rows.double().norm(dim=1)
    products = rows.double() @ direction
    worst = int((products + slack).nan_to_num(-torch.inf).argmin())
    require(
        (products >= -slack).all(),
        f"task {worst} has <g, d> = {float(products[worst])!r}, but expected at least 0 "
        f"(and may have {-float(slack[worst]):.3g})",
    )


def coordinatewise(subject: Subject, sample: Sample) -> None:
    """Two blocks of columns, handed over one by one, give what all columns give."""
    rows = sample.rows()
    whole = subject(rows)
    split = _integer(sample, 0, rows.shape[1])
    strategy = subject.make()
    strategy.start()
    blocks = (rows[:, :split], 0), (rows[:, split:], split)
    parts: list[Tensor] = [strategy.on_columns(block, first) for block, first in blocks]
    subject.close(torch.cat(parts), whole, rows)


def scale_free(subject: Subject, sample: Sample) -> None:
    """Where d is long enough to point anywhere: rows that cancel are left out."""
    rows = sample.rows()
    task = _integer(sample, 0, len(rows) - 1)
    _points_the_same_way(subject, rows, task, 2.0 ** _integer(sample, -6, -1))


def scale_free_where_dependent(subject: Subject, sample: Sample) -> None:
    """More rows than columns depend on each other, so that nothing may agree with all of them."""
    rows = sample.rows()
    for task in range(len(rows)):
        _points_the_same_way(subject, rows, task, 64.0)


def _points_the_same_way(subject: Subject, rows: Tensor, task: int, factor: float) -> None:
    scaled = rows.clone()
    scaled[task] *= factor
    one, other = subject(rows).double(), subject(scaled).double()
    if not (one.norm() > 1e-3 * size_of(rows) and other.norm() > 1e-3 * size_of(scaled)):
        return
    closeness = 1e4 * (subject.tolerance_at(rows) + rounding(rows.dtype))
    require_close(other / other.norm(), one / one.norm(), closeness, "unit direction, coordinate")


def linear_in_scales(subject: Subject, sample: Sample) -> None:
    """d((a + b) J) = d(a J) + d(b J) for diagonal matrices a and b of small positive integers."""
    rows = sample.rows()
    a, b = torch.randint(1, 9, (2, len(rows), 1), generator=sample.draws(), device="cpu").to(rows)
    subject.close(subject((a + b) * rows), subject(a * rows) + subject(b * rows), rows, 16.0)


def _claimed(claim: Claim, body: object, **rest: object) -> Property:
    return Property(body, claim.value, **rest)  # type: ignore[arg-type]


CLAIMED: dict[Claim, tuple[Property, ...]] = {
    Claim.ORDER_FREE: (_claimed(Claim.ORDER_FREE, order_free, dtypes=_WIDE, clear=True),),
    Claim.ROTATES: (_claimed(Claim.ROTATES, rotates, dtypes=_DOUBLE, clear=True),),
    Claim.ODD: (_claimed(Claim.ODD, odd, examples=25),),
    Claim.HOMOGENEOUS: (
        _claimed(Claim.HOMOGENEOUS, homogeneous_in_powers_of_two),
        _claimed(
            Claim.HOMOGENEOUS,
            homogeneous,
            families=("generic",),
            m=(1, 6),
            p=(1, 12),
            dtypes=_DOUBLE,
            scales=_EXACT_SCALES,
            examples=25,
        ),
        _claimed(
            Claim.HOMOGENEOUS,
            squares_out_of_range,
            families=("generic",),
            m=(2, 4),
            p=(9, 9),
            dtypes=_DOUBLE,
            scales=_UNHELD,
            examples=10,
        ),
    ),
    Claim.DOUBLES: (_claimed(Claim.DOUBLES, doubles, m=(1, 4), dtypes=_WIDE, clear=True),),
    Claim.IGNORES_ZERO_ROWS: (
        _claimed(Claim.IGNORES_ZERO_ROWS, ignores_zero_rows, adds=2, dtypes=_WIDE, clear=True),
    ),
    Claim.SUM_WITHOUT_CONFLICT: (
        _claimed(
            Claim.SUM_WITHOUT_CONFLICT,
            sum_without_conflict,
            families=("non_conflicting", "near_parallel"),
        ),
    ),
    Claim.NO_CONFLICT_LEFT: (
        _claimed(Claim.NO_CONFLICT_LEFT, no_conflict_left, dtypes=_WIDE, examples=150),
    ),
    Claim.COORDINATEWISE: (_claimed(Claim.COORDINATEWISE, coordinatewise, dtypes=_WIDE),),
    Claim.SCALE_FREE: (
        _claimed(
            Claim.SCALE_FREE,
            scale_free,
            families=("generic", "conflicting", "non_conflicting"),
            p=(2, 30),
            dtypes=_WIDE,
            clear=True,
        ),
        _claimed(
            Claim.SCALE_FREE,
            scale_free_where_dependent,
            families=("generic", "conflicting"),
            m=(3, 8),
            p=(2, 2),
            dtypes=_WIDE,
            clear=True,
            examples=25,
        ),
    ),
    Claim.LINEAR_IN_SCALES: (
        _claimed(Claim.LINEAR_IN_SCALES, linear_in_scales, dtypes=_WIDE, clear=True),
    ),
}
"""The properties that each claim stands for."""
