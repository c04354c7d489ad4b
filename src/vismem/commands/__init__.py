"""The commands of `vismem`, one file each: `parse(arguments)` reads what a command takes, `run(options)` does it.

torch and transformers are imported inside `run`, so that help and misuse are answered at once.
"""

from __future__ import annotations

COMMANDS = {
    "ask": "answer a question about images, and show where memory was invoked",
    "app": "ask in the browser, and look into each invocation",
    "info": "what a base and its memory are made of",
    "train": "train a memory: warm-up, stage I, stage II",
    "eval": "the paper's tables, one command each; tasks for lmms-eval",
    "audit": "is memory really used? replaced, probed and watched, with a report",
    "serve": "serve a model as OpenAI's chat completions are served",
    "pocket": "make, sample and evaluate the small model that comes with the package",
    "bench": "measure speed (needs a source checkout)",
}
