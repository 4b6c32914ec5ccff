"""Two matrices as one whose rows take turns: the layout in which grouped kernels read gate and up projections."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qconvert.core.errors import DataError
from qconvert.core.quantized import QuantizedTensor


def take_turns(first: Tensor, second: Tensor) -> Tensor:
    """Rows ``first_0, second_0, first_1, second_1, ...``: two [N, ...] as [2N, ...]."""
    return torch.stack((first, second), dim=1).flatten(0, 1)


def quantized_in_turns(first: QuantizedTensor, second: QuantizedTensor) -> QuantizedTensor:
    """The same with codes, scales and zero points that belong to rows: the exact meaning of both stays.

    Raises:
        DataError: the two are of different schemes, or have scales or an order of inputs that rows do not own.
    """
    if first.scheme != second.scheme:
        raise DataError(f"is {first.scheme} and its other half {second.scheme}: one kernel reads both")
    for one in (first, second):
        if one.second_scale is not None or one.column_group is not None or one.scale.shape[0] != one.shape[0]:
            raise DataError(f"has no scales of its own for each row, as {one.scheme}")
    zero_point = None
    if first.zero_point is not None and second.zero_point is not None:
        zero_point = take_turns(first.zero_point, second.zero_point)
    return replace(
        first,
        codes=take_turns(first.codes, second.codes),
        scale=take_turns(first.scale, second.scale),
        zero_point=zero_point,
        shape=(2 * first.shape[0], first.shape[1]),
    )
