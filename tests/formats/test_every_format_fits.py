"""The types hold every format that people serve: each is built by hand and compared with its own formula."""

from __future__ import annotations

import torch
from torch import Tensor

from qconvert.core.dtypes import DType
from qconvert.core.quantized import E2M1_VALUES, FP4_VALUES, NF4_VALUES, QuantizedTensor
from qconvert.core.scheme import (
    FP8,
    FP8_BLOCK,
    INT8,
    Activation,
    Channel,
    Codebook,
    Flat,
    Float,
    Group,
    Int,
    PerTensor,
    ScaleSpec,
    Scheme,
    int4,
)

ROWS, COLS = 192, 256
DYNAMIC_INT8 = Activation(kind="dynamic", grid=Int(bits=8))


def gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def integers(low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high, shape, generator=gen(low + high))


def scales(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return (torch.rand(shape, generator=gen(len(shape))) * 0.02 + 0.001).to(dtype)


def build(scheme: Scheme, codes: Tensor, scale: Tensor, **more: Tensor) -> QuantizedTensor:
    assert tuple(scale.shape) == scheme.scale_shape(ROWS, COLS)
    assert DType.from_torch(scale.dtype) == scheme.scale.dtype
    return QuantizedTensor(codes=codes, scale=scale, scheme=scheme, shape=(ROWS, COLS), **more)


def fp8_codes() -> Tensor:
    return (torch.randn(ROWS, COLS, generator=gen(9)) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)


def test_compressed_tensors_w4a16() -> None:
    codes, scale = integers(-8, 8, ROWS, COLS).to(torch.int8), scales(ROWS, COLS // 128)
    q = build(int4(128), codes, scale)
    expected = torch.stack([codes[:, k].float() * scale[:, k // 128].float() for k in range(COLS)], dim=1)
    assert torch.equal(q.dequantize(), expected) and str(q.scheme) == "int4-g128-sym"


def test_compressed_tensors_w4a16_asymmetric_and_awq() -> None:
    codes, zero = integers(0, 16, ROWS, COLS).to(torch.uint8), integers(0, 16, ROWS, COLS // 32).to(torch.uint8)
    for dtype in (DType.BF16, DType.F16):
        scale = scales(ROWS, COLS // 32, dtype=dtype.torch_dtype)
        scheme = Scheme(grid=Int(bits=4), blocking=Group(size=32), symmetric=False, scale=ScaleSpec(dtype=dtype))
        q = build(scheme, codes, scale, zero_point=zero)
        columns = [(codes[:, k].float() - zero[:, k // 32].float()) * scale[:, k // 32].float() for k in range(COLS)]
        assert torch.equal(q.dequantize(), torch.stack(columns, dim=1))


def test_gptq_with_and_without_act_order() -> None:
    # GPTQ v1 stores zero - 1 and [G, N] scales; its reader turns both. With g_idx, groups are not consecutive.
    order = torch.randperm(COLS, generator=gen(1))
    g_idx = torch.empty(COLS, dtype=torch.int32)
    g_idx[order] = (torch.arange(COLS) // 128).to(torch.int32)
    codes, zero = integers(0, 16, ROWS, COLS).to(torch.uint8), integers(0, 16, ROWS, 2).to(torch.uint8)
    scale = scales(ROWS, 2, dtype=torch.float16)
    scheme = Scheme(grid=Int(bits=4), blocking=Group(size=128), symmetric=False, scale=ScaleSpec(dtype=DType.F16))
    q = build(scheme, codes, scale, zero_point=zero, column_group=g_idx)
    stored_zero, qscales = zero.T.int() - 1, scale.T
    expected = torch.stack(
        [(codes[:, k].int() - (stored_zero[g_idx[k]] + 1)).float() * qscales[g_idx[k]].float() for k in range(COLS)],
        dim=1,
    )
    assert torch.equal(q.dequantize(), expected)


def test_w8a16_w8a8_and_llm_int8() -> None:
    codes = integers(-128, 128, ROWS, COLS).to(torch.int8)
    for scheme in (INT8, Scheme(grid=INT8.grid, blocking=Channel(), scale=INT8.scale, activation=DYNAMIC_INT8)):
        scale = scales(ROWS, 1)
        assert torch.equal(build(scheme, codes, scale).dequantize(), codes.float() * scale.float())
    # bitsandbytes LLM.int8 stores SCB = max|row|, and codes * SCB / 127.
    scb = torch.rand(ROWS, generator=gen(2)) + 0.5
    scheme = Scheme(grid=Int(bits=8), blocking=Channel(), scale=ScaleSpec(dtype=DType.F32), activation=DYNAMIC_INT8)
    q = build(scheme, codes, (scb / 127)[:, None])
    assert torch.allclose(q.dequantize(), codes.float() * scb[:, None] / 127, rtol=2.0**-22, atol=0)


def test_fp8_channel_tensor_and_block() -> None:
    codes = fp8_codes()
    scale = scales(ROWS, 1)
    assert torch.equal(build(FP8, codes, scale).dequantize(), codes.float() * scale.float())
    static = Activation(kind="static", grid=Float(kind="e4m3fn"))
    whole = Scheme(grid=FP8.grid, blocking=PerTensor(), scale=ScaleSpec(dtype=DType.F32), activation=static)
    one = scales(1, 1, dtype=torch.float32)
    assert torch.equal(build(whole, codes, one).dequantize(), codes.float() * one.item())
    tiles = scales(2, 2)  # 192 rows are one tile and a half.
    q = build(FP8_BLOCK, codes, tiles)
    for n, k in ((0, 0), (127, 128), (128, 127), (191, 255)):
        assert q.dequantize()[n, k] == codes[n, k].float() * tiles[n // 128, k // 128].float()


def e2m1(code: int) -> float:
    """Sign, two bits of exponent (bias 1), one of mantissa."""
    exponent, mantissa = code >> 1 & 3, code & 1
    magnitude = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
    return -magnitude if code & 8 else magnitude


def test_mxfp4() -> None:
    codes = integers(0, 16, ROWS, COLS).to(torch.uint8)
    exponents = integers(110, 140, ROWS, COLS // 32).to(torch.uint8)
    scheme = Scheme(grid=Float(kind="e2m1"), blocking=Group(size=32), scale=ScaleSpec(dtype=DType.F8_E8M0))
    q = build(scheme, codes, exponents.view(torch.float8_e8m0fnu))
    expected = torch.tensor(
        [[e2m1(int(codes[n, k])) * 2.0 ** (int(exponents[n, k // 32]) - 127) for k in range(COLS)] for n in range(8)]
    )
    assert torch.equal(q.dequantize()[:8], expected)
    assert list(E2M1_VALUES) == [e2m1(code) for code in range(16)]


def test_nvfp4_with_and_without_activations() -> None:
    codes = integers(0, 16, ROWS, COLS).to(torch.uint8)
    scale = scales(ROWS, COLS // 16, dtype=torch.float32).mul(1000).to(torch.float8_e4m3fn)
    stored_global = torch.tensor([2688.0])  # A reciprocal: the reader turns it.
    for activation in (Activation(), Activation(kind="dynamic", grid=Float(kind="e2m1"), group=16)):
        scheme = Scheme(
            grid=Float(kind="e2m1"),
            blocking=Group(size=16),
            scale=ScaleSpec(dtype=DType.F8_E4M3, second=DType.F32),
            activation=activation,
        )
        q = build(scheme, codes, scale, second_scale=1 / stored_global)
        expected = torch.tensor(
            [[e2m1(int(codes[n, k])) * scale[n, k // 16].item() / 2688.0 for k in range(COLS)] for n in range(8)]
        )
        assert torch.allclose(q.dequantize()[:8], expected, rtol=2.0**-22, atol=0)


def test_bitsandbytes_nf4_and_fp4() -> None:
    codes = integers(0, 16, ROWS, COLS).to(torch.uint8)
    absmax = scales(ROWS * COLS // 64, dtype=torch.float32)
    for kind, table in (("nf4", NF4_VALUES), ("fp4", FP4_VALUES)):
        grid = Codebook(kind="nf4") if kind == "nf4" else Codebook(kind="fp4")
        q = build(Scheme(grid=grid, blocking=Flat(size=64), scale=ScaleSpec(dtype=DType.F32)), codes, absmax)
        flat = q.dequantize().flatten()
        for i in (0, 63, 64, 1000, ROWS * COLS - 1):
            expected = torch.tensor(table[int(codes.flatten()[i])]) * absmax[i // 64]
            assert flat[i] == expected


def test_bitsandbytes_tables() -> None:
    # As bitsandbytes 0.50.2 decodes each code on a CPU.
    positive = [0.0, 0.0052083334885537624, 0.6666666865348816, 1.0]
    positive += [0.3333333432674408, 0.5, 0.1666666716337204, 0.25]
    fp4 = torch.tensor(FP4_VALUES)
    assert torch.equal(fp4, torch.tensor(positive + [-value for value in positive]))
    assert torch.signbit(fp4).tolist() == [False] * 8 + [True] * 8
    # NF4 is increasing, spans [-1, 1] and holds zero exactly; its inner numbers are printed in the paper.
    assert list(NF4_VALUES) == sorted(NF4_VALUES) and (NF4_VALUES[0], NF4_VALUES[7], NF4_VALUES[15]) == (-1, 0, 1)
    assert all(torch.tensor(value).item() == value for value in NF4_VALUES)
