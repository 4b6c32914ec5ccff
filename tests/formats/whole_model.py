"""A tiny checkpoint quantized by hand: no plan, no runner, only numerics, a format and the engine rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qconvert.core.quantized import QuantizedTensor
from qconvert.core.scheme import Scheme
from qconvert.formats.engine_rules import ModuleDecision
from qconvert.formats.quantization_config import quantization_config
from qconvert.formats.table import format_named
from qconvert.numerics.rounding import quantize
from tests.checkpoints import Naming, save_checkpoint, tiny_config, tiny_tensors

Choice = Callable[[str], tuple[Scheme, str] | None]


def routed_experts(scheme: Scheme, format_name: str) -> Choice:
    """The default policy: the main model's routed experts, nothing else."""

    def choose(module: str) -> tuple[Scheme, str] | None:
        return (scheme, format_name) if ".mlp.experts." in module and not module.startswith("mtp.") else None

    return choose


def is_linear(name: str, tensor: Tensor) -> bool:
    return tensor.ndim == 2 and not name.endswith(("embed_tokens.weight", "pos_embed.weight", "conv1d.weight"))


def decisions_for(tensors: Mapping[str, Tensor], choose: Choice) -> list[ModuleDecision]:
    decisions = []
    for name, tensor in tensors.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            rows, cols = tensor.shape[1:]
            decisions.append(ModuleDecision(name=name, shape=(rows, cols), stacked=tensor.shape[0]))
        elif is_linear(name, tensor):
            module = name.removesuffix(".weight")
            scheme, format_name = choose(module) or (None, None)
            rows, cols = tensor.shape
            decisions.append(ModuleDecision(name=module, shape=(rows, cols), scheme=scheme, format=format_name))
    return decisions


def write_quantized(
    path: Path, choose: Choice, *, naming: Naming, group: int, fused_mtp: bool = False
) -> tuple[dict[str, QuantizedTensor], dict[str, Tensor], dict[str, Any]]:
    """Write the folder; quantized matrices by module, everything else by tensor name, and the configuration."""
    config = tiny_config(naming=naming, group=group, vision=naming == "vl")
    config["dtype"] = "bfloat16"
    tensors = tiny_tensors(config, layout="per-expert")
    if fused_mtp:
        fused = tiny_tensors(config, layout="fused")
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("mtp.")}
        tensors |= {name: tensor for name, tensor in fused.items() if name.startswith("mtp.")}
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    decisions = decisions_for(tensors, choose)
    written, kept = dict(tensors), dict(tensors)
    quantized = {}
    for decision in decisions:
        if decision.scheme is None or decision.format is None:
            continue
        rounded = quantize(written.pop(decision.name + ".weight"), decision.scheme).quantized
        kept.pop(decision.name + ".weight")
        quantized[decision.name] = rounded
        for suffix, part in format_named(decision.format).pack(rounded).items():
            written[f"{decision.name}.{suffix}"] = part
    config["quantization_config"] = quantization_config(decisions)
    save_checkpoint(path, config, written)
    return quantized, kept, config
