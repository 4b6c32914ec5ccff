"""The compiled kernels give the bits of the plain torch expression, and losses that are the same every time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qconvert.core.dtypes import DType
from qconvert.core.errors import DataError
from qconvert.core.scheme import FP8, FP8_BLOCK, INT8, Block, Group, ScaleSpec, Scheme, int4
from qconvert.numerics import rounding_compiled
from qconvert.numerics.finite import all_finite
from qconvert.numerics.finite_kernels import all_below_16
from qconvert.numerics.packing import pack_int32
from qconvert.numerics.packing_kernels import pack_bytes, pack_nibbles
from qconvert.numerics.rounding import has_kernel, quantize
from qconvert.numerics.rounding_compiled import quantize_compiled
from qconvert.numerics.rounding_kernels import quantize_bf16, quantize_f32
from qconvert.numerics.rounding_rule import Rounded
from qconvert.numerics.rounding_torch import quantize_with_torch
from tests.numerics.matrices import SCHEMES, quick
from tests.tolerances import tolerances

CLOSE = tolerances("numerics")["loss_of_kernels"]
WITH_KERNEL = {name: scheme for name, scheme in SCHEMES.items() if has_kernel(scheme)}
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
REAL: dict[str, Scheme] = {
    "int4-g128": int4(128),
    "int4-g32": int4(32),
    "int4-g96": int4(96),
    "int4-asym": int4(128, symmetric=False),
    "int8": INT8,
    "int8-asym": replace(INT8, symmetric=False),
    "int8-g64-asym-fp32": replace(INT8, blocking=Group(size=64), symmetric=False, scale=ScaleSpec(dtype=DType.F32)),
    "fp8": FP8,
    "fp8-fp16": replace(FP8, scale=ScaleSpec(dtype=DType.F16)),
    "fp8-block": FP8_BLOCK,
    "fp8-block-fp32": replace(FP8_BLOCK, scale=ScaleSpec(dtype=DType.F32)),
}


def assert_same_codes(a: Rounded, b: Rounded) -> None:
    p, q = a.quantized, b.quantized
    assert p.codes.dtype == q.codes.dtype and p.scale.dtype == q.scale.dtype
    assert torch.equal(p.codes.view(torch.uint8), q.codes.view(torch.uint8))
    assert torch.equal(p.scale, q.scale)
    assert (p.zero_point is None) == (q.zero_point is None)
    if p.zero_point is not None and q.zero_point is not None:
        assert torch.equal(p.zero_point, q.zero_point)


def assert_same(w: Tensor, scheme: Scheme, *, search: bool) -> None:
    ours, plain = quantize_compiled(w, scheme, search=search), quantize_with_torch(w, scheme, search=search)
    assert_same_codes(ours, plain)
    assert ours.squared_error == pytest.approx(plain.squared_error, rel=CLOSE, abs=0)
    assert ours.signal == pytest.approx(plain.signal, rel=CLOSE, abs=0)


@st.composite
def odd_matrices(draw: st.DrawFn, group: int) -> Tensor:
    """[1..20, 1..40 or whole groups] of any float type: any bits, ordinary numbers, halves of a step, zeros.

    Where a number in the corner keeps the sums in float32's range, the codes of the extremes are the kernel's own.
    """
    dtype = draw(st.sampled_from(DTYPES))
    rows, cols = draw(st.integers(1, 20)), group * draw(st.integers(1, max(1, 40 // group)))
    gen = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = (rows, cols)
    normal = torch.randn(shape, generator=gen, dtype=torch.float64) * 2.0 ** draw(st.integers(-40, 15))
    match draw(st.sampled_from(("any bits", "normal", "negative", "ties", "tiny", "huge", "mixed"))):
        case "any bits":
            wide = torch.randint(-(2**31), 2**31, shape, generator=gen).to(torch.int32).view(torch.float32)
            w = wide.double()
        case "ties":
            # With 7.5, 127.5 or 448 in every block its scale is 1, and every number lies on a half.
            w = torch.randint(-15, 16, shape, generator=gen).double() / 2
            w[:, 0:cols:group] = draw(st.sampled_from((7.5, -7.5, 127.5, 448.0)))
        case "tiny":
            w = normal * 2.0**-110
        case "negative":
            w = -normal.abs()
        case "mixed":
            powers = torch.randint(-150, 40, (rows, 1), generator=gen)
            powers = powers - torch.randint(0, 20, (rows, cols // group), generator=gen).repeat_interleave(group, dim=1)
            w = normal.sign() * (1 + torch.rand(shape, generator=gen, dtype=torch.float64)) * 2.0**powers
            w[0, 0] = 1.0
        case "huge":
            w = normal.sign() * normal.abs().clamp(2.0**-10, 1) * 3.3e38
        case _:
            w = normal
    w = w.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)
    w = torch.where(w.isfinite() & (w.abs() <= 3.3e38), w, 0.0)
    zeros = torch.rand(shape, generator=gen) < draw(st.sampled_from((0.0, 0.1, 0.9, 1.0)))
    return torch.where(zeros, torch.where(w < 0, -0.0, 0.0).to(dtype), w)


def group_of(scheme: Scheme) -> int:
    return scheme.blocking.size if isinstance(scheme.blocking, Group) else 1


@pytest.mark.parametrize("search", [False, True], ids=["plain", "search"])
@pytest.mark.parametrize("scheme", WITH_KERNEL.values(), ids=WITH_KERNEL.keys())
@quick
@given(drawn=st.data())
def test_the_bits_of_the_plain_expression(scheme: Scheme, search: bool, drawn: st.DataObject) -> None:
    assert_same(drawn.draw(odd_matrices(group_of(scheme))), scheme, search=search)


@pytest.mark.parametrize("search", [False, True], ids=["plain", "search"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", REAL.values(), ids=REAL.keys())
def test_the_bits_of_the_plain_expression_on_real_shapes(scheme: Scheme, dtype: torch.dtype, search: bool) -> None:
    w = torch.randn(133, 1152, generator=torch.Generator().manual_seed(6)).mul_(0.02)
    w[5], w[7, 128:384], w[9, 3] = 0.0, -0.0, 1.5
    assert_same(w.to(dtype), scheme, search=search)


def test_every_scheme_that_is_written_has_a_kernel() -> None:
    assert all(has_kernel(scheme) for scheme in REAL.values())
    assert {name for name in SCHEMES if name not in WITH_KERNEL} == {"int8-tensor", "fp8-tensor", "fp4-g8"}
    assert not has_kernel(replace(INT8, blocking=Block(rows=4, cols=4), symmetric=False))


@pytest.mark.parametrize("scheme", REAL.values(), ids=REAL.keys())
def test_losses_do_not_depend_on_pieces_or_on_the_call(scheme: Scheme) -> None:
    w = torch.randn(261, 1152, generator=torch.Generator().manual_seed(8)).bfloat16()
    first = quantize(w, scheme)
    strided = w.T.contiguous().T
    for pieces in (1, 1152 * 130, 1 << 18):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rounding_compiled, "PIECE_ELEMENTS", pieces)
            for again in (quantize(w, scheme), quantize(w.float(), scheme), quantize(strided, scheme)):
                assert_same_codes(again, first)
                assert again.squared_error == first.squared_error and again.signal == first.signal


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", REAL.values(), ids=REAL.keys())
def test_refuses_what_the_plain_expression_refuses(scheme: Scheme, dtype: torch.dtype, bad: float) -> None:
    for row, col in ((0, 0), (132, 1151), (64, 600)):
        w = torch.ones(133, 1152, dtype=dtype)
        w[row, col] = bad
        with pytest.raises(DataError) as plain:
            quantize_with_torch(w, scheme)
        with pytest.raises(DataError) as ours:
            quantize_compiled(w, scheme)
        assert str(ours.value) == str(plain.value)


def test_numbers_need_not_lie_on_their_own_boundaries_and_need_no_code_of_their_own() -> None:
    w = torch.randn(3, 64, generator=torch.Generator().manual_seed(9)).bfloat16()
    file = bytearray(b"\0" + w.view(torch.uint8).numpy().tobytes())
    odd = torch.frombuffer(memoryview(file)[1:], dtype=torch.bfloat16).view(3, 64)
    codes = torch.frombuffer(memoryview(file)[1:], dtype=torch.int8).view(3, 128)
    assert odd.data_ptr() % 2 == 1
    for scheme in (int4(32), INT8, int4(64, symmetric=False), replace(FP8_BLOCK, blocking=Block(rows=2, cols=32))):
        assert_same_codes(quantize(odd, scheme), quantize(w, scheme))
        assert_same_codes(quantize(w.float(), scheme, search=True), quantize(w.double(), scheme, search=True))
    assert all_finite(odd) and all_finite(w)
    for bits in (4, 8):
        assert torch.equal(pack_int32(codes, bits), pack_int32(codes.clone(), bits))
    # Two processes that compile one kernel for two types of arguments at once could mix them up on disk.
    for kernel in (quantize_bf16, quantize_f32, pack_nibbles, pack_bytes, all_below_16):
        assert len(kernel.compiled.signatures) == 1
