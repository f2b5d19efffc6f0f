import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.pathology.training.model import JointTransformer


@pytest.fixture(scope="module")
def joint() -> JointTransformer:
    torch.manual_seed(0)
    return JointTransformer([2, 1]).eval()


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_it_has_the_papers_number_of_parameters(joint):
    assert count(joint) == 6_216_963


def test_the_baseline_lacks_one_token_and_one_head():
    assert count(JointTransformer([2])) == 6_216_963 - 384 - (384 + 1)


def test_shared_modules_hold_all_but_tokens_and_heads(joint):
    shared = sum(count(module) for module in joint.shared_modules())
    assert count(joint) - shared == 2 * 384 + (384 * 2 + 2) + (384 + 1)


def test_one_seed_gives_baseline_and_joint_the_same_trunk_and_primary_token():
    models = []
    for outputs in ([2], [2, 1]):
        torch.manual_seed(3)
        models.append(JointTransformer(outputs, layers=1, d_model=24, heads=2, feedforward=8))
    ours, theirs = (model.state_dict() for model in models)
    for key in (key for key in ours if not key.startswith("heads")):
        assert torch.equal(ours[key], theirs[key]), key


def test_tokens_start_uniform_between_0_and_1(joint):
    values = torch.cat(list(joint.tokens))
    assert 0 <= values.min() < 0.05
    assert 0.95 < values.max() < 1
    assert abs(values.mean() - 0.5) < 0.05


def test_names_of_parameters_hold_positions_only(joint):
    heads = {key for key in joint.state_dict() if key.startswith(("tokens", "heads"))}
    assert heads == {
        "tokens.0", "tokens.1", "heads.0.weight", "heads.0.bias", "heads.1.weight", "heads.1.bias",
    }  # fmt: skip


def test_outputs_follow_from_the_embedding(joint):
    with torch.inference_mode():
        outputs, embedding = joint(torch.randn(5, 768))
        assert embedding.shape == (1, 384)
        assert [tuple(output.shape) for output in outputs] == [(1, 2), (1, 1)]
        torch.testing.assert_close(outputs[0], joint.heads[0](embedding))


@settings(max_examples=10, deadline=None)
@given(st.permutations(range(7)))
def test_the_order_of_tiles_does_not_matter(joint, order):
    tiles = torch.randn(7, 768, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        a, b = joint(tiles), joint(tiles[list(order)])
    torch.testing.assert_close(a.embedding, b.embedding, atol=1e-5, rtol=1e-5)


def test_bags_of_a_batch_do_not_see_each_other(joint):
    bags = torch.randn(3, 4, 768)
    with torch.inference_mode():
        together = joint(bags)
        for i, bag in enumerate(bags):
            alone = joint(bag)
            torch.testing.assert_close(together.embedding[i], alone.embedding[0])
            torch.testing.assert_close(together.outputs[1][i], alone.outputs[1][0])


def test_tokens_attend_to_each_other():
    torch.manual_seed(0)
    model = JointTransformer([2, 1], layers=1, d_model=24, heads=2, feedforward=8).eval()
    tiles = torch.randn(4, 768)
    before = model(tiles).outputs[0]
    with torch.no_grad():
        model.tokens[1].add_(1.0)
    assert not torch.allclose(before, model(tiles).outputs[0])


def test_standardized_features_are_what_the_rest_sees():
    torch.manual_seed(0)
    model = JointTransformer([2, 1], layers=1, d_model=24, heads=2, feedforward=8).eval()
    tiles, mean, scale = torch.randn(4, 768), torch.randn(768), torch.rand(768) + 0.5
    scale[5] = 0.0
    divisor = scale.clone()
    divisor[5] = 1.0
    expected = model((tiles - mean) / divisor)
    before = count(model)
    model.standardize(mean, scale)
    torch.testing.assert_close(model(tiles), expected)
    assert count(model) == before
    assert torch.equal(model.state_dict()["mean"], mean)  # saved with the model


@pytest.mark.parametrize("shape", [(768,), (0, 768), (1, 0, 768), (1, 1, 2, 768)])
def test_a_wrong_shape_is_told(joint, shape):
    with pytest.raises(ValueError, match=r"`tiles` must be \(n, features\)"):
        joint(torch.zeros(shape))


@pytest.mark.parametrize("outputs", [[], [2, 0]])
def test_wrong_widths_are_told(outputs):
    with pytest.raises(ValueError, match="`outputs` must be widths of at least 1"):
        JointTransformer(outputs)


@pytest.mark.parametrize("token", [0, 1])
def test_attention_is_the_softmax_of_queries_and_keys_of_a_forward_pass(token):
    """What goes into the last cross-attention is caught in `forward`, and worked out by hand."""
    torch.manual_seed(0)
    model = JointTransformer([2, 1], d_model=24, heads=3, feedforward=16).eval()
    caught = []
    last = model.decoder.layers[-1].multihead_attn
    last.register_forward_pre_hook(lambda _, inputs: caught.append(inputs))
    tiles = torch.randn(11, 768)
    with torch.inference_mode():
        model(tiles)
        query, key, _ = caught[0]
        weight, bias = last.in_proj_weight, last.in_proj_bias
        q = (query[0] @ weight[:24].T + bias[:24]).view(2, 3, 8)
        k = (key[0] @ weight[24:48].T + bias[24:48]).view(11, 3, 8)
        expected = torch.einsum("thd,nhd->thn", q, k).div(8**0.5).softmax(-1).mean(1)[token]
        found = model.attention(tiles, token)
    torch.testing.assert_close(found, expected)
    assert float(found.sum()) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="must be in eval mode"):
        model.train().attention(tiles)


def test_inference_builds_no_attention_matrix_and_leaves_the_setting_alone():
    """The matrix of 3,000 tiles and 6 heads alone would be 216 MB."""
    model = JointTransformer([2, 1], layers=1).eval()
    before = torch.backends.mha.get_fastpath_enabled()
    with (
        torch.inference_mode(),
        torch.profiler.profile(profile_memory=True) as profile,
    ):
        model(torch.randn(3000, 768))
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest < 100e6
    assert torch.backends.mha.get_fastpath_enabled() == before


def test_inference_and_training_without_dropout_agree():
    torch.manual_seed(0)
    model = JointTransformer([2, 1], layers=1, dropout=0.0)
    tiles = torch.randn(7, 768)
    for ours, theirs in zip(model.train()(tiles).outputs, model.eval()(tiles).outputs, strict=True):
        torch.testing.assert_close(ours, theirs)
