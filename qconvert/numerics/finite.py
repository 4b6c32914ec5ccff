"""Whether numbers are finite, and how large."""

from __future__ import annotations

import torch
from torch import Tensor

_TYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def all_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite; integers always are.

    Args:
        values: any shape and type; BF16, F16, F32 and F64 that lie together in a CPU's memory are read once, at the
            speed of the memory.
    """
    if not values.is_floating_point():
        return True
    in_place = values.device.type == "cpu" and values.is_contiguous() and values.data_ptr() % values.itemsize == 0
    if in_place and values.dtype in _TYPES:
        return _all_finite_compiled(values.detach().reshape(-1))
    if values.itemsize == 1:
        values = values.to(torch.float32)
    return bool(torch.isfinite(values).all())


def largest_of(values: Tensor) -> float:
    """The largest absolute value; NaN or infinite if one value is."""
    low, high = (float(end) for end in torch.aminmax(values))
    return max(-low, high)


def _all_finite_compiled(values: Tensor) -> bool:
    # Here, because importing numba takes a quarter of a second, and most commands look at no weight.
    from qconvert.numerics.finite_kernels import all_below_16, all_below_32, all_below_64

    infinity = torch.tensor(float("inf"), dtype=values.dtype)
    match values.itemsize:
        case 2:
            kernel, bits = all_below_16, torch.uint16
        case 4:
            kernel, bits = all_below_32, torch.uint32
        case _:
            kernel, bits = all_below_64, torch.uint64
    return bool(kernel(values.view(bits).numpy(), infinity.view(bits).numpy()[()]))
