"""`vismem pocket evaluate`: accuracy of the base by task and by distance from the image.

Late questions are asked in three ways: the image was shown once; it is shown again with the question; or it is repeated
inside the reply, after the echo and its colon and before another colon, where a short-term memory will stand.
Promotions are also asked with the rule as a note after the label's colon, where a long-term memory will stand.
Greedy decoding by transformers' `generate`, test-split handwriting, 95 % Wilson intervals.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random

import torch

from pocket_base.batches import Encoder, prompt_batch
from pocket_base.conversations import easy_vqa_question
from pocket_base.tokenizer import IMAGE_TOKENS
from vismem import files
from vismem.evaluation.intervals import wilson
from vismem.pocket import BASE_PATH, easyvqa, load_base
from vismem.pocket.conversations import Conversation, Turn, sample_conversation
from vismem.pocket.tasks import TASKS, score
from vismem.pocket.world import PROMOTION_RULES, RULES, sample_scene

DISTANCE_TASKS = ("colour", "shape", "digit", "label", "row", "sum", "promotion")
DISTANCES = {"once": (1, 2, 3, 4, 5, 6, 7, 8), "again": (1, 2, 4, 6, 8), "inside": (1, 2, 4, 6, 8)}


class Answerer:
    """Greedy replies to the last turns of conversations, in batches."""

    def __init__(self, model, tokenizer, batch_size: int = 100):
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.encoder = Encoder(tokenizer)

    def prompt(self, conversation: Conversation, opened: str = "") -> tuple[list[int], list[int]]:
        """The ids up to where the reply continues, and the indices of the pictures shown.

        `opened`: "" stops before the reply; "look" opens it with the echo, its colon, the latest picture and a colon;
        "note" with the echo, the label, its colon, the note and a colon.
        """
        encoder, question = self.encoder, conversation.turns[-1].question
        encoded = encoder.encode(conversation, limit=1_000_000)
        ids = encoded.ids[: -len(encoder.text(conversation.answer_text)) - 1]
        shown = encoded.shown
        if opened == "look":
            ids = [*ids, *encoder.echo(question), *[encoder.image] * IMAGE_TOKENS, encoder.colon]
            shown = [*shown, shown[-1]]
        elif opened == "note":
            ids = [*ids, *encoder.text(f"{question.echo}: {question.label}: {question.note}:")]
        return ids, shown

    @torch.inference_mode()
    def __call__(self, conversations: list[Conversation], opened: str = "") -> list[str]:
        replies = [""] * len(conversations)
        prompts = [self.prompt(conversation, opened) for conversation in conversations]
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i][0]))
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            pictures = [[conversations[i].pictures[number] for number in prompts[i][1]] for i in rows]
            ids = [prompts[i][0] for i in rows]
            inputs = prompt_batch(ids, pictures, self.tokenizer.pad_token_id, self.model.dtype)
            longest = inputs["input_ids"].shape[1]
            length = max(len(self.encoder.text(conversations[i].answer_text)) for i in rows) + 4
            out = self.model.generate(**inputs, max_new_tokens=length, do_sample=False)
            texts = self.tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
            for i, text in zip(rows, texts, strict=True):
                replies[i] = text
        return replies

    def measure(self, conversations: list[Conversation], opened: str = "") -> dict:
        """Accuracy with its interval, n, and the mean number of tokens from the first image's end to the reply."""
        replies = self(conversations, opened)
        right = sum(score(c.task, reply, c.answer) for c, reply in zip(conversations, replies, strict=True))
        low, high = (round(end, 4) for end in wilson(right / len(replies), len(replies)))
        ages = []
        for conversation in conversations:
            ids = self.prompt(conversation)[0]
            if self.encoder.image in ids:
                first_run = conversation.turns[0].user
                runs = sum(isinstance(part, int) for part in first_run)
                places = [i for i, token in enumerate(ids) if token == self.encoder.image]
                ages.append(len(ids) - places[runs * IMAGE_TOKENS - 1])
        age = round(sum(ages) / len(ages), 1) if ages else None
        return {
            "accuracy": round(right / len(replies), 4),
            "low": low,
            "high": high,
            "n": len(replies),
            "tokens": age,
        }


