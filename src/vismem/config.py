"""The configuration of a memory: lengths, widths and LoRA settings, with the paper's values as defaults.

Every field is checked when the object is created, so a wrong value is reported where it was written. Symbols are those
of the paper (arXiv 2511.11007).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["short", "long"]
KINDS: tuple[Kind, ...] = ("short", "long")
LARGEST = 2**31  # a size must be below this; JSON has no bounds
ALLOWED_LENGTHS = (2, 4, 8, 16, 32)


class SettingsError(ValueError):
    """An invalid setting; the message names it, the value and what is allowed."""


@dataclass(frozen=True)
class VisMemConfig:
    """Configuration of a memory; immutable, and saved as `vismem_config.json`.

    Args:
        query_length: K, number of query vectors.
        short_length: N_s, number of short-term memory vectors, one of 2, 4, 8, 16, 32.
        long_length: N_l, number of long-term memory vectors, one of 2, 4, 8, 16, 32.
        builder_layers: L, transformer layers of the query builder.
        builder_heads: attention heads of the query builder.
        builder_width: inner width of the query builder; None is min(hidden_size, 960), which keeps the whole memory
            below one percent of every base in the paper.
        lora_r, lora_alpha, lora_dropout: rank, scale and dropout of both formers' LoRA adapters (query and value
            projections, Tab. 4).
        memory_init: `"pooled"` starts short memory from pooled patches and long memory from the mean token
            embedding, each plus a learned offset. `"attended"` differs in short memory: each vector starts from one
            block of patches that the query chooses; the choice must be trained. `"learned"` uses learned constants
            alone, the literal Eq. 6.
        content: `"formed"`, or `"soft"`, a baseline: the same number of vectors at the same positions, but learned
            constants. Builder, LoRA and `memory_init` are then unused.
        max_invocations: maximum number of invocations in one answer, sampled or random; forced ones are not limited.
        min_gap: minimum number of sampled tokens between two invocations.
        delimiters: strings that end a phrase. The first that is a single token initialises the four memory tokens'
            rows; `vismem.invocation.Random` can be limited to positions after any of them.
        token_noise: noise added to those rows, relative to their RMS.

    Raises:
        ValueError: if a value is invalid; the message names the field, the value and the rule.

    Example:
        >>> VisMemConfig(short_length=16).short_length
        16
    """

    query_length: int = 8
    short_length: int = 8
    long_length: int = 16
    builder_layers: int = 2
    builder_heads: int = 8
    builder_width: int | None = None
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.1
    memory_init: Literal["pooled", "attended", "learned"] = "pooled"
    content: Literal["formed", "soft"] = "formed"
    max_invocations: int = 8
    min_gap: int = 4
    delimiters: tuple[str, ...] = (".", ",", ";", ":", "?", "!", "\n")
    token_noise: float = 1e-2

    def __post_init__(self) -> None:
        for name in ("query_length", "builder_layers", "builder_heads", "lora_r", "lora_alpha"):
            fits = _is_whole(getattr(self, name), 1)
            self._require(name, fits, "a whole number, 1 or more (and below 2**31)")
        for name in ("max_invocations", "min_gap"):
            fits = _is_whole(getattr(self, name), 0)
            self._require(name, fits, "a whole number, 0 or more (and below 2**31)")
        for name in ("short_length", "long_length"):
            fits = _is_whole(value := getattr(self, name), 1) and value in ALLOWED_LENGTHS
            self._require(name, fits, f"one of {ALLOWED_LENGTHS}")
        width, delimiters = self.builder_width, self.delimiters
        fits = width is None or (_is_whole(width, 1) and width % self.builder_heads == 0)
        self._require("builder_width", fits, f"None or a multiple of builder_heads ({self.builder_heads})")
        self._require("lora_dropout", _is_number(self.lora_dropout) and 0 <= self.lora_dropout < 1, "in [0, 1)")
        self._require("token_noise", _is_number(self.token_noise) and 0 <= self.token_noise < LARGEST, "0 or more")
        inits = ("pooled", "attended", "learned")
        self._require("memory_init", self.memory_init in inits, "'pooled', 'attended' or 'learned'")
        self._require("content", self.content in ("formed", "soft"), "'formed' or 'soft'")
        fits = isinstance(delimiters, (list, tuple)) and all(isinstance(text, str) and text for text in delimiters)
        self._require("delimiters", fits and delimiters, "a non-empty list of strings")
        object.__setattr__(self, "delimiters", tuple(delimiters))

    def _require(self, name: str, holds: object, rule: str) -> None:
        if not holds:
            raise ValueError(f"VisMemConfig.{name} must be {rule}, got {shortened(getattr(self, name))}")

    def length(self, kind: Kind) -> int:
        """N of that kind: the number of vectors that one invocation inserts."""
        return self.short_length if kind == "short" else self.long_length

    def inner_width(self, hidden_size: int) -> int:
        """The query builder's inner width for a base of width `hidden_size`; a multiple of its heads."""
        return self.builder_width or min(hidden_size, 960) // self.builder_heads * self.builder_heads

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {**dataclasses.asdict(self), "delimiters": list(self.delimiters)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> VisMemConfig:
        """The inverse of `to_dict`; raises ValueError for unknown names."""
        unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"VisMemConfig has no field {unknown[0]!r}; was the file written by a newer version?")
        return cls(**values)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> VisMemConfig:
        """A named preset: `"paper"` (lengths 8 and 16), `"paper-table4"` (4 and 8) or `"pocket"` (16 and 16)."""
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; choose from {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **changes})


def shortened(value: Any) -> str:
    """A value for a message, in at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _is_whole(value: Any, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value < LARGEST


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "paper-table4": {"short_length": 4, "long_length": 8},
    # The pocket base shows an image as 16 visual tokens and has never read a coarser view of one.
    "pocket": {
        "short_length": 16,
        "long_length": 16,
        "builder_width": 128,
        "lora_r": 8,
        "lora_alpha": 16,
        # Its replies say where they look before a colon, and what they see after it.
        "delimiters": (":", "."),
        "min_gap": 1,
    },
}
