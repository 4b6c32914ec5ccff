"""What windows of any text are held to, and how they take turns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from qconvert.core.errors import UsageError

BATCH_TOKENS = 2048
"""Tokens that pass a layer together."""

T = TypeVar("T")


def in_turns(files: Sequence[Iterable[T]]) -> list[T]:
    """The first of each file, then the second of each that has one, and so on; none is ``None``."""
    return [one for one in chain.from_iterable(zip_longest(*files)) if one is not None]


def check_vocabulary(ids: Tensor, vocabulary: int, model: Path, where: str) -> None:
    """Refuse token ids that the table of ``model`` does not have; ``where`` they come from begins the message.

    Raises:
        UsageError: names the smallest and the largest of them.
    """
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocabulary:
        raise UsageError(f"{where}: token ids from {low} to {high}, the vocabulary of {model} has {vocabulary}")
