"""`VisMem`: a base model with latent vision memory. Equip, generate, forward, save, load.

Everything trainable is in `memory` and `tokens`; the base is never changed. `memory/` forms memories, `decoding/`
writes answers, and `reading/` reads finished ones for training.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from huggingface_hub import HfApi
from torch import Tensor, nn
from transformers.utils import ModelOutput

from vismem import checkpoint
from vismem.backbones import Backbone, backbone_of
from vismem.backbones.checks import check_base, check_head, check_processor
from vismem.config import KINDS, Kind, VisMemConfig
from vismem.decoding.cache import Slots
from vismem.decoding.decoder import Decoder
from vismem.decoding.output import collect
from vismem.decoding.policies import Policy, policy_of
from vismem.decoding.prepare import Layout, Prepared, prepare
from vismem.decoding.queue import Answer, Request, RequestQueue, stream
from vismem.decoding.trace import VisMemOutput
from vismem.memory import Choice, memory_of
from vismem.reading import forward as reading
from vismem.reading import heads
from vismem.reading.gaze import gaze_losses, gaze_targets
from vismem.tokens import MemoryTokens, add_memory_tokens, delimiter_ids, single_token_id


@dataclass
class VisMemForwardOutput(ModelOutput):
    """What `VisMem.forward` returns.

    Args:
        loss: mean cross-entropy over `labels`, where given.
        logits: float32 [B, L, vocabulary], aligned with `input_ids`, so slots have none. End tokens are -inf.
        memories: for each row its memory vectors [N, d], in order of invocation; None where a kind forms nothing.
        states: for each row and invocation the observed states [z, d] its query was built from.
        choices: for each row and invocation the `Choice` of its blocks, with gradient; None unless short memory with
            `memory_init="attended"` was formed.
        log_probs: with `sampled`, float32 [B, L]: of the sampled tokens, and 0 elsewhere.
        gaze_loss: with `gaze`, float32 [B]: mean over a row's invocations that have a target, else 0.
        last_hidden_state: [B, L, d], the last layer's states at the tokens of `input_ids`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    memories: list[list[Tensor | None]] | None = None
    states: list[list[Tensor]] | None = None
    choices: list[list[Choice | None]] | None = None
    log_probs: Tensor | None = None
    gaze_loss: Tensor | None = None
    last_hidden_state: Tensor | None = None


