"""What transformers' own `generate` makes ready for us: settings, processors, criteria, positions, image features.

Every answer, of `VisMem.generate` as of a queue of requests, is prepared by the base's `generate`, with our decoding
method put in the place of its loop (`custom_generate`), so that everything said to it means here what it means there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import CompileConfig, GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import EosTokenCriteria, GenerationMode, MaxLengthCriteria, StopStringCriteria
from transformers.generation.configuration_utils import ALL_STATIC_CACHE_IMPLEMENTATIONS

from vismem.backbones import Backbone, Image
from vismem.backbones.base import CACHE_NAMES
from vismem.config import VisMemConfig
from vismem.decoding.cache import Slots
from vismem.decoding.invocation import Policy
from vismem.decoding.rows import Settings

KEPT: WeakKeyDictionary[Any, Slots] = WeakKeyDictionary()  # a base's compiled slots, since compiling takes long


@dataclass
class Prepared:
    """One call of `generate`, ready to be decoded.

    Args:
        base: the base model.
        input_ids: [B, L].
        images: each prompt's images.
        settings: of its rows.
        copies: answers per prompt.
        kwargs: the model's other inputs.
    """

    base: Any
    input_ids: Tensor
    images: list[list[Image]]
    settings: Settings
    copies: int
    kwargs: dict[str, Any]


def prepared(
    backbone: Backbone,
    tokenizer: Any,
    delimiters: Callable[[], frozenset[int]],
    policy: Policy,
    decode: Callable[[Prepared], Any],
    inputs: Tensor | None,
    *,
    generator: torch.Generator | None = None,
    record: bool = False,
    streamer: Any = None,
    **kwargs: Any,
) -> Any:
    """Lets the base's `generate` prepare a call and hands it to `decode`, whose result is returned.

    Args:
        backbone: of the base.
        tokenizer: for stop strings, where none is given.
        delimiters: gives the ids after which a phrase ends.
        policy: of invocation.
        inputs, **kwargs: as for `VisMem.generate`.

    Raises:
        ValueError: for what memory decoding cannot honour, for a prompt longer than the base's context, and for images
            that do not fit the prompt.
    """
    if kwargs.get("assistant_model") is not None:
        raise ValueError("assisted decoding is not supported with memory; leave assistant_model out")
    if isinstance(kwargs.get("custom_generate"), str):
        raise ValueError("custom_generate is not supported with memory: memory is itself a decoding method")
    input_ids = kwargs.get("input_ids") if inputs is None else inputs
    if input_ids is None:
        raise ValueError("generate needs input_ids: pass the processor's output, model.generate(**inputs)")
    check_length(backbone.base, input_ids.shape[1])
    tokenizer = kwargs.pop("tokenizer", tokenizer)
    copies = setting(backbone.base, kwargs, "num_return_sequences") or 1
    stop_strings = setting(backbone.base, kwargs, "stop_strings")
    kwargs.pop("num_return_sequences", None)
    kwargs.pop("stop_strings", None)
    if copies > 1 or stop_strings:
        # transformers loses these two on the way to a custom decoding method, so they are taken along by hand.
        if kwargs.get("generation_config") is None:
            kwargs.update(num_return_sequences=1, stop_strings=None)
        else:  # said in there: keywords beside a config are deprecated
            config = copy.deepcopy(kwargs["generation_config"])
            config.num_return_sequences, config.stop_strings = 1, None
            kwargs["generation_config"] = config
    if stop_strings:
        criteria = kwargs.get("stopping_criteria") or []
        kwargs["stopping_criteria"] = StoppingCriteriaList([*criteria, StopStringCriteria(tokenizer, stop_strings)])
    vision = {name: kwargs[name] for name in backbone.image_inputs if kwargs.get(name) is not None}
    images = backbone.rows_of_images(input_ids == backbone.image_token_id, backbone.images(**vision))

    def method(
        base: Any,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Any:
        refuse_unsupported(generation_config, model_kwargs)
        limits = [c.max_length for c in stopping_criteria if isinstance(c, MaxLengthCriteria)]
        ends = [c.eos_token_id.tolist() for c in stopping_criteria if isinstance(c, EosTokenCriteria)]
        others = (c for c in stopping_criteria if not isinstance(c, (MaxLengthCriteria, EosTokenCriteria)))
        pad = generation_config._pad_token_tensor
        settings = Settings(
            policy=policy,
            config=generation_config,
            processors=for_copies(logits_processor, len(input_ids), copies),
            criteria=StoppingCriteriaList(others),
            ends=frozenset(token for found in ends for token in found),
            budget=min(limits, default=2**31) - input_ids.shape[1],
            delimiters=delimiters,
            pad=0 if pad is None else int(pad.flatten()[0]),
            generator=generator,
            record=record,
            streamer=streamer,
        )
        return decode(Prepared(base, input_ids, images, settings, copies, model_kwargs))

    return backbone.base.generate(inputs, custom_generate=method, streamer=streamer, **kwargs)


def context_of(base: Any) -> int:
    """How many tokens a base was made for; a number beyond all use where its config does not say."""
    return getattr(base.config.get_text_config(), "max_position_embeddings", None) or 2**31 - 1


def check_length(base: Any, length: int, name: str = "the prompt") -> None:
    """Refuses a prompt that the base has no positions for, before memory is allocated that grows with its square.

    Raises:
        ValueError: if it has more tokens than the base's context.
    """
    if length > (context := context_of(base)):
        raise ValueError(f"{name} has {length} tokens, but the base was made for {context} at most; shorten it")


@dataclass
class Layout:
    """That keys and values are to lie in slots, and how readings of them are compiled.

    Args:
        compiled: keywords of `torch.compile`, or None.
    """

    compiled: dict[str, Any] | None

    @classmethod
    def wanted(cls, base: Any, kwargs: dict[str, Any]) -> Layout | None:
        """What `cache_implementation`, `compile_config` and `disable_compile` ask for; takes them out of `kwargs`.

        As in transformers, a static cache on a GPU is compiled unless `disable_compile=True`; elsewhere only where a
        `compile_config` is given.

        Raises:
            ValueError: if the base's attention cannot read slots.
        """
        if setting(base, kwargs, "cache_implementation") not in ALL_STATIC_CACHE_IMPLEMENTATIONS:
            return None
        attention = base.config.get_text_config()._attn_implementation
        if attention not in ("sdpa", "eager"):
            raise ValueError(
                f"cache_implementation='static' needs attn_implementation 'sdpa' or 'eager', not {attention!r}"
            )
        given, disabled = setting(base, kwargs, "compile_config"), setting(base, kwargs, "disable_compile")
        config = kwargs.get("generation_config")
        if config is not None and config.cache_implementation is not None:
            kwargs["generation_config"] = config = copy.deepcopy(config)
            config.cache_implementation = None
        if config is None or kwargs.get("cache_implementation") is not None:
            kwargs["cache_implementation"] = "dynamic"  # for reading the prompts
        for name in ("compile_config", "disable_compile"):
            kwargs.pop(name, None)
        if disabled or (given is None and base.device.type != "cuda"):
            return cls(None)
        keywords = {name: value for name, value in vars(given or CompileConfig()).items() if not name.startswith("_")}
        return cls({**keywords, "dynamic": False})

    def slots(self, call: Prepared, rows: int, memory: VisMemConfig) -> Slots:
        """Slots for that many rows of a call; compiled ones are kept with the base and used again.

        They have room for prompt and answer, and compiled ones, which had better not grow, for all the memories
        that the guards allow.
        """
        base, config, device = call.base, call.base.config.get_text_config(), call.base.device
        columns = self.columns(call, memory)
        if self.compiled is None:
            return Slots(config, rows, columns, device)
        kept = KEPT.get(base)
        if kept is None or kept.in_use or (kept.rows, kept.compiled) != (rows, self.compiled) or kept.columns < columns:
            kept = KEPT[base] = Slots(config, rows, columns, device, self.compiled)
        kept.clear()
        return kept

    def columns(self, call: Prepared, memory: VisMemConfig) -> int:
        """How long the slots of a call's rows are laid out."""
        columns = call.input_ids.shape[1] + call.settings.budget
        if self.compiled is None:
            return columns
        return columns + memory.max_invocations * (max(memory.short_length, memory.long_length) + 1)


