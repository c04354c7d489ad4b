"""How fast `VisMem.generate` decodes: against transformers' own `generate` on the same base, and what a memory costs.

Every row of the table is one base, number of visual tokens and batch. Its runs alternate, round by round, in one
process, on one prompt and with a fixed number of greedy tokens:

    base      the base's own `generate`
    off       memory off
    on        invocation "learned", never invoked
    none      `Forced([])`, the run that the next one is compared with
    forced    `Forced`: in every row of the batch, after each `SEGMENT` tokens, one of `KINDS_IN_ORDER`
    scattered `Forced`, batches only: one invocation in every row, each row at its own step

How "on" never invokes: the output rows of the four tokens are set to zero, so that an invocation token's logit is 0,
which no greedy choice takes. The engine does all that it does when it decodes with a trained memory (keeps states,
widens the logits, computes the four, applies the guards), and the run is refused if its tokens differ from the base's.

A clock among the logits processors, the same object in every run, notes when each token is drawn. Time per token is
(last - first) / (tokens - 1), so reading the prompt is not in it. The cost of an invocation is the time of the
`SEGMENT` tokens from it on, less the same tokens' time in "none", in units of the base's time per token: formation,
the forward that reads the memory, and whatever it leaves behind (a longer cache) are all in it.

What is measured and printed is explained in `benchmarks/README.md`.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import (
    Idefics3ForConditionalGeneration,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

import vismem
from vismem.decoding.invocation import Forced
from vismem.pocket import BASE_PATH

SEGMENT = 16
KINDS_IN_ORDER = ("short", "short", "long", "short", "long")
PROMPT_WORDS = 32
SPECIAL = ("<pad>", "<end>", "<image>", "<start>", "<stop>")

# Steps that an invocation adds in the public VisMem code, one CPU thread, fp32; and the share of it allowed here.
PUBLIC_CODE = {
    ("qwen-200m", 64): {"short": 14.7, "long": 15.8, "share": 0.7},
    ("qwen-28m", 256): {"short": 27.6, "long": 28.7, "share": 0.5},
}
ALLOWED_RATIO = 1.05


# The bases and their prompts.


@dataclass(frozen=True)
class Case:
    """One row of the table: a base by name, the prompt's visual tokens, and the batch."""

    model: str
    visual_tokens: int
    batch: int

    def __str__(self) -> str:
        return f"{self.model}/{self.visual_tokens}/{self.batch}"


CASES = (
    *(Case("pocket", tokens, batch) for tokens in (64, 256) for batch in (1, 8)),
    *(Case("qwen-28m", 256, batch) for batch in (1, 8)),
    *(Case("qwen-200m", tokens, batch) for tokens in (64, 256) for batch in (1, 8)),
)


