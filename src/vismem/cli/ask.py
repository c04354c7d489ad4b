"""`vismem ask IMAGE... "QUESTION"`: writes the answer as it comes, with a mark at each invocation, then a trace."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vismem.cli.images import read_images
from vismem.cli.model_options import Loaded, add_model_options, load
from vismem.cli.parsing import (
    MOST_TOKENS,
    Misuse,
    Parser,
    command_parser,
    invocation,
    policy,
    temperature,
    whole,
)
from vismem.cli.streaming import SHAPES, Paper, Streamer
from vismem.decoding.policies import SPELLINGS, schedule_of


@dataclass(frozen=True)
class Answer:
    """What a model wrote.

    Args:
        text: the words, without marks.
        invocations: the `vismem.Invocation`s, in order.
        tokens: how many tokens the model sampled; end tokens and forced invocations are none.
        seconds: from the prompt to the last token; loading is not in it.
    """

    text: str
    invocations: list[Any]
    tokens: int
    seconds: float


def parser() -> Parser:
    found = command_parser(
        "vismem ask",
        "Answers a question about images, and shows where memory was invoked and of which kind.",
        'vismem ask before.png after.png "What changed?" --invocation short@0 --max-new-tokens 64',
        usage='vismem ask [IMAGE ...] "QUESTION" [options]',
    )
    found.add_argument(
        "words",
        nargs="*",
        metavar="IMAGE ... QUESTION",
        help="paths of images, or - for standard input; the question comes last",
    )
    found.add_argument("--json", action="store_true", help="print one JSON object instead")
    writing = found.add_argument_group("writing")
    writing.add_argument("--invocation", type=invocation, default="learned", metavar="POLICY", help=SPELLINGS)
    writing.add_argument(
        "--max-new-tokens", type=whole(1, MOST_TOKENS), default=256, metavar="N", help="most tokens (default: 256)"
    )
    writing.add_argument(
        "--temperature", type=temperature, default=0.0, metavar="T", help="sample at this temperature (default: greedy)"
    )
    writing.add_argument(
        "--seed", type=whole(0, 2**63 - 1), default=0, metavar="N", help="of sampling and of random:RATE (default: 0)"
    )
    add_model_options(found)
    return found


def parse(arguments: list[str]) -> argparse.Namespace:
    return parser().parse_intermixed_args(arguments)  # options may stand anywhere


def run(options: argparse.Namespace) -> int:
    names, question = split(options.words)
    check_schedule(options.invocation, bool(names))
    images = read_images(names)
    loaded = load(options)
    inputs = prompt(loaded.model, question, images)
    paper = Paper()
    if options.json:
        answer = write(loaded.model, inputs, options)
        print(json.dumps(report(question, names, answer, loaded)))
        return 0
    try:
        answer = write(
            loaded.model, inputs, options, Streamer(loaded.model.processor.tokenizer, loaded.model.tokens, paper)
        )
    finally:
        if not paper.fresh:  # also before an error's line
            paper.write("\n")
    trace(paper, answer, options.invocation)
    return 0


def split(words: list[str]) -> tuple[list[str], str]:
    """Image names and the question, which comes last.

    Raises:
        Misuse: if there is no question, or the last word is plainly an image.
    """
    if not words:
        raise Misuse('nothing asked: give images and a question, as in `vismem ask photo.png "What is this?"`')
    *names, question = words
    if not question.strip():
        raise Misuse("the question is empty")
    try:
        is_file = question == "-" or Path(question).is_file()
    except (OSError, ValueError):  # a long question is no path
        is_file = False
    if is_file:
        raise Misuse(f"no question: the last argument, {question}, is an image; the question comes after the images")
    return names, question


def check_schedule(text: str, sighted: bool) -> None:
    """Refuses a scheduled look at an image where there is none, before anything is loaded."""
    for _, step, kind in schedule_of(policy(text, 0)):
        if kind == "short" and not sighted:
            raise Misuse(f"--invocation asks for short@{step}, but short-term memory needs an image")


def prompt(model, question: str, images: list) -> dict:
    """The processor's tensors for one question about those images, on the model's device."""
    from vismem.serving.prompts import inputs_of, placeholders_of

    for mark in placeholders_of(model):
        if mark in question:
            raise Misuse(
                f"the question has the model's own mark {mark} in it; leave that out: images are named as files, "
                "before the question, and --invocation says who invokes memory"
            )
    shown = [{"type": "image", "image": image} for image in images]
    messages = [{"role": "user", "content": [*shown, {"type": "text", "text": question}]}]
    return inputs_of(model, messages)


def write(model, inputs: dict, options: argparse.Namespace, streamer: Streamer | None = None) -> Answer:
    """Lets the model answer."""
    sampling = {"do_sample": True, "temperature": options.temperature} if options.temperature else {"do_sample": False}
    start = time.perf_counter()
    out = model.generate(
        **inputs,
        **sampling,
        num_beams=1,
        max_new_tokens=options.max_new_tokens,
        invocation=policy(options.invocation, options.seed),
        seed=options.seed,
        streamer=streamer,
        return_dict_in_generate=True,
    )
    seconds = time.perf_counter() - start
    new = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    ends = set(model.tokens.end_ids.values())
    words = [token for token in new if token not in ends and token not in model.tokens.kind_of]
    found = out.invocations[0]
    sampled = len(words) + sum(not one.forced for one in found)
    return Answer(model.processor.tokenizer.decode(words, skip_special_tokens=True), found, sampled, seconds)


def report(question: str, names: list[str], answer: Answer, loaded: Loaded) -> dict:
    """What `--json` prints."""
    return {
        "question": question,
        "images": names,
        "answer": answer.text,
        "invocations": [one.to_dict() for one in answer.invocations],
        "tokens": answer.tokens,
        "seconds": round(answer.seconds, 4),
        "base": loaded.base,
        "checkpoint": loaded.checkpoint,
    }


def trace(paper: Paper, answer: Answer, invocation_text: str) -> None:
    """A line for each invocation, one for what was scheduled too late, and one for time and tokens."""
    paper.line()
    for one in answer.invocations:
        name = paper.paint(paper.name(one.kind).ljust(len(SHAPES["short"]) + len("short")), one.kind)
        how = "forced" if one.forced else "chosen"
        vectors = f"{one.length} vectors" if one.length else "formed nothing"
        paper.line(f"  {name}  at token {one.position:<4}  {vectors:<14}  {how}")
    late = len(schedule_of(policy(invocation_text, 0))) - len(answer.invocations)
    if late > 0:
        paper.line(f"  {late} scheduled after the answer's end, so not reached")
    rate = answer.tokens / answer.seconds if answer.seconds else 0.0
    tokens = f"{answer.tokens} token{'s' * (answer.tokens != 1)}"
    paper.line(paper.paint(f"  {tokens} in {answer.seconds:.2f} s ({rate:.0f} tokens/s)", "faint"))
