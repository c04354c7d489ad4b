"""What goes into forming a memory, and what comes out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from vismem.backbones import Patches
from vismem.memory.choice import Choice


@dataclass
class Observation:
    """What a memory is formed from: what one row observes when it invokes memory, without gradient.

    Args:
        visual: visual states [y, d] of the row's images.
        states: last-layer states [z, d] that produced the segment's tokens, the invocation token included.
        segment: input embeddings [z, d] of those tokens.
        patches: the row's images as the short former encoded them; empty without images.
        origin: the tag of the row's request and the index of the invocation, for analysis; None outside decoding.
        blocks: with `memory_init="attended"`, the blocks [N_s] that short memory starts from, to replay a choice; None
            lets the memory choose.
        sampler: samples the choice from its scores [N_s, P]; None takes the likeliest blocks.
    """

    visual: Tensor
    states: Tensor
    segment: Tensor
    patches: list[Patches] = field(default_factory=list)
    origin: tuple[Any, int] | None = None
    blocks: Tensor | None = None
    sampler: Callable[[Tensor], Tensor] | None = None


class Formed(NamedTuple):
    """Memories [n, N, d], and for each the `Choice` of its blocks; None unless short memory chooses them."""

    vectors: Tensor
    choices: list[Choice | None]
