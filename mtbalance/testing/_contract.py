"""What holds for every gradient strategy, whatever it claims."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from mtbalance.gradient import GradientStrategy, GramianStrategy

from ._matrices import Sample
from ._other_tasks import state_goes_to_other_tasks
from ._property import Property, Subject, size_of
from ._violation import (
    bits,
    copies_of,
    require,
    require_close,
    require_equal,
    require_same_state,
    state_of,
)

_DOUBLE = (torch.float64,)


def finite_vector(subject: Subject, sample: Sample) -> None:
    """The bound is ``growth`` times the sum of the norms, by which the Balancer judges."""
    rows = sample.rows()
    before = rows.clone()
    strategy = subject.make()
    direction = strategy(rows)
    require_equal(rows, before, "the input was written to: entry")
    require(
        direction.shape == rows.shape[1:],
        f"got shape {tuple(direction.shape)}, but expected {tuple(rows.shape[1:])}",
    )
    require(direction.dtype == rows.dtype, f"got {direction.dtype}, but expected {rows.dtype}")
    require(direction.device == rows.device, f"got {direction.device}, not {rows.device}")
    bad = [i for i, good in enumerate(torch.isfinite(direction).tolist()) if not good]
    require(
        not bad, f"coordinate {bad[:1]}: got {direction[bad[:1]].tolist()}, not a finite number"
    )
    if strategy.growth is not None:
        length, most = float(direction.double().norm()), 1.01 * strategy.growth * size_of(rows)
        require(length <= most, f"got a norm of {length!r}, but `growth` allows {most!r}")


def low_precision_only_rounds(subject: Subject, sample: Sample) -> None:
    """The random numbers are the same, since low precision is computed in float32.

    Directions may be longer than all rows together.
    """
    rows = sample.rows()
    exact = subject(rows.float())
    largest = max(float(exact.abs().max()), size_of(rows))
    tolerance = (torch.finfo(rows.dtype).eps + 1e-6) * largest
    require_close(subject(rows).float(), exact, tolerance, "coordinate")


def one_task_is_its_gradient(subject: Subject, sample: Sample) -> None:
    """Times the factor that equal rows get."""
    rows = sample.rows()
    _same_up_to(2, subject(rows), subject.identical * rows[0].double())


def no_parameters_no_numbers(subject: Subject, sample: Sample) -> None:
    """A group of parameters may be empty."""
    shape = subject(sample.rows()[:, :0]).shape
    require(shape == (0,), f"got shape {tuple(shape)}, but expected (0,)")


def zero_rows_give_zero(subject: Subject, sample: Sample) -> None:
    """Where no task has a gradient, nothing moves."""
    zeros = torch.zeros_like(sample.rows())
    require_equal(subject(zeros), zeros[0], "coordinate")


def equal_tasks_add_up(subject: Subject, sample: Sample) -> None:
    """The scale of the sum, times the factor of the method's formula.

    Two roundings of the result, and for bfloat16 and float32 some of the sum of m terms.
    """
    rows = sample.rows()[:1].expand(sample.m, -1)
    _same_up_to(8, subject(rows), subject.identical * sample.m * rows[0].double())


def default_device_is_not_taken(subject: Subject, sample: Sample) -> None:
    """As after torch.set_default_device("cuda") with rows on the CPU: "meta" has no numbers."""
    rows = sample.rows()
    expected = subject(rows)
    strategy = subject.make()
    with torch.device("meta"):
        direction = strategy(rows)
    require_equal(direction, expected, "coordinate")


def bad_numbers_come_out_bad(subject: Subject, sample: Sample) -> None:
    """A gradient scaler must see them; a Gramian strategy has not even drawn a random number."""
    rows = sample.rows()
    task, column = sample.seed % len(rows), sample.seed % rows.shape[1]
    for bad in (torch.nan, torch.inf, -torch.inf):
        strategy = subject.make()
        strategy(rows)
        before = state_of(strategy)
        poisoned = rows.clone()
        poisoned[task, column] = bad
        direction = strategy(poisoned)
        numbers = f"{bad} in task {task}, column {column} came out as {direction.tolist()}"
        require(not torch.isfinite(direction[column]), numbers)
        if isinstance(strategy, GramianStrategy):
            require(direction.isnan().all(), numbers)
            require_same_state(strategy, before)
        require(torch.isfinite(strategy(rows)).all(), f"after {bad}, good rows give bad numbers")


def opposite_infinities_come_out_bad(subject: Subject, sample: Sample) -> None:
    """Their sum is no number."""
    rows = sample.rows()
    rows[0, 0], rows[1, 0] = torch.inf, -torch.inf
    direction = subject(rows)
    require(not torch.isfinite(direction[0]), f"they came out as {float(direction[0])!r}")


def graphs_of_rows_do_not_matter(subject: Subject, sample: Sample) -> None:
    """Gradients made with ``create_graph=True`` give the same numbers."""
    rows = sample.rows()
    subject.close(subject(rows.clone().requires_grad_()).detach(), subject(rows), rows)


def memory_layout_does_not_matter(subject: Subject, sample: Sample) -> None:
    """Rows may be columns in memory."""
    rows = sample.rows()
    subject.equal(subject(rows.T.contiguous().T), subject(rows), rows)


def columns_as_the_class_says(subject: Subject, sample: Sample) -> None:
    """The Balancer hands columns over in blocks exactly where ``coordinatewise`` is set."""
    if not subject.make().coordinatewise:
        return
    rows = sample.rows()
    strategy, split = subject.make(), rows.shape[1] // 2
    strategy.start()
    parts = strategy.on_columns(rows[:, :split], 0), strategy.on_columns(rows[:, split:], split)
    subject.close(torch.cat(parts), subject(rows), rows)


def state_travels(subject: Subject, sample: Sample) -> None:
    """Mid-run, a strategy that is loaded, copied or pickled goes on as the original does."""
    rows = sample.rows()
    strategy = subject.make()
    for _ in range(3):
        strategy(rows)
    fresh = subject.make()
    fresh.load_state_dict(strategy.state_dict(), strict=True)
    for how, other in {"loaded": fresh, **copies_of(strategy)}.items():
        _go_on_alike(copy.deepcopy(strategy), other, rows, how)


def copies_share_no_state(subject: Subject, sample: Sample) -> None:
    """What a strategy remembers, its copy does not."""
    rows = sample.rows()
    strategy = subject.make()
    twin = copy.deepcopy(strategy)
    strategy(rows)
    _require_bits(twin(rows), subject(rows), "a copy made before")
    # What has the size of rows is made when it is needed.
    require(state_of(strategy).keys() >= state_of(twin).keys(), "steps take names from the state")


def reset_goes_back_to_the_start(subject: Subject, sample: Sample) -> None:
    """After ``reset()`` a strategy is as new."""
    rows = sample.rows()
    strategy = subject.make()
    start = state_of(strategy)
    strategy(rows)
    strategy.reset()
    require_same_state(strategy, start)
    _go_on_alike(strategy, subject.make(), rows, "new")


def new_ones_are_alike(subject: Subject, sample: Sample) -> None:
    """What a strategy draws comes from a stream of its own, which starts at its seed."""
    rows = sample.rows()
    _go_on_alike(subject.make(), subject.make(), rows, "new")


def global_generator_is_left_alone(subject: Subject, sample: Sample) -> None:
    """The training run's random numbers are what they would be without the strategy."""
    before = torch.get_rng_state()
    subject(sample.rows())
    require(torch.equal(torch.get_rng_state(), before), "torch.get_rng_state() has changed")


