"""`vismem audit`: tests whether a model uses its memory; replaces, probes and traces memories, and writes a report."""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path
from typing import Any

from vismem.audit.names import INTERVENTIONS, KINDS_IN_WORDS
from vismem.bundled import POCKET
from vismem.cli.model_options import add_model_options, load
from vismem.cli.parsing import (
    MAX_TOKENS,
    MOST_SEED,
    CommandError,
    UsageError,
    command_parser,
    echo,
    invocation_policy,
    log_to_stderr,
    whole,
)
from vismem.decoding.policies import SPELLINGS, read_policy
from vismem.interrupts import advising, termination_interrupts
from vismem.loading import silence_libraries

EXTRA = ("jinja2", "matplotlib", "sklearn", "datasets")
PLACED = "placed"


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = command_parser(
        "vismem audit",
        "Tests whether a memory is used. At every invocation it is replaced: by zeros, the mean memory, noise, the\n"
        "memory of another image, question or kind, or its slots shuffled. Probes read it, and attention to it is\n"
        "measured. Prints verdicts; writes a page (report.html) and all numbers (audit.json).\n"
        "Run the same command again to resume.",
        "vismem audit --data pocket:late --n 128 --out runs/audit/late\n"
        "  vismem audit --checkpoint my-memory --data questions.jsonl --rewards choice --probe category,answer",
    )
    parser.add_argument(
        "--data",
        required=True,
        metavar="NAME",
        help="questions: a .jsonl file, a folder, a hub data set, or a suite of the pocket world such as pocket:late",
    )
    parser.add_argument("--split", default="test", metavar="NAME", help="of a hub data set (default: test)")
    parser.add_argument(
        "--columns",
        type=columns,
        metavar="OURS=THEIRS",
        help="columns to rename, separated by commas: prompt=question,answer=gt",
    )
    parser.add_argument(
        "--rewards",
        metavar="NAMES",
        help="rewards that score answers, separated by commas (default: exact; pocket for pocket's suites)",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/audit"), metavar="FOLDER", help="default: %(default)s")
    asking = parser.add_argument_group("questions and answers")
    asking.add_argument(
        "--n",
        type=whole(1, MAX_TOKENS),
        default=128,
        metavar="N",
        help="questions with replaced memories (default: 128)",
    )
    asking.add_argument(
        "--reference",
        type=whole(1, MAX_TOKENS),
        metavar="N",
        help="questions to probe and take other memories from, --n included (default: 4 times --n)",
    )
    asking.add_argument(
        "--invocation",
        type=policy_or_placed,
        default="learned",
        metavar="POLICY",
        help=f"{SPELLINGS}; or placed: at each row's `places`",
    )
    asking.add_argument(
        "--max-new-tokens", type=whole(1, MAX_TOKENS), default=256, metavar="N", help="token limit (default: 256)"
    )
    asking.add_argument("--batch-size", type=whole(1, 4096), default=16, metavar="N", help="default: 16")
    asking.add_argument(
        "--seed", type=whole(0, MOST_SEED), default=0, metavar="N", help="of questions, noise, folds (default: 0)"
    )
    how = parser.add_argument_group("analyses")
    how.add_argument(
        "--interventions",
        type=interventions,
        default=INTERVENTIONS,
        metavar="NAMES",
        help=f"some of {','.join(INTERVENTIONS)}",
    )
    how.add_argument(
        "--probe",
        type=names,
        default=(),
        metavar="COLUMNS",
        help="columns to predict from memories, besides `attributes`",
    )
    how.add_argument(
        "--map", choices=("pca", "tsne"), default="pca", help="projection of memories to two dimensions (default: pca)"
    )
    add_model_options(parser)
    options = parser.parse_args(arguments)
    if options.reference is not None and options.reference < options.n:
        raise UsageError(f"--reference {options.reference} is less than --n {options.n}; it includes those questions")
    return options


def run(options: argparse.Namespace) -> int:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    log_to_stderr(logging.WARNING)
    logging.getLogger("vismem").setLevel(logging.INFO)
    silence_libraries(debug=options.debug)  # before importing them, as some log on import
    try:
        from vismem.audit.audit import AuditOptions, audit
        from vismem.audit.questions import questions_and_unread
    except ImportError as error:
        if (error.name or "").partition(".")[0] in EXTRA:
            raise CommandError(f"`vismem audit` needs {error.name}: pip install 'vismem[eval]'") from error
        raise
    from vismem.training.rewards import load_rewards

    pocket = options.data.partition(":")[0] == POCKET
    rewards = [name for name in (options.rewards or (POCKET if pocket else "exact")).split(",") if name]
    scorer = load_rewards(rewards)
    count = options.reference or 4 * options.n
    rows, unread = questions_and_unread(options.data, count, options.seed, options.split, options.columns)
    loaded = load(options)
    chosen = PLACED if options.invocation == PLACED else read_policy(options.invocation, options.seed)
    about = {
        "base": loaded.base,
        "checkpoint": loaded.checkpoint,
        "data": options.data,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
    }
    advice = f"finished answers are in {options.out}: run the same command again to resume"
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
    print_verdicts(found)
    echo(f"\n{options.out / 'report.html'}")
    return 0


def print_verdicts(found: dict[str, Any]) -> None:
    for kinds, words in KINDS_IN_WORDS.items():
        own = [verdict for verdict in found["verdicts"] if verdict["kinds"] == kinds]
        if own:
            echo(f"\n{words.capitalize()}")
        for verdict in own:
            size = ", large" if verdict["large"] else ""
            echo(f"  {verdict['question']} {verdict['answer']}{size}: {verdict['text']}")


def columns(text: str) -> dict[str, str]:
    pairs = [part.partition("=") for part in names(text)]
    if not pairs or not all(ours and theirs for ours, _, theirs in pairs):
        raise argparse.ArgumentTypeError(f"must be pairs such as prompt=question,answer=gt, got {text!r}")
    return {ours.strip(): theirs.strip() for ours, _, theirs in pairs}


def policy_or_placed(text: str) -> str:
    return text if text == PLACED else invocation_policy(text)


def names(text: str) -> tuple[str, ...]:
    """The type of options that take names separated by commas."""
    return tuple(filter(None, map(str.strip, text.split(","))))


def interventions(text: str) -> tuple[str, ...]:
    """The type of `--interventions`; sorts them as in `INTERVENTIONS`."""
    given = names(text)
    if not given or not set(given) <= set(INTERVENTIONS):
        raise argparse.ArgumentTypeError(f"must be some of {', '.join(INTERVENTIONS)}, got {text!r}")
    return tuple(name for name in INTERVENTIONS if name in given)
