"""Wrong use is told at once, in one sentence that names the thing, the rule and the value."""

import re

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from mtbalance import Balancer, make_balancer
from mtbalance.gradient import CAGrad, GradDrop, PCGrad, Sum
from mtbalance.weighting import DWA, AutoLambda, Equal, Uncertainty
from tests._device import DEVICE
from tests._networks import TASKS, Network, batch

SGD = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (lambda: CAGrad(c=-0.1), ValueError, "`c` must be at least 0, but got -0.1."),
        (lambda: CAGrad(c=float("nan")), ValueError, "`c` must be at least 0, but got nan."),
        (lambda: CAGrad(rescale=3), ValueError, "`rescale` must be one of 0, 1, 2, but got 3."),
        (lambda: GradDrop(leak=1.5), ValueError, "`leak` must be between 0 and 1, but got 1.5."),
        (
            lambda: PCGrad(order="fix"),
            ValueError,
            "`order` must be one of 'random', 'fixed', but got 'fix'. Did you mean 'fixed'?",
        ),
        (
            lambda: PCGrad(order="fixed", expectation=True),
            ValueError,
            "`expectation` must be False with order='fixed', but got True.",
        ),
        (
            lambda: DWA(temperature=0),
            ValueError,
            "`temperature` must be positive, but got 0.",
        ),
        (
            lambda: Uncertainty(kind="gaussian"),
            ValueError,
            "`kind` must be one of 'regression', 'classification', but got 'gaussian'.",
        ),
        (
            lambda: Uncertainty(init=-11.0),
            ValueError,
            "`init` must be at least `min_log_var` (-10.0), but got -11.0.",
        ),
        (lambda: AutoLambda(SGD, lr=-1.0), ValueError, "`lr` must be at least 0, but got -1.0."),
        (
            lambda: AutoLambda(SGD, init=0.1, minimum=0.2),
            ValueError,
            "`init` must be at least `minimum` (0.2), but got 0.1.",
        ),
        (
            lambda: AutoLambda("adam"),
            TypeError,
            (
                "`optimizer` must be the torch.optim.Optimizer of the model, a sequence of "
                "several, or None to assign it later, but got str."
            ),
        ),
        (
            lambda: AutoLambda(SGD, primary="msi"),
            TypeError,
            "`primary` must be a sequence of names, but got 'msi'.",
        ),
        (
            lambda: AutoLambda(SGD, primary=["mis"]).bind(["msi", "tme"]),
            ValueError,
            "`primary` must name tasks among 'msi', 'tme', but got 'mis'. Did you mean 'msi'?",
        ),
        (
            lambda: GradDrop(generator=0),
            ValueError,
            "`generator` must be a torch.Generator on the CPU",
        ),
        (
            lambda: PCGrad(expectation=True)(torch.randn(7, 3)),
            ValueError,
            "`expectation` must be False with more than 6 tasks, but got True with 7.",
        ),
        (
            lambda: GradDrop(leak=[0.1, 0.2])(torch.randn(3, 2)),
            ValueError,
            "`leak` must be one number or one per task (3), but got 2.",
        ),
    ],
)
def test_hyper_parameters(make, kind, words) -> None:
    with pytest.raises(kind, match=re.escape(words)):
        make()


@pytest.mark.parametrize("strategy", [Sum(), GradDrop(), PCGrad(), CAGrad()])
@pytest.mark.parametrize(
    ("gradients", "kind", "words"),
    [
        (torch.ones(3), ValueError, "`gradients` must have shape (m, p) with one row per task"),
        (torch.ones(0, 3), ValueError, "and m at least 1, but got shape (0, 3)."),
        (torch.ones(2, 3).long(), TypeError, "real and floating-point, but got torch.int64."),
        (torch.ones(2, 3) * 1j, TypeError, "real and floating-point, but got torch.complex64."),
        ([1.0], TypeError, "`gradients` must be a tensor of shape (m, p)"),
    ],
)
def test_gradients(strategy, gradients, kind, words) -> None:
    with pytest.raises(kind, match=re.escape(words)):
        strategy(gradients)


