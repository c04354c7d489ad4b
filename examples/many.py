"""Asks the pocket model many questions at once, offline: answers appear as they are done, in one live batch of four."""

from pathlib import Path

from PIL import Image

import vismem
from vismem.pocket import MEMORY_PATH, load_base

base, processor = load_base()
model = vismem.VisMem.from_pretrained(MEMORY_PATH, base=base, processor=processor)
picture = Image.open(Path(__file__).parent / "shelf.png")


def prompt(question: str) -> dict:
    content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return processor.apply_chat_template([{"role": "user", "content": content}], **options)


questions = [f"What is the price at row {row}, column {column}?" for row in range(1, 4) for column in range(1, 5)]
questions += [f"What does row {row} cost with its promotion?" for row in range(1, 5)]
requests = [vismem.Request(prompt(question), tag=question) for question in questions]
for answer in model.stream_batch(requests, batch_size=4, max_new_tokens=64):
    words = processor.decode(answer.tokens, skip_special_tokens=True)
    print(f"{answer.tag}  {words}  [{' '.join(found.kind for found in answer.invocations)}]")
