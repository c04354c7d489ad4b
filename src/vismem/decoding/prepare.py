"""What transformers' own `generate` makes ready for us: settings, processors, criteria, positions, image features.

Every answer, of `VisMem.generate` as of a queue of requests, is prepared by the base's `generate`, with our decoding
method put in the place of its loop (`custom_generate`), so that everything said to it means here what it means there.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import CompileConfig, DynamicCache, GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import (
    EosTokenCriteria,
    GenerationMode,
    MaxLengthCriteria,
    StopStringCriteria,
    logits_process,
)

from vismem.backbones import Backbone, Image
from vismem.backbones.base import CACHE_NAMES
from vismem.config import VisMemConfig
from vismem.decoding.cache import Slots
from vismem.decoding.policies import Policy
from vismem.decoding.row import ALL_OR_NONE, FiniteRows, Settings

# What transformers calls them; its other names are older ones of "static" or need storage that slots do not have.
SLOT_CACHES = ("static", "sliding_window", "hybrid", "hybrid_chunked")
DYNAMIC_CACHES = ("dynamic", "offloaded")
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
    memory_ids: list[int],
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
        memory_ids: of the four tokens.
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
    if setting(backbone.base, kwargs, "token_healing"):
        raise ValueError("token_healing is not supported with memory: it rewrites the prompt; set token_healing=False")
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
        off = not (policy.samples or policy.injects)
        refuse_unsupported(generation_config, model_kwargs, off)
        limits = [c.max_length for c in stopping_criteria if isinstance(c, MaxLengthCriteria)]
        ends = [c.eos_token_id.tolist() for c in stopping_criteria if isinstance(c, EosTokenCriteria)]
        others = (c for c in stopping_criteria if not isinstance(c, (MaxLengthCriteria, EosTokenCriteria)))
        pad = generation_config._pad_token_tensor
        settings = Settings(
            policy=policy,
            config=generation_config,
            processors=row_by_row(
                spared(for_copies(logits_processor, len(input_ids), copies), [] if off else memory_ids)
            ),
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
        """Takes the layout that `cache_implementation` asks for out of `kwargs`; returns None for a dynamic cache.

        The keyword counts most, then the generation config given, then the base's own. As in transformers, a static
        cache on a GPU is compiled unless `disable_compile=True`; elsewhere only where a `compile_config` is given.

        Raises:
            ValueError: for a cache that memory decoding cannot use, or attention that cannot read slots.
        """
        wanted = cache_implementation(base, kwargs)
        if wanted not in SLOT_CACHES:
            return None
        attention = base.config.get_text_config()._attn_implementation
        if attention not in ("sdpa", "eager"):
            raise ValueError(
                f"cache_implementation='static' needs attn_implementation 'sdpa' or 'eager', not {attention!r}"
            )
        given, disabled = setting(base, kwargs, "compile_config"), setting(base, kwargs, "disable_compile")
        for name in ("compile_config", "disable_compile"):
            kwargs.pop(name, None)
        read_dynamically(kwargs)
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
        invocations = min(memory.max_invocations, call.settings.budget)
        return columns + invocations * (max(memory.short_length, memory.long_length) + 1)


def asked_cache(kwargs: dict[str, Any]) -> str | None:
    """The cache that a keyword or a generation config names, or None."""
    return kwargs.get("cache_implementation") or getattr(kwargs.get("generation_config"), "cache_implementation", None)


def cache_implementation(base: Any, kwargs: dict[str, Any]) -> str:
    """The cache that a call of `generate` asks for.

    Raises:
        ValueError: if memory decoding cannot use it.
    """
    asked = asked_cache(kwargs)
    default = getattr(base.generation_config, "cache_implementation", None)
    found = asked or (None if default == "hybrid" else default) or "dynamic"  # transformers drops this old default too
    if found not in (*SLOT_CACHES, *DYNAMIC_CACHES):
        source = "" if asked else " (from the base's generation_config)"
        raise ValueError(
            f"memory decoding has no cache_implementation={found!r}{source}; use 'dynamic', 'offloaded' or 'static'"
        )
    if found == "offloaded" and base.device.type == "cpu":
        raise ValueError("cache_implementation='offloaded' moves keys and values off a GPU, and the base is on the CPU")
    return found


def read_dynamically(kwargs: dict[str, Any]) -> None:
    """Has transformers read the prompts into a dynamic cache, whatever a config or the base's defaults say."""
    config = kwargs.get("generation_config")
    kwargs.pop("cache_implementation", None)
    if config is None:
        kwargs["cache_implementation"] = "dynamic"
    else:  # said in there: keywords beside a config are deprecated
        kwargs["generation_config"] = config = copy.deepcopy(config)
        config.cache_implementation = "dynamic"


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