def word_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of exactly `size` words, so that the four memory tokens come after the base's vocabulary."""
    words = [*SPECIAL, ".", *(f"w{index}" for index in range(size - len(SPECIAL) - 1))]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>"))
    marks = {"pad_token": "<pad>", "eos_token": "<end>", "unk_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, padding_side="left", **marks)


def random_qwen(
    vocabulary: int, width: int, layers: int, mlp: int, tower: tuple[int, int, int], tied: bool
) -> tuple[Qwen2_5_VLForConditionalGeneration, Any]:
    """A Qwen2.5-VL with random weights; `tower` is its vision encoder's width, depth and MLP width."""
    tokenizer = word_tokenizer(vocabulary)
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(list(SPECIAL)), strict=True))
    config = Qwen2_5_VLConfig(
        vision_config={
            "hidden_size": tower[0],
            "depth": tower[1],
            "intermediate_size": tower[2],
            "num_heads": tower[0] // 64,
            "out_hidden_size": width,
            "fullatt_block_indexes": [tower[1] // 2 - 1, tower[1] - 1],
        },
        text_config={
            "hidden_size": width,
            "intermediate_size": mlp,
            "num_hidden_layers": layers,
            "num_attention_heads": width // 64,
            "num_key_value_heads": max(width // 64 // 2, 1) if width % 128 == 0 else 1,
            "vocab_size": vocabulary,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
            "tie_word_embeddings": tied,
            "bos_token_id": None,
            "eos_token_id": ids["<end>"],
        },
        image_token_id=ids["<image>"],
        video_token_id=vocabulary - 1,
        vision_start_token_id=ids["<start>"],
        vision_end_token_id=ids["<stop>"],
        tie_word_embeddings=tied,
    )
    base = Qwen2_5_VLForConditionalGeneration(config)
    base.generation_config.eos_token_id, base.generation_config.pad_token_id = ids["<end>"], ids["<pad>"]
    return base, SimpleNamespace(tokenizer=tokenizer)


def pocket() -> tuple[Idefics3ForConditionalGeneration, Any]:
    """The pocket base; where its weights are not there, one of its shape with random weights."""
    from vismem.pocket import architecture, load_base

    if (BASE_PATH / "config.json").is_file():
        return load_base()
    from vismem.pocket.tokenizer import END, IMAGE, PAD, VOCABULARY

    words = [PAD, END, IMAGE, ".", *(f"w{index}" for index in range(VOCABULARY - 4))]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=PAD))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token=PAD, eos_token=END, unk_token=PAD)
    return architecture.build_model(tokenizer), SimpleNamespace(tokenizer=tokenizer)


BASES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "pocket": pocket,
    "qwen-28m": lambda: random_qwen(16384, 320, 8, 1280, (256, 4, 704), tied=False),
    "qwen-200m": lambda: random_qwen(32768, 1024, 12, 2816, (512, 8, 1408), tied=True),
}


def prompt(base: Any, visual_tokens: int, batch: int, seed: int = 0) -> dict[str, Tensor]:
    """A batch of random prompts as the family's processor would make them: images, then `PROMPT_WORDS` words.

    Qwen2.5-VL shows one square image. Idefics3 has a fixed number of visual tokens per image and shows several.

    Raises:
        ValueError: if no square image, or no number of images, gives that many visual tokens.
    """
    config, generator = base.config, torch.Generator().manual_seed(seed)
    ordinary = 64, config.get_text_config().vocab_size - 8  # neither marks at the front nor rows kept free at the end
    words = torch.randint(*ordinary, (batch, PROMPT_WORDS), generator=generator)
    if config.model_type == "qwen2_5_vl":
        vision = config.vision_config
        side = math.isqrt(visual_tokens) * vision.spatial_merge_size
        if side**2 != visual_tokens * vision.spatial_merge_size**2:
            raise ValueError(f"{visual_tokens} visual tokens are not a square image")
        values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        images = {
            "pixel_values": torch.randn(batch * side**2, values, generator=generator),
            "image_grid_thw": torch.tensor([[1, side, side]] * batch),
        }
        frame = [config.vision_start_token_id], [config.vision_end_token_id]
    else:
        vision = config.vision_config
        each = (vision.image_size // vision.patch_size // config.scale_factor) ** 2
        if visual_tokens % each:
            raise ValueError(f"{visual_tokens} visual tokens are not a whole number of images of {each}")
        shape = (batch, visual_tokens // each, 3, vision.image_size, vision.image_size)
        images = {"pixel_values": torch.rand(shape, generator=generator) + 0.1}
        images["pixel_attention_mask"] = torch.ones(shape[0], shape[1], *shape[3:], dtype=torch.long)
        frame = [], []
    places = torch.tensor([*frame[0], *[config.image_token_id] * visual_tokens, *frame[1]])
    input_ids = torch.cat([places.expand(batch, -1), words], dim=1)
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), **images}
    if config.model_type == "qwen2_5_vl":
        inputs["mm_token_type_ids"] = (input_ids == config.image_token_id).long()
    return {
        name: value.to(base.device, base.dtype if value.is_floating_point() else None) for name, value in inputs.items()
    }