@pytest.mark.parametrize("strategy", [PCGrad(), CAGrad()])
def test_gramians(strategy) -> None:
    with pytest.raises(ValueError, match=re.escape("`gramian` must have shape (m, m)")):
        strategy.solve(torch.ones(2, 3))


@pytest.mark.parametrize("make", [Equal, Uncertainty, DWA, lambda: AutoLambda(SGD)])
@pytest.mark.parametrize(
    ("losses", "kind", "words"),
    [
        (torch.ones(2, 2), ValueError, "`losses` must have shape (m,) with one loss per task"),
        (torch.ones(0), ValueError, "and m at least 1, but got shape (0,)."),
        (torch.ones(2).long(), TypeError, "real and floating-point, but got torch.int64."),
        ([1.0, 2.0], TypeError, "`losses` must be a tensor of shape (m,)"),
        (torch.ones(4), ValueError, "must hold one loss for each of the 3 tasks"),
    ],
)
def test_losses_of_a_weighting_alone(make, losses, kind, words) -> None:
    weighting = make()
    weighting(torch.ones(3))
    with pytest.raises(kind, match=re.escape(words)):
        weighting(losses)


def test_a_weighting_belongs_to_one_set_of_tasks() -> None:
    weighting = Uncertainty()
    Balancer(weighting, Sum(), tasks=("a", "b"))
    with pytest.raises(RuntimeError, match="must belong to one set of tasks, but it is bound to"):
        Balancer(weighting, Sum(), tasks=("a", "c"))
    with pytest.raises(RuntimeError, match="must be bound to its tasks first"):
        _ = DWA().num_tasks


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (["regression"], "`kind` must have one entry per task (2), but got 1."),
        ({"a": "regression"}, "`kind` must name each of the tasks ('a', 'b'), but got ('a',)."),
    ],
)
def test_kinds_per_task(kind, words) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        Uncertainty(kind=kind).bind(["a", "b"])


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"tasks": "msi"}, TypeError, "`tasks` must be a sequence of names, but got the string"),
        ({"tasks": []}, ValueError, "`tasks` must name at least one task, but got none."),
        ({"tasks": ["a", "b", "a"]}, ValueError, "`tasks` must be distinct, but got 'a' more"),
        ({"tasks": ["a\nb"]}, ValueError, "`tasks` must hold names of one line each, but got 'a"),
        (
            {"tasks": ["a", "b/c", "a/b", "c"]},
            ValueError,
            "as in the figure 'cosine/a/b/c', but got both ('a', 'b/c') and ('a/b', 'c').",
        ),
        ({"tasks": {"a", "b"}}, TypeError, "`tasks` must have an order, which is that of the rows"),
        ({"tasks": ["a", 1]}, TypeError, "`tasks` must hold non-empty strings, but got 1."),
        ({"nonfinite": "dorp"}, ValueError, "but got 'dorp'. Did you mean 'drop'?"),
        (
            {"weighting": Sum()},
            TypeError,
            "`weighting` must be a Weighting, but got Sum. The weighting comes first: Balancer(",
        ),
        (
            {"gradient": Equal()},
            TypeError,
            "must be a GradientStrategy, but got Equal. The weighting comes first: Balancer(",
        ),
        ({"gradient": 3}, TypeError, "`gradient` must be a GradientStrategy, but got int."),
        ({"gradient": Sum}, TypeError, "but got the class Sum. Make one: Sum(...)."),
        ({"weighting": Sum}, TypeError, "`weighting` must be a Weighting, but got the class Sum."),
        ({"shared": []}, ValueError, "`shared` must hold parameters, but got none in group"),
        ({"shared": {"x": []}}, ValueError, "but got none in group 'x'."),
        ({"shared": "trunk"}, TypeError, "`shared` must hold modules and parameters, but got str."),
        ({"shared": [3]}, TypeError, "`shared` must hold modules and parameters, but got int."),
        (
            {"shared": [nn.Parameter(torch.ones(1)) * 2]},
            ValueError,
            "`shared` must hold parameters, but got a tensor that was computed from others",
        ),
        ({"process_group": 3}, TypeError, "`process_group` must be None or a torch.distributed."),
        ({"every": 0}, ValueError, "`every` must be at least 1, but got 0."),
        ({"every": 1.5}, TypeError, "`every` must be a whole number, but got 1.5."),
        ({"every": 2}, ValueError, "`every` must be 1 unless a GramianStrategy meets"),
        ({"chunk": 0}, ValueError, "`chunk` must be at least 1, but got 0."),
        ({"dtype": torch.int8}, TypeError, "`dtype` must be None or a real floating-point dtype"),
    ],
)
def test_balancer_arguments(options, kind, words) -> None:
    arguments = {"weighting": Equal(), "gradient": Sum(), "tasks": ("a", "b"), **options}
    with pytest.raises(kind, match=re.escape(words)):
        Balancer(arguments.pop("weighting"), arguments.pop("gradient"), **arguments)


