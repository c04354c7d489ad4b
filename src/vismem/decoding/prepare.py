"""A call of `generate` made ready to decode: settings, processors, criteria, positions and image features.

The base's own `generate` prepares every call, with a decoding method that returns what was prepared instead of
decoding it (`custom_generate`). So every argument means here what it means in transformers.
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
from transformers.generation import EosTokenCriteria, GenerationMode, MaxLengthCriteria, StopStringCriteria

from vismem.backbones import Backbone, Image
from vismem.backbones.base import CACHE_NAMES
from vismem.config import VisMemConfig
from vismem.decoding import processors
from vismem.decoding.cache import Slots
from vismem.decoding.policies import Counterfactual, Policy
from vismem.decoding.row import DecodingSettings
from vismem.tokens import MemoryTokens

# transformers' names; those after "static" are its older ones. Slots cannot stand in for the caches left out.
SLOT_CACHES = ("static", "sliding_window", "hybrid", "hybrid_chunked")
DYNAMIC_CACHES = ("dynamic", "offloaded")
COMPILED: WeakKeyDictionary[Any, Slots] = WeakKeyDictionary()  # each base's compiled slots, since compiling is slow
REMEDIES = defaultdict(
    lambda: "set num_beams=1",
    {
        GenerationMode.ASSISTED_GENERATION: "unset prompt_lookup_num_tokens, assistant_early_exit and use_mtp",
        GenerationMode.CONTRASTIVE_SEARCH: "unset penalty_alpha",
        GenerationMode.DOLA_GENERATION: "unset dola_layers",
    },
)


@dataclass
class Prepared:
    """One call of `generate`, ready to decode.

    Args:
        input_ids: [B, L].
        images: of each prompt.
        settings: of its rows.
        copies: answers per prompt.
        kwargs: the model's other inputs.
    """

    input_ids: Tensor
    images: list[list[Image]]
    settings: DecodingSettings
    copies: int
    kwargs: dict[str, Any]

    @property
    def rows(self) -> int:
        """Number of output rows."""
        policy = self.settings.policy
        openings = policy.openings if isinstance(policy, Counterfactual) else ()
        return len(openings) or len(self.input_ids) * self.copies

    @property
    def columns(self) -> int:
        """Tokens of the longest row, memory slots not counted."""
        return self.input_ids.shape[1] + self.settings.budget


def prepare(
    backbone: Backbone,
    tokens: MemoryTokens,
    tokenizer: Any,
    delimiters: Callable[[], frozenset[int]],
    policy: Policy,
    inputs: Tensor | None = None,
    *,
    generator: torch.Generator | None = None,
    record: bool = False,
    sample_blocks: bool = False,
    streamer: Any = None,
    **kwargs: Any,
) -> Prepared:
    """Prepares a call.

    Args:
        backbone, tokens: of the model.
        tokenizer: for stop strings, unless one is given.
        delimiters: returns the ids that end a phrase.
        policy: of invocation.
        inputs, generator, record, sample_blocks, streamer, **kwargs: as in `VisMem.generate`.

    Raises:
        ValueError: for what memory decoding cannot honour, for a prompt longer than the base's context, and for images
            that do not fit the prompt.
    """
    base, kwargs = backbone.base, backbone.prepare(kwargs)
    check_arguments(base, kwargs)
    input_ids = kwargs.get("input_ids") if inputs is None else inputs
    if input_ids is None:
        raise ValueError("generate needs input_ids: pass the processor's output, model.generate(**inputs)")
    check_length(base, input_ids.shape[1])
    tokenizer = kwargs.pop("tokenizer", tokenizer)
    copies = take_copies_and_stop_strings(base, kwargs, tokenizer)
    images = backbone.prompt_images(input_ids, kwargs)

    def return_prepared(
        _base: Any,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Prepared:
        memory_ids = tokens.ids if policy.samples or policy.injects else []
        refuse_unsupported(generation_config, model_kwargs, memory_on=bool(memory_ids))
        limits = [each.max_length for each in stopping_criteria if isinstance(each, MaxLengthCriteria)]
        ends = [each.eos_token_id.tolist() for each in stopping_criteria if isinstance(each, EosTokenCriteria)]
        others = (each for each in stopping_criteria if not isinstance(each, (MaxLengthCriteria, EosTokenCriteria)))
        pad = generation_config._pad_token_tensor  # noqa: SLF001  # set by `generate` in transformers 5.23
        settings = DecodingSettings(
            policy=policy,
            config=generation_config,
            processors=processors.adapt(logits_processor, memory_ids, len(input_ids), copies),
            criteria=StoppingCriteriaList(others),
            eos_ids=frozenset(token for found in ends for token in found),
            budget=min(limits, default=2**31) - input_ids.shape[1],
            delimiters=delimiters,
            pad=0 if pad is None else int(pad.flatten()[0]),
            generator=generator,
            record=record,
            sample_blocks=sample_blocks,
            streamer=streamer,
        )
        return Prepared(input_ids, images, settings, copies, model_kwargs)

    prepared: Prepared = base.generate(inputs, custom_generate=return_prepared, streamer=streamer, **kwargs)
    return prepared


def check_arguments(base: Any, kwargs: dict[str, Any]) -> None:
    """Raises ValueError for arguments that would bypass a custom decoding method."""
    if kwargs.get("assistant_model") is not None:
        raise ValueError("assisted decoding is not supported with memory; leave assistant_model out")
    if isinstance(kwargs.get("custom_generate"), str):
        raise ValueError("custom_generate is not supported with memory: memory is itself a decoding method")
    if setting(base, kwargs, "token_healing"):
        raise ValueError("token_healing is not supported with memory: it rewrites the prompt; set token_healing=False")


def take_copies_and_stop_strings(base: Any, kwargs: dict[str, Any], tokenizer: Any) -> int:
    """Moves two settings that transformers does not pass on to a custom decoding method.

    Stop strings become a stopping criterion in `kwargs`.

    Returns:
        `num_return_sequences`.
    """
    copies = setting(base, kwargs, "num_return_sequences") or 1
    stop_strings = setting(base, kwargs, "stop_strings")
    kwargs.pop("num_return_sequences", None)
    kwargs.pop("stop_strings", None)
    if copies > 1 or stop_strings:
        change(kwargs, num_return_sequences=1, stop_strings=None)
    if stop_strings:
        criteria = kwargs.get("stopping_criteria") or []
        kwargs["stopping_criteria"] = StoppingCriteriaList([*criteria, StopStringCriteria(tokenizer, stop_strings)])
    return int(copies)


def refuse_unsupported(config: GenerationConfig, kwargs: dict[str, Any], *, memory_on: bool) -> None:
    """Raises ValueError, in one line, for what this decoder cannot honour."""
    if config.guidance_scale not in (None, 1) and memory_on:
        raise ValueError(
            f"guidance_scale={config.guidance_scale} is not supported with memory: its second forward has none; "
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
                f"{name} cannot be a {type(cache).__name__}: leave it out, and choose a cache with cache_implementation"
            )
        if cache is not None and cache.get_seq_length() > 0:
            raise ValueError(f"a filled {name} cannot be continued: memory slots in it have no token ids")


def context_of(base: Any) -> int:
    """The base's maximum number of positions; 2**31 - 1 if its config does not say."""
    return getattr(base.config.get_text_config(), "max_position_embeddings", None) or 2**31 - 1


