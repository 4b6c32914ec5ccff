"""The ``quantization_config`` block of ``config.json``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qconvert.core.dtypes import DType
from qconvert.core.errors import PlanError
from qconvert.core.scheme import Activation, Block, Channel, Codebook, Float, Grid, Group, Int, PerTensor, Scheme
from qconvert.formats.engine_rules import (
    ModuleDecision,
    exact_names,
    ignore_list,
    kept_patterns,
    kept_substrings,
    module_patterns,
    verify,
)
from qconvert.formats.table import format_named


def quantization_config(decisions: Sequence[ModuleDecision], engine: str | None = None) -> dict[str, Any]:
    """What engines need to know of a checkpoint, from the decisions about all its linear modules.

    The block lists what stays as every engine reads it. One scheme becomes one group that targets ``Linear``;
    several become ``mixed-precision`` with a format per group, routed experts first. ``engine`` is the one that alone
    shall read it.

    Raises:
        PlanError: an engine would refuse the checkpoint or load it wrongly, or nothing is quantized.
        FormatError: a format cannot hold one of the matrices.
    """
    verify(decisions, engine)
    groups = _groups(decisions)
    if not groups:
        raise PlanError("nothing is quantized: no module has a scheme")
    method = format_named(groups[0][1]).quant_method
    if method == "compressed-tensors":
        return _compressed_tensors(groups, decisions)
    return _ALONE[method](groups[0][0], decisions)


def _groups(decisions: Sequence[ModuleDecision]) -> list[tuple[Scheme, str, list[ModuleDecision]]]:
    """Quantized modules by scheme and format, those of routed experts first."""
    members: dict[tuple[Scheme, str], list[ModuleDecision]] = {}
    for decision in decisions:
        if decision.scheme is not None and decision.format is not None:
            members.setdefault((decision.scheme, decision.format), []).append(decision)
    listed = [(scheme, name, chosen) for (scheme, name), chosen in members.items()]
    return sorted(listed, key=lambda group: not any(".mlp.experts." in decision.name for decision in group[2]))


def _fp8(scheme: Scheme, decisions: Sequence[ModuleDecision]) -> dict[str, Any]:
    if not isinstance(scheme.blocking, Block):
        raise PlanError(f"quant_method fp8 stores tiles, not {scheme.blocking}")
    return {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [scheme.blocking.rows, scheme.blocking.cols],
        "modules_to_not_convert": exact_names(decisions),
    }


def _gptq(scheme: Scheme, decisions: Sequence[ModuleDecision]) -> dict[str, Any]:
    head = next((decision for decision in decisions if decision.name == "lm_head"), None)
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": scheme.weight_bits,
        "group_size": _group_size(scheme),
        "sym": scheme.symmetric,
        "desc_act": False,
        "lm_head": head is not None and head.scheme is not None,
        "dynamic": {f"-:{pattern}": {} for pattern in kept_patterns(decisions)},
    }


def _awq(scheme: Scheme, decisions: Sequence[ModuleDecision]) -> dict[str, Any]:
    return {
        "quant_method": "awq",
        "version": "gemm",
        "bits": scheme.weight_bits,
        "group_size": _group_size(scheme),
        "zero_point": True,
        "modules_to_not_convert": kept_substrings(decisions),
    }


def _bitsandbytes(scheme: Scheme, decisions: Sequence[ModuleDecision]) -> dict[str, Any]:
    """Source: transformers 5.23, ``BitsAndBytesConfig``; ``should_convert_module`` matches patterns from the start."""
    four = isinstance(scheme.grid, Codebook)
    block = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": four,
        "load_in_8bit": not four,
        "llm_int8_threshold": 6.0,
        "llm_int8_skip_modules": kept_patterns(decisions),
    }
    if not isinstance(scheme.grid, Codebook):
        return block
    return block | {
        "bnb_4bit_quant_type": scheme.grid.kind,
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
    }


def _group_size(scheme: Scheme) -> int:
    return scheme.blocking.size if isinstance(scheme.blocking, Group) else -1


_ALONE: Mapping[str, Callable[[Scheme, Sequence[ModuleDecision]], dict[str, Any]]] = {
    "fp8": _fp8,
    "gptq": _gptq,
    "awq": _awq,
    "bitsandbytes": _bitsandbytes,
}
"""Loaders that know one scheme for the whole checkpoint."""


def _compressed_tensors(
    groups: list[tuple[Scheme, str, list[ModuleDecision]]], decisions: Sequence[ModuleDecision]
) -> dict[str, Any]:
    single = len(groups) == 1
    return {
        "quant_method": "compressed-tensors",
        "format": groups[0][1] if single else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{index}": {
                "targets": ["Linear"] if single else module_patterns(decisions, chosen),
                "weights": _weights(scheme),
                "input_activations": _activations(scheme.activation),
                "output_activations": None,
                "format": name,
            }
            for index, (scheme, name, chosen) in enumerate(groups)
        },
        "ignore": ignore_list(decisions),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _weights(scheme: Scheme) -> dict[str, Any]:
    arguments: dict[str, Any] = {**_grid(scheme.grid), "symmetric": scheme.symmetric, "dynamic": False}
    if scheme.scale.dtype is DType.F8_E8M0:
        arguments["scale_dtype"] = arguments["zp_dtype"] = "torch.uint8"
    if scheme.scale.second is not None:
        arguments["scale_dtype"] = arguments["zp_dtype"] = "torch.float8_e4m3fn"
    match scheme.blocking:
        case Group(size=size) if scheme.scale.second is not None:
            return {**arguments, "strategy": "tensor_group", "group_size": size}
        case PerTensor():
            return {**arguments, "strategy": "tensor", "group_size": None}
        case Channel():
            return {**arguments, "strategy": "channel", "group_size": None}
        case Group(size=size):
            return {**arguments, "strategy": "group", "group_size": size}
        case Block(rows=rows, cols=cols):
            return {**arguments, "strategy": "block", "group_size": None, "block_structure": [rows, cols]}
    raise PlanError(f"compressed-tensors has no name for scales over {scheme.blocking}")


def _activations(activation: Activation) -> dict[str, Any] | None:
    if activation.kind == "none" or activation.grid is None:
        return None
    return {
        **_grid(activation.grid),
        "symmetric": True,
        "dynamic": activation.kind == "dynamic",
        "strategy": "token" if activation.group is None else "group",
        "group_size": activation.group,
    }


def _grid(grid: Grid) -> dict[str, Any]:
    match grid:
        case Int(bits=bits):
            return {"num_bits": bits, "type": "int"}
        case Float(kind=kind):
            return {"num_bits": 8 if kind == "e4m3fn" else 4, "type": "float"}
    raise PlanError(f"compressed-tensors has no name for {grid}")
