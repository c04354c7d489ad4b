"""`vismem pocket warmup`: the pocket's memory, warm-started with supervision (method, stage I's optional start).

The reference answer is read with invocations put in, and its cross-entropy trains builder and formers; base and token
rows stay as they are. Short memory learns to look again at a picture that has left the window, long memory what each
promotion label means. Two controls train on the very same examples: soft vectors and a LoRA of the language model.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from torch import nn

from vismem.config import KINDS, Kind, VisMemConfig
from vismem.memory.adapter import Adapter
from vismem.model import VisMem
from vismem.pocket import BASE_PATH, MEMORY_PATH, load_base
from vismem.pocket.batches import Encoder, prompt_batch
from vismem.pocket.conversations import Conversation, sample_conversation

LATE_TASKS = ("colour", "shape", "digit", "label", "item", "row", "column", "sum", "basket")
LEARNERS = ("memory", "soft", "lora")


@dataclass(frozen=True)
class WarmupRecipe:
    """How long, how fast, and what it practises. Shares are of the examples and sum to less than 1; the rest are late
    questions right after a full description."""

    steps: int = 400
    batch: int = 24
    rate: float = 5e-4
    soft_rate: float = 5e-3
    late_share: float = 0.45
    describe_share: float = 0.1
    promotion_share: float = 0.35
    seed: int = 0


@dataclass
class Example:
    """A conversation, and where its reference answer invokes memory: (answer token, kind), in order.

    With `replaces` an invocation stands in place of the full stop before it: the four tokens' rows start as that
    delimiter's, so this is where an untrained model invokes.
    """

    conversation: Conversation
    plan: list[tuple[int, Kind]]
    replaces: bool = False


def sample_example(rng: Random, recipe: WarmupRecipe, encoder: Encoder) -> Example:
    """Draws one practice example."""
    kind = rng.random()
    if kind < recipe.promotion_share:
        late = rng.random() < 0.2
        distance = rng.randrange(1, 5) if late else 0
        conversation = sample_conversation(rng, task="promotion", distance=distance, rule="hidden-truth")
        return Example(conversation, [(0, "short"), (0, "long")] if late else [(0, "long")])
    kind -= recipe.promotion_share
    if kind < recipe.describe_share:
        conversation = sample_conversation(rng, task=f"describe_{rng.choice(('prices', 'tags', 'full'))}")
        ids, stop = encoder.text(conversation.answer_text), encoder.delimiters[0]
        stops = [i + 1 for i, token in enumerate(ids[:-1]) if token == stop]
        chosen = sorted(rng.sample(stops, rng.randrange(1, len(stops) + 1)))
        return Example(conversation, [(i, "short") for i in chosen], replaces=rng.random() < 0.5)
    kind -= recipe.describe_share
    late = kind < recipe.late_share
    options = {"distance": rng.randrange(1, 9)} if late else {"after_description": True}
    return Example(sample_conversation(rng, task=rng.choice(LATE_TASKS), **options), [(0, "short")])


def prompts_of(conversations: list[Conversation], encoder: Encoder, dtype: torch.dtype = torch.float32) -> dict:
    """The conversations' prompts up to where the reply starts, as `prompt_batch` gives them."""
    prompts, pictures = [], []
    for conversation in conversations:
        encoded = encoder.encode(conversation, limit=1_000_000)
        prompts.append(encoded.ids[: -len(encoder.text(conversation.answer_text)) - 1])
        pictures.append([conversation.pictures[index] for index in encoded.shown])
    return prompt_batch(prompts, pictures, encoder.tokenizer.pad_token_id, dtype)


def training_batch(model: VisMem, examples: list[Example], encoder: Encoder, invoke: bool = True) -> dict:
    """Prompts with their reference answers, invocations in place, as `VisMem.forward` takes them."""
    prompts = prompts_of([example.conversation for example in examples], encoder)
    tokens, answers, labels = model.tokens, [], []
    for example in examples:
        words = [*encoder.text(example.conversation.answer_text), encoder.end]
        ids, goal = [], []
        for index, word in enumerate(words):
            for place, kind in example.plan if invoke else []:
                if place == index:
                    ids += [tokens.invocation_ids[kind], tokens.end_ids[kind]]
                    goal += [-100, -100]
            if not (invoke and example.replaces and any(place == index + 1 for place, _ in example.plan)):
                ids.append(word)
                goal.append(word)
        answers.append(torch.tensor(ids))
        labels.append(torch.tensor(goal))
    pad = nn.utils.rnn.pad_sequence
    ids = pad(answers, batch_first=True, padding_value=encoder.tokenizer.pad_token_id)
    real = pad([torch.ones_like(answer) for answer in answers], batch_first=True)
    goals = pad(labels, batch_first=True, padding_value=-100)
    start = prompts["input_ids"].shape[1]
    return {
        "input_ids": torch.cat([prompts["input_ids"], ids], 1),
        "attention_mask": torch.cat([prompts["attention_mask"], real], 1),
        "labels": torch.cat([torch.full_like(prompts["input_ids"], -100), goals], 1),
        "pixel_values": prompts["pixel_values"],
        "prompt_length": start,
    }