def check_length(base: Any, length: int, name: str = "the prompt") -> None:
    """Checks a prompt's length before memory is allocated that grows with its square.

    Raises:
        ValueError: if it has more tokens than the base's context.
    """
    if length > (context := context_of(base)):
        raise ValueError(f"{name} has {length} tokens, but the base takes {context} at most; shorten it")


# Generation settings: keywords take precedence, then the generation config given, then the base's defaults.


def setting(base: Any, kwargs: dict[str, Any], name: str) -> Any:
    """A generation setting as `generate` would find it."""
    if kwargs.get(name) is not None:
        return kwargs[name]
    configs = (kwargs.get("generation_config"), base.generation_config)
    return next((value for config in configs if (value := getattr(config, name, None)) is not None), None)


def change(kwargs: dict[str, Any], **settings: Any) -> None:
    """Changes generation settings of a call: in its config if it has one, as keywords beside it are deprecated."""
    if kwargs.get("generation_config") is None:
        kwargs.update(settings)
        return
    config = kwargs["generation_config"] = copy.deepcopy(kwargs["generation_config"])
    for name, value in settings.items():
        setattr(config, name, value)


# The cache.


@dataclass
class Layout:
    """Keys and values in slots, and how forwards over them are compiled.

    Args:
        compiled: keywords of `torch.compile`, or None.
    """

    compiled: dict[str, Any] | None

    @classmethod
    def wanted(cls, base: Any, kwargs: dict[str, Any]) -> Layout | None:
        """Takes the layout that `cache_implementation` asks for out of `kwargs`; returns None for a dynamic cache.

        As in transformers, a static cache on a GPU is compiled unless `disable_compile=True`; elsewhere only with a
        `compile_config`.

        Raises:
            ValueError: for a cache that memory decoding cannot use, or attention that cannot read slots.
        """
        wanted = cache_implementation(base, kwargs)
        if wanted not in SLOT_CACHES:
            return None
        attention = base.config.get_text_config()._attn_implementation  # noqa: SLF001
        if attention not in ("sdpa", "eager"):
            raise ValueError(
                f"cache_implementation='static' needs attn_implementation 'sdpa' or 'eager', not {attention!r}"
            )
        given, disabled = setting(base, kwargs, "compile_config"), setting(base, kwargs, "disable_compile")
        for name in ("compile_config", "disable_compile"):
            kwargs.pop(name, None)
        read_into_dynamic_cache(kwargs)
        if disabled or (given is None and base.device.type != "cuda"):
            return cls(None)
        keywords = {name: value for name, value in vars(given or CompileConfig()).items() if not name.startswith("_")}
        return cls({**keywords, "dynamic": False})

    def slots(self, base: Any, rows: int, columns: int) -> Slots:
        """Slots for `rows` rows of `columns` columns; compiled ones are kept with the base and used again."""
        config = base.config.get_text_config()
        if self.compiled is None:
            return Slots(config, rows, columns, base.device)
        kept = COMPILED.get(base)
        if kept is None or kept.in_use or (kept.rows, kept.compiled) != (rows, self.compiled) or kept.columns < columns:
            kept = COMPILED[base] = Slots(config, rows, columns, base.device, self.compiled)
        kept.clear()
        return kept

    def columns(self, call: Prepared, memory: VisMemConfig) -> int:
        """Length of the slots for a call: prompt and answer, and for compiled ones all memories the guards allow.

        Compiled slots are best never grown, as each new length is compiled.
        """
        if self.compiled is None:
            return call.columns
        invocations = min(memory.max_invocations, call.settings.budget)
        return call.columns + invocations * (max(memory.short_length, memory.long_length) + 1)


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


def read_into_dynamic_cache(kwargs: dict[str, Any]) -> None:
    """Makes transformers read the prompts into a dynamic cache, whatever a config or the base's defaults say."""
    kwargs.pop("cache_implementation", None)
    change(kwargs, cache_implementation="dynamic")
