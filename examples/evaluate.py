"""Evaluates a memory, step by step: `python examples/evaluate.py`, offline, on the pocket model, in about a minute.

The file is a notebook as well: editors that know `# %%` run it cell by cell. `vismem eval` and `vismem audit` do all
this and more from the command line, for any base and data.
"""

# %% A model with its memory, and questions.
# The pocket world's late questions ask about a picture that has left the base's attention window some turns ago.
# Every question is a `Row`: a prompt, its pictures, the answer, and columns for the rewards and the tables.

from functools import partial

from vismem.analysis.heatmaps import Panel, figure_of, png
from vismem.analysis.replacement import next_token_kl
from vismem.analysis.short_attention import short_term_attention
from vismem.analysis.slot_attention import attention_to_slots
from vismem.data import prompt_inputs
from vismem.decoding.markers import pieces, plain
from vismem.evaluation.answering import answer
from vismem.evaluation.intervals import bootstrap_difference, bootstrap_mean
from vismem.loading import load_model
from vismem.pocket.suites import rows

model = load_model().model
questions = rows("late", n=1, seed=1)
print(f"{len(questions)} questions, such as: {questions[3].prompt[-1]['content'][0]['text']}")

# %% Without memory and with it: the same questions, greedy, in one live batch each.
# Rewards are those of training; "pocket" compares the result that a reply states with the reference.

ask = partial(answer, model, questions, "pocket", batch_size=20, max_new_tokens=48)
vanilla = [record.score for record in ask(invocation="off")]
learned = [record.score for record in ask(invocation="learned")]
long_only = [record.score for record in ask(invocation="long")]  # short-term memory alone is taken away

# %% Intervals. Each mean has one; the difference is paired, question by question, which makes its interval narrower.
# Where every answer is right an interval from 100 to 100 says just that: the questions are too few, or too easy.

for name, scores in (("without memory", vanilla), ("with memory", learned), ("long-term memory only", long_only)):
    mean, low, high = bootstrap_mean(scores)
    print(f"{name:<22} {100 * mean:5.1f} %  (95 % interval {100 * low:.1f} to {100 * high:.1f})")
mean, low, high = bootstrap_difference(learned, vanilla)
print(f"{'difference':<22} {100 * mean:+5.1f} points  ({100 * low:+.1f} to {100 * high:+.1f})")

# %% An intervention: is it this memory that matters, or only that there is one?
# Answers are written once, with what replay needs of them (`record=True`). Then each memory is replaced while the words
# stay, and the distribution of the next word is compared: with nothing, and with the memory of another question.

few = questions[::3]
inputs = prompt_inputs(model.processor, few)
out = model.generate(**inputs, record=True, return_dict_in_generate=True, do_sample=False, max_new_tokens=48)


def another(row, index, invocation):
    """The memory of the next question that invoked the same kind, or the same one where there is none."""
    others = [found for step in range(1, len(few)) for found in out.invocations[(row + step) % len(few)]]
    return next((found.memory for found in others if found.kind == invocation.kind), invocation.memory)


for name, replace in (("taken out", lambda row, index, invocation: None), ("of another question", another)):
    shifts = next_token_kl(model, inputs, out.rollout, replace)
    mean, low, high = bootstrap_mean([shift.first for shift in shifts], groups=[shift.row for shift in shifts])
    print(f"memory {name:<20} KL of the next word {mean:.2f} nats ({low:.2f} to {high:.2f}), {len(shifts)} memories")

# %% A look: where short-term memory looked in the picture, and what the answer read of it.
# Attention of the memory's positions to the patches, and of the answer's tokens to the memory's vectors. In the pocket
# model the first is nearly even, and the second is on the cell that the question is about.

seen = short_term_attention(model, inputs, out.invocations, [row.images for row in few])
attention = attention_to_slots(model, inputs, out.rollout)
look = seen[0]
row, answered = few[look.row], out.rollout[look.row].tokens.tolist()
reading = attention[look.row].reading(look.index)  # [layers, tokens, vectors]
after = attention[look.row].positions[look.index] + 1  # from the memory's end token on
print("answer:", plain(pieces(answered, model.processor.tokenizer, model.tokens)), "| reference:", row.completion)
print(f"busiest place of the look: {look.on(0).max():.1f} times the even share")
print(f"busiest place of what was read: {look.read(reading.mean((0, 1)), 0).max():.1f} times the even share")
for name, share in attention[look.row].shares.items():
    print(f"  the answer's attention to {name:<7} {100 * float(share[:, after:].mean()):4.1f} %")

# %% As a picture. In a notebook `figure` alone shows it; as a script this writes a file only if you say where.

figure = figure_of(
    row.images[0],
    [
        Panel("the picture"),
        Panel("memory looked at", look.on(0)),
        Panel("read of it", look.read(reading.mean((0, 1)), 0)),
    ],
)
drawn = png(figure)  # png(figure, "look.png") writes it
print(f"the figure has {len(drawn) // 1024} KiB")

# %% What is left: numbers that depend on chance need several seeds, and an interval of a few points some thousand
# questions. `vismem audit` replaces memories in seven ways, with intervals and a verdict for each, on one page.
