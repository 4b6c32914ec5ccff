"""Integer codes packed into 32-bit words, and back."""

from __future__ import annotations

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
    raw = codes.view(torch.uint8)
    if codes.dtype == torch.int8:
        raw = raw ^ (1 << (bits - 1))
    if raw.shape[1] * bits % 32:
        if bits == 4:
            raw = raw & 0xF
        raw = torch.nn.functional.pad(raw, (0, -raw.shape[1] % (32 // bits)))
    if bits == 4:
        # Bits above the low four are the sign's copies; the shift drops those of the high code.
        raw = (raw[:, 0::2] & 0xF).bitwise_or_(raw[:, 1::2] << 4)
    # Through one dimension: a single row may have any stride, which a view of another width refuses.
    return raw.reshape(-1).view(torch.int32).view(raw.shape[0], -1)


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
        raw = torch.stack((raw & 0xF, raw >> 4), dim=-1).view(raw.shape[0], -1)
    raw = raw[:, :cols]
    if not signed:
        return raw.contiguous()
    return (raw.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)


def _check_bits(bits: int) -> None:
    if bits not in (4, 8):
        raise ValueError(f"codes of {bits} bits cannot be packed; 4 and 8 can")
