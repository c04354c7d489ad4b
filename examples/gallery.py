"""Writes a gallery: pictures, questions, answers with marks where memory was invoked, and where memory looked.

`python examples/gallery.py` asks the pocket model, offline, and writes `docs/gallery/`. Another model, other data:

    python examples/gallery.py --base NAME --checkpoint NAME --data questions.jsonl --rewards exact --out gallery

The file is a notebook as well: editors that know `# %%` run it cell by cell.
"""

# %% What is asked, and of whom. Examples are taken in order, none is picked by hand.

import argparse
from functools import cache
from itertools import islice
from pathlib import Path

from vismem.analysis.heatmaps import Panel, figure_of, png, scale_end
from vismem.analysis.short_attention import short_term_attention
from vismem.analysis.slot_attention import attention_to_slots
from vismem.data import load_dataset_rows, prompt_inputs
from vismem.decoding.markers import SHAPES, pieces, plain
from vismem.evaluation.answering import scores
from vismem.loading import load_model
from vismem.pocket.suites import rows
from vismem.training.rewards import load_rewards

MOST = 24  # questions that are drawn of each cell
CELLS = [  # of the pocket's suites
    ("late", "colour/8"),
    ("late", "row/6"),
    ("strange", "rotation/digit"),
    ("rules", "promotion"),
    ("both", "promotion/4"),
    ("describe", "prices"),
    ("pairs", "compare"),
]

parser = argparse.ArgumentParser(description="A gallery of answers with memory.")
parser.add_argument("--base", help="a base model (default: the pocket model)")
parser.add_argument("--checkpoint", help="a memory (default: the pocket's)")
parser.add_argument("--device", default="auto", help="cpu, cuda, ... (default: a GPU where there is one)")
parser.add_argument("--data", help="questions in a file or on the hub, in TRL's layout (default: the pocket's)")
parser.add_argument("--rewards", default="pocket", help="what tells right from wrong, such as exact")
parser.add_argument("--examples", type=int, default=len(CELLS), help="how many, before one that went wrong is added")
parser.add_argument("--seed", type=int, default=1, help="of the pocket's questions")
parser.add_argument("--max-new-tokens", type=int, default=128)
parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "docs" / "gallery")
options, _ = parser.parse_known_args()

loaded = load_model(options.checkpoint, options.base, options.device)
model, rewards = loaded.model, load_rewards(options.rewards)


@cache
def of_cell(suite, cell, n):
    """The first questions of one cell."""
    return [row for row in rows(suite, n, options.seed) if row.columns["cell"] == cell]


def questions():
    """The list: the first question of each of the pocket's cells, then the second, ...; or the file's as it is."""
    if options.data:
        yield from load_dataset_rows(options.data)
        return
    for turn in range(MOST):
        for suite, cell in CELLS:
            yield of_cell(suite, cell, 1 if turn == 0 else MOST)[turn]


# %% Answers: with memory, and without.


def ask(row):
    """Two answers to a question: the model's own, and the base's."""
    inputs = prompt_inputs(model.processor, [row])
    inputs = {n: t.to(model.device, model.dtype if t.is_floating_point() else None) for n, t in inputs.items()}
    found = {}
    for name, invocation in (("memory", "learned"), ("vanilla", "off")):
        out = model.generate(
            **inputs,
            invocation=invocation,
            record=True,
            return_dict_in_generate=True,
            do_sample=False,
            max_new_tokens=options.max_new_tokens,
        )
        tokens = out.rollout[0].tokens.tolist()
        reply = model.processor.tokenizer.decode(tokens, skip_special_tokens=True)
        marked = plain(pieces(tokens, model.processor.tokenizer, model.tokens))
        found[name] = {"out": out, "marked": marked, "score": scores([row], [reply], [tokens], rewards)[0]}
    return inputs, found


asked = []
listed = questions()
for row in islice(listed, options.examples):
    asked.append((row, *ask(row)))
passed = 0  # questions that went well and are left out, between those and the first that did not
while all(answers["memory"]["score"] >= 1 for *_, answers in asked) and (row := next(listed, None)):
    example = (row, *ask(row))
    if example[2]["memory"]["score"] < 1:
        asked.append(example)
    else:
        passed += 1


# %% Where memory looked, and what the answer read of it.

options.out.mkdir(parents=True, exist_ok=True)
for old in options.out.glob("[0-9][0-9]-*.png"):
    old.unlink()
busiest, read = [], []  # the highest value of every map


