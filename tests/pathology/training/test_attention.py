"""Attention in blocks of queries: the mathematics of PyTorch's, with masks that every pass sees."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from examples.pathology.training import attention, checkpoint
from examples.pathology.training.attention import BlockwiseAttention, EncoderLayer, in_blocks
from examples.pathology.training.fold import fit_fold
from examples.pathology.training.model import JointTransformer
from mtbalance import make_balancer
from tests.pathology.tiny import make_tables, training

CLOSE = {"rtol": 0, "atol": 1e-12}
in_blocks_of_queries = BlockwiseAttention.apply


@pytest.fixture
def always(monkeypatch):
    """Let bags of any size go in blocks."""
    monkeypatch.setattr(attention, "MATRIX_GB", 0.0)


def parts(heads: int = 3, tiles: int = 150, width: int = 8) -> list[torch.Tensor]:
    """Return queries, keys and values, whose gradients can be asked for."""
    torch.manual_seed(0)
    shape = heads, tiles, width
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(3)]


def with_the_matrix(query, key, value, dropout):
    """The same in plain autograd: who attends to whom is read off values that name the tiles."""
    with torch.no_grad():
        names = torch.eye(key.shape[1], dtype=value.dtype).expand(len(key), -1, -1)
        kept = in_blocks_of_queries(query, key, names, dropout) > 0
    weights = torch.softmax(query @ key.mT / query.shape[-1] ** 0.5, -1)
    return weights * kept / (1 - round(dropout * 65536) / 65536) @ value


def layer(dropout: float = 0.1, kind: type[nn.TransformerEncoderLayer] = EncoderLayer):
    torch.manual_seed(1)
    return kind(12, 3, 24, dropout, batch_first=True).double()


def assert_equal_with_gradients(ours, theirs, inputs):
    """Check values, and gradients for the inputs along any direction."""
    torch.testing.assert_close(ours, theirs, **CLOSE)
    way = torch.randn_like(ours)
    found, expected = (torch.autograd.grad(each, inputs, way) for each in (ours, theirs))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


# --- the mathematics ------------------------------------------------------------------------------


@pytest.mark.parametrize("tiles", [1, 63, 64, 65, 150])
def test_without_dropout_it_is_pytorchs_attention(tiles):
    inputs = parts(tiles=tiles)
    ours = BlockwiseAttention.apply(*inputs, 0.0)
    theirs = scaled_dot_product_attention(*inputs)
    assert_equal_with_gradients(ours, theirs, inputs)


@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_with_dropout_values_and_gradients_are_those_of_the_matrix_with_its_mask(dropout):
    inputs = parts()
    state = torch.get_rng_state()
    ours = BlockwiseAttention.apply(*inputs, dropout)
    torch.set_rng_state(state)
    theirs = with_the_matrix(*inputs, dropout)
    assert_equal_with_gradients(ours, theirs, inputs)


def test_the_mask_is_fair_and_its_parts_know_nothing_of_each_other():
    """Within five standard deviations: 4 heads of 200 queries and 200 keys, two forward passes."""
    query, key, _ = (part.detach() for part in parts(4, 200))
    names = torch.eye(200, dtype=torch.float64).expand(4, -1, -1)
    torch.manual_seed(2)
    first, second = (BlockwiseAttention.apply(query, key, names, 0.1) > 0 for _ in range(2))
    lost = 1 - first.double()
    assert abs(lost.mean() - 0.1) < 5 * (0.09 / lost.numel()) ** 0.5
    centred = (lost - 0.1) / 0.3
    pairs = [
        (centred[0], centred[1]),  # heads
        (centred[:, :64], centred[:, 64:128]),  # blocks
        (centred[:, 1:], centred[:, :-1]),  # queries
        (centred[:, :, 1:], centred[:, :, :-1]),  # keys
        (centred, (1 - second.double() - 0.1) / 0.3),  # forward passes
    ]
    for a, b in pairs:
        assert abs((a * b).mean()) < 5 / a.numel() ** 0.5
    for way in (1, 2):  # none of the queries, and of the keys, is favoured
        assert abs(lost.mean(way) - 0.1).max() < 6 * (0.09 / 200) ** 0.5


# --- the masks of several passes ------------------------------------------------------------------


def test_every_backward_pass_sees_the_mask_of_the_forward_pass():
    inputs = parts()
    attended = BlockwiseAttention.apply(*inputs, 0.5)
    before = torch.get_rng_state()
    ways = torch.randn(2, *attended.shape, dtype=torch.float64)
    passes = []
    for way in (*ways, ways[0], ways.sum(0)):
        torch.rand(7)  # as what comes between does
        passes.append(torch.autograd.grad(attended, inputs, way, retain_graph=True))
    torch.set_rng_state(before)
    for one, other, again, both in zip(*passes, strict=True):
        assert torch.equal(one, again)
        torch.testing.assert_close(one + other, both, **CLOSE)


def test_the_mask_follows_from_the_generators_state_which_no_backward_pass_moves():
    inputs = parts()
    state = torch.get_rng_state()
    first = BlockwiseAttention.apply(*inputs, 0.1)
    after = torch.get_rng_state()
    first.sum().backward()
    assert torch.equal(torch.get_rng_state(), after)
    second = BlockwiseAttention.apply(*inputs, 0.1)
    torch.set_rng_state(state)
    assert torch.equal(BlockwiseAttention.apply(*inputs, 0.1), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("method", ["naive", "pcgrad", "autol+cagrad", "features", "famo"])
def test_balancers_find_the_gradients_of_the_matrix(always, monkeypatch, method):
    """Passes of single tasks, the look-ahead with other parameters, features, a second look."""
    found = []
    tiles, ahead = torch.randn(2, 1, 150, 12, dtype=torch.float64).unbind()
    for attend in (in_blocks_of_queries, with_the_matrix):
        trunk, heads = layer(), nn.ModuleList(nn.Linear(12, 1).double() for _ in "ab")
        optimizer = torch.optim.AdamW([*trunk.parameters(), *heads.parameters()], lr=0.01)

        def losses(bag, trunk=trunk, heads=heads):
            encoded = trunk(bag)
            made = (head(encoded).square().mean() for head in heads)
            return encoded, dict(zip("ab", made, strict=True))

        balancer = make_balancer(
            "cagrad" if method == "features" else method,
            tasks=("a", "b"), shared=[trunk], optimizer=optimizer, seed=0,
        )  # fmt: skip
        monkeypatch.setattr(BlockwiseAttention, "apply", attend)
        torch.manual_seed(3)
        for _ in range(2):
            optimizer.zero_grad()
            encoded, of_tasks = losses(tiles)
            balancer.backward(
                of_tasks,
                features=encoded if method == "features" else None,
                validation=(lambda: losses(ahead)[1]) if "autol" in method else None,
            )
            optimizer.step()
            balancer.after_step(lambda: losses(tiles)[1])
        found.append([value.detach() for value in trunk.state_dict().values()])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("balancer", ["pcgrad", "autol+cagrad"])
def test_a_fold_goes_on_bit_for_bit(always, monkeypatch, tmp_path, balancer):
    monkeypatch.setattr(checkpoint, "COST_SHARE", math.inf)
    blocks, original = [], attention._blocks
    monkeypatch.setattr(attention, "_blocks", lambda *args: blocks.append(1) or original(*args))
    cohort = make_tables(tmp_path).load()
    people = cohort.patients

    def fit(epochs, path=None):
        config = training(balancer=balancer, width=12, layers=1, epochs=epochs)
        parts = people[:3], people[3:6]
        return fit_fold(cohort, *parts, config, lookahead=people[6:9], checkpoint=path)

    fit(1, tmp_path / "checkpoint.pt")
    ours, theirs = fit(2, tmp_path / "checkpoint.pt"), fit(2)
    assert blocks
    assert [row["epoch"] for row in ours.history] == [1, 2]
    for key, value in ours.model.state_dict().items():
        assert torch.equal(value, theirs.model.state_dict()[key]), key


# --- which way is taken ---------------------------------------------------------------------------


def test_blocks_are_taken_above_a_gigabyte():
    assert not in_blocks(6454, 6)  # 24 bytes x 6454^2 = 999,698,784
    assert in_blocks(6455, 6)


def test_parameters_are_pytorchs_in_name_and_first_value():
    ours, theirs = layer().state_dict(), layer(kind=nn.TransformerEncoderLayer).state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("training_with_dropout", [True, False])
def test_small_bags_and_those_without_dropout_are_pytorchs_bit_for_bit(
    monkeypatch, training_with_dropout
):
    """Large ones in evaluation, too, where PyTorch's attention takes blocks by itself."""
    monkeypatch.setattr(attention, "MATRIX_GB", 1.0 if training_with_dropout else 0.0)
    results = []
    for kind in (EncoderLayer, nn.TransformerEncoderLayer):
        encode = layer(kind=kind).train(training_with_dropout)
        tiles = torch.randn(2, 70, 12, dtype=torch.float64, requires_grad=True)
        encoded = encode(tiles)
        results.append([encoded, *torch.autograd.grad(encoded.sum(), encode.parameters())])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


