"""The conformance kit: strategies that are broken on purpose are caught, and told why."""

import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

import mtbalance.testing
from mtbalance.gradient import (
    MGDA,
    CAGrad,
    DualProj,
    GradientStrategy,
    PCGrad,
    Smoothed,
    Sum,
    UPGrad,
)
from mtbalance.testing import (
    CLAIMED,
    FAMILIES,
    Claim,
    LossSample,
    Sample,
    Subject,
    Trait,
    Violation,
    check_differ,
    check_gradient_strategy,
    check_weighting,
    matrix,
    orthogonal,
    properties_of,
    train_step,
    traits_of,
)
from mtbalance.testing.__main__ import main
from mtbalance.testing._property import turned
from mtbalance.testing._violation import Mismatch, require_close
from mtbalance.testing._weighting import optimizer_of_a_point
from mtbalance.weighting import DWA, AutoLambda, Equal, Weighting

PAGE = Path(__file__).parents[1] / "docs" / "strategies-properties.md"


def near_one(gradients: Tensor) -> Tensor:
    """Return the gradients with a largest entry of 1, so that squares are in range."""
    largest = gradients.double().abs().max() if gradients.numel() else gradients.new_zeros(())
    return gradients.double() / torch.where(largest > 0, largest, 1.0)


class Plain(GradientStrategy):
    """The sum, which each of the following breaks in one way."""

    def forward(self, gradients: Tensor) -> Tensor:
        return gradients.sum(0)


class PrefersTheFirst(Plain):
    """Depends on the order, and leaves conflicts with all tasks but the first."""

    def forward(self, gradients: Tensor) -> Tensor:
        rows = near_one(gradients)
        opposed = (rows @ rows[:1].T < 0) & rows.isfinite().all()
        return torch.where(opposed, 0, gradients).sum(0)


class Normalizes(Plain):
    """Divides by the norms, of zero rows too."""

    def forward(self, gradients: Tensor) -> Tensor:
        norms = gradients.norm(dim=1, keepdim=True)
        return (gradients / norms * norms.mean()).sum(0)


class Remembers(Plain):
    """Adds a mean of earlier directions, which is in no ``state_dict``."""

    last: Tensor | None = None

    def forward(self, gradients: Tensor) -> Tensor:
        direction = gradients.detach().sum(0)
        if self.last is not None and self.last.shape == direction.shape:
            direction = direction + self.last
        if direction.isfinite().all():
            self.last = direction
        return direction


