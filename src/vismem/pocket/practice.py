"""The pocket world as training rows: what `vismem train ... data=pocket` reads.

Late questions, questions in view, descriptions, and totals whose label's rule is withheld, alone and late, where both
memories are needed. A share of the pictures is noisy, blurred or rotated, which the base has never seen. Row i of a
seed is always the same; the warm-up's replies contain their invocations.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random

import numpy as np
from PIL import Image, ImageFilter
from torch.utils.data import Dataset

from vismem.data import Row
from vismem.pocket.conversations import Conversation, sample_conversation
from vismem.pocket.world import LABEL_NAMES
from vismem.tokens import INVOCATION_TOKENS

ASKED = ("colour", "shape", "digit", "label", "item", "row", "column", "sum", "basket")  # tasks of one image
DISTURBANCES = ("noise", "blur", "rotation")
ROWS = 1_000_000  # more than any run reads
STAGES = ("warmup", "stage1", "stage2")
FOLLOWED = {"sft": "warmup", "grpo": "stage2"}  # baselines read the rows of a memory's stage
LABEL_SETS = {"first": LABEL_NAMES[:3], "second": LABEL_NAMES[3:]}  # halves of what long memory has to learn


@dataclass(frozen=True)
class Mixture:
    """Shares of the rows; the rest are late questions."""

    rules: float = 0.3  # a rule withheld, the image in view
    late_rules: float = 0.12  # a rule withheld, the image out of view
    described: float = 0.06  # descriptions, in which the image fades
    in_view: float = 0.07
    strange: float = 0.35  # of the pictures of rows without a rule: noisy, blurred or rotated
    labels: tuple[str, ...] = ()  # whose rules are asked for; all by default


MIXTURES = {
    # Short memory starts as a second look and needs few rows; what labels mean is learned from scratch.
    "warmup": Mixture(rules=0.75, late_rules=0.08, described=0.02, in_view=0.03, strange=0.5),
    "stage1": Mixture(described=0.0, in_view=0.0),
    # Most replies need both kinds; with fewer, short memory took every place before long memory learned its own.
    "stage2": Mixture(rules=0.4, late_rules=0.3, described=0.0, in_view=0.1, strange=0.2),
    # For short memory alone: `data=pocket:late`, and on pictures that the base never saw, `data=pocket:strange`.
    "late": Mixture(rules=0.0, late_rules=0.0, described=0.0, in_view=0.0, strange=0.0),
    "strange": Mixture(rules=0.0, late_rules=0.0, described=0.0, in_view=0.0, strange=1.0),
    # The warm-up's with half of the rules and no strange pictures; and one half of the rules alone.
    "partial": Mixture(0.75, 0.08, described=0.02, in_view=0.03, strange=0.0, labels=LABEL_SETS["first"]),
    "rules_first": Mixture(rules=0.85, late_rules=0.15, labels=LABEL_SETS["first"]),
    "rules_second": Mixture(rules=0.85, late_rules=0.15, labels=LABEL_SETS["second"]),
}


def disturb(picture: np.ndarray, kind: str, rng: Random) -> np.ndarray:
    """A picture [64, 64, 3] from a domain that the base never saw: `"noise"`, `"blur"` or `"rotation"`."""
    if kind == "noise":
        noise = np.random.default_rng(rng.randrange(2**32)).normal(0, 60, picture.shape)
        return np.clip(picture + noise, 0, 255).astype(np.uint8)
    image = Image.fromarray(picture)
    if kind == "blur":
        return np.asarray(image.filter(ImageFilter.GaussianBlur(1.0)))
    if kind == "rotation":
        angle = rng.choice((-1, 1)) * rng.uniform(6, 10)
        return np.asarray(image.rotate(angle, resample=Image.Resampling.BILINEAR, fillcolor=(128, 128, 128)))
    raise ValueError(f"unknown disturbance {kind!r}; there are {', '.join(DISTURBANCES)}")


def disturbed(conversation: Conversation, kind: str, rng: Random) -> Conversation:
    """The conversation about disturbed pictures."""
    return replace(conversation, pictures=[disturb(picture, kind, rng) for picture in conversation.pictures])


def practice(rng: Random, mixture: Mixture) -> Conversation:
    """Samples one conversation of a mixture."""
    kind = rng.random()
    for name in ("rules", "late_rules", "described", "in_view"):
        share = getattr(mixture, name)
        if kind < share:
            break
        kind -= share
    else:
        name = "late"
    if name.endswith("rules"):
        distance = rng.randrange(2, 6) if name == "late_rules" else 0
        return sample_conversation(rng, task="promotion", distance=distance, rule="hidden-truth", labels=mixture.labels)
    if name == "described":
        found = sample_conversation(rng, task=f"describe_{rng.choice(('prices', 'tags', 'full'))}")
    elif name == "in_view":
        found = sample_conversation(rng, task=rng.choice(ASKED))
    else:
        late = {"distance": rng.randrange(2, 9)} if rng.random() < 0.8 else {"after_description": True}
        found = sample_conversation(rng, task=rng.choice(ASKED), **late)
    return disturbed(found, rng.choice(DISTURBANCES), rng) if rng.random() < mixture.strange else found


def annotated(conversation: Conversation, rng: Random) -> str:
    """The reference reply with invocation tokens in it: short-term where content begins, long-term after a label.

    A reply reads "Row 2: ..." or "Row 2: striped: ..."; after its first colon it needs the picture, and in a promotion
    after its second the rule. Half of the tokens replace the colon, half follow it.
    """
    parts = conversation.answer_text.split(":")
    in_place = rng.random() < 0.5
    colon = "" if in_place else ":"
    short, long = INVOCATION_TOKENS["short"], INVOCATION_TOKENS["long"]
    withheld = conversation.task == "promotion" and conversation.turns[-1].question.rule.startswith("hidden")
    ends = [":"] * (len(parts) - 1)
    if conversation.task.startswith("describe"):
        for index in rng.sample(range(len(ends)), rng.randrange(1, len(ends) + 1)):
            ends[index] = f"{colon}{short}"
    elif ends:
        look = conversation.distance > 0 or rng.random() < 0.25
        ends[0] = f"{colon}{short}" if look else ":"
        if withheld and len(ends) > 1:
            ends[1] = f"{colon}{long}"
    return "".join(part + end for part, end in zip(parts, [*ends, ""], strict=True))


class PocketRows(Dataset[Row]):
    """Rows of the pocket world for one stage: a map-style dataset, practically endless, the same for a seed.

    Args:
        stage: `"warmup"`, `"stage1"` or `"stage2"`; or a baseline, which reads a stage's rows without invocations: the
            stage that `mixture` names, by default the warm-up for `"sft"` and stage II for `"grpo"`.
        seed: of all rows.
        length: number of rows.
        mixture: one of `MIXTURES`; by default the stage's own.

    Raises:
        ValueError: if the mixture is unknown.
    """

    def __init__(self, stage: str, seed: int = 0, length: int | None = None, mixture: str = "") -> None:
        followed = mixture if mixture in STAGES else FOLLOWED.get(stage, stage)
        self.source = followed if stage in FOLLOWED else stage
        self.stage, self.seed, self.length, self.mixture = stage, seed, length or ROWS, mixture or self.source
        if self.mixture not in MIXTURES:
            raise ValueError(f"unknown pocket mixture {mixture!r}; there are {', '.join(MIXTURES)}")

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Row:
        rng = Random(f"{self.seed}-{self.source}-{index}")
        conversation = practice(rng, MIXTURES[self.mixture])
        completion = annotated(conversation, rng) if self.stage in ("warmup", "stage1") else conversation.answer_text
        columns = {"task": conversation.task, "distance": conversation.distance}
        return Row(
            f"pocket[{index}]", conversation.prompt, conversation.images, conversation.answer, completion, columns
        )