# The clock and the runs.


class Clock(LogitsProcessor):
    """Notes when each token is drawn; changes nothing."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.ticks = device, []

    def tick(self) -> None:
        """Notes the time, when the device is done with what was asked of it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.ticks.append(time.perf_counter())

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.tick()
        return scores


@dataclass
class Run:
    """One timed generation: when it began, when each token was drawn, when it ended, and what it wrote."""

    ticks: list[float]
    sequences: Tensor

    @property
    def first(self) -> float:
        """Seconds to the first token: everything before decoding."""
        return self.ticks[1] - self.ticks[0]

    @property
    def per_token(self) -> float:
        """Seconds per token after the first."""
        return (self.ticks[-2] - self.ticks[1]) / (len(self.ticks) - 3)

    @property
    def total(self) -> float:
        """Seconds after the first token, to the end."""
        return self.ticks[-1] - self.ticks[1]

    def span(self, step: int) -> float:
        """Seconds from drawing token `step - 1` until `SEGMENT` more are drawn."""
        return self.ticks[step + SEGMENT] - self.ticks[step]


def timed(generate: Callable[..., Tensor], inputs: dict[str, Tensor], tokens: int, end: int, **kwargs: Any) -> Run:
    """Runs `generate` greedily for exactly `tokens` tokens, `end` never among them, with a clock in its processors."""
    clock = Clock(inputs["input_ids"].device)
    gc.collect()
    clock.tick()
    sequences = generate(
        **inputs,
        max_new_tokens=tokens,
        suppress_tokens=[end],
        do_sample=False,
        logits_processor=LogitsProcessorList([clock]),
        **kwargs,
    )
    clock.tick()
    return Run(clock.ticks, sequences)


def silence(model: vismem.VisMem) -> None:
    """Zeroes the output rows of the four tokens: every greedy choice prefers another token, at no other cost."""
    tokens = model.tokens
    rows = (tokens.invocation, tokens.end) if tokens.tied else (tokens.invocation_output, tokens.end_output)
    with torch.no_grad():
        for row in rows:
            row.zero_()


