"""Calls that may be made side by side: whoever has many of them is told how."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

S = TypeVar("S")
T = TypeVar("T")


class Each(Protocol):
    """Calls a function with every item, and gives what it returns in the order of the items.

    It may make several calls at once: those of a pool of threads with one thread of torch each.
    """

    def __call__(self, function: Callable[[S], T], items: Iterable[S], /) -> Iterable[T]:
        """See above."""
        ...


def one_by_one(function: Callable[[S], T], items: Iterable[S]) -> Iterator[T]:
    """The ``Each`` of a single thread."""
    yield from map(function, items)
