"""What a smaller scale gives up: values beyond the end of their grid, so that the others of a block are rounded finely.

N rows, K columns.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qconvert.core.quantized import QuantizedTensor
from qconvert.core.scheme import Int
from qconvert.parity.blocks import sums_by_block
from qconvert.parity.codes import at_the_end

LEAST_LEFT = 0.45
"""What is left at least of a value that a search of scales cuts off: our own goes down to 0.56 of the plain scale,
AutoAWQ's to 0.5; the rest is room for scales in 16 bits."""


MOST_OF_INT8 = 0.12
"""Of a row in eight-bit integers, how much is given up at most: searches for inputs whose mean squares are e^(4 z)
apart gave up to 0.10 (184,320 rows of 384, simulated), for e^(2 z) 0.01; a scale that is half of what a row needs takes
0.04 to 0.22. In four bits a search gives up to 0.44 of a group of 32, no less than such a scale takes."""


def given_up(w: Tensor, v: Tensor, plain: Tensor, quantized: QuantizedTensor) -> Tensor:
    """Which values are cut off because others are worth more, a mask [N, K].

    Such a value stands at the end of its grid, the original lies beyond, and a good part of it is left: no other code
    of this scale is nearer. And something else in its block is nearer to the original than plain rounding leaves it:
    without that nobody would choose the scale, whatever inputs count. In eight bits only few of a row are given up.
    So a scale that was changed after codes were chosen for it hides nothing, for then all other values of the block are
    wrong, or none is better.

    Args:
        w: [N, K] float32, the original.
        v: what ``quantized`` means.
        plain: ``w`` rounded with the plain scale.
        quantized: codes and scales.
    """
    upwards = v > 0
    if isinstance(quantized.scheme.grid, Int) and not quantized.scheme.symmetric:
        upwards = quantized.codes > 0  # the lowest code may mean zero, or more
    beyond = torch.where(upwards, w - v, v - w) > 0
    cut = at_the_end(quantized) & beyond & (w * v > 0) & (v.abs() >= LEAST_LEFT * w.abs())
    if not bool(cut.any()):
        return cut
    better = ((w - v).abs() < (w - plain).abs()) & ~cut
    blocking = quantized.scheme.blocking
    pays = sums_by_block(better.to(torch.float32), blocking) > 0
    if quantized.scheme.grid == Int(bits=8):
        share = sums_by_block(cut.to(torch.float32), blocking) / sums_by_block(torch.ones_like(w), blocking)
        pays &= share <= MOST_OF_INT8
    # by columns as they stand, as sums are, also where groups are not consecutive
    return cut & replace(quantized, column_group=None).spread(pays)
