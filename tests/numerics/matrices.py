"""Matrices that hypothesis draws, and the schemes that they are rounded to."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from qconvert.core.dtypes import DType
from qconvert.core.scheme import (
    FP8,
    FP8_BLOCK,
    INT8,
    MXFP4,
    Block,
    Channel,
    Group,
    Int,
    PerTensor,
    ScaleSpec,
    Scheme,
    int4,
)

quick = settings(deadline=None, max_examples=20)
"""Every property runs once per scheme."""

SCHEMES: dict[str, Scheme] = {
    "int4-g8": int4(8),
    "int4-g1": int4(1),
    "int4-asym": int4(8, symmetric=False),
    "int4-channel": replace(int4(8), blocking=Channel()),
    "int4-fp16-scale": replace(int4(8), scale=ScaleSpec(dtype=DType.F16)),
    "int4-fp16-scale-exact-in-bf16": replace(int4(8), scale=ScaleSpec(dtype=DType.F16, exact_in=DType.BF16)),
    "int8": INT8,
    "int8-asym": replace(INT8, symmetric=False),
    "int8-fp32-scale": replace(INT8, scale=ScaleSpec(dtype=DType.F32)),
    "int8-tensor": replace(INT8, blocking=PerTensor()),
    "int8-block": replace(INT8, grid=Int(bits=8), blocking=Block(rows=4, cols=3)),
    "fp8": FP8,
    "fp8-tensor": replace(FP8, blocking=PerTensor()),
    "fp8-g8": replace(FP8, blocking=Group(size=8)),
    "fp8-block": replace(FP8_BLOCK, blocking=Block(rows=4, cols=8)),
    "fp8-block-edges": replace(FP8_BLOCK, blocking=Block(rows=4, cols=6)),
    "fp8-block-fp32-scale": replace(FP8_BLOCK, blocking=Block(rows=4, cols=8), scale=ScaleSpec(dtype=DType.F32)),
    "mxfp4-g8": replace(MXFP4, blocking=Group(size=8)),
    "fp4-g8": replace(MXFP4, blocking=Group(size=8), scale=ScaleSpec(dtype=DType.BF16)),
}

_PATTERNS = st.integers(0, 0x7F7F) | st.integers(0x8000, 0xFF7F)
"""Bits of all finite BF16 numbers: zeros, subnormals and the largest ones among them."""

_ORDINARY = st.floats(-4.0, 4.0, width=16).map(lambda number: torch.tensor(number).bfloat16().view(torch.int16).item())


@st.composite
def matrices(draw: st.DrawFn, *, extreme: bool = True) -> Tensor:
    """BF16 [1..9, 8 or 16]; few distinct numbers, so that ties, zero blocks and equal magnitudes are common."""
    rows, cols = draw(st.integers(1, 9)), draw(st.sampled_from((8, 16)))
    numbers = st.one_of(_PATTERNS, _ORDINARY, st.just(0)) if extreme else _ORDINARY | st.just(0)
    pool = draw(st.lists(numbers, min_size=1, max_size=12))
    gen = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    picks = torch.randint(len(pool), (rows, cols), generator=gen)
    return torch.tensor(pool, dtype=torch.int32).to(torch.int16)[picks].view(torch.bfloat16)
