"""`vismem ask IMAGE... "QUESTION"`: streams the answer with a marker at each invocation, then prints a trace."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vismem.cli.model_options import add_model_options, load
from vismem.cli.parsing import (
    MAX_TOKENS,
    MOST_SEED,
    CommandError,
    UsageError,
    command_parser,
    invocation_policy,
    temperature,
    whole,
)
from vismem.cli.streaming import SHAPES, Streamer, TerminalWriter
from vismem.decoding.policies import SPELLINGS, read_policy, schedule_of

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from vismem.decoding.trace import Invocation
    from vismem.model import VisMem


@dataclass(frozen=True)
class AskResult:
    """What the model generated."""

    text: str  # without markers
    invocations: list[Invocation]
    tokens: int  # sampled: without end tokens and forced invocations
    seconds: float  # of prefill and decoding


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = command_parser(
        "vismem ask",
        "Answers a question about images, and shows where memory was invoked and of which kind.",
        'vismem ask before.png after.png "What changed?" --invocation short@0 --max-new-tokens 64',
        usage='vismem ask [IMAGE ...] "QUESTION" [options]',
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="IMAGE ... QUESTION",
        help="paths of images, or - for standard input; the question comes last",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    decoding = parser.add_argument_group("decoding")
    decoding.add_argument("--invocation", type=invocation_policy, default="learned", metavar="POLICY", help=SPELLINGS)
    decoding.add_argument(
        "--max-new-tokens", type=whole(1, MAX_TOKENS), default=256, metavar="N", help="token limit (default: 256)"
    )
    decoding.add_argument(
        "--temperature", type=temperature, default=0.0, metavar="T", help="sample at this temperature (default: greedy)"
    )
    decoding.add_argument(
        "--seed", type=whole(0, MOST_SEED), default=0, metavar="N", help="of sampling and of random:RATE (default: 0)"
    )
    add_model_options(parser)
    return parser.parse_intermixed_args(arguments)  # options may come anywhere


def run(options: argparse.Namespace) -> int:
    names, question = split_words(options.words)
    check_schedule(options.invocation, has_image=bool(names))
    images = read_images(names)
    loaded = load(options)
    inputs = prompt(loaded.model, question, images)
    if options.json:
        result = generate(loaded.model, inputs, options)
        found = {
            "question": question,
            "images": names,
            "answer": result.text,
            "invocations": [invocation.to_dict() for invocation in result.invocations],
            "tokens": result.tokens,
            "seconds": round(result.seconds, 4),
            "base": loaded.base,
            "checkpoint": loaded.checkpoint,
        }
        print(json.dumps(found))
        return 0
    out = TerminalWriter()
    try:
        streamer = Streamer(loaded.model.processor.tokenizer, loaded.model.tokens, out)
        result = generate(loaded.model, inputs, options, streamer)
    finally:
        if not out.at_line_start:  # an error message follows on its own line, too
            out.write("\n")
    print_trace(out, result, options.invocation)
    return 0


def split_words(words: list[str]) -> tuple[list[str], str]:
    """Splits image names from the question, which comes last. Raises UsageError if there is no question."""
    if not words:
        raise UsageError('nothing asked: give images and a question, as in `vismem ask photo.png "What is this?"`')
    *names, question = words
    if not question.strip():
        raise UsageError("the question is empty")
    try:
        is_file = question == "-" or Path(question).is_file()
    except (OSError, ValueError):  # too long for a path, or a NUL in it
        is_file = False
    if is_file:
        raise UsageError(f"no question: the last argument, {question}, is an image; put the question after the images")
    return names, question


def check_schedule(text: str, *, has_image: bool) -> None:
    """Raises UsageError if short-term memory is scheduled without an image."""
    for _, step, kind in schedule_of(read_policy(text, 0)):
        if kind == "short" and not has_image:
            raise UsageError(f"--invocation asks for short@{step}, but short-term memory needs an image")


def read_images(names: list[str]) -> list[Image]:
    """Opens images; `-` is standard input. Raises UsageError for a wrong name, CommandError for an unusable image."""
    from vismem.data.images import BadImageError, NoImageFileError, open_image

    if names.count("-") > 1:
        raise UsageError("standard input (-) can be read once only")
    try:
        return [open_image(read_standard_input() if name == "-" else Path(name)) for name in names]
    except NoImageFileError as error:
        raise UsageError(str(error)) from error
    except BadImageError as error:
        raise CommandError(str(error)) from error


def read_standard_input() -> dict[str, str | bytes]:
    from vismem.data.images import MOST_BYTES

    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError("no image on standard input: pipe one in, as in `vismem ask - QUESTION < image.png`")
    try:
        content = sys.stdin.buffer.read(MOST_BYTES + 1)
    except OSError as error:
        raise CommandError(f"cannot read standard input: {error.strerror or error}") from error
    if len(content) > MOST_BYTES:
        raise CommandError(f"the image on standard input is larger than {MOST_BYTES // 2**20} MiB, the limit")
    return {"bytes": content, "path": "on standard input"}


def prompt(model: VisMem, question: str, images: list[Image]) -> dict[str, Tensor]:
    """The processor's tensors for one question, on the model's device."""
    from vismem.data.batches import chat_inputs, reserved_texts

    for marker in reserved_texts(model):
        if marker in question:
            raise UsageError(
                f"the question contains the model's special token {marker}: remove it; name image files before the "
                "question, and use --invocation to invoke memory"
            )
    content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": question}]
    return chat_inputs(model, [{"role": "user", "content": content}])


def generate(
    model: VisMem, inputs: dict[str, Any], options: argparse.Namespace, streamer: Streamer | None = None
) -> AskResult:
    sampling: dict[str, Any] = {"do_sample": False}
    if options.temperature:
        sampling = {"do_sample": True, "temperature": options.temperature}
    start = time.perf_counter()
    out: Any = model.generate(
        **inputs,
        **sampling,
        num_beams=1,
        max_new_tokens=options.max_new_tokens,
        invocation=read_policy(options.invocation, options.seed),
        seed=options.seed,
        streamer=streamer,
        return_dict_in_generate=True,
    )
    seconds = time.perf_counter() - start
    new = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    ends = set(model.tokens.end_ids.values())
    words = [token for token in new if token not in ends and token not in model.tokens.kind_of]
    invocations = out.invocations[0]
    sampled = len(words) + sum(not invocation.forced for invocation in invocations)
    text = model.processor.tokenizer.decode(words, skip_special_tokens=True)
    return AskResult(text, invocations, sampled, seconds)


def print_trace(out: TerminalWriter, result: AskResult, invocation_text: str) -> None:
    """Prints a line for each invocation, the number of unreached ones, then tokens and time."""
    out.line()
    for invocation in result.invocations:
        name = out.name(invocation.kind).ljust(len(SHAPES["short"]) + len("short"))
        how = "forced" if invocation.forced else "chosen"
        vectors = f"{invocation.length} vectors" if invocation.length else "formed nothing"
        out.line(f"  {out.paint(name, invocation.kind)}  at token {invocation.position:<4}  {vectors:<14}  {how}")
    unreached = len(schedule_of(read_policy(invocation_text, 0))) - len(result.invocations)
    if unreached > 0:
        out.line(f"  {unreached} scheduled after the answer's end, so not reached")
    rate = result.tokens / result.seconds if result.seconds else 0.0
    tokens = f"{result.tokens} token{'s' * (result.tokens != 1)}"
    out.line(out.paint(f"  {tokens} in {result.seconds:.2f} s ({rate:.0f} tokens/s)", "faint"))
