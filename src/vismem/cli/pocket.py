"""`vismem pocket build|evaluate|sample`: trains and evaluates the pocket base, and draws samples of its world.

`build` and `evaluate` run `experiments/pocket_base` of a source checkout. To add a step, give it a parser in `parse`
and a function in `STEPS`.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from vismem.cli.checkout import import_from
from vismem.cli.parsing import MOST_SEED, CommandError, Parser, add_step, echo, log_to_stderr, whole
from vismem.interrupts import advising, termination_interrupts
from vismem.pocket import BASE_PATH

EXTRA = ("sklearn", "easy_vqa", "matplotlib", "tqdm")  # modules of the extra `pocket`
MANY = 10_000_000


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(
        "vismem pocket",
        "Trains, evaluates and samples the small model that ships with the package.",
        "Details: `vismem pocket STEP --help`. Example:",
        "vismem pocket sample --out pictures --n 12 --enlarge 4",
    )
    steps = parser.add_subparsers(dest="step", metavar="STEP", required=True, title="steps")

    building = add_step(
        steps,
        "build",
        "Trains the pocket base from scratch, or from a finished one",
        "Trains the pocket base from scratch, or from a finished one; an interrupted build resumes. Needs a source\n"
        "checkout.",
        "vismem pocket build --out my-base --threads 4",
    )
    building.add_argument("--out", type=Path, default=BASE_PATH, metavar="FOLDER", help="default: in the package")
    building.add_argument("--start", type=Path, metavar="FOLDER", help="a finished base to continue from")
    building.add_argument("--work", type=Path, metavar="FOLDER", help="for checkpoints (default: OUT-work)")
    building.add_argument("--fresh", action="store_true", help="start over, whatever the work folder holds")
    building.add_argument("--vision-steps", type=whole(1, MANY), metavar="N", help="default: the recipe's")
    building.add_argument("--language-steps", type=whole(1, MANY), metavar="N", help="default: the recipe's")
    building.add_argument("--threads", type=whole(1, 1024), metavar="N", help="CPU threads (default: PyTorch's choice)")

    sampling = add_step(
        steps,
        "sample",
        "Writes example pictures of the pocket world",
        "Writes example pictures of the pocket world, with questions and answers in samples.jsonl.",
        "vismem pocket sample --out pictures --n 12 --enlarge 4",
    )
    sampling.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="created if it does not exist")
    sampling.add_argument("--n", type=whole(1, MANY), default=12, metavar="N", help="examples (default: 12)")
    sampling.add_argument("--seed", type=whole(0, MOST_SEED), default=0, metavar="N", help="default: 0")
    sampling.add_argument("--enlarge", type=whole(1, 64), default=1, metavar="N", help="times 64 pixels (default: 1)")

    measuring = add_step(
        steps,
        "evaluate",
        "Evaluates a base, by task and by distance from the image",
        "Evaluates a base, by task and by distance from the image. Needs a source checkout.",
        "vismem pocket evaluate --n 200 --out results/pocket_base.json",
        aliases=["eval"],
    )
    measuring.add_argument("--base", type=Path, default=BASE_PATH, metavar="FOLDER", help="default: the pocket base")
    measuring.add_argument(
        "--out", type=Path, default=Path("results/pocket_base.json"), metavar="FILE", help="default: %(default)s"
    )
    measuring.add_argument("--plot", type=Path, metavar="FILE", help="also plot the results to FILE (PNG)")
    measuring.add_argument(
        "--n", type=whole(1, MANY), default=200, metavar="N", help="questions per cell (default: 200)"
    )
    measuring.add_argument("--seed", type=whole(0, MOST_SEED), default=0, metavar="N", help="default: 0")
    measuring.add_argument("--only", default="", metavar="TEXT", help="only cells whose name contains TEXT")

    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> int:
    log_to_stderr(logging.INFO, "%(asctime)s %(message)s")
    try:
        STEPS[options.step](options)
    except ImportError as error:
        if (error.name or "").partition(".")[0] in EXTRA:
            raise CommandError(f'`vismem pocket` needs {error.name}: pip install "vismem[pocket]"') from error
        raise
    return 0


def build(options: argparse.Namespace) -> None:
    program = import_from("experiments", "pocket_base.build", "`vismem pocket build` needs")
    with termination_interrupts(), advising(lambda: "run the same command again to continue from the last minute"):
        program.build(
            out=options.out,
            resume=not options.fresh,
            work=options.work,
            vision_steps=options.vision_steps,
            language_steps=options.language_steps,
            threads=options.threads,
            start=options.start,
        )
    echo(f"wrote {options.out}")


def sample(options: argparse.Namespace) -> None:
    from vismem.pocket.sample import sample

    sample(options.out, n=options.n, seed=options.seed, enlarge=options.enlarge)
    echo(f"wrote {options.n} examples to {options.out / 'samples.jsonl'}")


def evaluate(options: argparse.Namespace) -> None:
    program = import_from("experiments", "pocket_base.evaluate", "`vismem pocket evaluate` needs")
    program.evaluate(options.base, options.out, options.plot, n=options.n, seed=options.seed, only=options.only)
    echo(f"wrote {options.out}")


STEPS = {
    "build": build,
    "evaluate": evaluate,
    "eval": evaluate,
    "sample": sample,
}
