"""bitsandbytes reads our codes as we do; its integers are the nearest; zeros and bad numbers are taken care of."""

from __future__ import annotations

import sys
from typing import Literal

import bitsandbytes
import pytest
import torch
from bitsandbytes import functional
from torch import Tensor

from qconvert.core.errors import DataError, UsageError
from qconvert.core.quantized import CODEBOOKS
from qconvert.core.scheme import LLM_INT8, Scheme, bnb4
from qconvert.formats.bitsandbytes_state import Bitsandbytes4
from qconvert.numerics import rounding_bitsandbytes
from qconvert.numerics.rounding import has_kernel, quantize

KINDS: tuple[Literal["nf4", "fp4"], ...] = ("nf4", "fp4")


def weights(width: int = 160) -> Tensor:
    return (torch.randn(24, width, generator=torch.Generator().manual_seed(2)) * 0.02).bfloat16()


@pytest.mark.parametrize("kind", KINDS)
def test_four_bit_codes_are_theirs_and_mean_the_same(kind: Literal["nf4", "fp4"]) -> None:
    w = weights()
    q = quantize(w, bnb4(kind)).quantized
    packed, state = functional.quantize_4bit(w, blocksize=64, quant_type=kind)
    parts = Bitsandbytes4(kind).pack(q)
    theirs = {"weight." + name: part for name, part in state.as_dict(packed=True).items()}
    assert torch.equal(parts["weight"], packed) and theirs.keys() == parts.keys() - {"weight"}
    assert all(torch.equal(parts[name], part) for name, part in theirs.items())
    assert torch.allclose(theirs_of(kind, weights(192)), ours_of(kind, weights(192)), rtol=1e-6, atol=0)


def ours_of(kind: Literal["nf4", "fp4"], w: Tensor) -> Tensor:
    return quantize(w, bnb4(kind)).quantized.dequantize()


def theirs_of(kind: Literal["nf4", "fp4"], w: Tensor) -> Tensor:
    packed, state = functional.quantize_4bit(w, blocksize=64, quant_type=kind)
    state.dtype = torch.float32
    return functional.dequantize_4bit(packed, state)


def multiplied(kind: Literal["nf4", "fp4"], rows: int, cols: int) -> Tensor:
    """What a linear module of theirs gives for units."""
    module = bitsandbytes.nn.Linear4bit(cols, rows, bias=False, compress_statistics=False, quant_type=kind)
    module = module.bfloat16().to("cpu").eval()
    with torch.no_grad():
        product: Tensor = module(torch.eye(cols, dtype=torch.bfloat16))
    return product


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="about CPUs with AVX-512")
@pytest.mark.parametrize("kind", KINDS)
def test_what_avx512_makes_of_odd_shapes(kind: Literal["nf4", "fp4"]) -> None:
    """What limits say: blocks that go over the end of a row are misread, and products fail."""
    wrong = theirs_of(kind, weights(160)) != ours_of(kind, weights(160))
    assert wrong.any(1).tolist() == [False] + [True] * 23
    if functional.has_avx512bf16():
        assert multiplied(kind, 64, 128).shape == (128, 64)
        with pytest.raises(RuntimeError, match="is invalid for input of size"):
            multiplied(kind, 32, 160)
        with pytest.raises(AssertionError, match="N must be divisible"):
            multiplied(kind, 24, 192)


@pytest.mark.parametrize("kind", KINDS)
def test_no_other_code_is_nearer(kind: Literal["nf4", "fp4"]) -> None:
    w = weights()
    q = quantize(w, bnb4(kind)).quantized
    scaled = w.float().reshape(-1, 64) / q.scale[:, None]
    table = torch.tensor(CODEBOOKS[kind])
    best = (scaled[..., None] - table).abs().amin(-1)
    chosen = (scaled - table[q.codes.reshape(-1, 64).long()]).abs()
    assert float((chosen - best).max()) < 1e-6


def test_integers_of_llm_int8() -> None:
    w = weights()
    q = quantize(w, LLM_INT8).quantized
    largest = w.float().abs().amax(1)
    assert torch.equal(q.scale.squeeze(1), largest) and int(q.codes.min()) >= -127
    assert bool(((q.dequantize() - w.float()).abs() <= largest[:, None] / 254 * (1 + 1e-5)).all())
    theirs = functional.int8_vectorwise_dequant(q.codes, q.scale.squeeze(1))
    assert torch.allclose(theirs, q.dequantize(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("scheme", [bnb4("nf4"), bnb4("fp4"), LLM_INT8], ids=str)
def test_pieces_and_types_change_nothing(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    w = weights()[:, :96]  # blocks run on from row to row
    whole = quantize(w, scheme)
    monkeypatch.setattr(rounding_bitsandbytes, "PIECE_ELEMENTS", 1)
    for again in (quantize(w, scheme), quantize(w.double(), scheme)):
        assert torch.equal(again.quantized.codes, whole.quantized.codes)
        assert torch.equal(again.quantized.scale, whole.quantized.scale)
        assert again.squared_error == pytest.approx(whole.squared_error, rel=1e-6)


@pytest.mark.parametrize("scheme", [bnb4("nf4"), bnb4("fp4"), LLM_INT8], ids=str)
def test_zeros_stay_zeros_and_bad_numbers_are_errors(scheme: Scheme) -> None:
    w = weights()
    w[3] = 0.0
    w[4, :64] = -0.0
    q = quantize(w, scheme).quantized
    assert not bool(q.dequantize()[3].any()) and bool((q.scale > 0).all())
    w[7, 7] = float("nan")
    with pytest.raises(DataError, match="1 NaN"):
        quantize(w, scheme)
    assert not has_kernel(scheme)


def test_without_bitsandbytes_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UsageError, match=r"pip install 'qconvert\[bitsandbytes\]'"):
        quantize(weights(), bnb4("nf4"))
    with pytest.raises(ValueError, match="the blocks of bnb-nf4-flat64 do not divide a 1 x 32 matrix"):
        quantize(weights()[:1, :32], bnb4("nf4"))
