"""What users write, as mypy sees it (`make types`); never run. A wrong annotation in the package fails here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from typing_extensions import assert_type

import vismem
from vismem import Answer, Invocation, Request, RequestQueue, VisMem, VisMemConfig, VisMemOutput, invocation
from vismem.config import Kind
from vismem.data import load_dataset_rows
from vismem.decoding.policies import Policy, RowState
from vismem.loading import load_model
from vismem.training.arguments import MemoryTrainingArguments
from vismem.training.trainer import MemoryTrainer


class EveryTenth:
    """A custom policy, without a base class."""

    samples = False
    injects = True
    forms: tuple[Kind, ...] = ("short",)
    guarded = True

    def start(self) -> None:
        """Nothing to prepare."""

    def inject(self, row: RowState) -> Kind | None:
        return "short" if row.sighted and row.sampled % 10 == 9 else None


def ask(base: Any, processor: Any) -> tuple[str, list[Invocation]]:
    """Equip, ask, read what happened."""
    model = VisMem(base, processor, VisMemConfig(query_length=8, short_length=16, long_length=16))
    inputs = processor(text="?", images=Image.new("RGB", (8, 8)), return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=8, invocation="learned", seed=0, return_dict_in_generate=True)
    assert_type(out, VisMemOutput | Tensor)
    assert isinstance(out, VisMemOutput)
    assert_type(out.sequences, Tensor)
    for one in out.invocations[0]:
        assert_type(one.kind, Kind)
        assert_type(one.position, int)
        if one.memory is not None:
            assert_type(one.memory, Tensor)
    text: str = processor.decode(out.sequences[0])
    return text, out.invocations[0]


def plain(model: VisMem, inputs: dict[str, Any]) -> Tensor:
    """Token ids alone."""
    out = model.generate(**inputs, max_new_tokens=8)
    assert_type(out, VisMemOutput | Tensor)
    return out if isinstance(out, Tensor) else out.sequences


def policies(model: VisMem, inputs: dict[str, Any]) -> None:
    """`invocation` takes all of the package's policies, and custom ones."""
    given: list[Policy] = [
        invocation.Learned(),
        invocation.Off(),
        invocation.Only(kind="short"),
        invocation.Random(0.2, where="anywhere", seed=[1, 2]),
        invocation.Forced([(0, 4, "short"), (0, 9, "long")]),
        invocation.After(mark=7, plan={1: "short"}),
        EveryTenth(),
    ]
    for policy in given:
        model.generate(**inputs, invocation=policy)


def queue(model: VisMem, prompts: list[dict[str, Tensor]]) -> list[int]:
    """Requests of several users in one batch."""
    requests = RequestQueue(model, batch_size=4, max_new_tokens=16)
    answers = [a for p in prompts for a in requests.submit(Request(p, seed=1, top=3, invocation=EveryTenth()))]
    while len(requests):
        for done in requests.step():
            assert_type(done, Answer)
            if done.finish == "error":
                print(done.error)
    requests.cancel(answers)
    for answer in model.stream_batch(prompts, batch_size=2, invocation="off"):
        assert_type(answer.tokens, list[int])
        for top in answer.tops:
            if top is not None:
                assert_type(top.likeliest, list[tuple[int, float]])
    return answers[0].tokens


def keep(model: VisMem, folder: Path) -> VisMem:
    """Save and load."""
    model.save_pretrained(folder)
    loaded = VisMem.from_pretrained(folder, base=model.base, processor=model.processor)
    assert_type(loaded, VisMem)
    assert_type(load_model().model, VisMem)
    assert_type(load_model(checkpoint=str(folder), device="cpu", say=print).checkpoint, str | None)
    return loaded


def train(model: VisMem, file: Path) -> None:
    """One stage, from Python."""
    args = MemoryTrainingArguments(str(file.parent), stage="stage1", learning_rate=5e-5, max_steps=1)
    rows = load_dataset_rows(file)
    MemoryTrainer(model, args, rows, reward_funcs=["exact", reward]).train()
    out = model(input_ids=Tensor(), labels=Tensor())
    assert out.loss is not None


def reward(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]:
    """A custom reward with TRL's signature."""
    return [1.0 for _ in completions]


def mistakes(model: VisMem, inputs: dict[str, Any]) -> None:
    """What must be refused: an ignore that is not needed is an error itself."""
    VisMemConfig(query_lenght=8)  # type: ignore[call-arg]
    invocation.Only(kind="middle")  # type: ignore[arg-type]
    invocation.Random(0.1, where="everywhere")  # type: ignore[arg-type]
    model.generate(**inputs, invocation=3)  # type: ignore[arg-type]
    Request(inputs, seed="one")  # type: ignore[arg-type]
    vismem.VisMen  # type: ignore[attr-defined]  # noqa: B018