def refuses_what_is_no_matrix(subject: Subject, sample: Sample) -> None:
    """One error for what is no tensor, has not two dimensions, no row, or no real numbers."""
    rows = sample.rows()
    refused: list[tuple[object, type[Exception]]] = [
        (rows.tolist(), TypeError),
        (rows[0], ValueError),
        (rows[None], ValueError),
        (rows[:0], ValueError),
        (torch.ones_like(rows, dtype=torch.int64), TypeError),
        (torch.ones_like(rows, dtype=torch.complex64), TypeError),
    ]
    for given, error in refused:
        shown = f"{given.dtype}, {tuple(given.shape)}" if isinstance(given, Tensor) else "a list"
        try:
            subject.make()(given)  # type: ignore[arg-type]
        except error as raised:
            require("`gradients` must" in str(raised), f"{shown} gave {raised!r}")
        else:
            require(None, f"{shown} was taken, but expected a {error.__name__}")


def _same_up_to(times: int, direction: Tensor, expected: Tensor) -> None:
    """Require that every coordinate is right up to a few roundings of itself."""
    eps = times * torch.finfo(direction.dtype).eps
    require_close(direction.double() / expected.where(expected != 0, 1), expected.sign().abs(), eps)


def _require_bits(got: Tensor, expected: Tensor, how: str) -> None:
    same = bits(got) == bits(expected)
    require(same, f"{how}: got {got.tolist()}, but expected {expected.tolist()}")


