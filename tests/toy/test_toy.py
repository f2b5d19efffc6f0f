"""The two-task toy: its losses, its Pareto set, where strategies end, and its command."""

import math
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from examples.toy import cli
from examples.toy.problem import STARTS, TASKS, Model, losses_at, minimum_of_mean, pareto_set
from examples.toy.trails import Setting, follow, follow_all, title
from tests._commands import help_of

ROOT = Path(__file__).parents[2]
LEFT, RIGHT = (-7.5, -0.5), (9.0, -1.0)
"""Two starts in the lower half, either side of the minimum of the mean."""


def written_out(x1, x2):
    """The two losses as the authors of CAGrad write them, in numbers."""
    f1 = math.log(max(abs(0.5 * (-x1 - 7) - math.tanh(-x2)), 0.000005)) + 6
    f2 = math.log(max(abs(0.5 * (-x1 + 3) + math.tanh(-x2) + 2), 0.000005)) + 6
    g1 = ((-x1 + 7) ** 2 + 0.1 * (-x2 - 8) ** 2) / 10 - 20
    g2 = ((-x1 - 7) ** 2 + 0.1 * (-x2 - 8) ** 2) / 10 - 20
    c1, c2 = max(math.tanh(0.5 * x2), 0), max(math.tanh(-0.5 * x2), 0)
    return [f1 * c1 + g1 * c2, f2 * c1 + g2 * c2]


def gradients(point, scale=1.0):
    losses = losses_at(point.requires_grad_(), scale)
    return [torch.autograd.grad(loss, point, retain_graph=True)[0] for loss in losses]


def test_losses_are_those_of_the_paper():
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(200, 2, generator=generator, dtype=torch.float64) * 22 - 11
    points = torch.cat([points, torch.tensor([[-5.0, 40.0], [5.0, 40.0], [0.0, 0.0]])])
    expected = torch.tensor([written_out(*point) for point in points.tolist()]).double()
    torch.testing.assert_close(losses_at(points), expected, rtol=1e-6, atol=1e-6)


def test_the_second_loss_is_the_first_mirrored_and_the_scale_is_the_first_s():
    points = torch.tensor([[3.0, 2.0], [-4.0, -6.0], [9.0, 0.5]], dtype=torch.float64)
    mirrored = points * torch.tensor([-1.0, 1.0])
    torch.testing.assert_close(losses_at(points), losses_at(mirrored).flip(-1))
    scaled = losses_at(points, 0.1)
    torch.testing.assert_close(scaled, losses_at(points) * torch.tensor([0.1, 1.0]).double())


def test_on_the_pareto_set_gradients_are_opposite():
    for point in pareto_set(7)[1:-1]:
        first, second = gradients(point.clone())
        assert torch.cosine_similarity(first, second, dim=0) < -1 + 1e-9


@pytest.mark.parametrize("scale", [1.0, 0.1])
def test_the_mean_is_lowest_on_the_pareto_set(scale):
    minimum = minimum_of_mean(scale)
    assert sum(gradients(minimum.clone(), scale)).norm() < 1e-9
    means = losses_at(pareto_set(), scale).mean(-1)
    assert losses_at(minimum, scale).mean() <= means.min()


def test_no_start_is_without_a_way_down():
    for start in STARTS:
        model = Model(start)
        for task in TASKS:
            (gradient,) = torch.autograd.grad(model()[task], model.point)
            assert gradient.norm() > 0, start


ENDS = {
    "sum": ("minimum", "minimum"),
    "cagrad": ("minimum", "minimum"),
    "mgda": ("pareto", "pareto"),
    "pcgrad": ("pareto", "pareto"),
    "nash": ("pareto", "pareto"),
    "aligned": ("pareto", "pareto"),
}


@pytest.mark.parametrize("strategy", ENDS)
def test_where_a_strategy_ends(strategy):
    """CAGrad and the sum go to the minimum of the mean, others to where they first can.

    So Liu et al. (2021) find: MGDA, and PCGrad where it gets that far, stop at any point of the
    Pareto set, on the side that they come from.
    """
    trails = [follow(strategy, start, Setting(250, 0.2)) for start in (LEFT, RIGHT)]
    assert tuple(trail.ending for trail in trails) == ENDS[strategy]
    if "pareto" in ENDS[strategy]:
        assert trails[0].end[0] < -1
        assert trails[1].end[0] > 1


def test_the_sum_is_stuck_in_the_valley_that_mgda_leaves():
    """Liu et al. (2021) and Navon et al. (2022): from the upper starts the sum makes no way."""
    setting = Setting(700, 0.02)
    stuck, free = (follow(name, STARTS[0], setting) for name in ("sum", "mgda"))
    assert stuck.end[1] > 0.5
    assert free.end[1] < -5


def test_a_trail_that_has_settled_is_not_walked_on():
    start = tuple(minimum_of_mean().tolist())
    trail = follow("sum", start, Setting(300, 1e-3))
    assert trail.steps[-1] == 10
    assert trail.ending == "minimum"


def test_processes_do_what_one_does():
    setting = Setting(3, 0.1)
    alone, together = (follow_all(["cagrad"], setting, n) for n in (1, 2))
    for a, b in zip(alone[0], together[0], strict=True):
        assert torch.equal(a.points, b.points)


def test_names_become_headings():
    names = {"sum": "Sum", "cagrad": "CAGrad", "rlw+nash": "RandomWeighting + NashMTL"}
    assert {name: title(name) for name in names} == names


def run(*arguments):
    with pytest.raises(SystemExit) as caught:
        cli.main([str(argument) for argument in arguments])
    return caught.value.code


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_the_command_draws_a_panel_per_strategy(ending, tmp_path, monkeypatch, capsys):
    figures, original = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (figures.append(self), original(self, *a, **k))
    )
    out = tmp_path / f"toy.{ending}"
    code = run("--strategies", "sum, cagrad,mgda,rlw", "--steps", 3, "--out", out)
    assert code == 0
    assert out.stat().st_size > 0
    panels = [axes for axes in figures[0].axes if axes.get_visible() and axes.get_title()]
    assert [axes.get_title() for axes in panels] == ["Sum", "CAGrad", "MGDA", "RandomWeighting"]
    assert panels[0].texts[0].get_text() == "5 elsewhere"
    names = ["Pareto set", "minimum of the mean", "start", "end"]
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == names
    assert capsys.readouterr().out.splitlines()[-1] == str(out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--strategies", "sum,cagard"], "cagard"),
        (["--strategies", "autol"], "`optimizer` must be given"),
        (["--strategies", "sum,logloss"], "LogLoss must give finite weights"),  # the toy's are not
        (["--out", "toy.jpeg"], "`out` must end in .png or .svg"),
        (["--out", "nowhere/toy.png"], "`out` must be in a folder that exists"),
    ],
)
def test_wrong_use_is_told(arguments, message, capsys):
    assert run(*arguments, "--steps", 3) == 2
    assert message in capsys.readouterr().err


def test_weightings_that_look_back_at_steps_do() -> None:
    """Without it, the second step warns: see `Balancer.after_step`."""
    upper = max(STARTS, key=sum)
    assert follow("famo", upper, Setting(3, 1e-3)).steps[-1] == 3


def test_help_imports_no_heavy_package():
    assert help_of("examples.toy", {"torch", "numpy", "matplotlib"})


def test_the_figure_of_the_documents_is_small():
    assert 10_000 < (ROOT / "docs" / "toy.png").stat().st_size < 200_000
