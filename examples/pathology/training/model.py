"""The joint Transformer: a bag of tile features in, one prediction per target out.

Tiles are projected and attend to each other in the encoder. Every target owns one learned token;
the tokens attend to each other and to the encoded tiles in the decoder, and each leaves through its
own linear head. No training code lives here.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from examples.pathology.cohort.targets import Target
from examples.pathology.settings.crossval import HEADS
from examples.pathology.training.attention import EncoderLayer


class Prediction(NamedTuple):
    """What the model says about a batch of bags.

    Args:
        outputs: One tensor per target, in order: logits ``(b, classes)``, or ``(b, 1)`` for a
            regression.
        embedding: The primary ([cls]) token after the decoder, ``(b, d)``.
    """

    outputs: tuple[Tensor, ...]
    embedding: Tensor


class JointTransformer(nn.Module):
    """Encoder over tiles, decoder over one learned token per target, one linear head per target.

    With the defaults, one two-class and one regression target it has 6,216,963 parameters. Heads
    and tokens are kept by position, not by label, so that a label may hold any character. What all
    targets share is drawn first: the same seed gives the single-task baseline and the joint model
    the same initial trunk.

    Args:
        outputs: Width of each target's head: the number of classes, or 1 for a regression. The
            first target is the primary one; a single entry makes the baseline.
        in_features: Length of a tile's feature vector (768: CTransPath).
        d_model: Width of the Transformer (384: the paper's code, as all numbers below).
        layers: Encoder layers, and decoder layers (2).
        heads: Attention heads (6).
        feedforward: Width of the feed-forward parts (768).
        dropout: Dropout probability (0.1, the default of PyTorch's layers).
    """

    mean: Tensor
    scale: Tensor

    def __init__(
        self,
        outputs: Sequence[int],
        *,
        in_features: int = 768,
        d_model: int = 384,
        layers: int = 2,
        heads: int = 6,
        feedforward: int = 768,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.d_model, self.layers = d_model, layers
        self.register_buffer("mean", torch.zeros(in_features))
        self.register_buffer("scale", torch.ones(in_features))
        if not outputs or min(outputs) < 1:
            raise ValueError(f"`outputs` must be widths of at least 1, but got {list(outputs)}.")
        self.projector = nn.Sequential(nn.Linear(in_features, d_model), nn.ReLU())
        encoder_layer = EncoderLayer(d_model, heads, feedforward, dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(encoder_layer, layers, enable_nested_tensor=False)
        decoder_layer = nn.TransformerDecoderLayer(
            d_model, heads, feedforward, dropout, batch_first=True
        )
        self.decoder = nn.TransformerDecoder(decoder_layer, layers)
        self.tokens = nn.ParameterList(nn.Parameter(torch.rand(d_model)) for _ in outputs)
        self.heads = nn.ModuleList(nn.Linear(d_model, width) for width in outputs)

    def forward(self, tiles: Tensor) -> Prediction:
        """Predict every target of every bag.

        Args:
            tiles: Features ``(n, in_features)`` of one bag, or ``(b, n, in_features)`` of bags of
                equal size.

        Returns:
            Predictions with a batch dimension ``b`` (1 for a single bag) and the [cls] embedding.
        """
        bags = tiles.unsqueeze(0) if tiles.ndim == 2 else tiles
        if bags.ndim != 3 or bags.shape[1] == 0:
            raise ValueError(
                "`tiles` must be (n, features) or (b, n, features) with n > 0, but got "
                f"{tuple(tiles.shape)}."
            )
        with _attention_without_matrix():
            memory = self.encoder(self.projector((bags - self.mean) / self.scale))
            tokens = torch.stack(list(self.tokens)).expand(len(bags), -1, -1)
            decoded = self.decoder(tokens, memory)
        outputs = tuple(head(decoded[:, i]) for i, head in enumerate(self.heads))
        return Prediction(outputs, decoded[:, 0])

    def attention(self, tiles: Tensor, token: int = 0) -> Tensor:
        """Return how much a token attends to each tile in the last decoder layer.

        Args:
            tiles: Features ``(n, in_features)`` of one bag; the model must be in eval mode.
            token: Of which target; 0 is the primary one.

        Returns:
            Mean over heads ``(n,)``, which sums to 1.
        """
        if self.training:
            raise ValueError("The model must be in eval mode, but is in training mode: `.eval()`.")
        with _attention_without_matrix():
            memory = self.encoder(self.projector((tiles.unsqueeze(0) - self.mean) / self.scale))
            decoded = torch.stack(list(self.tokens)).unsqueeze(0)
            *first, last = self.decoder.layers
            for layer in first:
                decoded = layer(decoded, memory)
            among = last.self_attn(decoded, decoded, decoded, need_weights=False)[0]
            decoded = last.norm1(decoded + among)
            weights: Tensor = last.multihead_attn(decoded, memory, memory)[1]
        return weights[0, token]

    def standardize(self, mean: Tensor, scale: Tensor) -> None:
        """Bring features to mean 0 and standard deviation 1 from now on; saved with the model.

        Args:
            mean: Mean of every feature over the training part, ``(in_features,)``.
            scale: Its standard deviation; what does not vary (0) is only centred.
        """
        self.mean.copy_(mean)
        self.scale.copy_(torch.where(scale > 0, scale, torch.ones_like(scale)))

    def shared_modules(self) -> list[nn.Module]:
        """Return what all targets share: the places where their gradients meet."""
        return [self.projector, self.encoder, self.decoder]


def new_model(
    targets: Sequence[Target], in_features: int, *, width: int, layers: int
) -> JointTransformer:
    """Return the network for these targets, initialised from PyTorch's random numbers."""
    return JointTransformer(
        [target.width for target in targets],
        in_features=in_features,
        d_model=width,
        layers=layers,
        heads=HEADS,
        feedforward=2 * width,  # the paper's ratio
    )


@contextmanager
def _attention_without_matrix() -> Iterator[None]:
    """Keep PyTorch's "fast path" for inference off: it builds the whole n by n attention matrix.

    What remains, `scaled_dot_product_attention`, goes through the tiles in blocks: memory grows
    with n. For 10,000 tiles on a CPU it takes 0.2 GB instead of 2.5, and less than half the time.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
