"""Pack weights as GPTQModel does.

Usage: pack.py IN OUT, two safetensors files. IN holds float32 ``weight.B`` [N, K], ``scales.B`` and ``zeros.B`` [N, G]
for B = 4 and 8 bits, and int32 ``codes.4`` [N, K]; OUT gets ``gptq.B.qweight``, ``gptq.B.qzeros``, ``awq.4.qweight``
and ``awq.4.qzeros``.
"""

from __future__ import annotations

import sys

import torch
from gptqmodel.nn_modules.qlinear.gemm_awq import _pack_awq_columns  # its layer for AWQ wants a GPU to be made
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


def packed(bits: int, weight: Tensor, scales: Tensor, zeros: Tensor) -> dict[str, Tensor]:
    """The weight, rounded to the scales, as a layer of GPTQ holds it."""
    outputs, inputs = weight.shape
    group = inputs // scales.shape[1]
    layer = TorchLinear(
        bits=bits, group_size=group, sym=False, desc_act=False, in_features=inputs, out_features=outputs, bias=False
    )
    linear = nn.Linear(inputs, outputs, bias=False)
    linear.weight.data = weight
    layer.pack_original(linear, scales, zeros, torch.arange(inputs, dtype=torch.int32) // group)
    return {f"gptq.{bits}.{part}": getattr(layer, part).contiguous() for part in ("qweight", "qzeros")}


def main(source: str, out: str) -> None:
    """Pack every matrix of ``source``."""
    given = load_file(source)
    made: dict[str, Tensor] = {}
    for bits in (4, 8):
        made |= packed(bits, *(given[f"{name}.{bits}"] for name in ("weight", "scales", "zeros")))
    made["awq.4.qweight"] = _pack_awq_columns(given["codes.4"].T.contiguous(), 4)
    made["awq.4.qzeros"] = _pack_awq_columns(given["zeros.4"].T.contiguous().to(torch.int32), 4)
    save_file(made, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
