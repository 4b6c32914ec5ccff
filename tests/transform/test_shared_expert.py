"""A shared expert cut into experts: the same units in the same order, the same codes with the same scales."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from qconvert.core.errors import DataError, FormatError
from qconvert.core.quantized import QuantizedTensor
from qconvert.core.role import Kind
from qconvert.core.scheme import FP8, FP8_BLOCK, INT8, MXFP4, NVFP4, PerTensor, Scheme, bnb4, int4
from qconvert.numerics.rounding import quantize
from qconvert.transform.rectangles import cut, lay_quantized
from qconvert.transform.shared_expert import FOLDED, fold, shares, unfold
from tests.tolerances import tolerances

SCHEMES: dict[str, Scheme] = {
    "int4": int4(32),
    "int4-asym": int4(32, symmetric=False),
    "int8": INT8,
    "int8-asym": replace(INT8, symmetric=False),
    "fp8": FP8,
    "fp8-tensor": replace(FP8, blocking=PerTensor()),
    "mxfp4": MXFP4,
    "nvfp4": NVFP4,
}
WIDTHS = (64, 128, 32, 96, 224)
"""Of shared experts, for routed ones of 64: F, 2F, F/2, 3F/2, 7F/2."""
F, D = 64, 160


def matrix(kind: Kind, shared: int, seed: int = 0) -> Tensor:
    rows, cols = (D, shared) if kind is Kind.SHARED_DOWN else (shared, D)
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


def rounded(kind: Kind, shared: int, scheme: Scheme) -> QuantizedTensor:
    return quantize(matrix(kind, shared), scheme, second=2.0**-9 if scheme is NVFP4 else 1.0).quantized


def same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    first, last = (one.contiguous().view(-1).view(torch.uint8) for one in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(first, last)


@given(st.integers(1, 400), st.integers(1, 90))
def test_every_unit_is_in_one_expert(shared: int, width: int) -> None:
    cuts = list(shares(shared, width))
    assert [unit for one in cuts for unit in range(one.begin, one.end)] == list(range(shared))
    assert len(cuts) == -(-shared // width)
    assert all(one.end - one.begin == width for one in cuts[:-1])


@given(st.integers(1, 60), st.integers(1, 25))
def test_the_sum_of_the_experts_is_the_shared_expert(shared: int, width: int) -> None:
    gate, up, down = (matrix(kind, shared, seed).double() for seed, kind in enumerate(FOLDED))
    x = torch.randn(9, D, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    expected = functional.silu(x @ gate.T) * (x @ up.T) @ down.T
    pieces = zip(*(fold(one, kind, width) for one, kind in zip((gate, up, down), FOLDED, strict=True)), strict=True)
    found = sum(functional.silu(x @ g.T) * (x @ u.T) @ d.T for g, u, d in pieces)
    error = float((found - expected).abs().max()) / float(expected.abs().max())
    assert error <= tolerances("folding")["sum_of_units_fp64"]


@pytest.mark.parametrize("shared", WIDTHS)
@pytest.mark.parametrize("kind", FOLDED)
def test_unfolding_gives_a_matrix_back_bit_for_bit(kind: Kind, shared: int) -> None:
    original = matrix(kind, shared).bfloat16()
    pieces = fold(original, kind, F)
    assert {tuple(piece.shape) for piece in pieces} == {(D, F) if kind is Kind.SHARED_DOWN else (F, D)}
    assert same(unfold(pieces, kind, shared), original)


@pytest.mark.parametrize("shared", WIDTHS)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", FOLDED)
def test_codes_and_scales_move_and_nothing_is_rounded(kind: Kind, scheme: str, shared: int) -> None:
    whole = rounded(kind, shared, SCHEMES[scheme])
    pieces = fold(whole, kind, F)
    for piece, meant in zip(pieces, fold(whole.dequantize(), kind, F), strict=True):
        assert torch.equal(piece.dequantize(), meant)  # what fills the last one up means zero
        assert piece.scale.shape == piece.scheme.scale_shape(*piece.shape)
        assert bool((piece.scale.float() > 0).all())
    back = unfold(pieces, kind, shared)
    for name in ("codes", "scale", "zero_point", "second_scale"):
        assert same(getattr(back, name), getattr(whole, name)), name


@pytest.mark.parametrize("kind", FOLDED)
def test_codes_in_tiles_are_cut_between_tiles(kind: Kind) -> None:
    whole = quantize(torch.randn(512, 512, generator=torch.Generator().manual_seed(0)), FP8_BLOCK).quantized
    pieces = fold(whole, kind, 256)
    assert [piece.scale.shape for piece in pieces] == [(4, 2) if kind is Kind.SHARED_DOWN else (2, 4)] * 2
    assert same(unfold(pieces, kind, 512).scale, whole.scale)
    with pytest.raises(FormatError, match="blocks of 128"):
        fold(whole, kind, 192)


def test_what_cannot_be_cut_is_refused() -> None:
    whole = rounded(Kind.SHARED_DOWN, 128, int4(32))
    with pytest.raises(FormatError, match=r"columns 0 \.\. 48 of 128 cut through blocks of 32"):
        fold(whole, Kind.SHARED_DOWN, 48)
    with pytest.raises(FormatError, match="activation order"):
        fold(replace(whole, column_group=torch.zeros(128, dtype=torch.int32)), Kind.SHARED_DOWN, F)
    flat = quantize(matrix(Kind.SHARED_DOWN, 128), bnb4("nf4")).quantized
    with pytest.raises(FormatError, match="over the ends of rows"):
        cut(flat, (0, 10), (0, 128))


def test_pieces_that_do_not_belong_together_are_refused() -> None:
    pieces = fold(rounded(Kind.SHARED_DOWN, 128, INT8), Kind.SHARED_DOWN, F)
    other = replace(pieces[1], scale=pieces[1].scale * 2)
    with pytest.raises(DataError, match="scales"):
        unfold([pieces[0], other], Kind.SHARED_DOWN, 128)
    pieces = fold(rounded(Kind.SHARED_UP, 128, NVFP4), Kind.SHARED_UP, F)
    with pytest.raises(DataError, match="second scales"):
        unfold([pieces[0], replace(pieces[1], second_scale=torch.tensor(1.0))], Kind.SHARED_UP, 128)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_matrix_of_nothing_means_zero(scheme: str) -> None:
    blank = lay_quantized((), (64, 128), SCHEMES[scheme], torch.tensor(1.0) if scheme == "nvfp4" else None)
    assert not bool(blank.dequantize().any())
