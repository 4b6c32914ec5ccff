"""The group of every input (``g_idx``), where groups need not be consecutive: activation order."""

from __future__ import annotations

import torch
from torch import Tensor

from qconvert.core.errors import FormatError
from qconvert.core.scheme import Scheme


def consecutive_groups(scheme: Scheme, shape: tuple[int, int]) -> Tensor:
    """Group ``k // size`` of every input k: int32 [K]."""
    groups = scheme.scale_shape(*shape)[1]
    return torch.arange(groups, dtype=torch.int32).repeat_interleave(shape[1] // groups)


def check_groups_of_inputs(index: Tensor, scheme: Scheme, shape: tuple[int, int], suffix: str) -> Tensor | None:
    """The stored ``index`` as a ``QuantizedTensor`` has it: ``None`` for consecutive groups.

    Raises:
        FormatError: it is no permutation of the groups.
    """
    consecutive = consecutive_groups(scheme, shape)
    if torch.equal(index, consecutive):
        return None
    if not torch.equal(index.sort().values, consecutive):
        size = shape[1] // scheme.scale_shape(*shape)[1]
        raise FormatError(f"{suffix} does not give every group its {size} inputs", part=suffix)
    return index
