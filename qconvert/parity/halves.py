"""The halves of ``q_proj`` apart: what rounding costs the queries, and what it costs the output gates."""

from __future__ import annotations

import torch

from qconvert.core.role import HALVES, TensorRole
from qconvert.numerics.error import ErrorSums, error_sums
from qconvert.parity.pairs import Place, pairs


def half_sums(first: Place, second: Place) -> dict[TensorRole, ErrorSums]:
    """The error of each half of the ``q_proj`` in ``second`` against ``first``, by the role of the half.

    Rows are [L, 2, H]: for every head those of its query, then those of its gate.

    Raises:
        FormatError: one of them cannot be read.
    """
    source, role = first
    height = source.config.text.head_dim
    sums = {half: ErrorSums() for half in role.halves}
    begin = 0
    for w, v in pairs(first, second):
        index = torch.arange(begin, begin + len(w)) // height % len(HALVES)
        for number, half in enumerate(role.halves):
            sums[half] += error_sums(w[index == number], v[index == number])
        begin += len(w)
    return sums