class VisMem(nn.Module):
    """A vision-language model with short-term and long-term latent memory.

    Equipping adds four special tokens to `processor.tokenizer`, freezes the base and builds the memory beside it, in
    the base's dtype and on its device. The base's modules and weights do not change: `model.base` is the model you
    passed.

    Args:
        base: a model of a supported family, as `AutoModelForImageTextToText.from_pretrained` gives it.
        processor: its processor.
        config: lengths and widths; the paper's by default.

    Attributes:
        history: the training stages of the memory, oldest first: `stage`, `steps`, `seed`, `data`, `rewards` and the
            metrics it logged last (`figures`). Saved with the memory, and shown in its model card.

    Raises:
        ValueError: if no backbone supports the family, no delimiter is a single token, the base is wrapped or has an
            adapter, or the processor has no tokenizer.

    Example:
        >>> model = vismem.VisMem(base, processor, vismem.VisMemConfig())
        >>> out = model.generate(**inputs, max_new_tokens=256, return_dict_in_generate=True)
        >>> out.invocations
    """

    def __init__(self, base: nn.Module, processor: Any, config: VisMemConfig | None = None) -> None:
        super().__init__()
        check_base(base)
        self.backbone = backbone_of(base)
        check_head(base)
        check_processor(processor)
        refuse_offloaded(self.backbone)
        self.memory_config = config or VisMemConfig()
        self.history: tuple[dict[str, Any], ...] = ()
        self.processor = processor
        self.base: Any = base.eval().requires_grad_(False)
        tokenizer = processor.tokenizer
        delimiter = single_token_id(tokenizer, self.memory_config.delimiters)
        invocation_ids, end_ids = add_memory_tokens(tokenizer)
        known_to_pipelines()
        self.memory = memory_of(self.backbone, self.memory_config)
        self.tokens = MemoryTokens(
            self.backbone.embeddings,
            self.backbone.head,
            invocation_ids,
            end_ids,
            delimiter,
            self.memory_config.token_noise,
            self.backbone.embedding_scale,
        )

    # What transformers' tools expect of a model.

    @property
    def config(self) -> Any:
        """The base's config; the memory's is `memory_config`."""
        return self.base.config

    @property
    def generation_config(self) -> Any:
        """The base's generation defaults."""
        return self.base.generation_config

    @property
    def device(self) -> torch.device:
        """The device of the base's first parameter."""
        return self.base.device

    @property
    def dtype(self) -> torch.dtype:
        """The base's dtype, which the memory follows."""
        return self.base.dtype

    @property
    def name_or_path(self) -> str:
        """The base's name, as recorded in checkpoints."""
        return self.base.name_or_path

    def can_generate(self) -> bool:
        """Returns True, for `transformers.pipeline`."""
        return True

    def train(self, mode: bool = True) -> VisMem:  # noqa: FBT001, FBT002  # torch's signature
        """Sets the memory's training mode; the frozen base stays in evaluation mode."""
        super().train(mode)
        self.base.eval()
        return self

    def parameters_of(self, part: str) -> list[nn.Parameter]:
        """Trainable parameters of one part: `"builder"`, `"short"`, `"long"` (stage I) or `"tokens"` (stage II).

        Soft prompts have no builder, so that part is empty.
        """
        parts: dict[str, nn.Module] = {"builder": self.memory.builder, "short": self.memory.short}
        parts |= {"long": self.memory.long, "tokens": self.tokens}
        if part not in parts:
            raise ValueError(f"unknown part {part!r}; choose from {', '.join(parts)}")
        return list(parts[part].parameters())

    def num_parameters(  # transformers' signature
        self,
        only_trainable: bool = False,  # noqa: FBT001, FBT002
        exclude_embeddings: bool = False,  # noqa: FBT001, FBT002
    ) -> int:
        """Counts parameters of base and memory, as `PreTrainedModel.num_parameters` does.

        Args:
            only_trainable: count those that require a gradient.
            exclude_embeddings: leave out those of `nn.Embedding`s.
        """
        from transformers import PreTrainedModel  # slow to import

        self.is_loaded_in_4bit = getattr(self.base, "is_loaded_in_4bit", False)  # asked there
        return PreTrainedModel.num_parameters(cast(Any, self), only_trainable, exclude_embeddings)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Counts the trainable parameters and all parameters, as peft does."""
        from peft import PeftModel  # slow to import

        return PeftModel.get_nb_trainable_parameters(cast(Any, self))

    def print_trainable_parameters(self) -> None:
        """Prints how many parameters are trainable, in peft's words.

        Example:
            >>> model.print_trainable_parameters()
            trainable params: 221,969 || all params: 4,063,377 || trainable%: 5.4627
        """
        from peft import PeftModel  # slow to import

        PeftModel.print_trainable_parameters(cast(Any, self))

    @cached_property
    def delimiters(self) -> frozenset[int]:
        """Ids of the tokens that end a phrase, by `memory_config.delimiters`."""
        return delimiter_ids(self.processor.tokenizer, self.memory_config.delimiters)

    def move_inputs(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns a processor's tensors on the model's device, floating-point ones in its dtype."""
        return {n: t.to(self.device, self.dtype if t.is_floating_point() else None) for n, t in inputs.items()}

    # Decoding.

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        *,
        invocation: str | Policy = "learned",
        generator: torch.Generator | None = None,
        seed: int | list[int] | None = None,
        record: bool = False,
        sample_blocks: bool = False,
        streamer: Any = None,
        **kwargs: Any,
    ) -> VisMemOutput | Tensor:
        """Writes answers with memory; takes the arguments of the base's own `generate`.

        Args:
            inputs: prompt ids [B, L]; or pass `input_ids` with the rest of the processor's output.
            invocation: `"learned"`, `"off"`, `"short"`, `"long"`, or a policy of `vismem.invocation`.
            generator, seed: of sampling; without either, torch's global generator. With a list of seeds, one for each
                output row, a row's samples do not depend on its neighbours.
            record: also return what training needs of each row, as `rollout` (with `return_dict_in_generate=True`).
            sample_blocks: with `memory_init="attended"`, sample the blocks that short memory starts from, each row by
                its own seed, instead of taking the likeliest; as stage I does.
            streamer: as in transformers; invocation and end tokens pass through it too.
            **kwargs: the processor's tensors, a `generation_config`, and generation keywords. `max_new_tokens`
                counts sampled tokens only, not end tokens, memory slots and forced invocations. With
                `cache_implementation="static"` keys and values lie in preallocated buffers, finished rows leave the
                batch, and on a GPU the step is compiled (`compile_config`, `disable_compile`, as in transformers).

        Returns:
            LongTensor [B * num_return_sequences, prompt + new], or a `VisMemOutput` with
            `return_dict_in_generate=True`.

        Raises:
            ValueError: for beam search, assisted decoding, attention outputs, a filled cache, an unknown policy, or
                images that do not fit the prompt.
            NonFiniteError: after all other rows are done, if some have no finite scores to sample from. `rows` names
                them, `output` holds the others' answers.
        """
        if isinstance(seed, int):
            generator = torch.Generator(device=self.device).manual_seed(seed)
        seeds = list(seed) if isinstance(seed, (list, tuple)) else None
        policy, layout = policy_of(invocation), Layout.wanted(self.base, kwargs)
        options = {"generator": generator, "record": record, "sample_blocks": sample_blocks, "streamer": streamer}
        call = self.prepare(policy, inputs, **options, **kwargs)
        slots = None
        if layout is not None:
            slots = layout.slots(self.base, call.rows, layout.columns(call, self.memory_config))
        decoder = self.decoder(slots)
        rows = decoder.enter(decoder.read_prompts(call), call.settings, call.copies, seeds)
        while decoder.rows:
            decoder.step()
        if streamer is not None:
            streamer.end()
        return collect(rows, call.settings)

    def stream_batch(
        self,
        requests: Iterable[Request | dict[str, Tensor]],
        batch_size: int = 16,
        *,
        invocation: str | Policy = "learned",
        record: bool = False,
        **generation: Any,
    ) -> Iterator[Answer]:
        """Answers many requests in one live batch (continuous batching): finished rows leave, waiting ones enter.

        Args:
            requests: the processor's outputs, or `vismem.Request`s with their own settings; any iterable, consumed as
                there is room.
            batch_size: maximum number of rows decoded together.
            invocation, record: as in `generate`.
            **generation: generation keywords for all of them.

        Yields:
            `vismem.Answer`s as they finish, with `tokens`, `invocations`, `finish` and the request. If a request's
            numbers are not finite, `finish` is `"error"` and `error` a `NonFiniteError`; others are not affected.

        Raises:
            ValueError: if a request is invalid; names its tag if that is a string, else its number.

        Example:
            >>> for answer in model.stream_batch(prompts, batch_size=32, max_new_tokens=64):
            ...     print(answer.tag, processor.decode(answer.tokens, skip_special_tokens=True))
        """
        queue = RequestQueue(self, batch_size, invocation=invocation, record=record, **generation)
        return stream(queue, requests)

    def prepare(self, policy: Policy, inputs: Tensor | None = None, **kwargs: Any) -> Prepared:
        """Prepares a call of `generate` without decoding it; see `decoding.prepare.prepare`."""
        tokenizer = self.processor.tokenizer
        return prepare(self.backbone, self.tokens, tokenizer, lambda: self.delimiters, policy, inputs, **kwargs)

    def decoder(self, slots: Slots | None = None) -> Decoder:
        """A new decoder of this model."""
        return Decoder(self.backbone, self.tokens, self.memory, self.memory_config, slots)

    # Training.

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        prompt_length: int | Tensor | None = None,
        copies: int = 1,
        states: list[list[Tensor]] | None = None,
        memories: list[list[Tensor | None]] | None = None,
        blocks: list[list[Tensor | None]] | None = None,
        forms: tuple[Kind, ...] = KINDS,
        logits_to_keep: int = 0,
        sampled: Tensor | None = None,
        allowed: Tensor | None = None,
        temperature: float = 1.0,
        *,
        gaze: bool = False,
        **inputs: Tensor,
    ) -> VisMemForwardOutput:
        """The training forward: reads finished answers with their memories in place, in one pass.

        Every invocation token in an answer that is followed by its end token forms a memory. The states its query is
        built from are observed without gradient (as in Eq. 14): pass the recorded ones (`states`), or have them
        recomputed, with as many extra forwards as the row with the most has invocations. What precedes the first
        invocation is read once, without gradient, and cached; so is a prompt that several rows share (`copies`).

        Args:
            input_ids: [B, L], prompts and answers, with invocation and end ids but without slots.
            attention_mask: [B, L], 0 at padding, left or right.
            labels: [B, L], -100 for no loss; end tokens never count, as they are never sampled.
            prompt_length: where each row's answer starts, padding included; by default at its first label.
            copies: number of consecutive rows that share a prompt; pass the image tensors once per prompt and
                `prompt_length` as one number.
            states: for each row and invocation, observed states [z, d].
            memories: for each row and invocation its vectors [N, d], or None if nothing was inserted. Nothing is formed
                then, and no gradient reaches builder and formers.
            blocks: for each row and invocation the recorded blocks [N_s] of short memory (`Invocation.choice`), with
                `memory_init="attended"`; by default the memory chooses again.
            forms: kinds that form a memory; tokens of the other kind are read without one.
            logits_to_keep: return logits of the last `logits_to_keep` positions only; 0 for all.
            sampled: bool [B, L]; return `log_probs` of these tokens instead of logits.
            allowed: bool [B, L, 2], with `sampled`: kinds that might have been invoked at each token; by default all.
            temperature: of the distribution of `log_probs`.
            gaze: with `sampled` and `memory_init="attended"`, return `gaze_loss` too: how far the choices are
                from where the frozen base looks as it reads the sampled tokens; takes one more read of the answers.
            **inputs: the processor's image tensors, and its per-token tensors if the family has them
                (`mm_token_type_ids`, `token_type_ids`), at least for the prompts: answers are text.

        Returns:
            A `VisMemForwardOutput`; gradients reach the builder, the formers and the four tokens' rows.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        starts = reading.answer_starts(self, input_ids, labels, prompt_length)
        located, reader = reading.locate(self, input_ids, attention_mask, starts, copies, inputs)
        choices = None
        if memories is None:
            if "short" in forms:
                located.patches = reading.encode_patches(self, located)
            if states is None:
                states = reading.observe(self, located, reader, forms, blocks)
            memories, choices = reading.form(self, located, states, forms, blocks)
        hidden = reading.read(located, reader, memories)
        output = VisMemForwardOutput(memories=memories, states=states, choices=choices, last_hidden_state=hidden)
        if gaze and sampled is not None and any(choice is not None for row in choices or () for choice in row):
            assert choices is not None
            output.gaze_loss = gaze_losses(choices, gaze_targets(self, located, reader, sampled))
        if sampled is not None:
            output.log_probs = heads.sampled_log_probs(self, hidden, input_ids, sampled, allowed, temperature)
            return output
        output.logits = heads.logits_of(self, hidden, logits_to_keep)
        if labels is not None:
            output.loss = heads.cross_entropy(self, output.logits, labels)
        return output

    @property
    def checkpointing(self) -> bool:
        """Whether activations are recomputed in the backward pass."""
        return self.memory.short.checkpointing

    def gradient_checkpointing_enable(self, *, enable: bool = True) -> None:
        """Trades time for memory: the base's layers and the short former's tower keep no activations."""
        self.memory.short.checkpointing = enable

    # Saving and loading.

    def save_pretrained(self, save_directory: str | Path, *, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Writes `vismem_config.json`, `vismem.safetensors` and a model card; the base is named, not copied.

        If a save over an earlier memory is killed, the folder holds the old memory or the new one.

        Args:
            save_directory: the folder; created if missing.
            push_to_hub: also upload it (`repo_id=` and the arguments of `push_to_hub`).

        Raises:
            ValueError: if `save_directory` is a file. OSError: if it cannot be written, or the disk is full.
        """
        checkpoint.save(self, Path(save_directory))
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload memory",
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        tags: list[str] | None = None,
    ) -> str:
        """Uploads the memory and its model card to the hub; a model card that is already there is kept.

        Args:
            repo_id: `owner/name`; created if missing.
            commit_message, commit_description, private, token, revision, create_pr: as in `huggingface_hub`.
            tags: further tags of the model card.

        Returns:
            The address of the commit.
        """
        hub = HfApi(token=token)
        repo_id = hub.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            hub.create_branch(repo_id, branch=revision, exist_ok=True)
        with TemporaryDirectory() as folder:
            checkpoint.save(self, Path(folder), repo_id, tuple(tags or ()))
            card = checkpoint.CARD_FILE
            kept = [card] if hub.file_exists(repo_id, card, revision=revision) else []
            commit = hub.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message,
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
                ignore_patterns=kept,
            )
        return str(commit)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        base: nn.Module | None = None,
        processor: Any = None,
        revision: str | None = None,
        token: str | None = None,
        memory_dtype: torch.dtype | None = None,
        **base_kwargs: Any,
    ) -> VisMem:
        """Loads a memory, and its base by the recorded name unless `base` is passed.

        Args:
            pretrained_model_name_or_path: a memory's folder, one that contains it, such as a run's, or a hub name.
            base, processor: used instead of the recorded ones.
            revision, token: for the memory's hub repository.
            memory_dtype: of the memory and the four tokens' rows; by default the base's.
            **base_kwargs: for loading the base: `dtype`, `device_map`, `trust_remote_code`, ...

        Raises:
            ValueError: if the files are damaged or were made for another base; names both.
            OSError: if the memory or its base cannot be found.
        """
        from transformers import AutoModelForImageTextToText, AutoProcessor  # slow to import

        folder = checkpoint.locate(pretrained_model_name_or_path, revision, token)
        record = checkpoint.read_record(folder)
        name = checkpoint.base_location(record, folder) if base is None else str(getattr(base, "name_or_path", ""))
        try:
            if base is None:
                base = AutoModelForImageTextToText.from_pretrained(name, **base_kwargs)
            if processor is None:
                shared = ("trust_remote_code", "local_files_only", "cache_dir", "token")
                processor = AutoProcessor.from_pretrained(name, **{k: v for k, v in base_kwargs.items() if k in shared})
        except OSError as error:
            reason = str(error).strip().splitlines()[0]
            raise OSError(
                f"cannot load {name or 'an unnamed model'}, the base of memory {folder}: {reason}; "
                "say where it is with base= (--base on the command line)"
            ) from error
        record, state = checkpoint.read_checkpoint(folder, base)
        model = cls(base, processor, record.config)
        model.history = record.history
        if memory_dtype is not None:
            model.memory.to(memory_dtype)
            model.tokens.to(memory_dtype)
        checkpoint.load_weights(model, state, folder, record)
        return model.eval()

    def extra_repr(self) -> str:
        return f"base={self.name_or_path!r}, {self.memory_config}"


def known_to_pipelines() -> None:
    """Registers `VisMem` with transformers' image-text-to-text pipeline, which warns of unknown classes."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES  # slow to import

    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["vismem"] = VisMem.__name__


def refuse_offloaded(backbone: Backbone) -> None:
    """Refuses a base with offloaded parts other than layers of the language model.

    A base that is entirely on the meta device is accepted, to count sizes.

    Raises:
        ValueError: names the offloaded parts.
    """
    embeddings: Tensor = backbone.embeddings.weight
    head: Any = backbone.head.weight
    language = {id(weight) for weight in (*backbone.language_model.parameters(), head)}
    parts: dict[str, list[Tensor]] = {
        "token embeddings": [embeddings],
        "output head": [head],
        "vision encoder or projector": [w for w in backbone.base.parameters() if id(w) not in language],
    }
    away = [name for name, weights in parts.items() if any(weight.is_meta for weight in weights)]
    if away and not all(weight.is_meta for weight in backbone.base.parameters()):
        raise ValueError(
            f"offloaded parts of the base: {', '.join(away)}; memory reads their weights directly, so keep them on a "
            "device in device_map (layers of the language model may be offloaded)"
        )


__all__ = ["VisMem", "VisMemForwardOutput"]
