"""`vismem pocket build|evaluate|sample`: trains and evaluates the pocket base, and draws samples of its world.

`build` and `evaluate` run `experiments/pocket_base` of a source checkout. To add a step, give it a parser in `parser`
and a function in `STEPS`.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from vismem.cli.checkout import checkout_folder, importable
from vismem.cli.parsing import CommandError, Parser, add_debug, echo, log_to_stderr, whole
from vismem.interrupts import advising, termination_interrupts
from vismem.pocket import BASE_PATH

EXTRA = ("sklearn", "easy_vqa", "matplotlib", "tqdm")  # modules of the extra `pocket`
MANY = 10_000_000
CHECKOUT = "Needs a source checkout."


def parser() -> Parser:
    found = Parser(
        "vismem pocket",
        "Trains, evaluates and samples the small model that ships with the package.",
        "Details: `vismem pocket STEP --help`. Example:",
        "vismem pocket sample --out pictures --n 12 --enlarge 4",
    )
    steps = found.add_subparsers(dest="step", metavar="STEP", required=True, title="steps")

    def step(name: str, summary: str, example: str, details: str = "", **kwargs) -> Parser:
        description = f"{summary}. {details}".strip()
        added = steps.add_parser(
            name, help=summary, description=description, details="example:", example=example, **kwargs
        )
        add_debug(added)
        return added

    building = step(
        "build",
        "Trains the pocket base from scratch, or from a finished one; an interrupted build resumes",
        "vismem pocket build --out my-base --threads 4",
        CHECKOUT,
    )
    building.add_argument("--out", type=Path, default=BASE_PATH, metavar="FOLDER", help="default: in the package")
    building.add_argument("--start", type=Path, metavar="FOLDER", help="a finished base to continue from")
    building.add_argument("--work", type=Path, metavar="FOLDER", help="for checkpoints (default: OUT-work)")
    building.add_argument("--fresh", action="store_true", help="start over, whatever the work folder holds")
    building.add_argument("--vision-steps", type=whole(1, MANY), metavar="N", help="default: the recipe's")
    building.add_argument("--language-steps", type=whole(1, MANY), metavar="N", help="default: the recipe's")
    building.add_argument("--threads", type=whole(1, 1024), metavar="N", help="CPU threads (default: PyTorch's choice)")

    sampling = step(
        "sample",
        "Writes example pictures of the pocket world, with questions and answers in samples.jsonl",
        "vismem pocket sample --out pictures --n 12 --enlarge 4",
    )
    sampling.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="created if it does not exist")
    sampling.add_argument("--n", type=whole(1, MANY), default=12, metavar="N", help="examples (default: 12)")
    sampling.add_argument("--seed", type=whole(0, 2**63 - 1), default=0, metavar="N", help="default: 0")
    sampling.add_argument("--enlarge", type=whole(1, 64), default=1, metavar="N", help="times 64 pixels (default: 1)")

    measuring = step(
        "evaluate",
        "Evaluates a base, by task and by distance from the image",
        "vismem pocket evaluate --n 200 --out results/pocket_base.json",
        CHECKOUT,
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
    measuring.add_argument("--seed", type=whole(0, 2**63 - 1), default=0, metavar="N", help="default: 0")
    measuring.add_argument("--only", default="", metavar="TEXT", help="only cells whose name contains TEXT")

    return found


def parse(arguments: list[str]) -> argparse.Namespace:
    return parser().parse_args(arguments)


def run(options: argparse.Namespace) -> int:
    log_to_stderr(logging.INFO, "%(asctime)s %(message)s")
    try:
        STEPS[options.step](options)
    except ImportError as error:
        if (error.name or "").partition(".")[0] in EXTRA:
            raise CommandError(f'`vismem pocket` needs {error.name}: pip install "vismem[pocket]"') from error
        raise
    return 0


def folder() -> Path:
    return checkout_folder("experiments")


def build(options: argparse.Namespace) -> None:
    importable(folder(), "`vismem pocket build` needs")
    from pocket_base.build import build

    with termination_interrupts(), advising(lambda: "run the same command again to continue from the last minute"):
        build(
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
    importable(folder(), "`vismem pocket evaluate` needs")
    from pocket_base.evaluate import evaluate

    evaluate(options.base, options.out, options.plot, n=options.n, seed=options.seed, only=options.only)
    echo(f"wrote {options.out}")


STEPS = {
    "build": build,
    "evaluate": evaluate,
    "eval": evaluate,
    "sample": sample,
}
