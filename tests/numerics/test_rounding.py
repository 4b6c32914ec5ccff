"""Rounding is nearest, bounded, finite, row by row, and the same as an exact textbook version."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qconvert.core.errors import DataError, FormatError
from qconvert.core.quantized import E2M1_VALUES, QuantizedTensor
from qconvert.core.scheme import FP8, FP8_BLOCK, INT8, Block, Codebook, Flat, Float, Group, Int, Scheme, int4
from qconvert.numerics import rounding_compiled, rounding_torch
from qconvert.numerics.error import sqnr_db
from qconvert.numerics.packing import pack_int32
from qconvert.numerics.rounding import quantize
from tests.numerics import textbook
from tests.numerics.matrices import SCHEMES, matrices, quick
from tests.tolerances import tolerances

each_scheme = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())
TOLERANCE = tolerances("numerics")


def same(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    zeros = (a.zero_point is None and b.zero_point is None) or (
        a.zero_point is not None and b.zero_point is not None and torch.equal(a.zero_point, b.zero_point)
    )
    codes = torch.equal(a.codes.view(torch.uint8), b.codes.view(torch.uint8))
    scales = a.scale.dtype == b.scale.dtype and torch.equal(a.scale.view(torch.uint8), b.scale.view(torch.uint8))
    return codes and scales and zeros


def spread(per_block: Tensor, like: QuantizedTensor) -> Tensor:
    """One value per block, repeated to every element."""
    wide = torch.empty(like.shape)
    for at, elements in textbook.blocks(like.scheme, *like.shape).items():
        for n, k in elements:
            wide[n, k] = per_block[at].float()
    return wide


def representable(q: QuantizedTensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest number that each element could have become."""
    scale = spread(q.scale, q).double()
    match q.scheme.grid:
        case Int(bits=bits) if q.scheme.symmetric:
            return -(2.0 ** (bits - 1)) * scale, (2.0 ** (bits - 1) - 1) * scale
        case Int(bits=bits):
            zero = spread(q.zero_point, q).double() if q.zero_point is not None else torch.zeros(1)
            return -zero * scale, (2.0**bits - 1 - zero) * scale
        case Float(kind="e2m1"):
            return -6 * scale, 6 * scale
    return -448 * scale, 448 * scale


def float32_slack(q: QuantizedTensor) -> Tensor:
    """What float32 roundings of the quotient, of the sum with the zero point and of the product can move."""
    low, high = representable(q)
    return (high - low) * 2.0**-23


@each_scheme
@quick
@given(w=matrices(extreme=False))
def test_equals_the_textbook(scheme: Scheme, w: Tensor) -> None:
    got = quantize(w, scheme).quantized
    codes, scale, zero = textbook.quantize(w, scheme)
    assert torch.equal(got.scale.float(), scale)
    numbers = torch.tensor(E2M1_VALUES)[got.codes.long()] if scheme.grid == Float(kind="e2m1") else got.codes.float()
    assert torch.equal(numbers, codes)
    if got.zero_point is not None:
        assert torch.equal(got.zero_point.float(), zero)


@each_scheme
@quick
@given(w=matrices())
def test_scales_are_finite_and_positive_and_numbers_stay_finite(scheme: Scheme, w: Tensor) -> None:
    for search in (False, True):
        rounded = quantize(w, scheme, search=search)
        q = rounded.quantized
        assert q.scale.dtype == scheme.scale.dtype.torch_dtype
        assert bool((q.scale.float() > 0).all()) and bool(q.scale.float().isfinite().all())
        assert bool(q.dequantize().isfinite().all())
        assert rounded.squared_error < float("inf") and rounded.signal < float("inf")


@each_scheme
@quick
@given(w=matrices())
def test_error_is_half_a_step_or_what_is_cut_off(scheme: Scheme, w: Tensor) -> None:
    q = quantize(w, scheme).quantized
    error = (q.dequantize().double() - w.double()).abs()
    low, high = representable(q)
    cut = torch.maximum(w.double() - high, low - w.double()).clamp(min=0)
    scale = spread(q.scale, q).double()
    if scheme.grid == Float(kind="e2m1"):
        # Two steps between powers of two, subnormal steps of a half.
        half_step = torch.maximum(w.double().abs() / 4, scale / 4)
    elif isinstance(scheme.grid, Float):
        # Sixteen steps between powers of two, subnormal steps of 2**-9.
        half_step = torch.maximum(w.double().abs() / 16, scale * 2.0**-10)
    else:
        half_step = scale / 2
    assert bool((error <= torch.maximum(half_step, cut) + float32_slack(q)).all())