def draw(number, row, inputs, out):
    """Draws every picture of a question with each look at it; gives the files, and a line about every look."""
    seen = short_term_attention(model, inputs, out.invocations, [row.images])
    (attention,) = attention_to_slots(model, inputs, out.rollout)
    lines, figures = [], []
    several = len(seen) > 1
    for look in seen:
        shown = {view.picture for view in look.views}
        busiest.append(max(float(look.on(picture).max()) for picture in shown))
        got = 100 * float(attention.until_next(look.index).sum(-1).mean())
        lines.append(
            f"{name_of(look, several)}: the busiest place got {busiest[-1]:.1f} times the even share of the look; "
            f"{got:.0f} % of the answer's attention went to this memory"
        )
    for index in range(len(row.images)):
        top, below = [Panel("the picture" if len(row.images) == 1 else f"picture {index + 1}")], []
        for look in seen:
            if any(view.picture == index for view in look.views):
                top.append(Panel(f"{name_of(look, several)} looked at", look.on(index)))
            if any(look.views[view].picture == index for view, _ in look.starts):
                heat = look.read(attention.until_next(look.index).mean((0, 1)), index)
                below.append(Panel(f"read of {name_of(look, several)}", heat))
                read.append(float(heat.max()))
        figures.append(([*top, *below], len(top) + len(below)) if len(top) < 3 else ([*top, None, *below], len(top)))
    most = scale_end([panel.heat for panels, _ in figures for panel in panels if panel and panel.heat is not None])
    names = [f"{number:02}-{index + 1}.png" for index in range(len(figures))]
    for name, picture, (panels, columns) in zip(names, row.images, figures, strict=True):
        png(figure_of(picture, panels, most, columns), options.out / name)
    return names, lines


def name_of(look, several):
    """The look's mark, numbered where an answer has several."""
    return SHAPES["short"] + (str(look.index + 1) if several else "")


# %% The page.


def said(message):
    """The words of a message."""
    return " ".join(part["text"] for part in message["content"] if part["type"] == "text").strip()


def heading(row):
    """Where a question is from, and how far behind its last picture lies."""
    shown = [turn for turn, message in enumerate(row.prompt) if any(p["type"] == "image" for p in message["content"])]
    turns = (len(row.prompt) - 1 - shown[-1]) // 2 if shown else 0
    name = " ".join(str(row.columns[key]) for key in ("suite", "cell") if key in row.columns) or row.id
    return name + (f", asked {turns} turns after the picture" if turns else "")


page = []
for number, (row, inputs, answers) in enumerate(asked, 1):
    names, lines = draw(number, row, inputs, answers["memory"]["out"])
    page += [f"## {number}. {heading(row)}", "", f"**{said(row.prompt[-1])}**", ""]
    page += [" ".join(f"![picture {i + 1}]({name})" for i, name in enumerate(names)), ""] if names else []
    page += ["| | answer | score |", "|---|---|---|"]
    for name, label in (("memory", "with memory"), ("vanilla", "without")):
        words = answers[name]["marked"].replace("|", "\\|").replace("\n", " ")
        page.append(f"| {label} | {words} | {answers[name]['score']:.2g} |")
    reference = row.completion.replace("|", "\\|").replace("\n", " ")
    page += [f"| reference | {reference} | |", "", *[f"- {line}" for line in lines], ""]

right = {name: sum(answers[name]["score"] >= 1 for *_, answers in asked) for name in ("memory", "vanilla")}
rule = f"the first {options.examples} of {f'`{Path(options.data).name}`' if options.data else 'a fixed list'}"
if not options.data:
    cells = ", ".join(f"`{suite}/{cell}`" for suite, cell in CELLS)
    rule += (
        f", which has the first question of each of {cells}, then the second of each, and so on (seed {options.seed})"
    )
if len(asked) > options.examples:
    rule += f"; as all of these went well, the first after them that did not is added, past {passed} that did"
head = [
    "# Gallery",
    f"Answers of the base `{loaded.base}` with the memory `{loaded.checkpoint or 'untrained'}`, made by "
    f"`python examples/gallery.py`. Which questions: {rule}. Of these {len(asked)}, {right['memory']} are right with "
    f"memory and {right['vanilla']} without. These are examples, not a measurement.",
    f"- `[{SHAPES['short']}short]` and `[{SHAPES['long']}long]` stand where the model invoked memory. Only short-term "
    "memory looks at the picture.\n"
    f"- **{SHAPES['short']} looked at**: attention of the short-term memory's positions to the picture's patches, mean "
    "over heads, layers and vectors.\n"
    f"- **read of {SHAPES['short']}**: attention of the answer's tokens to the memory's vectors, from its end to the "
    "next short-term memory, mean over heads, layers and tokens. Each vector is drawn where it started.\n"
    "- 1 is an even share, and colour begins above it. All maps of a question have one scale.",
]
if busiest:
    found = f"The busiest place of a look got {min(busiest):.1f} to {max(busiest):.1f} times the even share"
    if read:
        found += f", that of what an answer read {min(read):.1f} to {max(read):.1f} times"
    head.append(found + ".")
    if read and max(busiest) < 1.6 < max(read):
        head[-1] += " This memory looks almost everywhere alike; what the answers read of it is a few regions."
text = "\n\n".join(head) + "\n\n" + "\n".join(page).rstrip() + "\n"
(options.out / "index.md").write_text(text, encoding="utf-8")

# %% What was made.

size = sum(path.stat().st_size for path in options.out.iterdir()) / 1024
print(f"{len(asked)} examples, {right['memory']} right with memory and {right['vanilla']} without")
print(f"{options.out / 'index.md'} and its pictures, {size:.0f} KiB")
