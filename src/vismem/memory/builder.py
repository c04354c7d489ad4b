"""The query builder (Eq. 5, 9-11): K memory queries from what the model observes.

A small pre-norm transformer encoder over `[H ; Q_init]`. H are visual states and hidden states of the current text
segment; they carry their own positions, so none are learned and there is no length limit.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

VISUAL, TEXT, QUERY = range(3)  # rows of the type embedding


class Block(nn.Module):
    """A pre-norm transformer encoder layer: attention, then a GELU MLP of four times the width."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, mask: Tensor, last: int | None = None) -> Tensor:
        """x: [n, t, width]; mask: bool [n, 1, t, t], True where a row may attend to a column.

        With `last`, only that many last positions attend and are returned: [n, last, width].
        """
        seen = self.norm1(x)
        if last is None:
            query, key, value = self.qkv(seen).chunk(3, dim=-1)
        else:
            x, mask, width = x[:, -last:], mask[:, :, -last:], x.shape[-1]
            weight, bias = self.qkv.weight, self.qkv.bias
            query = F.linear(seen[:, -last:], weight[:width], bias[:width])
            key, value = F.linear(seen, weight[width:], bias[width:]).chunk(2, dim=-1)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (query, key, value))
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class QueryBuilder(nn.Module):
    """`Q = B([v_1..v_y ; h_1..h_z ; Q_init])[-K:]`, one builder for both kinds of memory.

    Args:
        hidden_size: d of the base.
        query_length: K.
        layers, heads, width: of the encoder; `width` is inner, with a linear layer in and out.
        output_scale: initial RMS of the queries: that of the base's embedding table, so that the language model reads
            them as words.
        from_segment: the queries start from the mean of the segment's states. Otherwise a query starts as an average
            over thousands of visual states, in which the few of text drown.
    """

    def __init__(
        self,
        hidden_size: int,
        query_length: int,
        layers: int,
        heads: int,
        width: int,
        output_scale: float = 1.0,
        *,
        from_segment: bool = False,
    ) -> None:
        super().__init__()
        self.from_segment = from_segment
        self.norm_in = nn.LayerNorm(hidden_size)  # norms of visual states and hidden states can differ fifty-fold
        self.project_in = nn.Linear(hidden_size, width)
        self.types = nn.Parameter(torch.randn(3, width) * 0.02)
        self.query_init = nn.Parameter(torch.randn(query_length, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm_out = nn.LayerNorm(width)
        self.project_out = nn.Linear(width, hidden_size)
        nn.init.normal_(self.project_out.weight, std=output_scale * width**-0.5)
        nn.init.zeros_(self.project_out.bias)

    def encode(self, visual: list[Tensor], states: list[Tensor], *, queries_only: bool = False) -> Tensor:
        """The encoder's last layer for n invocations: [n, s + K, width], H first (padded to s), then the queries.

        Args:
            visual: for each invocation its row's visual states [y, d]; y may be 0.
            states: for each invocation the hidden states [z, d] that produced the segment's tokens.
            queries_only: return only the queries [n, K, width]; the last layer computes nothing else.
        """
        weight = self.project_in.weight
        rows = [torch.cat([v.to(weight), h.to(weight)]) for v, h in zip(visual, states, strict=True)]
        text = [torch.arange(len(row), device=weight.device) >= len(v) for row, v in zip(rows, visual, strict=True)]
        lengths = torch.tensor([len(row) for row in rows], device=weight.device)
        kinds = pad_sequence([t.long() for t in text], batch_first=True)  # [n, s], VISUAL or TEXT
        held = self.project_in(self.norm_in(pad_sequence(rows, batch_first=True))) + self.types[kinds]
        queries = (self.query_init + self.types[QUERY]).expand(len(rows), -1, -1)
        if self.from_segment:
            segment = torch.stack([h.mean(0).to(weight) for h in states])
            queries = queries + self.project_in(self.norm_in(segment))[:, None]
        x = torch.cat([held, queries], dim=1)
        mask = builder_mask(lengths, held.shape[1], queries.shape[1])
        for block in self.blocks[:-1]:
            x = block(x, mask)
        return self.blocks[-1](x, mask, queries.shape[1] if queries_only else None)

    def forward(self, visual: list[Tensor], states: list[Tensor]) -> Tensor:
        """Memory queries [n, K, d]; arguments as for `encode`."""
        queries = self.encode(visual, states, queries_only=True)
        return self.project_out(self.norm_out(queries))


def builder_mask(lengths: Tensor, held: int, queries: int) -> Tensor:
    """Attention mask over `[H ; Q_init]`: H attends to H, queries attend to H and to each other.

    Eq. 11 as printed puts the queries first; this follows Eq. 5, which puts them last.

    Args:
        lengths: int [n], how many of the `held` positions of each row are real.
        held, queries: padded length of H, and K.

    Returns:
        bool [n, 1, held + K, held + K], True where the row may attend to the column.
    """
    position = torch.arange(held + queries, device=lengths.device)
    real = (position < lengths[:, None]) | (position >= held)  # [n, t]
    is_query = position >= held
    return (real[:, None, :] & (is_query[:, None] | ~is_query[None, :]))[:, None]
