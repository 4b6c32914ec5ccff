"""FP8 e4m3 to float32, many times faster than torch's own cast on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor


def widen_e4m3(codes: Tensor) -> Tensor:
    """The float32 values of e4m3 codes, exact, NaN included; same shape.

    An e4m3 number's exponent and mantissa, moved to those of a half-precision number, read as the same number
    times 2**-8, subnormals too (OCP 8-bit floating point specification 1.0: bias 7, half precision: bias 15).
    """
    bits = codes.contiguous().view(torch.int8)
    half = bits.to(torch.int16).bitwise_left_shift_(7).bitwise_and_(-0x4080)
    values = half.view(torch.float16).to(torch.float32).mul_(256.0)
    magnitudes = bits & 0x7F
    if magnitudes.numel() and int(magnitudes.max()) == 0x7F:
        values.masked_fill_(magnitudes == 0x7F, torch.nan)
    return values