class Sticks(Plain):
    """Keeps what ``reset()`` should forget."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, gradients: Tensor) -> Tensor:
        if torch.isfinite(gradients).all():
            self.steps += 1
        return gradients.sum(0)


class Writes(Plain):
    """Halves the largest row where it stands."""

    def forward(self, gradients: Tensor) -> Tensor:
        direction = gradients.sum(0)
        if gradients.is_leaf and not gradients.requires_grad and gradients.stride(0):
            gradients[gradients.norm(dim=1).argmax()] /= 2
        return direction


class Means(Plain):
    def forward(self, gradients: Tensor) -> Tensor:
        return gradients.mean(0)


class Widens(Plain):
    def forward(self, gradients: Tensor) -> Tensor:
        return gradients.double().sum(0)


class Hides(Plain):
    """Replaces NaN."""

    def forward(self, gradients: Tensor) -> Tensor:
        return gradients.nan_to_num().sum(0)


class DrawsGlobally(Plain):
    def forward(self, gradients: Tensor) -> Tensor:
        torch.rand(1)
        return gradients.sum(0)


class TakesTheDefaultDevice(Plain):
    def forward(self, gradients: Tensor) -> Tensor:
        return torch.ones(len(gradients), dtype=gradients.dtype) @ gradients


class Boasts(Plain):
    """Is longer than it says."""

    @property
    def growth(self) -> float:
        return 0.1


class SaysColumns(Plain):
    """Says that columns do not matter to each other, but they do."""

    coordinatewise = True

    def forward(self, gradients: Tensor) -> Tensor:
        norms = near_one(gradients).abs().sum(dim=1, keepdim=True)
        total = norms.sum()
        share = torch.where(total > 0, len(norms) * norms / total, 1.0)
        return (share * gradients).sum(0).to(gradients.dtype)


class Epsilon(Plain):
    """Leaves rows alone that are shorter than an epsilon."""

    def forward(self, gradients: Tensor) -> Tensor:
        norms = gradients.double().norm(dim=1, keepdim=True)
        return (gradients * (norms / (norms + 1e-8))).sum(0).to(gradients.dtype)


class Raises(Plain):
    """Solves a singular system."""

    def forward(self, gradients: Tensor) -> Tensor:
        torch.linalg.cholesky((gradients @ gradients.T).double())
        return gradients.sum(0)


class ByPlace(Plain):
    """Keeps the lengths of rows at their places, in a buffer that is of no task."""

    def __init__(self) -> None:
        super().__init__()
        self.places: Tensor = torch.arange(99)
        self.register_buffer("longest", torch.zeros(99, dtype=torch.float64))

    def reset(self) -> None:
        self.longest.zero_()

    def take(self, active: Tensor | slice, group: int) -> None:
        super().take(active, group)
        self.places = torch.arange(99)[active]

    def forward(self, gradients: Tensor) -> Tensor:
        norms = gradients.detach().double().norm(dim=1)
        places = self.places[: len(norms)]
        weights = 1 - (self.longest[places] > norms).double() / 2
        if norms.isfinite().all():
            self.longest[places] = torch.maximum(self.longest[places], norms)
        return (weights.to(gradients)[:, None] * gradients).sum(0)


class Refuses(Plain):
    """Remembers a number per task in a way that nobody can take to other tasks."""

    def bind(self, tasks: Sequence[str], groups: int = 1) -> "Refuses":
        self.register_buffer("seen", torch.zeros(len(tasks)))
        super().bind(tasks, groups)
        return self


BROKEN = [
    (Normalizes, (), "finite_vector"),
    (Remembers, (), "state_travels"),
    (Sticks, (), "reset_goes_back_to_the_start"),
    (Writes, (), "finite_vector"),
    (Means, (), "equal_tasks_add_up"),
    (Widens, (), "finite_vector"),
    (Hides, (), "bad_numbers_come_out_bad"),
    (DrawsGlobally, (), "global_generator_is_left_alone"),
    (TakesTheDefaultDevice, (), "default_device_is_not_taken"),
    (Boasts, (), "finite_vector"),
    (SaysColumns, (), "columns_as_the_class_says"),
    (Epsilon, (), "one_task_is_its_gradient"),
    (Raises, (), "finite_vector"),
    (ByPlace, (), "state_goes_to_other_tasks"),
    (Refuses, (), "state_goes_to_other_tasks"),
    (PrefersTheFirst, (Claim.ORDER_FREE,), "order_free"),
    (PrefersTheFirst, (Claim.NO_CONFLICT_LEFT,), "no_conflict_left"),
    (PCGrad, (Claim.DOUBLES,), "doubles"),
    (PrefersTheFirst, (Claim.COORDINATEWISE,), "coordinatewise"),
    (Plain, (Claim.SCALE_FREE,), "scale_free"),
    (CAGrad, (Claim.SUM_WITHOUT_CONFLICT,), "sum_without_conflict"),
    (MGDA, (Claim.LINEAR_IN_SCALES,), "linear_in_scales"),
    (MGDA, (Claim.IGNORES_ZERO_ROWS,), "ignores_zero_rows"),
]


def again(violation: Violation) -> Tensor:
    """Run the call that a message shows."""
    call = re.search(r"at: +mtbalance\.testing\.(matrix\(.*\))", str(violation))
    assert call is not None
    return eval(call[1], {"matrix": matrix, "torch": torch})  # noqa: S307


@pytest.mark.parametrize(
    ("kind", "claims", "name"), BROKEN, ids=[f"{kind.__name__}-{n}" for kind, _, n in BROKEN]
)
def test_what_is_broken_is_caught(kind, claims: tuple[Claim, ...], name: str) -> None:
    identical = 1.4 / 1.16 if kind is CAGrad else 1.0
    with pytest.raises(Violation) as caught:
        check_gradient_strategy(Subject(kind, identical), claims=claims)
    text = str(caught.value)
    assert caught.value.name == name
    assert f"breaks {name!r}: {caught.value.says}" in text
    assert kind.__name__ in text
    rows = again(caught.value)
    family = re.search(r'matrix\("(\w+)"', text)
    assert family is not None
    # The proof of the matrix's structure.
    assert mtbalance.testing.BY_NAME[family[1]].proof.splitlines()[0] in text
    assert rows.ndim == 2


def test_trials_take_one_thread() -> None:
    """Several would wait for each other, about matrices that are small."""
    seen = set()

    class Counts(Plain):
        def forward(self, gradients: Tensor) -> Tensor:
            seen.add(torch.get_num_threads())
            return gradients.sum(0)

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        check_gradient_strategy(Counts, seeds=range(1))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == {1}


def test_properties_that_are_not_asked() -> None:
    report = check_gradient_strategy(
        Boasts, seeds=range(1), without=["finite_vector"], claims=[Claim.ODD]
    )
    assert "finite_vector" not in report.held
    with pytest.raises(ValueError, match="`without` must name properties, but got 'finite'"):
        check_gradient_strategy(Plain, without=["finite"])


@pytest.mark.parametrize(
    ("check", "make", "words"),
    [
        (
            check_gradient_strategy,
            PCGrad(),
            "but got one PCGrad. Give the class, or a function: la",
        ),
        (
            check_gradient_strategy,
            DWA,
            "a GradientStrategy, but returned DWA. What is of the other",
        ),
        (check_weighting, DWA(), "in each call, but got one DWA."),
        (
            check_weighting,
            Sum,
            "a Weighting, but returned Sum. What is of the other kind is for ch",
        ),
    ],
)
def test_what_is_checked_is_made_anew_and_of_its_kind(check, make, words: str) -> None:
    with pytest.raises(TypeError, match=re.escape(words)):
        check(make)


def test_both_numbers_are_those_of_the_matrix_that_is_named() -> None:
    with pytest.raises(Violation) as caught:
        check_gradient_strategy(PrefersTheFirst, claims=[Claim.NO_CONFLICT_LEFT])
    rows = again(caught.value)
    found = re.search(r"task (\d) has <g, d> = (\S+),", str(caught.value))
    assert found is not None
    product = rows[int(found[1])].double() @ PrefersTheFirst()(rows).double()
    assert float(found[2]) == pytest.approx(float(product), rel=1e-12)
    assert product < 0
    with pytest.raises(Violation) as caught:
        check_gradient_strategy(Means)
    rows = again(caught.value)
    assert "got" in str(caught.value)
    assert "expected" in str(caught.value)


def test_a_sample_fails_alone() -> None:
    """A failure is run again with one call."""
    (order_free,) = CLAIMED[Claim.ORDER_FREE]
    with pytest.raises(Violation) as caught:
        check_gradient_strategy(PrefersTheFirst, claims=[Claim.ORDER_FREE])
    call = caught.value.where.replace("matrix", "Sample")
    sample = eval(call, {"mtbalance": mtbalance, "torch": torch})  # noqa: S307
    with pytest.raises(Violation, match="order_free"):
        order_free(Subject(PrefersTheFirst), sample)
    assert order_free(Subject(Plain), sample)


def test_claims_that_are_not_made_but_hold_are_reported() -> None:
    report = check_gradient_strategy(Plain, claims=[Claim.ODD], seeds=range(1))
    assert report.unclaimed == set(Claim) - {
        Claim.ODD,
        Claim.NO_CONFLICT_LEFT,
        Claim.SCALE_FREE,
    }
    assert "may also claim ORDER_FREE: d(PJ) = d(J)" in str(report)
    assert "finite_vector" in report.held
    assert "odd" in report.held
    assert report.samples > 100


def test_trials_say_what_theory_says() -> None:
    """UPGrad is linear under scaling, DualProj is not (Quinton and Rey 2024)."""
    assert Claim.LINEAR_IN_SCALES in properties_of(UPGrad)
    assert Claim.LINEAR_IN_SCALES not in properties_of(DualProj)
    assert Claim.ORDER_FREE not in properties_of(lambda: PCGrad(order="fixed"))


def test_a_matrix_at_which_nothing_is_settled_speaks_against_no_claim() -> None:
    class Jumps(Plain):
        """Takes the first row where a column cancels, which any change of the rows ends."""

        def forward(self, gradients: Tensor) -> Tensor:
            total = gradients.sum(0)
            cancelled = total.abs() <= 1e-14 * gradients.abs().sum(0).nan_to_num(0, 0, 0)
            return torch.where(cancelled, gradients[0], total)

    assert Claim.ORDER_FREE in properties_of(Jumps, seeds=range(2))
    with pytest.raises(Violation, match="order_free"):
        check_gradient_strategy(Jumps, claims=[Claim.ORDER_FREE])


def test_one_change_of_the_rows_is_not_enough_to_tell_what_is_settled() -> None:
    class Leans(Plain):
        """Takes the first row where a column cancels, which every second change ends."""

        def forward(self, gradients: Tensor) -> Tensor:
            total = gradients.sum(0)
            size = gradients.abs().sum(0).nan_to_num(0, 0, 0)
            return torch.where((total <= 0) & (total >= -1e-9 * size), gradients[0], total)

    assert Claim.ORDER_FREE in properties_of(Leans, seeds=range(3))


@pytest.mark.parametrize(
    ("got", "fine"),
    [
        ([1.0, 2.0], True),
        ([1.0, 2.0 + 1e-9], True),
        ([1.0, 2.1], False),
        ([1.0, torch.nan], False),
        ([1.0, torch.inf], False),
        ([1.0], False),
    ],
)
def test_what_is_close(got: list[float], fine: bool) -> None:
    expected = torch.tensor([1.0, 2.0], dtype=torch.float64)
    numbers = torch.tensor(got, dtype=torch.float64)
    if fine:
        require_close(numbers, expected, 1e-8)
    else:
        with pytest.raises(Mismatch, match=r"got .*, but expected"):
            require_close(numbers, expected, 1e-8)


@pytest.mark.parametrize("other", [PCGrad, UPGrad, MGDA])
def test_strategies_that_differ(other: Callable[[], GradientStrategy]) -> None:
    sample = check_differ(Sum, other)
    rows = sample.rows()
    assert (Sum()(rows) - other()(rows)).abs().max() >= 1e-3 * rows.norm(dim=1).sum()


def test_one_strategy_in_disguise() -> None:
    with pytest.raises(Violation, match=r"must differ from Plain\(\)") as caught:
        check_differ(Sum, Plain)
    assert again(caught.value).shape[0] > 1


# --- weightings -----------------------------------------------------------------------------------


class Fair(Weighting):
    """Every weight is 1; what each of the following breaks."""

    def forward(self, losses: Tensor) -> Tensor:
        return losses * self.weights(losses.detach())

    def weights(self, losses: Tensor) -> Tensor:
        return torch.ones_like(losses)


class Negative(Fair):
    def weights(self, losses: Tensor) -> Tensor:
        return torch.tensor([1.0, -1.0, 1.0])[self.active].to(losses)


class Vanishing(Fair):
    """Is infinite for small losses in bfloat16, and in others NaN."""

    def weights(self, losses: Tensor) -> Tensor:
        return 1 / (losses - losses.min())


class Inflates(Fair):
    def weights(self, losses: Tensor) -> Tensor:
        return 1 + losses.abs() * 0.1


class CountsEverybody(Fair):
    """Remembers a step for tasks that were absent, too."""

    def setup(self) -> None:
        self.register_buffer("steps", torch.zeros(self.num_tasks))

    def forward(self, losses: Tensor) -> Tensor:
        if self.training:
            self.steps += 1
        return super().forward(losses)


class CountsInEvaluation(CountsEverybody):
    def forward(self, losses: Tensor) -> Tensor:
        self.steps[self.active] += torch.isfinite(losses)
        return Fair.forward(self, losses)


class Forgets(Fair):
    """Doubles a number that no ``state_dict`` holds."""

    scale = 1.0

    def weights(self, losses: Tensor) -> Tensor:
        self.scale *= 2
        return self.scale * torch.ones_like(losses)


class Swaps(Fair):
    """Gives absent tasks' weights to others."""

    def weights(self, losses: Tensor) -> Tensor:
        return torch.arange(1.0, 1 + len(losses)).to(losses)