def test_one_parameter_in_two_groups() -> None:
    layer = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"'weight' is in 'x' and 'y'. Tied weights belong to one"):
        Balancer(Equal(), Sum(), tasks=("a",), shared={"x": layer, "y": layer})


@pytest.mark.parametrize("strategy", [Sum, CAGrad])
@pytest.mark.parametrize(
    ("losses", "kind", "words"),
    [
        (lambda losses: [losses["a"]], TypeError, "`losses` must map task names to scalar tensors"),
        (
            lambda losses: {**losses, "bb": losses["b"]},
            ValueError,
            "`losses` must name tasks among 'a', 'b', 'c', but got 'bb'. Did you mean 'b'?",
        ),
        (
            lambda losses: {**losses, "b": losses["b"].expand(2)},
            ValueError,
            "the loss of task 'b' must be a scalar, but got shape (2,). Reduce it first",
        ),
        (
            lambda losses: {**losses, "b": losses["b"].detach()},
            ValueError,
            "the loss of task 'b' must have a graph, but it does not require a gradient.",
        ),
        (
            lambda losses: {**losses, "b": torch.tensor(0.0)},
            ValueError,
            "If it stands for missing labels, leave the task out.",
        ),
        (
            lambda losses: {**losses, "b": None},
            TypeError,
            "the loss of task 'b' must be a tensor, but got None. Leave a task without labels out",
        ),
        (
            lambda losses: {**losses, "b": losses["b"] * 1j},
            TypeError,
            "the loss of task 'b' must be real and floating-point, but got torch.complex128.",
        ),
        (
            lambda losses: {**losses, "b": nn.Parameter(torch.ones(()))},
            ValueError,
            "the loss of task 'b' must reach a shared parameter, but reaches none.",
        ),
    ],
)
def test_losses_of_a_step(strategy, losses, kind, words) -> None:
    """Nothing is written, and the next step is not disturbed."""
    model = Network()
    balancer = Balancer(Equal(), strategy(), tasks=TASKS, shared=model.trunk)
    with pytest.raises(kind, match=re.escape(words)):
        balancer.backward(losses(model.losses(batch())))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert balancer.backward(model.losses(batch())).tasks == TASKS


def test_inferred_tasks_that_share_nothing() -> None:
    x, y, z = (nn.Parameter(torch.ones(1)) for _ in range(3))
    balancer = Balancer(Equal(), CAGrad(), tasks=TASKS)
    losses = {"a": x.sum(), "b": (x * y).sum(), "c": z.sum()}
    with pytest.raises(ValueError, match="loss of task 'c' must reach a shared parameter, but sha"):
        balancer.backward(losses)


def trunk_and_heads() -> tuple[nn.Module, dict[str, nn.Module]]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh()), {t: nn.Linear(6, 1) for t in ("a", "b")}


def squares(heads: dict[str, nn.Module], hidden: Tensor) -> dict[str, Tensor]:
    return {task: head(hidden).square().mean() for task, head in heads.items()}


@pytest.mark.parametrize("strategy", [Sum, CAGrad])
def test_reentrant_checkpointing_hides_the_shared_part(strategy) -> None:
    trunk, heads = trunk_and_heads()
    balancer = Balancer(Equal(), strategy(), tasks=("a", "b"), shared=trunk)
    x = torch.ones(8, 4, requires_grad=True)
    words = (
        "the loss of task 'a' must reach a shared parameter, but its graph ends in re-entrant "
        "activation checkpointing (CheckpointFunctionBackward), which hides the parameters behind "
        "it. Call torch.utils.checkpoint with use_reentrant=False."
    )
    for take in (balancer.backward, balancer.accumulate):
        hidden = checkpoint(trunk, x, use_reentrant=True)
        with pytest.raises(ValueError, match=f"^{re.escape(words)}$"):
            take(squares(heads, hidden))
    balancer.backward(squares(heads, checkpoint(trunk, x, use_reentrant=False)))
    assert trunk[0].weight.grad is not None