@each_scheme
@quick
@given(w=matrices(extreme=False))
def test_no_other_code_is_nearer(scheme: Scheme, w: Tensor) -> None:
    q = quantize(w, scheme).quantized
    error = (q.dequantize().double() - w.double()).abs()
    for move in (-1, 1):
        if scheme.grid == Float(kind="e2m1"):
            other = ((q.codes.to(torch.int16) & 7) + move).clamp(0, 7).to(torch.uint8) | q.codes & 8
        elif isinstance(scheme.grid, Float):
            bits = (q.codes.view(torch.uint8).to(torch.int16) & 0x7F) + move
            sign = q.codes.view(torch.uint8) & 0x80
            other = (bits.clamp(0, 0x7E).to(torch.uint8) | sign).view(torch.float8_e4m3fn)
        else:
            half, full = 2 ** (scheme.weight_bits - 1), 2**scheme.weight_bits - 1
            low, high = (-half, half - 1) if scheme.symmetric else (0, full)
            other = (q.codes.to(torch.int16) + move).clamp(low, high).to(q.codes.dtype)
        moved = (replace(q, codes=other).dequantize().double() - w.double()).abs()
        assert bool((error <= moved + float32_slack(q)).all())


@each_scheme
@quick
@given(w=matrices())
def test_counts_its_own_error(scheme: Scheme, w: Tensor) -> None:
    rounded = quantize(w, scheme)
    error = (rounded.quantized.dequantize().double() - w.double()).square().sum().item()
    signal = w.double().square().sum().item()
    close = TOLERANCE["sum_of_squares"]
    assert rounded.signal == pytest.approx(signal, rel=close, abs=0)
    assert rounded.squared_error == pytest.approx(error, rel=close, abs=0)


@each_scheme
@quick
@given(w=matrices(), chunk=st.integers(1, 64))
def test_rows_do_not_influence_each_other(scheme: Scheme, w: Tensor, chunk: int) -> None:
    tall = {Block: 4}.get(type(scheme.blocking), 1)
    whole = quantize(w, scheme).quantized
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounding_torch, "CHUNK_ELEMENTS", chunk)
        patch.setattr(rounding_compiled, "PIECE_ELEMENTS", chunk)
        assert same(quantize(w, scheme).quantized, whole)
    if str(scheme.blocking) == "tensor":
        return
    step = tall * (1 + chunk % 3)
    runs = [quantize(w[begin : begin + step], scheme).quantized for begin in range(0, w.shape[0], step)]
    joined = replace(
        whole,
        codes=torch.cat([run.codes.view(torch.uint8) for run in runs]).view(whole.codes.dtype),
        scale=torch.cat([run.scale.view(torch.uint8) for run in runs]).view(whole.scale.dtype),
        zero_point=None if whole.zero_point is None else torch.cat([run.zero_point for run in runs]),
    )
    assert same(joined, whole)


@each_scheme
@quick
@given(w=matrices(extreme=False), power=st.integers(-8, 8))
def test_a_power_of_two_moves_only_the_scales(scheme: Scheme, w: Tensor, power: int) -> None:
    if scheme.scale.dtype.value == "F16":
        return  # Half-precision scales of small weights are subnormal.
    plain, scaled = quantize(w, scheme).quantized, quantize(w.float() * 2.0**power, scheme).quantized
    zero_blocks = torch.tensor(
        [not any(w[n, k] for n, k in elements) for elements in textbook.blocks(scheme, *w.shape).values()]
    ).reshape(plain.scale.shape)
    assert torch.equal(plain.codes.view(torch.uint8), scaled.codes.view(torch.uint8))
    assert torch.equal((plain.scale.float() * 2.0**power).masked_fill(zero_blocks, 1.0), scaled.scale.float())


@pytest.mark.parametrize("scheme", [FP8, FP8_BLOCK], ids=["channel", "block"])
def test_fp8_of_fp8_is_itself(scheme: Scheme) -> None:
    once = quantize(torch.randn(256, 384, generator=torch.Generator().manual_seed(1)), scheme).quantized
    assert same(quantize(once.dequantize(), scheme).quantized, once)


@each_scheme
@quick
@given(w=matrices())
def test_search_never_loses(scheme: Scheme, w: Tensor) -> None:
    plain, searched = quantize(w, scheme), quantize(w, scheme, search=True)
    assert searched.squared_error <= plain.squared_error * (1 + TOLERANCE["sum_of_squares"])
    before = (plain.quantized.dequantize().double() - w.double()).square()
    after = (searched.quantized.dequantize().double() - w.double()).square()
    for elements in textbook.blocks(scheme, *w.shape).values():
        rows, cols = zip(*elements, strict=True)
        assert after[rows, cols].sum() <= before[rows, cols].sum() * (1 + TOLERANCE["sum_of_squares"])


