"""Work on several threads, and matrix products that give the same bits whatever their number is."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


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


def in_order(
    pool: ThreadPoolExecutor, work: Callable[[Item], Result], items: Iterable[Item], ahead: int
) -> Iterator[Result]:
    """``map(work, items)`` by the threads of ``pool``, no gradients; at most ``ahead`` are there or under way at once.

    What is under way when the caller stops, or when one of them fails, is waited for.
    """

    def quietly(item: Item) -> Result:
        with torch.no_grad():  # a thread has this setting for itself
            return work(item)

    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(quietly, item))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
        for future in waiting:
            if not future.cancelled():
                future.exception()