@pytest.mark.parametrize("shared", ["given", "inferred"])
def test_tensors_that_are_no_parameters(shared: str) -> None:
    trunk, heads = trunk_and_heads()
    tensors = {k: v.detach().clone().requires_grad_() for k, v in trunk.named_parameters()}
    given = trunk if shared == "given" else None
    x = torch.randn(8, 4)

    def losses() -> dict[str, Tensor]:
        return squares(heads, functional_call(trunk, tensors, (x,)))

    words = "must reach a shared parameter, but reaches 2 tensors that are no parameters (one of "
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        Balancer(Equal(), CAGrad(), tasks=("a", "b"), shared=given).backward(losses())
    assert "functional_call. Give those that are shared as `shared`" in str(caught.value)
    assert "modules given" not in str(caught.value)
    assert "Name the shared" not in str(caught.value)
    balancer = Balancer(Equal(), CAGrad(), tasks=("a", "b"), shared=list(tensors.values()))
    balancer.backward(losses())  # the remedy
    assert all(tensor.grad is not None for tensor in tensors.values())


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is")  # torch's own, in forward mode
@pytest.mark.parametrize("tangent", [False, True], ids=["loss", "its tangent"])
@pytest.mark.parametrize("strategy", [CAGrad, PCGrad, GradDrop])
def test_inside_of_forward_mode_differentiation(strategy, tangent: bool) -> None:
    trunk, heads = trunk_and_heads()
    balancer = Balancer(Equal(), strategy(), tasks=("a", "b"), shared=trunk)
    x = torch.randn(8, 4)

    def losses() -> dict[str, Tensor]:
        pairs = squares(heads, trunk(forward_ad.make_dual(x, torch.ones_like(x))))
        if not tangent:
            return pairs
        return {task: forward_ad.unpack_dual(pair).tangent for task, pair in pairs.items()}

    words = r"inside of forward_ad.dual_level\(\). Balance the losses after it\.$"
    with forward_ad.dual_level(), pytest.raises(ValueError, match=words):
        balancer.backward(losses())
    assert trunk[0].weight.grad is None
    with forward_ad.dual_level():
        kept = losses()
    balancer.backward(kept)  # the remedy
    assert trunk[0].weight.grad is not None


def test_lazy_modules_are_explained() -> None:
    trunk = nn.Sequential(nn.LazyLinear(6), nn.Tanh())
    heads = {task: nn.Linear(6, 1) for task in ("a", "b")}
    unknown = "lazy, of unknown size until a forward pass"
    inferring = Balancer(Equal(), CAGrad(), tasks=("a", "b"))
    assert [row.use for row in inferring.explain(model=trunk).rows] == [unknown]
    balancer = Balancer(Equal(), CAGrad(), tasks=("a", "b"), shared=trunk)
    (row,) = balancer.explain().rows
    assert (row.use, row.tensors, row.parameters) == (f"shared, {unknown}", 2, 0)
    losses = squares(heads, trunk(torch.ones(8, 4)))
    assert balancer.explain(losses).balanced == 4 * 6 + 6


@pytest.mark.parametrize("strategy", [Sum, CAGrad])
def test_a_scaler_without_grad_mode(strategy) -> None:
    """Backward passes may be made under no_grad: its product must not lose the graph."""
    trunk, heads = trunk_and_heads()
    balancer = Balancer(Equal(), strategy(), tasks=("a", "b"), shared=trunk)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=4.0)
    found = []
    for given in (None, scaler):
        trunk.zero_grad()
        losses = squares(heads, trunk(torch.ones(8, 4)))
        with torch.no_grad():
            balancer.backward(losses, scaler=given)
        found.append(trunk[0].weight.grad)
    torch.testing.assert_close(found[1], 4 * found[0])
    losses = squares(heads, trunk(torch.ones(8, 4)))
    with torch.inference_mode(), pytest.raises(ValueError, match="outside of torch"):
        balancer.backward(losses)