def test_search_helps_where_one_weight_sticks_out() -> None:
    w = torch.randn(64, 128, generator=torch.Generator().manual_seed(2))
    w[:, 5] *= 4
    plain, searched = quantize(w, int4(128)), quantize(w, int4(128), search=True)
    assert searched.squared_error < 0.9 * plain.squared_error


@each_scheme
@quick
@given(w=matrices(), where=st.data())
def test_not_a_number_is_an_error(scheme: Scheme, w: Tensor, where: st.DataObject) -> None:
    n, k = where.draw(st.integers(0, w.shape[0] - 1)), where.draw(st.integers(0, w.shape[1] - 1))
    w = w.clone()
    w[n, k] = where.draw(st.sampled_from((float("nan"), float("inf"), float("-inf"))))
    with pytest.raises(DataError, match="1 NaN and 0 infinite" if w[n, k].isnan() else "0 NaN and 1 infinite"):
        quantize(w, scheme)


@each_scheme
def test_zero_matrix_has_scale_one(scheme: Scheme) -> None:
    q = quantize(torch.zeros(8, 24), scheme).quantized
    assert bool((q.scale == 1).all()) and not bool(q.dequantize().any())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_takes_any_float_type_and_stride(dtype: torch.dtype) -> None:
    w = torch.randn(48, 64, generator=torch.Generator().manual_seed(3)).bfloat16().to(dtype)
    strided = w.T.contiguous().T
    for scheme in SCHEMES.values():
        assert same(quantize(strided, scheme).quantized, quantize(w.float(), scheme).quantized)


@quick
@given(w=matrices())
def test_scales_that_shall_be_exact_in_two_types_are(w: Tensor) -> None:
    scale = quantize(w, SCHEMES["int4-fp16-scale-exact-in-bf16"]).quantized.scale
    assert scale.dtype == torch.float16 and bool(scale.isfinite().all())
    assert torch.equal(scale.to(torch.bfloat16).to(torch.float16), scale)


def test_group_must_divide_the_columns() -> None:
    with pytest.raises(ValueError, match="groups of 32 do not divide 48 columns"):
        quantize(torch.zeros(2, 48), int4(32))


@pytest.mark.parametrize(
    "scheme",
    [
        replace(int4(32), grid=Codebook(kind="nf4"), blocking=Flat(size=64)),
        replace(INT8, blocking=Flat(size=64)),
    ],
    ids=str,
)
def test_what_is_not_available_says_so(scheme: Scheme) -> None:
    with pytest.raises(FormatError, match="not available"):
        quantize(torch.ones(2, 64), scheme)


@pytest.mark.parametrize(
    ("name", "scheme"),
    [("int8", INT8), ("fp8", FP8), ("int4_g32", int4(32)), ("int4_g128", int4(128))],
)
def test_gaussian_weights_keep_their_signal(name: str, scheme: Scheme) -> None:
    w = torch.randn(256, 2048, generator=torch.Generator().manual_seed(4)).bfloat16()
    rounded = quantize(w, scheme)
    assert sqnr_db(rounded.signal, rounded.squared_error) > TOLERANCE[f"sqnr_{name}"]


def test_int4_uses_all_sixteen_codes() -> None:
    w = torch.randn(64, 1024, generator=torch.Generator().manual_seed(5))
    q = quantize(w, int4(32)).quantized
    assert set(q.codes.unique().tolist()) == set(range(-8, 8))
    assert isinstance(q.scheme.blocking, Group)


@pytest.mark.parametrize("search", [False, True], ids=["plain", "search"])
@each_scheme
def test_all_stays_on_the_device_of_the_matrix(scheme: Scheme, search: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # The device without memory stands for a GPU: it refuses to be mixed with a CPU's, and holds no numbers.
    for convert, number in (("__bool__", True), ("__int__", 1), ("__float__", 1.0)):
        monkeypatch.setattr(Tensor, convert, lambda _, number=number: number)
    q = quantize(torch.empty(16, 48, dtype=torch.bfloat16, device="meta"), scheme, search=search).quantized
    parts = [q.codes, q.scale, *([] if q.zero_point is None else [q.zero_point])]
    if isinstance(scheme.grid, Int):
        parts.append(pack_int32(q.codes, scheme.weight_bits))
    assert {part.device.type for part in parts} == {"meta"}
