"""Work on several threads, and matrix products that give the same bits whatever their number is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

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


@contextmanager
def side_by_side(jobs: int) -> Iterator[Callable[..., Iterator[Any]]]:
    """A ``map`` that makes ``jobs`` calls at once, each with one thread of torch, so that bits do not follow ``jobs``.

    It asks for all items before it gives a result, unless ``jobs`` is 1.
    """
    with one_thread():
        if jobs == 1:
            yield map
            return
        with ThreadPoolExecutor(jobs, thread_name_prefix="side by side") as pool:
            yield pool.map
