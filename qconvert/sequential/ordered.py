"""Work on several threads whose results come in the order of what they were made of."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


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
