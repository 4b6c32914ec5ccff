"""A tiny checkpoint quantized by hand: no plan, no runner, only numerics, a format and the engine rules."""

from __future__ import annotations

import re
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
from qconvert.numerics.finite import largest_of
from qconvert.numerics.rounding import quantize, second_scale_for
from tests.checkpoints import Naming, save_checkpoint, tiny_config, tiny_tensors

Choice = Callable[[str], tuple[Scheme, str] | None]


def routed_experts(scheme: Scheme, format_name: str, *, layers: tuple[int, ...] = (0, 1, 2)) -> Choice:
    """The default policy: the main model's routed experts, nothing else."""
    prefixes = tuple(f"layers.{layer}.mlp.experts." for layer in layers)

    def choose(module: str) -> tuple[Scheme, str] | None:
        inside = any(prefix in module for prefix in prefixes) and not module.startswith("mtp.")
        return (scheme, format_name) if inside else None

    return choose


def dense(scheme: Scheme, format_name: str, *, attention: bool = True) -> Choice:
    """Attention, linear attention and the shared expert of the main model."""
    parts = (".linear_attn.in_proj_qkv", ".linear_attn.in_proj_z", ".linear_attn.out_proj")

    def choose(module: str) -> tuple[Scheme, str] | None:
        inside = ".shared_expert." in module or module.endswith(parts) or (attention and ".self_attn." in module)
        return (scheme, format_name) if inside and not module.startswith("mtp.") else None

    return choose


def either(first: Choice, second: Choice) -> Choice:
    return lambda module: first(module) or second(module)


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
    path: Path, choose: Choice, *, naming: Naming, group: int, stack_kept: bool = True
) -> tuple[dict[str, QuantizedTensor], dict[str, Tensor], dict[str, Any]]:
    """Write the folder; quantized matrices by module, everything else by tensor name, and the configuration.

    Experts of a layer in which none is quantized are stored stacked or one by one.
    """
    config = tiny_config(naming=naming, group=group, vision=naming == "vl")
    config["dtype"] = "bfloat16"
    tensors = tiny_tensors(config, layout="per-expert")
    for name, tensor in tiny_tensors(config, layout="fused").items() if stack_kept else ():
        experts = name.rpartition(".")[0]
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")) and choose(f"{experts}.0.gate_proj") is None:
            tensors = {key: value for key, value in tensors.items() if not re.match(rf"{re.escape(experts)}\.\d", key)}
            tensors[name] = tensor
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    decisions = decisions_for(tensors, choose)
    written, kept = dict(tensors), dict(tensors)
    quantized = {}
    for decision in decisions:
        if decision.scheme is None or decision.format is None:
            continue
        w = written.pop(decision.name + ".weight")
        rounded = quantize(w, decision.scheme, second=second_scale_for(decision.scheme, largest_of(w))).quantized
        kept.pop(decision.name + ".weight")
        quantized[decision.name] = rounded
        for suffix, part in format_named(decision.format).pack(rounded).items():
            written[f"{decision.name}.{suffix}"] = part
    config["quantization_config"] = quantization_config(decisions)
    save_checkpoint(path, config, written)
    return quantized, kept, config
