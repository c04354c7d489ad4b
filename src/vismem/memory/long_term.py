"""The long-term former (Eq. 6): the base's language model with its own adapter recalls learned semantics."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vismem.backbones import Backbone
from vismem.config import VisMemConfig
from vismem.memory.adapter import Adapter


class LongTermFormer(nn.Module):
    """`M = F([X, Q, M_init])[-N_l:]`, with X the current segment's token embeddings, causal, positions from 0.

    The vectors are scaled to the RMS of the base's token embeddings times a learned gain, stored as its logarithm.
    """

    table_rms: Tensor
    table_mean: Tensor

    def __init__(self, backbone: Backbone, config: VisMemConfig) -> None:
        super().__init__()
        self.backbone, self.constant = backbone, config.memory_init == "learned"
        table, scale = backbone.embeddings.weight.detach().float(), backbone.embedding_scale
        self.register_buffer("table_rms", table.pow(2).mean().sqrt() * scale, persistent=False)
        self.register_buffer("table_mean", table.mean(0) * scale, persistent=False)
        start = torch.zeros(config.long_length, backbone.hidden_size)
        # An offset from the mean token embedding, or the whole of M_init.
        self.memory_init = nn.Parameter(self.table_rms.to(start) * torch.randn_like(start) if self.constant else start)
        self.log_gain = nn.Parameter(torch.zeros(()))
        self.adapter = Adapter(
            backbone.language_model, backbone.language_targets, config.lora_r, config.lora_alpha, config.lora_dropout
        )

    def forward(self, query: Tensor, segments: list[Tensor]) -> Tensor:
        """Long-term memory for n invocations.

        Args:
            query: Q [n, K, d].
            segments: X, for each invocation the embeddings [z, d] of its segment's tokens.

        Returns:
            [n, N_l, d], at the embedding table's scale.
        """
        start = self.memory_init if self.constant else self.memory_init + self.table_mean
        rows = [torch.cat([x.to(query), q, start.to(query)]) for x, q in zip(segments, query, strict=True)]
        longest = max(len(row) for row in rows)
        padding = torch.tensor([longest - len(row) for row in rows], device=query.device)
        inputs = torch.stack([nn.functional.pad(row, (0, 0, longest - len(row), 0)) for row in rows])
        position = torch.arange(longest, device=query.device) - padding[:, None]
        with self.adapter.on():
            hidden = self.backbone.language_model(
                inputs_embeds=inputs.to(self.backbone.embeddings.weight.dtype),
                attention_mask=(position >= 0).long() if bool(padding.any()) else None,
                position_ids=position.clamp(min=0),
                use_cache=False,
            ).last_hidden_state
        memory = hidden[:, -len(start) :].float()
        unit = memory * memory.pow(2).mean(-1, keepdim=True).add(1e-12).rsqrt()
        return (unit * self.table_rms * self.log_gain.float().exp()).to(query.dtype)