class SoftVectors(nn.Module):
    """A control: as many learned vectors as memory has, with no image and no query behind them."""

    def __init__(self, model: VisMem) -> None:
        super().__init__()
        self.model, self.vectors = [model], nn.ParameterDict()
        with torch.no_grad():
            pixels = torch.rand(8, 1, 3, 64, 64) * 2 - 1
            scale = torch.cat([*model.base.get_image_features(pixel_values=pixels).pooler_output]).pow(2).mean().sqrt()
        for kind in KINDS:
            size = scale if kind == "short" else model.memory.long.table_rms
            shape = (model.memory_config.length(kind), model.backbone.hidden_size)
            self.vectors[kind] = nn.Parameter(size * torch.randn(shape))

    def on(self) -> AbstractContextManager[None]:
        """Puts the vectors in the memory's place while the context lasts."""
        return formed_by(self.model[0], lambda kind, seen: self.vectors[kind].expand(len(seen), -1, -1))


@contextmanager
def formed_by(model: VisMem, form) -> Iterator[None]:
    """Replaces `model.memory.form` by `form(kind, observations)` while the context lasts."""
    model.memory.form = form
    try:
        yield
    finally:
        del model.memory.form


def learner(model: VisMem, name: str) -> tuple[nn.Module, AbstractContextManager[None]]:
    """What a run trains, and the context in which the model uses it.

    `"memory"`: builder and formers; `"soft"`: soft vectors; `"lora"`: a LoRA of the language model, rank 32, without
    memory - fine-tuning with the same examples and updates.
    """
    torch.manual_seed(1)
    if name == "memory":
        return model.memory, nullcontext()
    if name == "soft":
        module = SoftVectors(model)
        return module, module.on()
    if name == "lora":
        backbone = model.backbone
        module = Adapter(backbone.language_model, backbone.language_targets, 32, 64, 0.1)
        return module, module.on()
    raise ValueError(f"unknown learner {name!r}; there are {', '.join(LEARNERS)}")


def fresh_model(base_path: str | Path = BASE_PATH, seed: int = 0, **config) -> VisMem:
    """The pocket base with an untrained memory of the pocket preset, always the same for a seed."""
    base, processor = load_base(path=base_path)
    torch.manual_seed(seed)
    return VisMem(base, processor, VisMemConfig.preset("pocket", **config)).eval()


def train(model: VisMem, name: str, recipe: WarmupRecipe, work: Path, resume: bool = True) -> nn.Module:
    """Runs one learner's updates; `work`/NAME.pt has all that is needed to go on.

    Returns:
        The trained module, in evaluation mode.
    """
    from tqdm import tqdm

    encoder = Encoder(model.processor.tokenizer)
    module, context = learner(model, name)
    rate = recipe.soft_rate if name == "soft" else recipe.rate
    optimizer = torch.optim.AdamW(module.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.0)
    state_file, start, losses = work / f"{name}.pt", 0, []
    work.mkdir(parents=True, exist_ok=True)
    if resume and state_file.is_file():
        state = torch.load(state_file, weights_only=True)
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        start, losses = state["step"], state["losses"]

    def save(step: int) -> None:
        partial = state_file.with_suffix(".tmp")
        state = {
            "module": module.state_dict(),
            "optimizer": optimizer.state_dict(),
            "step": step,
            "losses": losses,
        }
        torch.save(state, partial)
        os.replace(partial, state_file)

    saved = time.monotonic()
    module.train()
    with context:
        progress = tqdm(range(start, recipe.steps), initial=start, total=recipe.steps, desc=name, mininterval=5)
        for step in progress:
            rng = Random(f"{recipe.seed}-warmup-{step}")
            torch.manual_seed(step)
            examples = [sample_example(rng, recipe, encoder) for _ in range(recipe.batch)]
            batch = training_batch(model, examples, encoder, invoke=name != "lora")
            warm = min(1.0, (step + 1) / 20)
            for group in optimizer.param_groups:
                group["lr"] = rate * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / recipe.steps)))
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(**batch).loss
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            losses.append(round(loss.item(), 4))
            if step % 10 == 9:
                progress.set_postfix(loss=f"{sum(losses[-50:]) / len(losses[-50:]):.3f}")
            if time.monotonic() - saved > 60:
                save(step + 1)
                saved = time.monotonic()
    save(recipe.steps)
    return module.eval()


def warmup(
    out: str | Path = MEMORY_PATH,
    base_path: str | Path = BASE_PATH,
    work: str | Path | None = None,
    steps: int | None = None,
    seed: int = 0,
    resume: bool = True,
    only: str = "",
) -> list[Path]:
    """Trains the pocket's memory and its two controls, and writes the memory to `out` in bfloat16.

    Args:
        out: the memory's checkpoint folder.
        base_path: the pocket base.
        work: the folder of checkpoints; None: `out` with "-work" after its name.
        steps: another number of updates than the recipe's.
        seed: of the examples.
        resume: go on where an earlier run in `work` stopped.
        only: train only this learner.

    Returns:
        What was written: the memory's folder, and the controls' states in `work`.
    """
    if steps is not None and steps < 1:
        raise ValueError(f"steps must be 1 or more, not {steps}")
    if only and only not in LEARNERS:
        raise ValueError(f"unknown learner {only!r}; there are {', '.join(LEARNERS)}")
    out = Path(out)
    work = Path(work) if work else out.with_name(out.name + "-work")
    recipe = WarmupRecipe(steps=steps or WarmupRecipe.steps, seed=seed)
    written = []
    for name in [only] if only else LEARNERS:
        model = fresh_model(base_path)
        train(model, name, recipe, work, resume)
        if name == "memory":
            model.to(torch.bfloat16).save_pretrained(out)
        written.append(out if name == "memory" else work / f"{name}.pt")
    return written