def setting(base: Any, kwargs: dict[str, Any], name: str) -> Any:
    """A generation setting as `generate` would find it: a keyword, then the config given, then the base's defaults."""
    if kwargs.get(name) is not None:
        return kwargs[name]
    places = (kwargs.get("generation_config"), base.generation_config)
    return next((value for place in places if (value := getattr(place, name, None)) is not None), None)


def for_copies(processors: LogitsProcessorList, prompts: int, copies: int) -> LogitsProcessorList:
    """Processors that hold each prompt's padding (the repetition penalty), for as many rows as there are answers."""
    found = LogitsProcessorList(processors)
    for place, processor in enumerate(processors):
        padding = getattr(processor, "prompt_ignore_length", None)
        if isinstance(padding, Tensor) and len(padding) == prompts:
            found[place] = copy.copy(processor)
            found[place].prompt_ignore_length = padding.repeat_interleave(copies)
    return found


def refuse_unsupported(config: GenerationConfig, kwargs: dict[str, Any]) -> None:
    """Refuses, in one line, what this decoder cannot honour."""
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(f"memory decodes greedily or by sampling, not by {mode.value}; set num_beams=1")
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(config, name):
            raise ValueError(f"{name}=True is not supported by memory decoding; output_scores and output_logits are")
    for name in CACHE_NAMES:
        cache = kwargs.get(name)
        if cache is not None and cache.get_seq_length() > 0:
            raise ValueError(f"a filled {name} cannot be continued: memory slots in it have no token ids")
