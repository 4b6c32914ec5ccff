"""Integer codes packed into 32-bit words, and back."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def pack_int32(codes: Tensor, bits: int) -> Tensor:
    """Pack codes along K, the first code in a word's lowest bits.

    Signed codes are stored as ``code + 2**(bits-1)``, unsigned ones as they are. This is the order of
    compressed-tensors' ``pack-quantized``; the last word of a row is filled up with zero bits.

    Args:
        codes: [N, K] int8 (signed) or uint8 (unsigned).
        bits: 4 or 8.

    Returns:
        int32 [N, ceil(K * bits / 32)].

    Raises:
        ValueError: another width.
    """
    _check_bits(bits)
    signed = codes.dtype == torch.int8
    if ragged := codes.shape[1] * bits % 32:
        # The number that is stored as zero bits.
        filling = -(1 << (bits - 1)) if signed else 0
        codes = torch.nn.functional.pad(codes, (0, (32 - ragged) // bits), value=filling)
    # Through one dimension: a single row may have any stride, which a view of another width refuses.
    raw = codes.reshape(-1).view(torch.uint8)
    flip = 1 << (bits - 1) if signed else 0
    packed = _pack_compiled(raw, bits, flip) if raw.device.type == "cpu" else pack_with_torch(raw, bits, flip)
    return packed.view(codes.shape[0], -1)


def pack_with_torch(raw: Tensor, bits: int, flip: int) -> Tensor:
    """Pack the bytes of whole words by plain tensor operations, on any device.

    Args:
        raw: uint8 [n]; above the low ``bits`` a byte may hold anything.
        bits: 4 or 8.
        flip: what every code is combined with by exclusive or.

    Returns:
        int32 [n * bits / 32].
    """
    raw = raw ^ flip
    if bits == 4:
        # The shift drops what is above the low four bits of the high code.
        raw = (raw[0::2] & 0xF).bitwise_or_(raw[1::2] << 4)
    return raw.view(torch.int32)


def _pack_compiled(raw: Tensor, bits: int, flip: int) -> Tensor:
    """The same on a CPU, several words at a time."""
    # Here, because importing numba takes a quarter of a second, and most commands pack nothing.
    from qconvert.numerics.packing_kernels import pack_bytes, pack_nibbles

    # Kernels may take for granted that numbers lie on their own boundaries.
    if raw.data_ptr() % 8:
        raw = raw.clone()
    words = torch.empty(raw.numel() * bits // 32, dtype=torch.int32)
    kernel, width = (pack_nibbles, np.uint64) if bits == 4 else (pack_bytes, np.uint32)
    everywhere = np.uint32(flip * (0xFFFFFFFF // ((1 << bits) - 1)))
    kernel(raw.numpy().view(width), everywhere, words.view(torch.uint32).numpy())
    return words


def unpack_int32(packed: Tensor, bits: int, cols: int, *, signed: bool = True) -> Tensor:
    """The exact inverse of ``pack_int32``.

    Args:
        packed: int32 [N, ceil(cols * bits / 32)].
        bits: 4 or 8.
        cols: K, the number of codes in a row.
        signed: whether the codes were int8.

    Returns:
        [N, K] int8 or uint8.

    Raises:
        ValueError: another width, or words that do not hold ``cols`` codes.
    """
    _check_bits(bits)
    if packed.shape[1] != -(-cols * bits // 32):
        raise ValueError(f"{packed.shape[1]} words of 32 bits do not hold {cols} codes of {bits} bits")
    raw = packed.reshape(-1).view(torch.uint8).view(packed.shape[0], -1)
    if bits == 4:
        raw = unpack_pairs(raw)
    raw = raw[:, :cols]
    if not signed:
        return raw.contiguous()
    return (raw.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)


def unpack_pairs(packed: Tensor) -> Tensor:
    """Two 4-bit codes a byte, the first in the low half, one by one: uint8 [N, K / 2] to uint8 [N, K]."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).view(packed.shape[0], -1)


def _check_bits(bits: int) -> None:
    if bits not in (4, 8):
        raise ValueError(f"codes of {bits} bits cannot be packed; 4 and 8 can")
