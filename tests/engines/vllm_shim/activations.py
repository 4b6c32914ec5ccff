"""Round activations with vLLM's own functions.

Usage: activations.py IN OUT, two safetensors files. IN holds ``x``, BF16 [T, K], ``scale`` of static FP8 and ``over``
of NVFP4, float32 [1]. OUT gets float32 [T, K] of each way by name: what its codes stand for.
"""

from __future__ import annotations

import sys

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8
from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import ref_nvfp4_quant_dequant
from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape


def fp8(x: Tensor, shape: GroupShape, scale: Tensor | None = None) -> Tensor:
    """By token, by group of inputs, or with one scale for all."""
    codes, scales = QuantFP8(static=scale is not None, group_shape=shape).forward_native(x, scale)
    by_group = codes.float().unflatten(-1, (scales.shape[-1] if scale is None else 1, -1))
    return (by_group * scales.unsqueeze(-1)).flatten(-2)


def main(source: str, out: str) -> None:
    """Round in every way."""
    given = load_file(source)
    x = given["x"]
    codes, scales, _ = ops.onednn_scaled_int8_quant(x)
    with set_current_vllm_config(VllmConfig()):
        rounded = {
            "int8 token": codes.float() * scales,
            "fp8 token": fp8(x, GroupShape.PER_TOKEN),
            "fp8 group": fp8(x, GroupShape(1, 128)),
            "fp8 static": fp8(x, GroupShape.PER_TENSOR, given["scale"]),
            "fp4 group": ref_nvfp4_quant_dequant(x.float(), given["over"], 16),
        }
    save_file({name: one.to(torch.float32).contiguous() for name, one in rounded.items()}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