def _go_on_alike(one: GradientStrategy, other: GradientStrategy, rows: Tensor, how: str) -> None:
    """Require that two strategies answer alike, bit for bit, for three more steps."""
    for step in range(3):
        _require_bits(other(rows), one(rows), f"the {how} one, step {step}")


def _always(body: Callable[[Subject, Sample], None], says: str, **rest: object) -> Property:
    return Property(body, says, **rest)  # type: ignore[arg-type]


_SMALL = {"families": ("conflicting",), "m": (3, 4), "p": (6, 20), "scales": (1.0,)}
_STEPS = {**_SMALL, "dtypes": (torch.float32, torch.float64), "examples": 5}

ALWAYS = (
    _always(
        finite_vector,
        "d is a finite vector of the rows' dtype, no longer than `growth` says, "
        "and the rows are left as they were",
        examples=80,
    ),
    _always(
        low_precision_only_rounds,
        "bfloat16 rows give what the same numbers give in float32, up to one rounding",
        m=(1, 6),
        dtypes=(torch.bfloat16,),
        scales=(1.0,),
        examples=25,
    ),
    _always(
        one_task_is_its_gradient,
        "the direction of one task is its gradient",
        families=("generic",),
        m=(1, 1),
        examples=10,
    ),
    _always(
        no_parameters_no_numbers,
        "rows of no parameters give a direction of none",
        families=("generic",),
        examples=10,
    ),
    _always(
        zero_rows_give_zero,
        "rows of zeros give a direction of zeros",
        families=("generic",),
        examples=10,
    ),
    _always(
        equal_tasks_add_up,
        "m equal rows g give m g, times the factor of the formula",
        families=("generic",),
        m=(1, 6),
        p=(1, 12),
        examples=40,
    ),
    _always(
        default_device_is_not_taken,
        "the default device is not taken for that of the rows",
        families=("generic", "conflicting", "stationary", "zero_rows"),
        m=(2, 20),
        p=(30, 30),
        dtypes=_DOUBLE,
        scales=(1.0,),
        examples=10,
    ),
    _always(
        bad_numbers_come_out_bad,
        "NaN and infinity come out, and leave no trace",
        **{**_SMALL, "examples": 10},
    ),
    _always(
        opposite_infinities_come_out_bad,
        "opposite infinities give no finite number",
        **{**_SMALL, "examples": 5},
    ),
    _always(graphs_of_rows_do_not_matter, "rows with a graph give the same numbers", **_STEPS),
    _always(memory_layout_does_not_matter, "the rows' layout in memory changes nothing", **_STEPS),
    _always(
        columns_as_the_class_says,
        "blocks of columns give what all columns give, if the class sets `coordinatewise`",
        examples=15,
        p=(2, 30),
    ),
    _always(
        state_travels,
        "a strategy that is loaded, copied or pickled goes on as the original",
        **_STEPS,
    ),
    _always(
        state_goes_to_other_tasks,
        "what is remembered of a task goes along with it to other tasks, with `with_tasks`",
        **{**_STEPS, "m": (4, 4), "dtypes": _DOUBLE, "examples": 2},
    ),
    _always(copies_share_no_state, "a copy shares no state with the original", **_STEPS),
    _always(reset_goes_back_to_the_start, "after `reset()` a strategy is as new", **_STEPS),
    _always(new_ones_are_alike, "two new strategies answer alike, step by step", **_STEPS),
    _always(global_generator_is_left_alone, "torch's global generator is left alone", **_STEPS),
    _always(refuses_what_is_no_matrix, "what is no matrix of real numbers is refused", **_STEPS),
)
"""The properties of every gradient strategy."""
