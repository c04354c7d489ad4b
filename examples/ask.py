"""Asks the pocket model about a picture, offline: `python examples/ask.py [IMAGE [QUESTION]]`."""

import sys
from pathlib import Path

import vismem
from vismem.data.images import open_image
from vismem.pocket import MEMORY_PATH, load_base

defaults = [Path(__file__).parent / "shelf.png", "What does row 2 cost with its promotion?"]
picture, question = (sys.argv[1:] + defaults[len(sys.argv) - 1 :])[:2]

base, processor = load_base()
model = vismem.VisMem.from_pretrained(MEMORY_PATH, base=base, processor=processor)

content = [{"type": "image", "image": open_image(picture)}, {"type": "text", "text": question}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
)
out = model.generate(**inputs, max_new_tokens=64, return_dict_in_generate=True)

answer = out.sequences[0, inputs["input_ids"].shape[1] :]
print(processor.decode(answer, skip_special_tokens=True))
for found in out.invocations[0]:
    print(f"{found.kind}-term memory at token {found.position}: {found.length} vectors")
