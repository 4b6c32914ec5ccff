"""Matrix products that give the same bits whatever number of threads the process is set to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch and its BLAS work on one thread: how they cut a product follows the number, and sums follow the cut.

    The number belongs to the process. Whoever computes on several threads of Python sets it to 1 before they start,
    and then this changes nothing.
    """
    before = torch.get_num_threads()
    if before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
