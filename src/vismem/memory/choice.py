"""The choice of `memory_init="attended"`: which block of the image each short-term memory vector starts from.

Eq. 6 starts every memory from the same M_init. Here vector i starts from the patches of one projector block instead
(m x m patches, what the base sees as one visual token), chosen by the query among all blocks of the row's images:

    A_i = softmax_p( s <W_i LN(sum_k mix_ik q_k) + o_i, W_v LN(v_p)> / sqrt(w) )

The choice is hard, so the gradient of the text never reaches A. It learns from the base's own gaze in the warm-up, and
from rewards in stage I, where a sampled choice is an action.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from vismem.backbones import Patches

WIDTH = 64  # w, of the queries and keys


@dataclass
class Choice:
    """The blocks that the vectors of one short-term memory started from.

    Blocks are numbered through the row's images in order, each image row by row.

    Args:
        scores: float32 [N, P], unnormalised log-probabilities of each vector over the row's P blocks.
        blocks: int [N], the block that each vector took.
        grids: rows and columns of blocks of each image; an image in tiles counts once per tile.
    """

    scores: Tensor
    blocks: Tensor
    grids: list[tuple[int, int]]

    @property
    def log_probs(self) -> Tensor:
        """Log-probability [N] of each vector's block."""
        return self.scores.log_softmax(-1).gather(-1, self.blocks[:, None].to(self.scores.device)).squeeze(-1)

    @property
    def places(self) -> list[tuple[int, int, int]]:
        """Image, row and column of each vector's block, as `Patches.blocks` has them."""
        found = []
        for block in self.blocks.tolist():
            for image, (rows, columns) in enumerate(self.grids):
                if block < rows * columns:
                    found.append((image, *divmod(block, columns)))
                    break
                block -= rows * columns
        return found

    def detach(self) -> Choice:
        """A copy without gradient, on the CPU."""
        return Choice(self.scores.detach().cpu(), self.blocks.cpu(), self.grids)


class BlockChoice(nn.Module):
    """Scores every block of a row's images for each memory vector.

    Args:
        hidden_size: d of the base.
        vectors: N_s.
        queries: K.
        width: w.
    """

    def __init__(self, hidden_size: int, vectors: int, queries: int, width: int = WIDTH) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(vectors, queries) * queries**-0.5)
        self.norm_query, self.norm_key = nn.LayerNorm(hidden_size), nn.LayerNorm(hidden_size)
        self.query = nn.Parameter(torch.randn(vectors, hidden_size, width) * (3 * hidden_size) ** -0.5)
        self.offset = nn.Parameter(0.1 * torch.randn(vectors, width))
        self.key = nn.Linear(hidden_size, width, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(4.0)))

    def forward(self, query: Tensor, states: list[Tensor]) -> list[Tensor]:
        """Scores of n invocations.

        Args:
            query: Q [n, K, d].
            states: for each invocation the visual states [P, d] of its row's blocks.

        Returns:
            For each invocation float32 [N, P].
        """
        weight = self.key.weight
        asked = torch.einsum("bnd,ndw->bnw", self.norm_query(self.mix @ query.to(weight)), self.query) + self.offset
        scale = self.log_scale.exp() * weight.shape[0] ** -0.5
        keys = [self.key(self.norm_key(shown.to(weight))) for shown in states]
        return [(scale * (each @ key.T)).float() for each, key in zip(asked, keys, strict=True)]


def block_tokens(patches: list[Patches]) -> Tensor:
    """The visual token [P] of every block of a row's images, counted from the row's first."""
    firsts = accumulate((image.tokens for image in patches), initial=0)
    return torch.cat([first + image.blocks.flatten() for first, image in zip(firsts, patches, strict=False)])


def sampled_blocks(scores: Tensor, generator: torch.Generator | None) -> Tensor:
    """Samples a block for each vector from `scores` [N, P], by Gumbel-max: [N].

    Scores that are not finite give an arbitrary block, never an error.
    """
    device = scores.device if generator is None else generator.device
    uniform = torch.rand(scores.shape, generator=generator, device=device).clamp(1e-12, 1 - 1e-7)
    return (scores.detach() - uniform.log().neg().log().to(scores)).argmax(-1)
