"""Pack codes as vLLM's own tools do.

Usage: pack.py IN OUT, two safetensors files. IN holds ``codes.4`` and ``codes.8``, int32 [K, N]; OUT gets ``gptq.4``,
``gptq.8`` and ``awq.4``.
"""

from __future__ import annotations

import sys

from safetensors.torch import load_file, save_file
from vllm.model_executor.layers.quantization.utils.quant_utils import awq_pack, gptq_pack


def main(source: str, out: str) -> None:
    """Pack every matrix of ``source``."""
    codes = load_file(source)
    packed = {f"gptq.{bits}": gptq_pack(codes[f"codes.{bits}"], bits, *codes[f"codes.{bits}"].shape) for bits in (4, 8)}
    packed["awq.4"] = awq_pack(codes["codes.4"], 4, *codes["codes.4"].shape)
    save_file({name: words.contiguous() for name, words in packed.items()}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
