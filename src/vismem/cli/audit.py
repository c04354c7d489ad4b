"""`vismem audit`: is it memory, or just some latent computation? Replaces, reads and watches a memory, and reports."""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path

from vismem.audit.names import INTERVENTIONS, KINDS_IN_WORDS
from vismem.bundled import POCKET
from vismem.cli.model_options import add_model_options, load, silence_libraries
from vismem.cli.parsing import (
    MOST_TOKENS,
    Failure,
    Misuse,
    Parser,
    command_parser,
    echo,
    invocation,
    log_to_stderr,
    policy,
    whole,
)
from vismem.decoding.policies import SPELLINGS
from vismem.interrupts import advising, termination_interrupts

EXTRA = ("jinja2", "matplotlib", "sklearn", "datasets")
PLACED = "placed"


def parser() -> Parser:
    found = command_parser(
        "vismem audit",
        "Asks whether a memory is really used. At every invocation it is replaced: by zeros, the mean memory, noise,\n"
        "the memory of another image, question or kind, or its slots shuffled. Probes read it, and attention to it is\n"
        "watched. Prints verdicts with their numbers; writes one page (report.html) and all numbers (audit.json).\n"
        "A stopped run goes on where it was.",
        "vismem audit --data pocket:late --n 128 --out runs/audit/late\n"
        "  vismem audit --checkpoint my-memory --data questions.jsonl --rewards choice --probe category,answer",
    )
    found.add_argument(
        "--data",
        required=True,
        metavar="NAME",
        help="questions: a .jsonl file, a folder, a hub data set, or a suite of the pocket world such as pocket:late",
    )
    found.add_argument("--split", default="test", metavar="NAME", help="of a hub data set (default: test)")
    found.add_argument(
        "--columns",
        type=columns,
        metavar="OURS=THEIRS",
        help="names of the data's columns that differ, with commas, as prompt=question,answer=gt",
    )
    found.add_argument(
        "--rewards",
        metavar="NAMES",
        help="what scores answers, with commas (default: exact; pocket for pocket's suites)",
    )
    found.add_argument("--out", type=Path, default=Path("runs/audit"), metavar="FOLDER", help="default: %(default)s")
    asking = found.add_argument_group("questions and answers")
    asking.add_argument(
        "--n",
        type=whole(1, MOST_TOKENS),
        default=128,
        metavar="N",
        help="questions with replaced memories (default: 128)",
    )
    asking.add_argument(
        "--reference",
        type=whole(1, MOST_TOKENS),
        metavar="N",
        help="questions answered once, those included, to probe and to take other memories from (default: 4 times --n)",
    )
    asking.add_argument(
        "--invocation",
        type=policy_or_placed,
        default="learned",
        metavar="POLICY",
        help=f"{SPELLINGS}; or placed: where a row's column `places` says",
    )
    asking.add_argument(
        "--max-new-tokens", type=whole(1, MOST_TOKENS), default=256, metavar="N", help="most tokens (default: 256)"
    )
    asking.add_argument("--batch-size", type=whole(1, 4096), default=16, metavar="N", help="default: 16")
    asking.add_argument(
        "--seed", type=whole(0, 2**63 - 1), default=0, metavar="N", help="of questions, noise, folds (default: 0)"
    )
    how = found.add_argument_group("what is looked at")
    how.add_argument(
        "--interventions",
        type=interventions,
        default=INTERVENTIONS,
        metavar="NAMES",
        help=f"some of {','.join(INTERVENTIONS)}",
    )
    how.add_argument(
        "--probe", type=names, default=(), metavar="COLUMNS", help="columns to read from memories, besides `attributes`"
    )
    how.add_argument(
        "--map", choices=("pca", "tsne"), default="pca", help="how memories are drawn in two dimensions (default: pca)"
    )
    add_model_options(found)
    return found


def parse(arguments: list[str]) -> argparse.Namespace:
    options = parser().parse_args(arguments)
    if options.reference is not None and options.reference < options.n:
        raise Misuse(f"--reference {options.reference} is less than --n {options.n}, whose questions are part of it")
    return options


def run(options: argparse.Namespace) -> int:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    log_to_stderr(logging.WARNING)
    logging.getLogger("vismem").setLevel(logging.INFO)
    silence_libraries(debug=options.debug)  # before they are imported, as some speak up then
    try:
        from vismem.audit.audit import AuditOptions, audit
        from vismem.audit.questions import questions_and_unread
    except ImportError as error:
        if (error.name or "").partition(".")[0] in EXTRA:
            raise Failure(f"`vismem audit` needs {error.name}: pip install 'vismem[eval]'") from error
        raise
    from vismem.training.rewards import load_rewards

    pocket = options.data.partition(":")[0] == POCKET
    rewards = [name for name in (options.rewards or (POCKET if pocket else "exact")).split(",") if name]
    scorer = load_rewards(rewards)
    count = options.reference or 4 * options.n
    rows, unread = questions_and_unread(options.data, count, options.seed, options.split, options.columns)
    loaded = load(options)
    chosen = PLACED if options.invocation == PLACED else policy(options.invocation, options.seed)
    about = {
        "base": loaded.base,
        "checkpoint": loaded.checkpoint,
        "data": options.data,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
    }
    advice = f"what is answered is kept in {options.out}: run the same command again to continue"
    with termination_interrupts(), advising(lambda: advice):
        found = audit(
            loaded.model,
            rows,
            scorer,
            AuditOptions(
                out=options.out,
                n=options.n,
                invocation=chosen,
                batch_size=options.batch_size,
                max_new_tokens=options.max_new_tokens,
                seed=options.seed,
                probe=options.probe,
                interventions=options.interventions,
                map=options.map,
                about=about,
            ),
            unread,
        )
    show(found)
    echo(f"\n{options.out / 'report.html'}")
    return 0


def show(found: dict) -> None:
    """The verdicts on the terminal."""
    for kinds, words in KINDS_IN_WORDS.items():
        own = [one for one in found["verdicts"] if one["kinds"] == kinds]
        if own:
            echo(f"\n{words.capitalize()}")
        for one in own:
            echo(f"  {one['question']} {one['answer']}{', large' if one['large'] else ''}: {one['text']}")


def columns(text: str) -> dict[str, str]:
    """The type of `--columns`."""
    pairs = [part.partition("=") for part in names(text)]
    if not pairs or not all(ours and theirs for ours, _, theirs in pairs):
        raise argparse.ArgumentTypeError(f"must be pairs as prompt=question,answer=gt, got {text!r}")
    return {ours.strip(): theirs.strip() for ours, _, theirs in pairs}


def policy_or_placed(text: str) -> str:
    """The type of `--invocation`."""
    return text if text == PLACED else invocation(text)


def names(text: str) -> tuple[str, ...]:
    """The type of options that take names with commas."""
    return tuple(name for name in (part.strip() for part in text.split(",")) if name)


def interventions(text: str) -> tuple[str, ...]:
    """The type of `--interventions`, in the order of the table."""
    given = names(text)
    unknown = [name for name in given if name not in INTERVENTIONS]
    if unknown or not given:
        raise argparse.ArgumentTypeError(f"there are {', '.join(INTERVENTIONS)}; got {text!r}")
    return tuple(name for name in INTERVENTIONS if name in given)