class Poisoned(Fair):
    """Remembers bad losses."""

    def setup(self) -> None:
        self.register_buffer("last", torch.zeros(self.num_tasks))

    def forward(self, losses: Tensor) -> Tensor:
        if self.training:
            self.last[self.active] = losses.detach().to(self.last)
        return super().forward(losses)


class LosesItsPlace(Poisoned):
    """Says of what is a task's that it is no task's."""

    def forward(self, losses: Tensor) -> Tensor:
        return super().forward(losses) if losses.isfinite().all() else Fair.forward(self, losses)

    def carried(self, state: Mapping[str, object], change: object) -> dict[str, object]:
        return dict(state)


class Pairs(LosesItsPlace):
    """Remembers a number per pair of tasks, too, and does not say where these go."""

    carried = Weighting.carried

    def setup(self) -> None:
        super().setup()
        self.register_buffer("pairs", torch.zeros(self.num_tasks, self.num_tasks))


WRONG = [
    (Negative, {Trait.STATELESS, Trait.POSITIVE}, "weights_are_positive"),
    (Vanishing, {Trait.STATELESS}, "finite_and_of_the_losses_dtype"),
    (Inflates, {Trait.STATELESS, Trait.SUMS_TO_M}, "weights_sum_to_m"),
    (Inflates, {Trait.STATELESS, Trait.STARTS_EQUAL}, "starts_equal"),
    (Fair, set(), "what_learns_or_remembers_is_saved"),
    (Fair, {Trait.STATELESS, Trait.LEARNS_BY_GRADIENT}, "what_learns_or_remembers_is_saved"),
    (CountsEverybody, set(), "absent_tasks_are_left_as_they_were"),
    (CountsInEvaluation, set(), "evaluation_changes_nothing"),
    (Forgets, {Trait.STATELESS}, "state_travels"),
    (Swaps, {Trait.STATELESS}, "numbers_of_tasks_pick_their_weights"),
    (Poisoned, set(), "bad_losses_leave_no_trace"),
    (LosesItsPlace, set(), "state_of_losses_goes_to_other_tasks"),
    (Pairs, set(), "state_of_losses_goes_to_other_tasks"),
    (CountsEverybody, {Trait.STATELESS}, "absent_tasks_are_left_as_they_were"),
]


