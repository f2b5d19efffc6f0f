"""Self-attention with dropout among many tiles on a CPU, in memory that grows with their number.

There, PyTorch's own builds a matrix of tiles by tiles for each head and keeps it for the backward
pass. Here some queries at a time attend to all tiles, and every backward pass attends again.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

MATRIX_GB = 1.0
"""Size of a layer's matrix, all heads in single precision, above which blocks are taken.

Up to 6,454 tiles (6 heads) results are those of PyTorch's attention, bit for bit.
"""
QUERIES = 64  # in a block; its weights stay in the processor's cache


class EncoderLayer(nn.TransformerEncoderLayer):
    """PyTorch's, with the same parameters; large bags attend to themselves in blocks."""

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Encode tiles ``(b, n, d)``. With a mask there are no blocks."""
        heads, dropout = self.self_attn.num_heads, self.self_attn.dropout
        matrix = self.training and dropout > 0 and src.device.type == "cpu"
        masked = is_causal or src_mask is not None or src_key_padding_mask is not None
        if masked or not (matrix and in_blocks(src.shape[1], len(src) * heads)):
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        parts = linear(src, self.self_attn.in_proj_weight, self.self_attn.in_proj_bias)
        parts = parts.to(torch.promote_types(parts.dtype, torch.float32))  # PyTorch's own does so
        parts = parts.view(*parts.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4).flatten(1, 2)
        with torch.autocast("cpu", enabled=False):
            attended: Tensor = BlockwiseAttention.apply(*parts.contiguous(), dropout)
        attended = attended.view(len(src), heads, *attended.shape[1:]).transpose(1, 2).flatten(2)
        tiles = self.norm1(src + self.dropout1(self.self_attn.out_proj(attended)))
        inner = self.dropout(self.activation(self.linear1(tiles)))
        encoded: Tensor = self.norm2(tiles + self.dropout2(self.linear2(inner)))
        return encoded


def in_blocks(tiles: int, heads: int) -> bool:
    """Return whether so many tiles attend to each other in blocks."""
    return 4 * heads * tiles**2 > MATRIX_GB * 1e9


class BlockwiseAttention(torch.autograd.Function):
    """Attention of queries to keys and values, all ``(heads, n, d)``, with dropout of its weights.

    One number is drawn from PyTorch's generator, and the masks follow from it: every backward pass
    sees those of the forward pass. Dropout's probability is rounded to a multiple of 2^-16.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
        """Return the attended values ``(heads, n, d)``."""
        ctx.dropped, ctx.seed = round(dropout * 2**16), int(torch.randint(2**32, ()))
        attended = torch.empty_like(value)
        for at, weights, kept in _blocks(query, key, ctx):
            torch.mm(weights.mul_(kept), value[at[0]], out=attended[at])
        attended /= 1 - ctx.dropped / 2**16
        ctx.save_for_backward(query, key, value, attended)
        return attended

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Return the gradients of queries, keys and values."""
        query, key, value, attended = ctx.saved_tensors
        (gradient,) = gradients
        of_query, of_key, of_value = (torch.zeros_like(key) for _ in range(3))
        means = (gradient * attended).sum(-1, keepdim=True)  # of the gradients of a query's weights
        gradient = gradient.contiguous() / (1 - ctx.dropped / 2**16)
        for at, weights, kept in _blocks(query, key, ctx):
            head = at[0]
            of_logits = (gradient[at] @ value[head].T).mul_(kept).sub_(means[at]).mul_(weights)
            of_value[head].addmm_(weights.mul_(kept).T, gradient[at])
            of_key[head].addmm_(of_logits.T, query[at])
            torch.mm(of_logits, key[head], out=of_query[at])
        scale = query.shape[-1] ** -0.5
        return of_query.mul_(scale), of_key.mul_(scale), of_value, None


def _blocks(
    query: Tensor, key: Tensor, ctx: Any
) -> Iterator[tuple[tuple[int, slice], Tensor, Tensor]]:
    """Yield head and queries of a block, their weights ``(queries, n)``, and 1 for those kept."""
    draws = torch.Generator().manual_seed(ctx.seed)
    for head in range(len(query)):
        for start in range(0, query.shape[1], QUERIES):
            at = head, slice(start, start + QUERIES)
            weights = (query[at] * query.shape[-1] ** -0.5 @ key[head].T).softmax(-1)
            # 16 bits for each weight: a quarter of the time that `bernoulli_` takes
            bits = torch.empty(-(-weights.numel() // 4), dtype=torch.int64)
            bits.random_(-(2**63), None, generator=draws)
            numbers = bits.view(torch.int16)[: weights.numel()].view_as(weights)
            yield at, weights, (numbers >= ctx.dropped - 2**15).to(weights)
