"""The four memory tokens: their names, ids, input and output rows, and which of them may be sampled (Eq. 3-4).

The rows are stored beside the base's matrices, never in them, so that one base serves many memories. What happens at a
memory token is the decoder's job (`decoding/decoder.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vismem.config import KINDS, Kind, shortened

INVOCATION_TOKENS: dict[Kind, str] = {"short": "<ms_I>", "long": "<ml_I>"}
END_TOKENS: dict[Kind, str] = {"short": "<ms_E>", "long": "<ml_E>"}


def add_memory_tokens(tokenizer: Any) -> tuple[dict[Kind, int], dict[Kind, int]]:
    """Adds the four tokens to `tokenizer` (a no-op if it has them) and returns their ids by kind.

    Returns:
        Two dictionaries from kind to id: the invocation tokens' and the end tokens'.
    """
    order = [table[kind] for kind in KINDS for table in (INVOCATION_TOKENS, END_TOKENS)]
    tokenizer.add_special_tokens({"extra_special_tokens": order}, replace_extra_special_tokens=False)
    ids = dict(zip(order, tokenizer.convert_tokens_to_ids(order), strict=True))
    return {kind: ids[INVOCATION_TOKENS[kind]] for kind in KINDS}, {kind: ids[END_TOKENS[kind]] for kind in KINDS}


def single_token_id(tokenizer: Any, strings: tuple[str, ...]) -> int:
    """The id of the first string that is a single token of `tokenizer`.

    Raises:
        ValueError: if none is.
    """
    for text in strings:
        ids = tokenizer.encode(text, add_special_tokens=False)
        if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
            return ids[0]
    raise ValueError(
        f"none of the delimiters {shortened(strings)} is a single token of this tokenizer; set config.delimiters"
    )


def delimiter_ids(tokenizer: Any, strings: tuple[str, ...]) -> frozenset[int]:
    """All ids whose text, without spaces, is one of the delimiter strings (so '.', ' .' and '.\\n' for '.')."""
    wanted = {text.strip(" ") for text in strings}
    bare = {text.strip() for text in strings} - {""}
    texts = tokenizer.batch_decode([[index] for index in range(len(tokenizer))])
    return frozenset(i for i, text in enumerate(texts) if text.strip(" ") in wanted or text.strip() in bare)


class MemoryTokens(nn.Module):
    """Rows of the four memory tokens, as trainable parameters beside a base's embedding table and output head.

    Invocation and end rows are separate parameters because stage II trains them at different rates. Each is initialised
    with a delimiter's row plus noise of `noise` times its RMS. If the output head is tied to the embedding table, the
    output rows are the input rows. If the table scales its rows on lookup, these rows are scaled too.

    Args:
        table: the base's input embedding, `weight` [vocab, d].
        head: the base's output head, `weight` [vocab, d].
        invocation_ids, end_ids: id of each kind's token.
        delimiter: id of the token whose rows are copied.
        noise: relative size of the noise.
        scale: factor that the table applies to its rows on lookup.
    """

    def __init__(
        self,
        table: nn.Embedding,
        head: nn.Module,
        invocation_ids: dict[Kind, int],
        end_ids: dict[Kind, int],
        delimiter: int,
        noise: float,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.invocation_ids, self.end_ids, self.scale = invocation_ids, end_ids, scale
        self.kind_of: dict[int, Kind] = {index: kind for kind, index in invocation_ids.items()}
        self.ids = [*(invocation_ids[kind] for kind in KINDS), *(end_ids[kind] for kind in KINDS)]
        self._sent: dict[torch.device, Tensor] = {}
        base: dict[str, Any] = {"table": table, "head": head}
        self._base = base  # a dict, so that the base is not registered a second time

        def start(weight: Tensor) -> nn.Parameter:
            row = weight[delimiter].detach().float()
            size = noise * row.pow(2).mean().sqrt()
            return nn.Parameter((row + size * torch.randn(2, row.numel(), device=row.device)).to(weight.dtype))

        self.invocation, self.end = start(table.weight), start(table.weight)
        self.tied = base["head"].weight is table.weight
        if not self.tied:
            self.invocation_output, self.end_output = start(base["head"].weight), start(base["head"].weight)

    @property
    def base_vocabulary(self) -> int:
        """Width of the base's own logits."""
        return self._base["head"].weight.shape[0]

    @property
    def vocabulary(self) -> int:
        """Width of the logits with the four tokens in them."""
        return max(self.base_vocabulary, max(self.ids) + 1)

    def _ids_on(self, device: torch.device) -> Tensor:
        """The four ids [4] on `device`, copied once: a copy per token would make the host wait for the GPU."""
        if device not in self._sent:
            with torch.inference_mode(False):  # training may use them too
                self._sent[device] = torch.tensor(self.ids, device=device)
        return self._sent[device]

    def present(self, input_ids: Tensor) -> bool:
        """Whether any of the four ids occurs in `input_ids`."""
        return bool(torch.isin(input_ids, self._ids_on(input_ids.device)).any())

    def row(self, kind: Kind, which: str) -> Tensor:
        """The input embedding [d] of a kind's `"invocation"` or `"end"` token."""
        return getattr(self, which)[KINDS.index(kind)] * self.scale

    def embed(self, input_ids: Tensor) -> Tensor:
        """Input embeddings [..., d] of ids [...], those of the four tokens from the rows here."""
        rows = torch.cat([self.invocation, self.end]) * self.scale
        ids = self._ids_on(input_ids.device)
        hits = input_ids.unsqueeze(-1) == ids  # [..., 4]
        known = self._base["table"](input_ids.masked_fill(hits.any(-1), 0))
        if not hits.any():
            return known
        return torch.where(hits.any(-1, keepdim=True), rows[hits.int().argmax(-1)].to(known.dtype), known)

    def extend(self, logits: Tensor, hidden: Tensor) -> Tensor:
        """Widens base logits by the four tokens' logits.

        The four are computed in float32: a bfloat16 logit near 16 moves in steps of 0.125, far more than an update of
        the rows moves it.

        Args:
            logits: of the base, [..., base_vocabulary].
            hidden: the states they were computed from, [..., d].

        Returns:
            [..., vocabulary], float32 (float64 where `hidden` is).
        """
        rows = torch.cat([self.invocation, self.end] if self.tied else [self.invocation_output, self.end_output])
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            four = hidden.to(dtype) @ rows.to(hidden.device, dtype).T
        wide = logits.new_full((*logits.shape[:-1], self.vocabulary), float("-inf"), dtype=dtype)
        wide[..., : logits.shape[-1]] = logits
        return wide.index_copy_(-1, self._ids_on(logits.device), four.to(logits.device))

    def forbid(self, logits: Tensor, allowed: Tensor) -> Tensor:
        """Masks with -inf what may not be sampled: both end tokens always, each invocation token unless `allowed`.

        Args:
            logits: [..., vocabulary].
            allowed: bool [..., 2] or [2], in the order of `KINDS`.
        """
        index = self._ids_on(logits.device)
        open_ = torch.cat([allowed, torch.zeros_like(allowed)], dim=-1)  # [..., 4] or [4]
        return logits.index_copy(-1, index, logits[..., index].masked_fill(~open_, float("-inf")))
