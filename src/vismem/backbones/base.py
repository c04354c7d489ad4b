"""The interface to a family of vision-language models.

A family is one file in this folder: a subclass of `Backbone` that says where the vision tower, its blocks and the
projector are. Everything here is arithmetic on one image or one block; `vismem.memory` decides which tokens are run and
when an adapter is on. To add a family, write its file and add one line to `backbones/__init__.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CACHE_NAMES = ("cache", "past_key_values")  # keyword of the cache in transformers' models, new and old
Rotation = tuple[Tensor, Tensor]
Rotary = Rotation | None  # cos and sin, each [..., tokens, head_dim]; None in towers without rotation


@dataclass
class Image:
    """One image (or one tile of one) as the family's processor made it.

    Args:
        pixels: the tower's input, in the family's layout, padding removed.
        grid: height and width in patches.
        tokens: number of its visual tokens in the prompt.
        part: rows and columns of the grid that show the picture; the rest is padding that the tower reads too.
        blocks: see `Patches`; None if the visual tokens are the grid's blocks row by row.
    """

    pixels: Tensor
    grid: tuple[int, int]
    tokens: int
    part: tuple[slice, slice] = (slice(None), slice(None))
    blocks: Tensor | None = None


@dataclass
class Patches:
    """One image encoded through the short former's adapter.

    Args:
        embedded: patch embeddings on their grid, after a learned position embedding, padding left out: [height,
            width, d_vision].
        keys_values: for each block [2, heads, patches, head_dim], rotated where the tower rotates.
        tokens: number of the image's visual tokens in the prompt.
        blocks: int [height // m, width // m], for each whole block of m x m patches the index of the visual token that
            shows it, counted from the image's first.
    """

    embedded: Tensor
    keys_values: list[Tensor]
    tokens: int
    blocks: Tensor


class Backbone:
    """A base model behind its family's interface.

    Subclasses set the class attributes and implement the methods at the end; `base` is never changed.

    Attributes:
        model_types: values of `config.model_type` in the family.
        image_inputs: names of the processor's image tensors; the first is the pixels.
        token_inputs: names of further per-token inputs of the language model, [B, L] with 0 for text; for example
            which tokens attend in both directions.
        tower_targets, language_targets: names of the linear layers that LoRA adapts (query and value projections).
        fused_qkv: whether the tower's one target is a fused query-key-value projection.
    """

    model_types: tuple[str, ...] = ()
    image_inputs: tuple[str, ...] = ()
    token_inputs: tuple[str, ...] = ()
    tower_targets: tuple[str, ...] = ("q_proj", "v_proj")
    language_targets: tuple[str, ...] = ("q_proj", "v_proj")
    fused_qkv: bool = False

    def __init__(self, base: Any) -> None:
        self.base: Any = base  # its attributes depend on the family
        # transformers 5.24 renamed past_key_values.
        taken = inspect.signature(base.forward).parameters if hasattr(base, "forward") else ()
        self.cache_name = next((name for name in CACHE_NAMES if name in taken), CACHE_NAMES[-1])

    # Shared by all families.

    @property
    def model_type(self) -> str:
        """The family's name in transformers' configs."""
        return self.base.config.model_type

    @property
    def embeddings(self) -> nn.Embedding:
        """The token embedding table."""
        return self.base.get_input_embeddings()

    @property
    def embedding_scale(self) -> float:
        """Factor that the embedding table applies to its rows on lookup."""
        return 1.0

    @property
    def head(self) -> Any:
        """The output head, [d] to [vocab]."""
        return self.base.get_output_embeddings()

    @property
    def hidden_size(self) -> int:
        """d, the language model's width."""
        return self.base.config.get_text_config().hidden_size

    @property
    def image_token_id(self) -> int:
        """The id of one visual token in `input_ids`."""
        return self.base.config.image_token_id

    def prepare(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The keywords of a `generate` call, before transformers sees them.

        transformers encodes the images before the prompt if the base's `forward` takes `mm_encoder_outputs`. Otherwise
        a family adds `mm_encoder_outputs={"image": features}` here, and its `read` inserts the features.
        """
        return inputs

    def image_features(self, **vision: Tensor) -> Any:
        """The base's image features, in the form that `visual_states` and `read` take."""
        return self.base.get_image_features(**vision, return_dict=True)

    def read(self, cache: Any = None, **inputs: Any) -> Tensor:
        """Last-layer states [B, L, d] of the base without its head.

        Args:
            cache: keys and values of earlier tokens.
            **inputs: keywords of transformers' models.
        """
        kept = {} if cache is None else {self.cache_name: cache}
        return self.base.model(**kept, **inputs).last_hidden_state

    def visual_states(self, places: Tensor, features: Any | None) -> list[Tensor]:
        """The projector's outputs, row by row (v of Eq. 5).

        Args:
            places: bool [B, L], True at visual tokens.
            features: what the base's `get_image_features` returned, or None without images.

        Returns:
            For each row a tensor [y, d]; y is 0 without an image.

        Raises:
            ValueError: if the images do not fill the prompt's image placeholders.
        """
        counts = places.sum(1).tolist()
        if features is None:
            flat = self.embeddings.weight.new_zeros(0, self.hidden_size)
        else:
            outputs = features.pooler_output
            parts = [outputs] if torch.is_tensor(outputs) else outputs  # [..., d] each
            flat = torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])
        if sum(counts) != len(flat):
            raise mismatch(sum(counts), len(flat))
        return list(flat.split(counts))

    def vision_inputs(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """The image tensors among the processor's outputs."""
        return {name: inputs[name] for name in self.image_inputs if inputs.get(name) is not None}

    def prompt_images(self, input_ids: Tensor, inputs: dict[str, Any]) -> list[list[Image]]:
        """Each prompt's images.

        Args:
            input_ids: [B, L].
            inputs: the processor's outputs.

        Raises:
            ValueError: if the images do not fill the prompts' image placeholders.
        """
        return self.rows_of_images(input_ids == self.image_token_id, self.images(**self.vision_inputs(inputs)))

    def prompt_visual_states(self, input_ids: Tensor, inputs: dict[str, Any]) -> list[Tensor]:
        """Each prompt's visual states [y, d]; arguments and errors as in `prompt_images`."""
        vision = self.vision_inputs(inputs)
        return self.visual_states(input_ids == self.image_token_id, self.image_features(**vision) if vision else None)

    def rows_of_images(self, places: Tensor, images: list[Image]) -> list[list[Image]]:
        """Assigns `images`, given in prompt order, to rows by the `places` [B, L] of their visual tokens."""
        counts = places.sum(1).tolist()
        remaining, rows = iter(images), []
        for count in counts:
            row: list[Image] = []
            while count > 0:
                image = next(remaining, None)
                if image is None or image.tokens > count:
                    break
                row.append(image)
                count -= image.tokens
            if count:
                raise mismatch(sum(counts), sum(image.tokens for image in images))
            rows.append(row)
        if next(remaining, None) is not None:
            raise mismatch(sum(counts), sum(image.tokens for image in images))
        return rows

    def encode(self, images: list[Image], run: Callable[..., Any] = lambda block, *args: block(*args)) -> list[Patches]:
        """Runs images through the tower's blocks and keeps every block's keys and values.

        Images with equal grids are batched. The caller decides whether an adapter is on, and with `run(block, *args)`
        how a block runs, for example with its activations recomputed in the backward pass.
        """
        groups: dict[tuple[int, int], list[int]] = {}
        for index, image in enumerate(images):
            groups.setdefault(image.grid, []).append(index)
        found: list[Patches | None] = [None] * len(images)
        for grid, members in groups.items():
            start = self.embed_patches([images[i] for i in members])  # [n, patches, d_vision]
            rotary, hidden, kept = self.patch_rotary(grid), start, []
            for depth in range(len(self.blocks)):
                keys_values, hidden = run(self.read_block, depth, grid, rotary, hidden)
                kept.append(keys_values)
            raster = self.to_raster(start, grid)
            for place, index in enumerate(members):
                embedded = raster[place][images[index].part]
                layers, image = [layer[place] for layer in kept], images[index]
                found[index] = Patches(embedded, layers, image.tokens, self.block_tokens(image))
        return [patches for patches in found if patches is not None]

    def block_tokens(self, image: Image) -> Tensor:
        """The visual token of each whole block of an image; see `Patches.blocks`."""
        if image.blocks is not None:
            return image.blocks
        rows, columns = (cells // self.merge for cells in image.grid)
        return torch.arange(rows * columns).view(rows, columns)

    def read_block(self, depth: int, grid: tuple[int, int], rotary: Rotary, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Block `depth` on patches [n, patches, d_vision]: its keys and values [n, 2, heads, patches, head_dim], and
        the patches after it (unchanged by the last block, as nothing reads them)."""
        block = self.blocks[depth]
        query, key, value = self.qkv(block, hidden, rotary)
        if depth + 1 < len(self.blocks):
            hidden = self.finish(block, hidden, self.attend_patches(depth, grid, query, key, value))
        return torch.stack([key, value], dim=1), hidden

    # Implemented by each family.

    @property
    def tower(self) -> Any:
        """The vision encoder, without the projector."""
        raise NotImplementedError

    @property
    def blocks(self) -> Any:
        """The tower's transformer blocks."""
        raise NotImplementedError

    @property
    def language_model(self) -> Any:
        """The language model without its head; takes `inputs_embeds`, returns `last_hidden_state`."""
        raise NotImplementedError

    @property
    def vision_size(self) -> int:
        """d_vision, the tower's width."""
        raise NotImplementedError

    @property
    def merge(self) -> int:
        """m: the projector turns m x m patches into one visual token."""
        raise NotImplementedError

    def images(self, **inputs: Tensor) -> list[Image]:
        """The images in the processor's output, in prompt order."""
        raise NotImplementedError

    def embed_patches(self, images: list[Image]) -> Tensor:
        """Patch embeddings [n, patches, d_vision] of n images of one grid, in the tower's own order."""
        raise NotImplementedError

    def to_raster(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """Patches [n, patches, d_vision] from the tower's order to [n, height, width, d_vision]."""
        return patches.unflatten(1, grid)

    def laid_out(self, image: Image) -> Tensor:
        """The image's pixels in their spatial layout, [values, height, width]; override if the family's differs."""
        return image.pixels

    def patch_rotary(self, grid: tuple[int, int]) -> Rotary:  # noqa: ARG002
        """Rotary embedding of an image's patches, in the tower's order; None if positions are learned."""
        return None

    def rotary_at(self, coordinates: Tensor) -> Rotary:  # noqa: ARG002
        """Rotary embedding at any coordinates [..., 2] (row and column, in patches); (0, 0) is no rotation."""
        return None

    def attend_patches(
        self,
        depth: int,  # noqa: ARG002
        grid: tuple[int, int],  # noqa: ARG002
        query: Tensor,
        key: Tensor,
        value: Tensor,
    ) -> Tensor:
        """Attention among the patches of one image in block `depth`; windowed towers restrict it."""
        return F.scaled_dot_product_attention(query, key, value)

    def qkv(self, block: Any, hidden: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value of a block for hidden states [n, t, d_vision]: each [n, heads, t, head_dim]."""
        raise NotImplementedError

    def finish(self, block: Any, hidden: Tensor, attended: Tensor) -> Tensor:
        """The rest of a block after attention gave `attended` [n, heads, t, head_dim]: residuals and MLP."""
        raise NotImplementedError

    def project(self, hidden: Tensor) -> Tensor:
        """The tower's last norm and the projector: [n, N * m * m, d_vision] to [n, N, d], m * m in block order."""
        raise NotImplementedError


def mismatch(wanted: int, given: int) -> ValueError:
    """The error for images that do not fill the prompt's image placeholders."""
    return ValueError(
        f"the prompt has {wanted} image tokens but its images give {given}: let the processor make prompt and pixels "
        "in one call, one image per placeholder (an all-black image can count as padding)"
    )


def split_heads(states: Tensor, head_dim: int) -> Tensor:
    """[n, t, heads * head_dim] to [n, heads, t, head_dim]."""
    return states.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def join_heads(states: Tensor) -> Tensor:
    """[n, heads, t, head_dim] to [n, t, heads * head_dim]."""
    return states.transpose(1, 2).flatten(-2)
