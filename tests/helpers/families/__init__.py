"""A tiny real model of every supported family, one file each: `build(seed, ...)` and `processor()`.

A new family is one file here and one line below; every test that takes the fixture `family` then runs on it.
Where its towers differ among themselves, `VARIANTS` lists other arguments of `build` for the tests of the tower.
Where the base rearranges its projector's outputs, `projected(base, inputs)` returns them view by view.
Where its code comes with the model, `LOADING` holds the keywords that `from_pretrained` then needs.
"""

from __future__ import annotations

from families import (
    gemma3,
    idefics3,
    internvl,
    llava,
    llava_next,
    llava_onevision,
    llava_onevision1_5,
    qwen2_5_vl,
    qwen2_vl,
    qwen3_vl,
    qwen3_vl_moe,
    smolvlm,
)

FAMILIES = {
    "gemma3": gemma3,
    "idefics3": idefics3,
    "internvl": internvl,
    "llava": llava,
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "llavaonevision1_5": llava_onevision1_5,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen2_vl": qwen2_vl,
    "qwen3_vl": qwen3_vl,
    "qwen3_vl_moe": qwen3_vl_moe,
    "smolvlm": smolvlm,
}

# What no family can change is tested on two that differ in all that matters: separate projections, learned positions
# and a tied head; a fused projection, rotation, windows and an untied head.
UNLIKE = ["idefics3", "qwen2_5_vl"]