def test_missing_validation() -> None:
    model = Network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    balancer = Balancer(AutoLambda(optimizer), CAGrad(), tasks=TASKS, shared=model.trunk)
    losses = model.losses(batch())
    words = r"`validation` must be a function without arguments .* but got None. AutoLambda looks"
    with pytest.raises(ValueError, match=words):
        balancer.backward(losses)
    balancer.accumulate(losses)
    with pytest.raises(ValueError, match=words):
        balancer.apply()
    balancer.apply(validation=lambda: model.losses(batch()))  # nothing was lost
    with pytest.raises(ValueError, match=r"but got dict\. AutoLambda looks ahead"):
        balancer.backward(model.losses(batch()), validation=model.losses(batch()))


@pytest.mark.parametrize(
    ("result", "kind", "words"),
    [
        (lambda losses: losses["a"], TypeError, "`validation` must return a mapping from task"),
        (lambda losses: {"z": losses["a"]}, ValueError, "`validation` must name tasks among"),
        (
            lambda losses: {"b": losses["b"]},
            ValueError,
            "`validation` must return the loss of at least one primary task ('a'), but got ('b',)",
        ),
    ],
)
def test_wrong_validation(result, kind, words) -> None:
    """The parameters come back although the error arises at the virtual step."""
    model = Network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    weighting = AutoLambda(optimizer, primary=["a"])
    balancer = Balancer(weighting, CAGrad(), tasks=TASKS, shared=model.trunk)
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(kind, match=re.escape(words)):
        balancer.backward(
            model.losses(batch()), validation=lambda: result(model.losses(batch(seed=1)))
        )
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_apply_without_accumulate() -> None:
    with pytest.raises(RuntimeError, match=re.escape("apply() must follow accumulate()")):
        Balancer(Equal(), CAGrad(), tasks=("a",)).apply()


@pytest.mark.parametrize(
    ("name", "options", "kind", "words"),
    [
        ("cagard", {"tasks": ["a"]}, ValueError, "but got 'cagard'. Did you mean 'cagrad'?"),
        ("dwa+autol", {"tasks": ["a"]}, ValueError, "at most one weighting and one gradient"),
        ("dwa", {"tasks": ["a"], "temprature": 1}, TypeError, "Did you mean 'temperature'?"),
        ("dwa", {}, TypeError, "`tasks` must name the tasks, but it is missing."),
        ("autol+cagrad", {"tasks": ["a"]}, TypeError, "`optimizer` must be given for 'autol"),
        ("constant", {"tasks": ["a"]}, TypeError, "`weights` must be given for 'constant', but it"),
        ("gradientcosine", {"tasks": ["a"]}, TypeError, "it is the task that GradientCosine fav"),
        ("pcd", {"tasks": ["a"]}, TypeError, "`primary` must be given for 'pcd', but it is missin"),
        ("krum", {"tasks": ["a"]}, TypeError, "it is how many gradients Krum takes for outliers."),
        ("trimmedmean", {"tasks": ["a"]}, TypeError, "it is how many entries TrimmedMean leaves"),
    ],
)
def test_make_balancer(name, options, kind, words) -> None:
    with pytest.raises(kind, match=re.escape(words)):
        make_balancer(name, **options)


@pytest.mark.parametrize(
    ("name", "weighting", "gradient"),
    [
        ("naive", Equal, Sum),
        ("equal+none", Equal, Sum),
        ("Uncert", Uncertainty, Sum),
        ("graddrop", Equal, GradDrop),
        ("pcgrad + dwa", DWA, PCGrad),
        ("autol+cagrad", AutoLambda, CAGrad),
    ],
)
def test_names_of_the_papers(name, weighting, gradient) -> None:
    balancer = make_balancer(name, tasks=["a"], optimizer=SGD, c=0.7, seed=5)
    assert type(balancer.weighting) is weighting
    assert type(balancer.gradient) is gradient
    if gradient is CAGrad:
        assert balancer.gradient.c == 0.7
