"""Where the frozen base itself looks: what teaches the choice of `memory_init="attended"` (`memory/choice.py`).

The base reads a reference reply, without gradient and without memory. What its words attend to in the image, up to the
next short-term invocation, is what the memory there should contain, so the choice is trained by cross-entropy with it.
No annotation is needed beyond the reply.

A base whose layers all attend within a window may not reach the image from the reply. It is then shown the image's
visual states again, where the memory will stand.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vismem.memory import Choice
from vismem.memory.choice import block_tokens
from vismem.reading.attention import attention_weights
from vismem.reading.splice import Reader, Splice

if TYPE_CHECKING:
    from vismem.model import VisMem
    from vismem.reading.forward import Choices, Located

SHARE = 0.5  # blocks with at least this share of the largest weight are targets


def full_layers(config: Any) -> set[int]:
    """The layers of a language model that attend to everything before them, by its text config."""
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return {index for index, kind in enumerate(kinds) if kind == "full_attention"}
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    return set() if windowed else set(range(config.num_hidden_layers))


@torch.no_grad()
def gaze_targets(model: VisMem, located: Located, reader: Reader, words: Tensor) -> list[list[Tensor | None]]:
    """Where the words after each short-term invocation look.

    Args:
        model: the model.
        located: the batch, with the patches of the images that are looked at.
        reader: of the batch; its cached prefix is not read again.
        words: bool [B, L], the reply's words.

    Returns:
        For each row and invocation float32 [P], uniform over the most attended blocks, at most N_s of them; None for
        long-term memory, and where no word follows.
    """
    layers = full_layers(model.base.config.get_text_config())
    shown_again = not layers
    given: list[list[Tensor | None]] = [
        [located.visual[row // located.copies] if shown_again and site.kind == "short" else None for site in sites]
        for row, sites in enumerate(located.sites)
    ]
    splice = Splice(located.sites, given, located.length)
    columns = [  # positions of the visual tokens in the spliced row: in each showing, or in the prompt
        splice.slot[row].nonzero().flatten() if shown_again else splice.kept[row, located.shown[row].cpu()]
        for row in range(len(located.sites))
    ]
    sums: list[Tensor] = [torch.zeros(())] * len(columns)
    done = reader.prefix.shape[1]

    def receive(layer: int, weights: Tensor) -> None:
        if layers and layer not in layers:
            return
        missing = splice.real.shape[1] - weights.shape[3]  # keys that a windowed layer dropped on the left
        for row, places in enumerate(columns):
            index = (places - missing).clamp(min=0).to(weights.device)
            seen = weights[row].mean(0, dtype=torch.float32)[:, index] * (places >= missing).to(weights.device)
            sums[row] = sums[row].to(seen.device) + seen

    with attention_weights(model.backbone, receive):
        reader(splice)
    targets: list[list[Tensor | None]] = []
    for row, sites in enumerate(located.sites):
        found: list[Tensor | None] = []
        looks = [site.index for site in sites if site.kind == "short"]
        said = [t for t in range(done, located.length - 1) if words[row, t + 1]]  # the states that write words
        everywhere = sums[row][splice.kept[row, said] - done] if said else None
        for site in sites:
            end = next((index for index in looks if index > site.index), located.length)
            rows = [at for at, t in enumerate(said) if site.index < t < end]
            if site.kind != "short" or not rows or everywhere is None:
                found.append(None)
                continue
            count, showing = len(located.visual[row // located.copies]), looks.index(site.index)
            first = showing * count if shown_again else 0
            mine = everywhere[:, first : first + count]
            weight = mine[rows].amax(0)
            if not shown_again and len(said) > 1:  # what every word attends to is an attention sink, not a look
                weight = (weight - mine.mean(0)).clamp(min=0)
            blocks = block_tokens(located.patches[row // located.copies]).to(weight.device)
            found.append(looked_at(weight[blocks], model.memory_config.short_length))
        targets.append(found)
    return targets


def looked_at(weight: Tensor, most: int) -> Tensor | None:
    """The blocks with at least half of the largest of `weight` [P], at most `most` of them, as a distribution [P]."""
    if not weight.max() > 0:
        return None
    kept = torch.zeros_like(weight).scatter(0, weight.topk(min(most, len(weight))).indices, 1.0)
    kept = kept * (weight >= SHARE * weight.max())
    return kept / kept.sum()


def gaze_loss(choice: Choice, target: Tensor) -> Tensor:
    """Cross-entropy of a choice with what was looked at.

    The target is dealt out to the vectors in reading order, 1 / N_s of it to each, so that no two learn the same.

    Args:
        choice: with scores [N, P].
        target: [P], sums to 1.

    Example:
        >>> gaze_loss(Choice(torch.zeros(2, 4), torch.tensor([0, 0]), [(2, 2)]), torch.tensor([0.5, 0.0, 0.5, 0.0]))
        tensor(1.3863)
    """
    scores = choice.scores
    until = target.to(scores).cumsum(-1)[None]
    edges = torch.arange(len(scores) + 1, device=scores.device)[:, None] / len(scores)
    part = torch.minimum(until, edges[1:]) - torch.maximum(until - target.to(scores), edges[:-1])
    return -(part.clamp(min=0) * len(scores) * scores.log_softmax(-1)).sum(-1).mean()


def gaze_losses(choices: Choices, targets: list[list[Tensor | None]]) -> Tensor:
    """Each row's mean `gaze_loss` over its invocations that have a target: [B], 0 for a row without one."""
    rows = []
    for chosen, wanted in zip(choices, targets, strict=True):
        losses = [
            gaze_loss(choice, target)
            for choice, target in zip(chosen, wanted, strict=True)
            if choice is not None and target is not None
        ]
        rows.append(torch.stack(losses).mean() if losses else torch.zeros(()))
    device = next((row.device for row in rows if row.requires_grad), rows[0].device)
    return torch.stack([row.to(device) for row in rows])
