"""A tiny real model of every supported family, one file each: `build(seed, ...)` and `processor()`.

A new family is one file here and one line below; every test that takes the fixture `family` then runs on it.
"""

from __future__ import annotations

from families import idefics3, qwen2_5_vl

FAMILIES = {
    "idefics3": idefics3,
    "qwen2_5_vl": qwen2_5_vl,
}

# What no family can change is tested on two that differ in all that matters: separate projections, learned positions
# and a tied head; a fused projection, rotation, windows and an untied head.
UNLIKE = ["idefics3", "qwen2_5_vl"]
