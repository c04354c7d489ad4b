"""`vismem pocket build`: trains the pocket VLM from scratch, or from a finished one.

The vision stage trains the tower and the projector to classify what the cells hold, through heads that are discarded;
the language stage trains everything on conversations. Both resume from `state.pt` in the work folder.
"""

from __future__ import annotations

import ctypes
import logging
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from pocket_base.architecture import build_model
from pocket_base.batches import CELL_SIZES, Batch, cell_labels, normalise
from pocket_base.handwriting import render_varied
from pocket_base.mixture import training_batches
from pocket_base.tokenizer import build_processor, corpus
from vismem import files
from vismem.pocket import BASE_PATH, easyvqa, load_base
from vismem.pocket.world import sample_scene

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """How long and how fast. A step of the language stage reads about `tokens` tokens."""

    vision_steps: int = 150
    vision_batch: int = 64
    vision_rate: float = 1.5e-3
    language_steps: int = 4900
    tokens: int = 2400
    language_rate: float = 1.3e-3
    early_share: float = 0.15  # of the language steps, leaning on reading tasks
    reading_share: float = 0.6  # of the language steps, mostly packed questions; then mostly conversations
    packed_share: float = 0.9  # of the pools while reading
    packed_share_later: float = 0.45
    cell_weight: float = 0.5  # of the cells' loss in the language stage
    weight_decay: float = 0.02
    seed: int = 0


# Continuing a finished base: the vision stage only fits new cell heads to a frozen tower.
CONTINUED = Recipe(
    vision_steps=60,
    vision_rate=1e-2,
    language_steps=3600,
    language_rate=8e-4,
    early_share=0.0,
    reading_share=0.0,
    packed_share_later=0.5,
    seed=1,
)