class Times(nn.Module):
    """What stands for a dropout without chance."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.factor * x


def test_a_layer_in_blocks_is_pytorchs_layer(always):
    """Each of two bags attends to itself; no weight is dropped, but blocks are taken."""
    results = []
    for kind in (EncoderLayer, nn.TransformerEncoderLayer):
        encode = layer(0.0, kind)
        encode.self_attn.dropout = 1e-15
        for name, factor in (("dropout", 0.9), ("dropout1", 0.8), ("dropout2", 0.7)):
            setattr(encode, name, Times(factor))
        tiles = torch.randn(2, 70, 12, dtype=torch.float64)
        encoded = encode(tiles)
        results.append([encoded, *torch.autograd.grad(encoded.square().sum(), encode.parameters())])
    assert "BlockwiseAttention" in _names(results[0][0].grad_fn)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def _names(node) -> str:
    return "" if node is None else node.name() + "".join(_names(n) for n, _ in node.next_functions)


def test_a_mask_is_heeded(always):
    """No bag has one; PyTorch's own then does the work."""
    encode, tiles = layer(), torch.randn(1, 9, 12, dtype=torch.float64)
    unseen = torch.zeros(9, 9, dtype=torch.bool)
    unseen[:8, 8] = True  # the last tile, to all others
    changed = tiles.clone()
    changed[:, 8] += 1.0
    both = []
    for bag in (tiles, changed):
        torch.manual_seed(5)
        both.append(encode(bag, src_mask=unseen)[:, :8])
    assert torch.equal(*both)


def test_half_precision_keeps_single_precision_inside(always):
    """As PyTorch's attention on a CPU does."""
    encode = layer(0.0).float()
    encode.self_attn.dropout = 1e-15
    tiles = torch.randn(1, 200, 12)
    with torch.autocast("cpu", torch.bfloat16):
        half = encode(tiles)
        theirs = nn.TransformerEncoderLayer.forward(encode, tiles)
    half.sum().backward()
    assert torch.isfinite(encode.self_attn.in_proj_weight.grad).all()
    torch.testing.assert_close(half, theirs, atol=0.03, rtol=0)


def test_training_builds_no_attention_matrix(always):
    """The matrix of 1,500 tiles and 6 heads alone would be 54 MB."""
    model = JointTransformer([2, 1], in_features=8, layers=1, d_model=12, feedforward=24).train()
    with torch.profiler.profile(profile_memory=True) as profile:
        outputs = model(torch.randn(1500, 8)).outputs
        sum(output.sum() for output in outputs).backward()
    assert max(event.cpu_memory_usage for event in profile.events()) < 5e6
