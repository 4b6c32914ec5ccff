"""Run llm-compressor's GPTQ: ``X.w`` [N, K], ``X.h`` [K, K] and ``X.scale`` [N, K / 128] to ``X``, dequantized."""

from __future__ import annotations

import sys

import torch
from compressed_tensors.quantization import QuantizationArgs
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
from safetensors.torch import load_file, save_file


def main(given: str, made: str) -> None:
    """Read ``given``, write ``made``."""
    torch.set_num_threads(1)
    parts = load_file(given)
    args = QuantizationArgs(num_bits=4, strategy="group", group_size=128, symmetric=True, actorder="static")
    done = {}
    for name in sorted({key.rpartition(".")[0] for key in parts}):
        w, h, scale = (parts[f"{name}.{part}"][None].clone() for part in ("w", "h", "scale"))
        rounded, _, _ = quantize_weight(w, h, scale, torch.zeros_like(scale), None, args)
        done[name] = rounded[0].contiguous()
    save_file(done, made)


if __name__ == "__main__":
    main(*sys.argv[1:])
