"""Rollouts: trajectories with memory, answers without it, and stage II's counterfactuals, all without gradient.

A row's samples depend on its own seed alone, so the same prompts give the same trajectories in any batch and on any
number of processes.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig

from vismem.config import KINDS
from vismem.decoding.policies import Counterfactual, Opening, Policy
from vismem.decoding.trace import Rollout, VisMemOutput
from vismem.model import VisMem


def seed_of(*parts: Any) -> int:
    """A seed that depends on all of `parts` and on nothing else."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def sampling(model: VisMem, max_new_tokens: int, temperature: float | None) -> GenerationConfig:
    """Settings of `write`: sampling at a temperature and nothing else, or greedy decoding for None."""
    defaults, pad = model.generation_config, model.processor.tokenizer.pad_token_id
    return GenerationConfig(
        do_sample=temperature is not None,
        temperature=temperature or 1.0,
        top_k=0 if temperature else None,  # transformers' default is 50
        max_new_tokens=max_new_tokens,
        eos_token_id=defaults.eos_token_id,
        pad_token_id=pad if defaults.pad_token_id is None else defaults.pad_token_id,
        return_dict_in_generate=True,
        cache_implementation="static",  # finished answers leave the batch
        disable_compile=True,  # prompt lengths change with every update
    )


@contextmanager
def without_defaults(base: Any) -> Iterator[None]:
    """Removes the base's generation defaults (penalties, beams, suppressed tokens) inside the context.

    Replay does not apply them, so it would recompute the log-probabilities of a different distribution.
    """
    defaults, base.generation_config = base.generation_config, GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = defaults


def write(
    model: VisMem,
    inputs: dict[str, torch.Tensor],
    policy: str | Policy,
    settings: GenerationConfig,
    seeds: list[int] | None = None,
    copies: int = 1,
    *,
    sample_blocks: bool = False,
) -> list[Rollout]:
    """`copies` answers to every prompt in one batched decode; each prompt is read once and its cache expanded.

    Args:
        inputs: the processor's output for B prompts.
        policy: of invocation.
        settings: from `sampling`.
        seeds: one for each of the B * copies rows; None for greedy decoding.
        copies: G.
        sample_blocks: sample the blocks that short memories start from, with `memory_init="attended"`.

    Returns:
        B * copies rollouts without padding, those of one prompt adjacent.
    """
    settings = copy.deepcopy(settings)
    settings.num_return_sequences = copies
    keywords: dict[str, Any] = {**inputs}
    with without_defaults(model.base):
        out = model.generate(
            **keywords,
            generation_config=settings,
            invocation=policy,
            seed=seeds,
            record=True,
            sample_blocks=sample_blocks,
        )
    assert isinstance(out, VisMemOutput) and out.rollout is not None  # as `sampling` and `record` ask for
    return out.rollout


def counterfactuals(
    model: VisMem,
    inputs: dict[str, torch.Tensor],
    rollouts: list[Rollout],
    copies: int,
    sighted: list[bool],
    settings: GenerationConfig,
    seeds: list[int],
) -> dict[int, Rollout]:
    """tau_rev (Eq. 15): every rollout that invoked, decoded again from its first invocation on with kinds swapped.

    Rows that did not invoke, and rows without an image (which have only one kind), have none.

    Args:
        sighted: for each prompt whether it has an image.
        seeds: one for each of the rollouts.

    Returns:
        From a rollout's index to its counterfactual.
    """
    openings: dict[int, Opening] = {}
    for index, rollout in enumerate(rollouts):
        prompt = index // copies
        if rollout.invocations and sighted[prompt]:
            first = rollout.invocations[0]
            assert first.states is not None  # rollouts record them
            other = KINDS[1 - KINDS.index(first.kind)]
            openings[index] = Opening(prompt, tuple(rollout.tokens[: first.position].tolist()), other, first.states)
    if not openings:
        return {}
    policy = Counterfactual(openings=tuple(openings.values()))
    found = write(model, inputs, policy, settings, [seeds[index] for index in openings])
    return dict(zip(openings, found, strict=True))