def schedules(batch: int) -> tuple[int, dict[str, list[tuple[int, int, str]]]]:
    """New tokens of every run, and the schedules of "forced" and "scattered"."""
    steps = [SEGMENT * (index + 1) for index in range(len(KINDS_IN_ORDER))]
    forced = [(row, step, kind) for step, kind in zip(steps, KINDS_IN_ORDER, strict=True) for row in range(batch)]
    tokens = steps[-1] + SEGMENT
    spacing = max((tokens - 2 * SEGMENT) // batch, 1)
    scattered = [(row, SEGMENT + row * spacing, ("short", "long")[row % 2]) for row in range(batch)]
    return tokens, {"forced": forced, "scattered": scattered}


def one_round(model: vismem.VisMem, inputs: dict[str, Tensor], turn: int = 0) -> dict[str, Run]:
    """Every run once, beginning with another one each turn.

    Raises:
        RuntimeError: if a run without invocations writes anything but the base's tokens.
    """
    batch = len(inputs["input_ids"])
    tokens, plans = schedules(batch)
    runs: dict[str, tuple[Callable[..., Tensor], dict[str, Any]]] = {
        "base": (model.base.generate, {}),
        "off": (model.generate, {"invocation": "off"}),
        "on": (model.generate, {"invocation": "learned"}),
        "none": (model.generate, {"invocation": Forced([])}),
        "forced": (model.generate, {"invocation": Forced(plans["forced"])}),
    }
    if batch > 1:
        runs["scattered"] = (model.generate, {"invocation": Forced(plans["scattered"])})
    names = list(runs)
    names = names[turn % len(names) :] + names[: turn % len(names)]
    end = model.base.generation_config.eos_token_id
    done = {name: timed(runs[name][0], inputs, tokens, end, **runs[name][1]) for name in names}
    for name in ("off", "on", "none"):
        if not torch.equal(done[name].sequences, done["base"].sequences):
            raise RuntimeError(f"{name!r} wrote other tokens than the base; the times cannot be compared")
    return done


# From times to numbers.


@dataclass
class Spread:
    """Median and quartiles of some samples, which are kept."""

    median: float
    q1: float
    q3: float
    samples: list[float]

    @classmethod
    def of(cls, samples: list[float], digits: int = 3) -> Spread:
        q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else samples * 3
        return cls(*(round(v, digits) for v in (median, q1, q3)), [round(v, digits) for v in samples])


@dataclass
class Result:
    """One row's numbers.

    Args:
        model, weights, visual_tokens, batch: the case; `weights` is `"trained"` or `"random"`.
        parameters: of the base, and of its vision encoder and text model alone; of the memory.
        token_ms: time per token of base, off and on.
        first_token_ms: time to the first token of the same.
        ratio: time per token of off and on over the base's in the same round; `first_off`, `first_on` likewise.
        invocation_steps: what an invocation adds, in the base's decode steps: `short_first` (encodes the image's
            patches), `short` (later ones on the same image), `long`; `scattered`: one in each row, per invocation.
        gigabytes_per_second: text weights (with the head) that the base reads in a step, over its time.
    """

    model: str
    weights: str
    visual_tokens: int
    batch: int
    parameters: dict[str, int]
    token_ms: dict[str, Spread] = field(default_factory=dict)
    first_token_ms: dict[str, Spread] = field(default_factory=dict)
    ratio: dict[str, Spread] = field(default_factory=dict)
    invocation_steps: dict[str, Spread] = field(default_factory=dict)
    gigabytes_per_second: float = 0.0


def invocation_costs(rounds: list[dict[str, Run]], batch: int) -> dict[str, list[float]]:
    """What invocations added in each round, in decode steps of the base."""
    costs: dict[str, list[float]] = {}
    for runs in rounds:
        step_time = runs["base"].per_token
        for index, kind in enumerate(KINDS_IN_ORDER):
            step = SEGMENT * (index + 1)
            name = "short_first" if index == KINDS_IN_ORDER.index("short") else kind
            costs.setdefault(name, []).append((runs["forced"].span(step) - runs["none"].span(step)) / step_time)
        if "scattered" in runs:
            extra = runs["scattered"].total - runs["none"].total
            costs.setdefault("scattered", []).append(extra / batch / step_time)
    return costs


def summarize(case: Case, weights: str, model: vismem.VisMem, rounds: list[dict[str, Run]]) -> Result:
    """The row's numbers from its rounds."""
    backbone, compared = model.backbone, ("base", "off", "on")

    def count(module: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    parameters = {
        "base": count(model.base),
        "vision": count(backbone.tower),
        "text": count(backbone.language_model),
        "memory": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
    }
    result = Result(case.model, weights, case.visual_tokens, case.batch, parameters)
    for name in compared:
        result.token_ms[name] = Spread.of([1e3 * runs[name].per_token for runs in rounds])
        result.first_token_ms[name] = Spread.of([1e3 * runs[name].first for runs in rounds])
    for name in compared[1:]:
        result.ratio[name] = Spread.of([runs[name].per_token / runs["base"].per_token for runs in rounds], 4)
        result.ratio[f"first_{name}"] = Spread.of([runs[name].first / runs["base"].first for runs in rounds], 4)
    for name, samples in invocation_costs(rounds, case.batch).items():
        result.invocation_steps[name] = Spread.of(samples, 2)
    read = parameters["text"] - backbone.embeddings.weight.numel() + backbone.head.weight.numel()
    seconds = result.token_ms["base"].median / 1e3
    result.gigabytes_per_second = round(read * backbone.head.weight.element_size() / seconds / 1e9, 1)
    return result


def equip(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[vismem.VisMem, str]:
    """A base of that name with the default memory, ready to be measured, and where its weights come from."""
    torch.manual_seed(0)
    base, processor = BASES[name]()
    weights = "trained" if name == "pocket" and (BASE_PATH / "config.json").is_file() else "random"
    model = vismem.VisMem(base.to(device, dtype).eval(), processor, vismem.VisMemConfig()).eval()
    silence(model)
    return model, weights


def measure(
    cases: list[Case], rounds: int, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Iterator[Result]:
    """Measures `cases` one by one, each with a round of warming up; says on stderr how far it is."""
    began, work = time.monotonic(), [WORK.get(case.model, 1) * (1 + case.batch / 8) for case in cases]
    equipped: dict[str, tuple[vismem.VisMem, str]] = {}
    for index, case in enumerate(cases):
        if case.model not in equipped:
            equipped = {case.model: equip(case.model, device, dtype)}
        model, weights = equipped[case.model]
        inputs, kept = prompt(model.base, case.visual_tokens, case.batch), []
        for turn in range(rounds + 1):
            done = sum(work[:index]) + work[index] * turn / (rounds + 1)
            spent = time.monotonic() - began
            left = f"about {spent * (sum(work) - done) / done / 60:.0f} min left" if done else "warming up"
            print(f"[{index + 1}/{len(cases)}] {case}: round {turn}/{rounds}, {left}", file=sys.stderr, flush=True)
            runs = one_round(model, inputs, turn)
            kept += [runs] if turn else []
        yield summarize(case, weights, model, kept)


WORK = {"pocket": 1, "qwen-28m": 3, "qwen-200m": 12}  # relative time of a row, for the estimate on stderr alone


# What comes out.


def machine_facts(device: str, dtype: torch.dtype) -> dict[str, Any]:
    """What ran the benchmark: processor, cores and threads, versions, dtype."""
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), processor)
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu",
        "dtype": str(dtype).removeprefix("torch."),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "vismem": vismem.__version__,
    }


def budgets(results: list[Result]) -> list[dict[str, Any]]:
    """What each row was allowed and what it took; only the rows that a budget names."""
    found = []

    def add(row: Result, what: str, measured: float, allowed: float) -> None:
        name = str(Case(row.model, row.visual_tokens, row.batch))
        met = measured <= allowed
        found.append({"row": name, "what": what, "measured": measured, "allowed": round(allowed, 2), "met": met})

    for row in results:
        for name in ("off", "on"):
            add(row, f"time per token, {name}, of generate's", row.ratio[name].median, ALLOWED_RATIO)
        public = PUBLIC_CODE.get((row.model, row.visual_tokens))
        if public and row.batch == 1:
            for name in ("short_first", "short", "long"):
                allowed = public["share"] * public[name.removesuffix("_first")]
                add(row, f"steps for an invocation, {name}", row.invocation_steps[name].median, allowed)
    return found


def report(results: list[Result], device: str, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """All that is written to the JSON file."""
    config = vismem.VisMemConfig()
    return {
        "benchmark": "decode",
        "machine": machine_facts(device, dtype),
        "setting": {
            "rounds": rounds,
            "new_tokens": schedules(1)[0],
            "segment": SEGMENT,
            "query_length": config.query_length,
            "short_length": config.short_length,
            "long_length": config.long_length,
        },
        "rows": [asdict(result) for result in results],
        "public_code_steps": [
            {"model": model, "visual_tokens": tokens, "short": steps["short"], "long": steps["long"]}
            for (model, tokens), steps in PUBLIC_CODE.items()
        ],
        "budgets": budgets(results),
    }


def table(results: list[Result]) -> str:
    """The results as a Markdown table, then the budgets."""
    head = [
        "base",
        "visual",
        "batch",
        "generate ms",
        "off",
        "on",
        "tokens/s",
        "1st short",
        "short",
        "long",
        "scattered",
    ]
    lines = [head, ["-" * len(name) for name in head]]
    for row in results:
        steps = row.invocation_steps
        generate, on = row.token_ms["base"].median, row.token_ms["on"].median
        lines.append(
            [
                row.model + ("" if row.weights == "trained" else "*"),
                str(row.visual_tokens),
                str(row.batch),
                f"{generate:.2f}",
                f"{row.ratio['off'].median:.3f}x",
                f"{row.ratio['on'].median:.3f}x",
                f"{row.batch / on * 1e3:.1f}",
                *(f"{steps[name].median:.1f}" if name in steps else "" for name in ("short_first", "short", "long")),
                f"{steps['scattered'].median:.1f}" if "scattered" in steps else "",
            ]
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    rows = ["| " + " | ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines]
    config = vismem.VisMemConfig()
    notes = [
        "",
        "generate: per token, of the base's own generate; off, on: time per token against it (on: never invoked).",
        f"1st short, short, long: what an invocation of {config.short_length} or {config.long_length} vectors adds, "
        "in steps of generate, in every row of the batch at once;",
        "scattered: the same per invocation when every row invokes at another step. * random weights.",
        "",
    ]
    for entry in budgets(results):
        verdict = "met" if entry["met"] else "MISSED"
        took = f"{entry['measured']:g} (at most {entry['allowed']:g})"
        notes.append(f"{verdict:6} {entry['row']}: {entry['what']} {took}")
    return "\n".join([*rows, *notes])


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="vismem bench decode",
        description="Decoding speed against transformers' generate, and the cost of a memory invocation.",
        epilog="example: vismem bench decode --quick --only qwen-28m/256/1",
    )
    parser.add_argument(
        "--quick", action="store_true", help="two rounds instead of eight; writes nothing unless --json is given"
    )
    parser.add_argument("--rounds", type=int, help="rounds per row (default 8)")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="rows whose BASE/VISUAL/BATCH begins so")
    parser.add_argument("--json", type=Path, metavar="PATH", help="where to write (default results/bench_decode.json)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    args = parser.parse_args(argv)
    if args.rounds is not None and args.rounds < 1:
        parser.error(f"--rounds must be 1 or more, got {args.rounds}")
    if args.threads < 1:
        parser.error(f"--threads must be 1 or more, got {args.threads}")
    args.cases = [case for case in CASES if not args.only or any(str(case).startswith(name) for name in args.only)]
    if not args.cases:
        parser.error(f"--only {' '.join(args.only)} fits no row; there are {', '.join(map(str, CASES))}")
    args.rounds = args.rounds or (2 if args.quick else 8)
    if args.json is None and not args.quick and not args.only:
        args.json = Path("results/bench_decode.json")
    return args


def main(argv: list[str] | None = None) -> int:
    """Measures, prints the table, writes the JSON; 0 when done, 1 when the runs could not be compared."""
    args = arguments(argv)
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    dtype = getattr(torch, args.dtype)
    results: list[Result] = []
    try:
        for result in measure(args.cases, args.rounds, args.device, dtype):
            results.append(result)
            if args.json is not None:
                write(args.json, report(results, args.device, dtype, args.rounds))
    except RuntimeError as error:
        print(f"vismem bench decode: {error}", file=sys.stderr)
        return 1
    print(table(results))
    return 0


def write(path: Path, found: dict[str, Any]) -> None:
    """Writes the report, whole or not at all; rows that other runs on this machine left in the file stay."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file():
        earlier = json.loads(path.read_text())
        if earlier.get("machine") == found["machine"]:
            measured = {name_of(row) for row in found["rows"]}
            found["rows"] += [row for row in earlier["rows"] if name_of(row) not in measured]
            found["budgets"] += [entry for entry in earlier["budgets"] if entry["row"] not in measured]
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(found, indent=1) + "\n")
    partial.replace(path)


def name_of(row: dict[str, Any]) -> str:
    """A row's name in the table, as `--only` takes it."""
    return str(Case(row["model"], row["visual_tokens"], row["batch"]))


if __name__ == "__main__":
    sys.exit(main())