class CellHeads(nn.Module):
    """Linear probes of a visual token - digit, colour, shape, label, row, column - used only while building.

    Row and column are needed because rotary positions are relative: a visual token must itself encode its cell. The
    noise makes each property take its share of a token; without it two of the six took three quarters of the variance
    and the language model was slow to find the others.
    """

    noise = 1.5  # relative to the tokens' RMS

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, sum(CELL_SIZES))

    def loss(self, features: torch.Tensor, cells: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """features [U, 16, width], cells [U, 16, 6] -> mean loss, accuracies [6]."""
        losses, rights = [], []
        features = features.float()
        if self.training:
            scale = features.pow(2).mean().sqrt()
            features = features + self.noise * scale * torch.randn_like(features)
        logits = self.linear(features).split(CELL_SIZES, dim=-1)
        for kind, part in enumerate(logits):
            target = cells[..., kind]
            losses.append(functional.cross_entropy(part.flatten(0, 1), target.flatten(), ignore_index=-100))
            rights.append((part.argmax(-1) == target)[target >= 0].float().mean())
        return torch.stack(losses).mean(), torch.stack(rights)


def visual_tokens(model, pixels: torch.Tensor) -> torch.Tensor:
    """Pictures [U, 3, 64, 64] -> projected visual tokens [U, 16, width]."""
    features = model.get_image_features(pixel_values=pixels[:, None], return_dict=True).pooler_output
    return torch.stack([*features]).view(len(pixels), -1, model.config.text_config.hidden_size)


def language_loss(model, heads: CellHeads, batch: Batch, cell_weight: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The weighted next-token loss over replies, plus the cells' loss; and the first of the two alone."""
    embeddings = model.get_input_embeddings()(batch.ids)
    extra = 0.0
    if len(batch.pixels):
        features = visual_tokens(model, batch.pixels)
        slots = (batch.ids == model.config.image_token_id)[..., None].expand_as(embeddings)
        embeddings = embeddings.masked_scatter(slots, features.flatten(0, 1)[batch.visual].to(embeddings.dtype))
        if cell_weight and (batch.cells >= 0).any():
            extra = cell_weight * heads.loss(features, batch.cells)[0]
    places = {"attention_mask": batch.mask, "position_ids": batch.positions}
    states = model.model.text_model(inputs_embeds=embeddings, use_cache=False, **places).last_hidden_state
    counted = batch.weights[:, 1:] > 0
    logits = model.lm_head(states[:, :-1][counted]).float()
    weights = batch.weights[:, 1:][counted]
    losses = functional.cross_entropy(logits, batch.ids[:, 1:][counted], reduction="none")
    loss = (losses * weights).sum() / weights.sum()
    return loss + extra, loss.detach()


def rate_at(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """Linear warm-up, then a cosine to 2 % of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1))))


class Builder:
    """The build's moving parts: model, heads, optimiser, and where it stands."""

    def __init__(self, work: Path, recipe: Recipe, resume: bool, start: Path | None = None):
        from transformers import AutoProcessor

        self.recipe, self.work, self.start = recipe, work, start
        self.state_file = work / "state.pt"
        work.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(recipe.seed)
        resume = resume and self.state_file.is_file()
        if resume:
            self.processor = AutoProcessor.from_pretrained(work)
        else:
            started = AutoProcessor.from_pretrained(start) if start else None
            self.processor = started or build_processor(corpus(seed=recipe.seed))
            self.processor.save_pretrained(work)
        self.model = build_model(self.processor.tokenizer).train()
        self.model.set_attn_implementation("eager")  # the same masks; faster than sdpa's backward on CPU
        self.heads = CellHeads(self.model.config.text_config.hidden_size)
        self.optimizer = self._optimizer()
        self.stage, self.step = "vision", 0
        if resume:
            state = torch.load(self.state_file, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.heads.load_state_dict(state["heads"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.stage, self.step = state["stage"], state["step"]
            log.info("resuming at %s step %d", self.stage, self.step)
        elif start:
            self.model.load_state_dict(load_base(path=start)[0].state_dict())

    def _optimizer(self) -> torch.optim.Optimizer:
        parameters = [*self.model.parameters(), *self.heads.parameters()]
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": self.recipe.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), fused=True)

    def save_state(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "stage": self.stage,
            "step": self.step,
        }
        with files.replacing(self.state_file) as partial:
            torch.save(state, partial)

    def update(self, loss: torch.Tensor, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_([*self.model.parameters(), *self.heads.parameters()], 1.0)
        self.optimizer.step()

    def run_stage(self, stage: str, steps: int, train_step) -> None:
        """Run `train_step(step) -> metrics` up to `steps`, saving every minute."""
        from tqdm import tqdm

        if self.stage != stage:
            return
        saved = time.monotonic()
        progress = tqdm(range(self.step, steps), initial=self.step, total=steps, desc=stage, mininterval=5)
        averages: dict[str, float] = {}
        for step in progress:
            for name, value in train_step(step).items():
                averages[name] = 0.95 * averages.get(name, value) + 0.05 * value
            self.step = step + 1
            if self.step % 20 == 0:
                progress.set_postfix({name: f"{value:.3f}" for name, value in averages.items()})
            if self.step % 200 == 0:
                log.info("%s %d/%d %s", stage, self.step, steps, {k: round(v, 4) for k, v in averages.items()})
            if time.monotonic() - saved > 60:
                self.save_state()
                saved = time.monotonic()

    def vision_step(self, step: int) -> dict[str, float]:
        rng = Random(f"{self.recipe.seed}-vision-{step}")
        scenes = [sample_scene(rng) for _ in range(self.recipe.vision_batch)]
        pixels = normalise(np.stack([render_varied(scene) for scene in scenes]))
        cells = torch.from_numpy(np.stack([cell_labels(scene) for scene in scenes]))
        with torch.autocast("cpu", torch.bfloat16):
            features = visual_tokens(self.model, pixels)
        features = features.detach() if self.start else features
        loss, right = self.heads.loss(features, cells)
        self.update(loss, rate_at(step, self.recipe.vision_steps, self.recipe.vision_rate))
        return {
            "loss": loss.item(),
            **dict(zip(("digit", "colour", "shape", "label"), right.tolist(), strict=False)),
        }

    def language_step(self, step: int) -> dict[str, float]:
        batch = next(self.batches)
        with torch.autocast("cpu", torch.bfloat16):
            loss, shown = language_loss(self.model, self.heads, batch, self.recipe.cell_weight)
        self.update(loss, rate_at(step, self.recipe.language_steps, self.recipe.language_rate))
        return {"loss": shown.item()}

    def run(self) -> None:
        self.run_stage("vision", self.recipe.vision_steps, self.vision_step)
        if self.stage == "vision":
            self.stage, self.step = "language", 0
            self.optimizer = self._optimizer()
            self.save_state()
        self.batches = training_batches(self.processor.tokenizer, self.recipe, self.step)
        self.run_stage("language", self.recipe.language_steps, self.language_step)
        self.save_state()

    def export(self, out: Path) -> None:
        """Write the finished base as an ordinary Hugging Face folder in bfloat16."""
        out.mkdir(parents=True, exist_ok=True)
        model = build_model(self.processor.tokenizer)
        model.load_state_dict(self.model.state_dict())
        model.to(torch.bfloat16).save_pretrained(out)
        self.processor.save_pretrained(out)


def keep_freed_memory() -> None:
    """Stop glibc from returning freed memory: faulting it in again costs up to half of a CPU step."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: take large blocks from the heap
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: and keep them there
    except (OSError, AttributeError):  # another C library; only speed is lost
        log.debug("no mallopt here")


def build(
    out: Path = BASE_PATH,
    resume: bool = True,
    work: Path | None = None,
    vision_steps: int | None = None,
    language_steps: int | None = None,
    threads: int | None = None,
    start: Path | None = None,
) -> None:
    """Train the pocket VLM from scratch, or from `start`, and write it to `out`.

    Args:
        out: the finished base, an ordinary Hugging Face folder.
        resume: continue an interrupted build in `work`.
        work: the folder of checkpoints; None: beside `out`, "-work" after its name.
        vision_steps, language_steps: overrides of the recipe.
        threads: CPU threads; None leaves PyTorch's choice.
        start: a finished base to continue from, with the recipe `CONTINUED`.
    """
    given = {"vision_steps": vision_steps, "language_steps": language_steps}
    given = {name: steps for name, steps in given.items() if steps is not None}
    recipe = replace(CONTINUED if start else Recipe(), **given)
    if recipe.vision_steps < 1 or recipe.language_steps < 1:
        raise ValueError(f"steps must be 1 or more, not {recipe.vision_steps} and {recipe.language_steps}")
    if threads:
        torch.set_num_threads(threads)
    easyvqa.questions("train")  # a missing package is an error now, not in ten minutes
    keep_freed_memory()
    out = Path(out)
    work = Path(work) if work else out.with_name(out.name + "-work")
    with files.locked(work):
        builder = Builder(work, recipe, resume, start)
        builder.run()
        builder.export(out)
    log.info("wrote %s", out)