def cells() -> dict[str, tuple[Callable[[Random], Conversation], str]]:
    """Everything that is evaluated: name -> (how to sample one conversation, how its reply is opened)."""
    out = {}

    def add(name: str, opened: str = "", **options):
        out[name] = (lambda rng: sample_conversation(rng, "test", **options), opened)

    for task in TASKS:
        add(f"in_view/{task}", task=task)
    for task in DISTANCE_TASKS:
        for shown, distances in DISTANCES.items():
            again = {"shown_again": shown == "again", "opened": "look" if shown == "inside" else ""}
            for distance in distances:
                add(f"distance/{task}/{shown}/{distance}", task=task, distance=distance, **again)
            add(f"after_description/{task}/{shown}", task=task, after_description=True, **again)
    for rule, opened in {"stated-truth": "", "noted-truth": "note", "hidden-truth": ""}.items():
        add(f"promotion/{rule}", opened, task="promotion", rule=rule)
    return out


def promotion_chance(seed: int, scenes: int = 500) -> float:
    """How often a random rule gives a row the same price as its label's rule."""
    rng, hits, trials = Random(seed), 0, 0
    for _ in range(scenes):
        scene = sample_scene(rng, "test")
        for name, prices in zip(scene.labels, scene.prices, strict=True):
            wanted = sum(PROMOTION_RULES[name].apply(list(prices)))
            hits += sum(sum(rule.apply(list(prices))) == wanted for rule in RULES)
            trials += len(RULES)
    return round(hits / trials, 4)


def _easy_vqa(n: int, seed: int) -> list[Conversation]:
    rng = Random(f"{seed}-easy-vqa")
    everything = [(i, pair) for i, pairs in easyvqa.questions("test").items() for pair in pairs]
    chosen = rng.sample(everything, min(n, len(everything)))
    return [
        Conversation(
            [Turn([0, text], easy_vqa_question(text, answer), 0)],
            [easyvqa.picture("test", image)],
            [None],
        )
        for image, (text, answer) in chosen
    ]


def evaluate(
    base_path: str | Path = BASE_PATH,
    out_json: str | Path | None = "results/pocket_base.json",
    plot: str | Path | None = "docs/images/pocket_base.png",
    n: int = 200,
    seed: int = 0,
    only: str = "",
) -> dict:
    """Evaluate a base; write the results and their plot.

    Args:
        base_path: the base's folder.
        out_json, plot: where the results go; None writes none.
        n: conversations per cell (the easy-VQA test split gets 1000 questions, or n if that is more).
        seed: the sample of conversations.
        only: measure only cells whose name contains this.
    """
    if n < 1:
        raise ValueError(f"n must be 1 or more, not {n}")
    from tqdm import tqdm

    model, processor = load_base(path=base_path)
    answerer = Answerer(model, processor.tokenizer)
    measured = {}
    chosen = {name: cell for name, cell in cells().items() if only in name}
    for name, (sample, opened) in tqdm(chosen.items(), desc="pocket eval"):
        conversations = [sample(Random(f"{seed}-{name}-{i}")) for i in range(n)]
        measured[name] = answerer.measure(conversations, opened)
    if only in "easy_vqa":
        measured["easy_vqa"] = answerer.measure(_easy_vqa(max(n, 1000) if n >= 100 else n, seed))
    results = {
        "command": f"vismem pocket evaluate --n {n} --seed {seed}",
        "what": "accuracy of the pocket base, greedy, test-split handwriting; low/high: 95 % Wilson interval; "
        "tokens: mean distance from the image's end to the reply",
        "seed": seed,
        "n": n,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "sliding_window": model.config.text_config.sliding_window,
        "promotion_chance": promotion_chance(seed),
        **_nest(measured),
    }
    if out_json:
        files.write_json(out_json, results, indent=1)
    if plot and not only:
        from pocket_base.plot import draw

        draw(results, Path(plot))
    return results


def _nest(measured: dict[str, dict]) -> dict:
    """{"a/b": x} -> {"a": {"b": x}}."""
    out: dict = {}
    for name, value in measured.items():
        *folders, leaf = name.split("/")
        place = out
        for folder in folders:
            place = place.setdefault(folder, {})
        place[leaf] = value
    return out
