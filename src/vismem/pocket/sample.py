"""`vismem pocket sample`: example pictures of the pocket world, and questions about them with their answers."""

from __future__ import annotations

from pathlib import Path
from random import Random

from PIL import Image

from vismem import jsonl
from vismem.pocket.conversations import sample_conversation
from vismem.pocket.tasks import TASKS


def sample(out: Path, n: int = 12, seed: int = 0, enlarge: int = 1) -> None:
    """Write `n` examples: pictures `0003_0.png` (64x64, times `enlarge`) and one line each in `samples.jsonl`.

    A line has `images` (file names), `question`, `reply` (the reference, with its steps), `answer` and `task`.
    """
    if n < 1 or enlarge < 1:
        raise ValueError(f"n and enlarge must be 1 or more, not {n} and {enlarge}")
    out = Path(out)
    lines = []
    for number in range(n):
        conversation = sample_conversation(Random(f"{seed}-{number}"), "test", task=TASKS[number % len(TASKS)])
        out.mkdir(parents=True, exist_ok=True)  # only once there is something to write
        names = []
        for place, image in enumerate(conversation.images):
            names.append(f"{number:04d}_{place}.png")
            side = image.width * enlarge
            image.resize((side, side), Image.Resampling.NEAREST).save(out / names[-1])
        asked = conversation.turns[-1].question
        line = {"images": names, "question": asked.text, "reply": asked.reply}
        lines.append({**line, "answer": asked.answer, "task": asked.task})
    jsonl.write(out / "samples.jsonl", lines)
