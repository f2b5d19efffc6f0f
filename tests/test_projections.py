"""Projections of all rows on their dual cone, by the conditions that they are alone in meeting."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mtbalance import _projections
from mtbalance._gramians import unit_rows
from mtbalance._projections import project_each_on_dual_cone
from tests._oracles import array, project_on_dual_cone
from tests._samplers import gradients, matrix, random_gradients


def cosines_of(rows: Tensor) -> Tensor:
    return unit_rows(rows @ rows.T).cosines


def unit_rows_of(rows: Tensor) -> Tensor:
    """Return those that are not zero over their length, in float64."""
    rows = rows[rows.any(1)].double()
    return rows / rows.norm(dim=1, keepdim=True)


def meets_its_conditions(multipliers: Tensor, gramian: Tensor) -> bool:
    """Whether each row meets the conditions of Karush, Kuhn and Tucker, which no other vector does.

    Its products with all rows are not negative, and zero with those of which it has a multiple.
    """
    products = gramian + multipliers @ gramian
    sizes = 1 + multipliers.sum(1)
    lost = (multipliers * products).abs().sum(1)
    return bool(
        (multipliers >= 0).all()
        and (products.amin(1) >= -1e-12).all()
        and (lost <= 1e-12 * sizes).all()
    )


@pytest.fixture
def alone(monkeypatch) -> list[int]:
    """Return a list that gets longer with each problem that is solved for itself."""
    calls: list[int] = []
    solve = _projections.add_rows_one_by_one
    monkeypatch.setattr(
        _projections, "add_rows_one_by_one", lambda *args: calls.append(1) or solve(*args)
    )
    return calls


@given(
    rows=gradients(scales=[1.0]),
    most=st.sampled_from([(0, 0), (1, 0), (0, 9), (12, 40)]),
    few=st.sampled_from([0, 64]),
    unwatched=st.sampled_from([0, 6]),
    entries=st.sampled_from([1, 2**20]),
)
@settings(max_examples=300)
def test_each_is_the_nearest_point_of_the_cone(
    rows: Tensor, most: tuple[int, int], few: int, unwatched: int, entries: int
) -> None:
    """However many exchanges are allowed, whatever faces share, and however many go at a time."""
    units = unit_rows_of(rows)
    assume(len(units) > 0)
    gramian = (units @ units.T).fill_diagonal_(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_projections, "_MOST_PIVOTS", most)
        patch.setattr(_projections, "_FEW", few)
        patch.setattr(_projections, "_UNWATCHED", unwatched)
        patch.setattr(_projections, "_ENTRIES", entries)
        multipliers = project_each_on_dual_cone(gramian)
    assert meets_its_conditions(multipliers, gramian)
    for unit, found in zip(units, units + multipliers @ units, strict=True):
        expected, _ = project_on_dual_cone(array(units), array(unit))
        assert np.linalg.norm(array(found) - expected) <= 1e-6


@pytest.mark.parametrize("m", [3, 10, 50, 120])
def test_rows_are_projected_together(m: int, alone: list[int]) -> None:
    """Otherwise it would be no faster. Independent rows settle."""
    gramian = cosines_of(random_gradients(m, 2 * m, seed=m))
    assert meets_its_conditions(project_each_on_dual_cone(gramian), gramian)
    assert not alone


@pytest.mark.parametrize("name", ["generic", "conflicting", "rank_deficient", "stationary"])
@pytest.mark.parametrize("p", [50, 110])
def test_more_rows_than_one_works_on_as_they_are(name: str, p: int) -> None:
    """Where multipliers and slacks change places, and where rows depend on each other."""
    gramian = cosines_of(matrix(name, 80, p, seed=p))
    assert meets_its_conditions(project_each_on_dual_cone(gramian), gramian)


def test_rows_that_nearly_depend_on_each_other_settle(alone: list[int]) -> None:
    """Each second row is its neighbour but for 1e-7 of its length."""
    rows = random_gradients(100, 120, seed=1)
    rows -= 0.9 * rows.mean(0)
    rows[1::2] = rows[::2] + 1e-7 * random_gradients(50, 120, seed=2)
    gramian = cosines_of(rows)
    assert meets_its_conditions(project_each_on_dual_cone(gramian), gramian)
    assert not alone


@pytest.mark.parametrize(("m", "p"), [(4, 6), (6, 6), (6, 16), (8, 20), (80, 100)])
def test_rows_that_depend_on_each_other_but_for_the_rounding_of_float32(m: int, p: int) -> None:
    """They are projected as those before rounding, by multipliers that float32 can bear.

    What rounding leaves of a dependence is 1e-8 long. Multiplied by 1e7 it meets conditions no less
    well, and nothing is left of a direction that is added up in float32.
    """
    for seed in range(60 if m < 20 else 3):
        dependent = matrix("rank_deficient", m, p, seed=seed, dtype=torch.float32)
        factors = 0.5 + random_gradients(m, 1, seed=seed).abs().float()
        before = dependent.double() * factors.double()
        units = unit_rows_of(dependent * factors)
        multipliers = project_each_on_dual_cone(cosines_of(units))
        assert multipliers.max() < 1e3
        for unit, found in zip(units, units + multipliers @ units, strict=True):
            expected, _ = project_on_dual_cone(array(before), array(unit))
            assert np.linalg.norm(array(found) - expected) <= 1e-5


@pytest.mark.parametrize("few", [0, 64])
def test_however_many_fit_each_is_solved_once(few: int, monkeypatch) -> None:
    """The faces are all that conflicts, or none of it; those of no rows have no multipliers."""
    gramian = cosines_of(random_gradients(20, 40, seed=4))
    masks = gramian < 0
    masks[::3] = False
    monkeypatch.setattr(_projections, "_FEW", few)
    tableau = _projections._Tableau(gramian, gramian, masks)
    assert (tableau._base is None) == (few > 0)
    whole = tableau.multipliers(masks, gramian)
    for face, linear, found in zip(masks, gramian, whole, strict=True):
        expected = np.linalg.solve(array(gramian[face][:, face]), -array(linear[face]))
        assert np.abs(array(found[face]) - expected).max(initial=0) <= 1e-12
        assert not found[~face].any()
    for entries in (1, 200):
        monkeypatch.setattr(_projections, "_ENTRIES", entries)
        assert (tableau.multipliers(masks, gramian) - whole).abs().max() <= 1e-12


def test_what_faces_share_makes_systems_small(monkeypatch) -> None:
    """Rows that are pulled to one side want nearly all others: systems are those of the rest."""
    solve, sizes = _projections._Tableau._solve, []

    def counted(self, masks, differs, linear, largest):
        sizes.append(largest)
        return solve(self, masks, differs, linear, largest)

    monkeypatch.setattr(_projections._Tableau, "_solve", counted)
    rows = random_gradients(100, 2000, seed=3)
    gramian = cosines_of(rows - 0.9 * rows.mean(0))
    multipliers = project_each_on_dual_cone(gramian)
    assert meets_its_conditions(multipliers, gramian)
    assert (multipliers > 0).sum(1).median() > 90
    assert sizes[-1] < 10
