"""Models that invoke often, and rows decoded alone, to compare batches with."""

from __future__ import annotations

import tiny
import torch

import vismem
from vismem.decoding import cache


def tempting(family: str, pull: float = 6, **changes) -> vismem.VisMem:
    """A model that invokes more often the larger `pull` is."""
    model = tiny.equip(family, min_gap=2, **changes)
    with torch.no_grad():
        for name, parameter in model.tokens.named_parameters():
            if name.endswith("output") or model.tokens.tied:
                parameter.mul_(pull)
    return model


def readings(monkeypatch) -> list[int]:
    """The number of rows in each prefill, recorded from now on."""
    widths, read = [], cache.Slots.read

    def noted(self, backbone, inputs, rows):
        widths.append(len(inputs))
        return read(self, backbone, inputs, rows)

    monkeypatch.setattr(cache.Slots, "read", noted)
    return widths


SAMPLING = [
    {},
    {"do_sample": True, "temperature": 0.9, "top_k": 50},
    {"do_sample": True, "repetition_penalty": 1.2, "temperature": 0.8},
]


def prompts(model, count: int = 9) -> list[dict]:
    """Prompts of different lengths with no, one or two images."""
    return [
        tiny.prompts(
            model.processor,
            [tiny.message("look again! " * (i % 3 + 1), *(tiny.picture(i + j) for j in range((0, 1, 2)[i % 3])))],
        )
        for i in range(count)
    ]


def alone(model, inputs, **settings):
    """The answer of a row by itself, as ids, with its invocations."""
    out = model.generate(**inputs, return_dict_in_generate=True, **settings)
    return out.sequences[0, inputs["input_ids"].shape[1] :].tolist(), out.invocations[0]