@pytest.mark.parametrize(
    ("kind", "traits", "name"), WRONG, ids=[f"{kind.__name__}-{n}" for kind, _, n in WRONG]
)
def test_weightings_that_are_wrong_are_caught(kind, traits: set[Trait], name: str) -> None:
    with pytest.raises(Violation) as caught:
        check_weighting(kind, traits=traits)
    text = str(caught.value)
    assert caught.value.name == name
    assert f"{kind.__name__}() breaks {name!r}" in text
    call = re.search(r"at: +mtbalance\.testing\.(LossSample.*)", text)
    assert call is not None
    losses = eval(call[1], {"LossSample": LossSample, "torch": torch})  # noqa: S307
    assert losses
    assert str([round(x, 6) for x in losses[0].tolist()]) in text


def test_a_strategy_is_told_that_it_refuses_other_tasks() -> None:
    words = "must know what becomes of '(pairs|seen)' in its saved state .* override its `carried`"
    with pytest.raises(Violation, match=words):
        check_weighting(Pairs)
    with pytest.raises(Violation, match=words):
        check_gradient_strategy(Refuses)
    on_purpose = ["state_of_losses_goes_to_other_tasks"]
    assert on_purpose[0] not in check_weighting(Pairs, without=on_purpose).held
    with pytest.raises(ValueError, match="`without` must name properties, but got 'state'"):
        check_weighting(Pairs, without=["state"])


