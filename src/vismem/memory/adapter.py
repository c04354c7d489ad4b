"""LoRA (by peft) on a frozen module, active only inside `with adapter.on():`.

peft wraps the target layers once; the wrappers are then removed and kept aside. Outside the context the base is, module
for module, the one the user passed, so no adapter can stay on while the policy reads or writes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class QueryValueUp(nn.Linear):
    """LoRA's up-projection for a fused query-key-value layer: adapts queries and values, and returns zero for keys.

    Maps [..., r] to [..., 3 * d] with a weight of [2 * d, r].
    """

    def __init__(self, rank: int, fused: int, **factory: Any) -> None:
        super().__init__(rank, fused // 3 * 2, bias=False, **factory)
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        query, value = super().forward(x).chunk(2, dim=-1)
        return torch.cat([query, torch.zeros_like(query), value], dim=-1)


def execution_device(layer: nn.Module) -> torch.device | None:
    """The device on which accelerate runs a layer whose weights it offloads; None for any other layer."""
    device = getattr(getattr(layer, "_hf_hook", None), "execution_device", None)
    return None if device is None else torch.device(device)


class Adapter(nn.Module):
    """LoRA weights for some linear layers of `module`; this module holds the LoRA weights only.

    Args:
        module: the frozen module whose layers are adapted.
        targets: names of the linear layers, as peft's `target_modules`.
        r, alpha, dropout: LoRA's rank, scale and dropout.
        fused_qkv: whether the targets are fused query-key-value layers, whose keys are not adapted.

    Raises:
        ValueError: if no layer of `module` has one of the names.
    """

    def __init__(
        self,
        module: nn.Module,
        targets: tuple[str, ...],
        r: int,
        alpha: int,
        dropout: float,
        *,
        fused_qkv: bool = False,
    ) -> None:
        from peft import LoraConfig, inject_adapter_in_model  # slow to import
        from peft.tuners.lora import LoraLayer

        super().__init__()
        trainable = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
        had_config = hasattr(module, "peft_config")
        config = LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(targets))
        inject_adapter_in_model(config, module, adapter_name="memory")
        layers: dict[str, Any] = {name: layer for name, layer in module.named_modules() if isinstance(layer, LoraLayer)}
        self._sites: list[tuple[nn.Module, str, nn.Module]] = []
        self.layers = nn.ModuleDict()
        for name, layer in layers.items():
            parent_name, _, attribute = name.rpartition(".")
            parent = module.get_submodule(parent_name)
            plain = layer.get_base_layer()
            setattr(parent, attribute, plain)
            self._sites.append((parent, attribute, layer))
            weight = layer.lora_B["memory"].weight
            factory = {"device": weight.device, "dtype": weight.dtype}
            if weight.is_meta and (place := execution_device(plain)) is not None:  # offloaded
                factory["device"] = place
                layer.lora_A["memory"] = nn.Linear(plain.in_features, r, bias=False, **factory)
                layer.lora_B["memory"] = nn.Linear(r, plain.out_features, bias=False, **factory)
                nn.init.zeros_(layer.lora_B["memory"].weight)
            if fused_qkv:
                layer.lora_B["memory"] = QueryValueUp(r, weight.shape[0], **factory)
            parts = {
                "down": layer.lora_A["memory"],
                "up": layer.lora_B["memory"],
                "dropout": layer.lora_dropout["memory"],
            }
            self.layers[name.replace(".", "/")] = nn.ModuleDict(parts)
        if not had_config and hasattr(module, "peft_config"):
            del module.peft_config
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(trainable[name])

    @contextmanager
    def on(self) -> Iterator[None]:
        """Adapts the module inside the context, and restores it however the context ends."""
        usual = [getattr(parent, attribute) for parent, attribute, _ in self._sites]  # possibly another adapter's
        for parent, attribute, layer in self._sites:
            setattr(parent, attribute, layer)
        try:
            yield
        finally:
            for (parent, attribute, _), module in zip(self._sites, usual, strict=True):
                setattr(parent, attribute, module)
