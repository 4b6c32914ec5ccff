"""compressed-tensors, given the same stored scales, chooses the same codes, and in float32 the same scales."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize as upstream_dequantize
from compressed_tensors.quantization.lifecycle.forward import quantize as upstream_quantize
from compressed_tensors.quantization.utils import calculate_qparams

from qconvert.core.dtypes import DType
from qconvert.core.scheme import FP8, FP8_BLOCK, INT8, MXFP4, W8A8, Channel, ScaleSpec, Scheme, int4
from qconvert.numerics.rounding import quantize

CASES: dict[str, tuple[Scheme, QuantizationArgs]] = {
    "int4-g32": (int4(32), QuantizationArgs(num_bits=4, strategy="group", group_size=32)),
    "int4-g128": (int4(128), QuantizationArgs(num_bits=4, strategy="group", group_size=128)),
    "int4-asym": (
        int4(32, symmetric=False),
        QuantizationArgs(num_bits=4, strategy="group", group_size=32, symmetric=False),
    ),
    "int8": (INT8, QuantizationArgs(num_bits=8, strategy="channel")),
    "int8-asym": (replace(INT8, symmetric=False), QuantizationArgs(num_bits=8, strategy="channel", symmetric=False)),
    "w8a8": (W8A8, QuantizationArgs(num_bits=8, strategy="channel")),
    "fp8": (FP8, QuantizationArgs(num_bits=8, type="float", strategy="channel")),
    "fp8-block": (FP8_BLOCK, QuantizationArgs(num_bits=8, type="float", strategy="block", block_structure=[128, 128])),
}


@pytest.mark.parametrize("scale_type", [DType.BF16, DType.F32], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_same_codes_and_same_numbers(case: str, scale_type: DType) -> None:
    scheme, args = CASES[case]
    scheme = replace(scheme, scale=ScaleSpec(dtype=scale_type))
    w = torch.randn(256, 384, generator=torch.Generator().manual_seed(7)).bfloat16().float()
    q = quantize(w, scheme).quantized
    half = 2 ** (scheme.weight_bits - 1)
    ours, zero = q.codes, None
    if q.zero_point is not None:
        zero, ours = ((part.to(torch.int16) - half).to(torch.int8) for part in (q.zero_point, q.codes))
    codes = upstream_quantize(x=w, scale=q.scale.float(), zero_point=zero, args=args, dtype=args.pytorch_dtype())
    assert torch.equal(ours.view(torch.uint8), codes.view(torch.uint8))
    theirs = upstream_dequantize(x_q=codes, scale=q.scale.float(), zero_point=zero, args=args)
    assert torch.equal(q.dequantize(), theirs)


@pytest.mark.parametrize("case", ["int4-g32", "int4-g128", "int8", "fp8", "int4-asym"])
def test_same_scales(case: str) -> None:
    scheme, args = CASES[case]
    scheme = replace(scheme, scale=ScaleSpec(dtype=DType.F32))
    w = torch.randn(64, 384, generator=torch.Generator().manual_seed(8))
    q = quantize(w, scheme).quantized
    size = w.shape[1] if scheme.blocking == Channel() else args.group_size
    blocks = w.unflatten(1, (-1, size))
    scale, zero = calculate_qparams(blocks.amin(dim=2), blocks.amax(dim=2), args)
    assert torch.equal(q.scale, scale)
    if q.zero_point is not None:
        assert torch.equal(q.zero_point.to(torch.int16) - 8, zero.to(torch.int16))


def test_mxfp4_scales_and_numbers() -> None:
    args = QuantizationArgs(
        num_bits=4, type="float", strategy="group", group_size=32, scale_dtype=torch.uint8, zp_dtype=torch.uint8
    )
    w = torch.randn(256, 384, generator=torch.Generator().manual_seed(9))
    w *= torch.logspace(-8, 8, 256, base=2.0)[:, None]
    q = quantize(w, MXFP4).quantized
    blocks = w.unflatten(1, (-1, 32))
    scale, _ = calculate_qparams(blocks.amin(dim=2), blocks.amax(dim=2), args)
    assert torch.equal(q.scale.float(), scale.float())
    theirs = upstream_quantize(x=w, scale=scale.float(), zero_point=None, args=args)
    assert torch.equal(q.dequantize(), upstream_dequantize(x_q=theirs, scale=scale.float(), zero_point=None, args=args))