def test_a_negative_weight_is_shown() -> None:
    with pytest.raises(Violation, match=r"the weight of task 1 is -1\.0, but expected one above 0"):
        check_weighting(Negative, traits=[Trait.STATELESS, Trait.POSITIVE])


def test_traits_that_are_there_are_reported() -> None:
    report = check_weighting(Equal, traits=[Trait.STATELESS])
    assert report.unclaimed == {
        Trait.LINEAR,
        Trait.POSITIVE,
        Trait.STARTS_EQUAL,
        Trait.SUMS_TO_M,
    }
    assert traits_of(DWA) >= {Trait.SUMS_TO_M, Trait.SHARED_OUT}
    assert "may also claim LINEAR: the weighted losses" in str(report)


def test_a_weighting_may_look_ahead_with_several_optimizers() -> None:
    """d/d lambda_i is -0.1 <(-1, 2), L_i (1, i)> for each of 2 optimizers and 3 validation losses.

    Adam takes over a tenth of it in the first step.
    """

    def several() -> AutoLambda:
        return AutoLambda([optimizer_of_a_point(), optimizer_of_a_point()], lr=0.3)

    weighting = several()
    train_step(weighting, torch.tensor([1.0, 2.0, 3.0]))
    expected = 2 * 3 * 0.1 * 0.1 * torch.tensor([1.0, -2.0, -9.0])
    torch.testing.assert_close(weighting.exp_avg, expected)
    report = check_weighting(several, traits=[Trait.LINEAR], seeds=range(1))
    assert report.unclaimed == {Trait.STARTS_EQUAL}


