"""Packing has an exact inverse and is compressed-tensors' order."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qconvert.numerics.packing import pack_int32, pack_with_torch, unpack_int32


@st.composite
def codes(draw: st.DrawFn) -> tuple[Tensor, int]:
    bits, rows, cols = draw(st.sampled_from((4, 8))), draw(st.integers(1, 5)), draw(st.integers(1, 37))
    gen = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    half = 2 ** (bits - 1)
    return torch.randint(-half, half, (rows, cols), generator=gen, dtype=torch.int8), bits


@settings(deadline=None)
@given(codes())
def test_signed_codes_as_compressed_tensors_and_back(drawn: tuple[Tensor, int]) -> None:
    signed, bits = drawn
    packed = pack_int32(signed, bits)
    assert packed.is_contiguous() and torch.equal(packed, pack_to_int32(signed, bits))
    assert torch.equal(unpack_int32(packed, bits, signed.shape[1]), signed)
    assert torch.equal(unpack_from_int32(packed, bits, signed.shape), signed)


@settings(deadline=None)
@given(codes())
def test_unsigned_codes_are_the_same_bits(drawn: tuple[Tensor, int]) -> None:
    signed, bits = drawn
    unsigned = (signed.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)
    packed = pack_int32(unsigned, bits)
    assert torch.equal(packed, pack_int32(signed, bits))
    assert torch.equal(unpack_int32(packed, bits, signed.shape[1], signed=False), unsigned)


def test_first_code_is_in_the_lowest_bits() -> None:
    assert pack_int32(torch.arange(8, dtype=torch.uint8)[None], 4).item() == 0x76543210
    assert pack_int32(torch.tensor([[-8, -7, 0, 0, 0, 0, 0, 6]], dtype=torch.int8), 4).item() == 0xE8888810 - 2**32
    assert pack_int32(torch.tensor([[1, 2, 3, 4]], dtype=torch.uint8), 8).item() == 0x04030201


@settings(deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 300), st.sampled_from((4, 8)), st.booleans())
def test_the_kernels_are_the_plain_expression(seed: int, words: int, bits: int, signed: bool) -> None:
    raw = torch.randint(0, 256, (words * 32 // bits + 1,), generator=torch.Generator().manual_seed(seed))
    codes = raw.to(torch.uint8)[:-1] if seed % 2 else raw.to(torch.uint8)[1:]
    plain = pack_with_torch(codes.clone(), bits, 1 << (bits - 1) if signed else 0)
    packed = pack_int32(codes.view(torch.int8 if signed else torch.uint8)[None], bits)
    assert torch.equal(packed[0], plain)
    packed.zero_()
    assert torch.equal(codes, raw.to(torch.uint8)[:-1] if seed % 2 else raw.to(torch.uint8)[1:])


def test_does_not_touch_its_input() -> None:
    signed = torch.arange(-8, 8, dtype=torch.int8)[None]
    before = signed.clone()
    unpack_int32(pack_int32(signed, 4), 4, 16)
    assert torch.equal(signed, before)


def test_other_widths_and_wrong_sizes_are_errors() -> None:
    with pytest.raises(ValueError, match="codes of 3 bits"):
        pack_int32(torch.zeros(1, 8, dtype=torch.int8), 3)
    with pytest.raises(ValueError, match="2 words of 32 bits do not hold 20 codes of 4 bits"):
        unpack_int32(torch.zeros(1, 2, dtype=torch.int32), 4, 20)