class WordsOnly(logits_process.LogitsProcessor):
    """A processor that judges words by the words before them, without the four memory tokens.

    Memory tokens are no repetition of a text: their logits stay what they were, and an n-gram reaches over them.

    Args:
        inner: the processor.
        ids: of the four tokens.
    """

    def __init__(self, inner: logits_process.LogitsProcessor, ids: list[int]) -> None:
        self.inner, self.ids = inner, torch.tensor(ids)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.ids = self.ids.to(scores.device)
        if isinstance(self.inner, OF_SEQUENCES):
            hits = torch.isin(input_ids, self.ids)
            input_ids = input_ids.gather(
                1, hits.int().argsort(dim=1, descending=True, stable=True)
            )  # words stay adjacent
        found = self.inner(input_ids, scores)
        if isinstance(self.inner, PENALTIES):
            found = found.index_copy(1, self.ids, scores[:, self.ids])
        return found


REMEDIES = defaultdict(
    lambda: "set num_beams=1",
    {
        GenerationMode.ASSISTED_GENERATION: "unset prompt_lookup_num_tokens, assistant_early_exit and use_mtp",
        GenerationMode.CONTRASTIVE_SEARCH: "unset penalty_alpha",
        GenerationMode.DOLA_GENERATION: "unset dola_layers",
    },
)
PENALTIES = (
    logits_process.EncoderNoRepeatNGramLogitsProcessor,
    logits_process.EncoderRepetitionPenaltyLogitsProcessor,
    logits_process.NoRepeatNGramLogitsProcessor,
    logits_process.RepetitionPenaltyLogitsProcessor,
)
OF_SEQUENCES = (
    logits_process.EncoderNoRepeatNGramLogitsProcessor,
    logits_process.NoRepeatNGramLogitsProcessor,
    logits_process.SequenceBiasLogitsProcessor,  # and of bad words
)


def spared(processors: LogitsProcessorList, ids: list[int]) -> LogitsProcessorList:
    """Processors that leave the memory tokens `ids` alone, where transformers has penalties for repetition in them."""
    if not ids:
        return processors
    return LogitsProcessorList(
        WordsOnly(each, ids) if isinstance(each, PENALTIES + OF_SEQUENCES) else each for each in processors
    )


def row_by_row(processors: LogitsProcessorList) -> LogitsProcessorList:
    """Processors that spare the other rows where one row's scores are not finite."""
    return LogitsProcessorList(FiniteRows(each) if isinstance(each, ALL_OR_NONE) else each for each in processors)


def refuse_unsupported(config: GenerationConfig, kwargs: dict[str, Any], off: bool) -> None:
    """Refuses, in one line, what this decoder cannot honour."""
    if config.guidance_scale not in (None, 1) and not off:
        raise ValueError(
            f"guidance_scale={config.guidance_scale} is not supported with memory, which its second forward has not; "
            "leave it out or pass invocation='off'"
        )
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(f"memory decodes greedily or by sampling, not by {mode.value}; {REMEDIES[mode]}")
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(config, name):
            raise ValueError(f"{name}=True is not supported by memory decoding; output_scores and output_logits are")
    for name in CACHE_NAMES:
        cache = kwargs.get(name)
        if cache is not None and not isinstance(cache, DynamicCache):
            raise ValueError(
                f"{name} cannot be a {type(cache).__name__}: leave it out, and say what cache you want by "
                "cache_implementation"
            )
        if cache is not None and cache.get_seq_length() > 0:
            raise ValueError(f"a filled {name} cannot be continued: memory slots in it have no token ids")