def test_an_optimizer_to_look_ahead_with_is_of_two_numbers() -> None:
    wrong = torch.optim.SGD([torch.zeros(2, 3, requires_grad=True)])
    with pytest.raises(Violation, match=r"first, but one holds a tensor of shape \(2, 3\)\. Make"):
        check_weighting(lambda: AutoLambda(wrong), seeds=range(1))


def test_losses_reach_the_bounds() -> None:
    drawn = torch.cat([torch.cat(LossSample(seed, 1e-6, 1e6).epochs()) for seed in range(50)])
    assert drawn.min() == torch.tensor(1e-6)
    assert (drawn.max() / 1e6 - 1).abs() < 1e-6
    assert ((drawn > 0.01) & (drawn < 100)).any()


# --- matrices, table, package ---------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_matrix_is_made_again(family) -> None:
    sample = Sample(family.name, 3, 4, 5, 2.0**20, torch.float32)
    shown = eval(str(sample), {"matrix": matrix, "torch": torch})  # noqa: S307
    assert torch.equal(shown, sample.rows())
    assert shown.dtype == torch.float32
    assert torch.equal(shown.double(), (matrix(family.name, 3, 4, 5) * 2.0**20).float().double())
    assert not torch.equal(matrix(family.name, 3, 9, 5), matrix(family.name, 3, 9, 6))


def test_matrices_ask_for_what_they_need() -> None:
    with pytest.raises(ValueError, match=r"`family` must be one of generic, .* but got 'odd'\."):
        matrix("odd", 2, 2)
    with pytest.raises(ValueError, match=r"`m` and `p` must be at least 2 and 1 .* got 1 and 3\."):
        matrix("conflicting", 1, 3)


def test_orthogonal_matrices() -> None:
    q = orthogonal(6, 1)
    torch.testing.assert_close(q @ q.T, torch.eye(6, dtype=torch.float64))


def test_the_page_holds_what_the_command_prints() -> None:
    """Two seeds find what the page's three have found."""
    page = PAGE.read_text().splitlines()
    lines = main(["--seeds", "2"]).splitlines()
    assert len(lines) > 30
    for line in lines:
        assert line in page, "paste what `python -m mtbalance.testing` prints into the page"


def test_the_command_tries_something(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["--seeds", "0"])
    assert "`--seeds` must be at least 1" in capsys.readouterr().err


def test_what_a_strategy_remembers_counts() -> None:
    """Smoothed weights of other gradients let conflicts through, but not in the first step."""

    def smoothed() -> GradientStrategy:
        return Smoothed(UPGrad(), alpha=0.5)

    assert Claim.NO_CONFLICT_LEFT in properties_of(smoothed, seeds=range(2))
    later = properties_of(smoothed, seeds=range(2), steps=2)
    assert Claim.NO_CONFLICT_LEFT not in later
    assert Claim.ORDER_FREE in later


@pytest.mark.parametrize("towards", [4.0, -0.8])
def test_earlier_gradients_commute_with_what_claims_do_to_rows(towards: float) -> None:
    rows = matrix("generic", 3, 5)
    order, q = torch.tensor([2, 0, 1]), orthogonal(5)
    factors = torch.tensor([[1.0], [3.0], [0.2]], dtype=torch.float64)
    expected = turned(rows, towards)
    for got, right in (
        (turned(rows[order], towards), expected[order]),
        (turned(rows @ q, towards), expected @ q),
        (turned(factors * rows, towards), factors * expected),
        (turned(torch.cat([rows, rows]), towards), torch.cat([expected, expected])),
        (turned(torch.cat([rows, 0 * rows[:1]]), towards)[:3], expected),
    ):
        torch.testing.assert_close(got, right)
    for scale in (2.0**-1000, 2.0**560):  # whose squares float64 does not hold
        assert torch.equal(turned(scale * rows, towards), scale * expected)
    before, after = (_cosine(each) for each in (rows, expected))
    assert (after > before) if towards > 0 else (after < before)


def _cosine(rows: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(rows[0], rows[1], dim=0)


def test_a_plain_import_leaves_the_kit_alone() -> None:
    code = "import sys, mtbalance; print([m for m in sys.modules if 'mtbalance.testing' in m])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
