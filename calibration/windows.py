"""Token windows of one length, cut from documents in a fixed or a seeded order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor


def token_stream(documents: Iterable[Sequence[int]], separator: int | None = None) -> Tensor:
    """All tokens one after another, int64 [N]; ``separator`` follows every document when given."""
    tokens: list[int] = []
    for document in documents:
        tokens.extend(document)
        if separator is not None:
            tokens.append(separator)
    return torch.tensor(tokens, dtype=torch.int64)


def cut(stream: Tensor, length: int) -> Tensor:
    """Consecutive windows [W, length] of a stream [N] without overlap; a shorter rest is left out.

    Raises:
        ValueError: the stream is shorter than one window.
    """
    count = stream.shape[0] // length
    if count == 0:
        raise ValueError(f"{stream.shape[0]} tokens do not fill one window of {length}")
    return stream[: count * length].view(count, length)


def batches(windows: Tensor, size: int, seed: int, start: int = 0) -> Iterator[Tensor]:
    """Endless batches [size, T] of windows [W, T], reshuffled by ``seed`` at every pass; ``start`` batches are skipped.

    A pass ends when fewer than ``size`` windows are left.
    """
    per_pass = windows.shape[0] // size
    if per_pass == 0:
        raise ValueError(f"{windows.shape[0]} windows do not fill one batch of {size}")
    number = start
    while True:
        generator = torch.Generator().manual_seed(seed + number // per_pass)
        order = torch.randperm(windows.shape[0], generator=generator)
        for inside in range(number % per_pass, per_pass):
            yield windows[order[inside * size : (inside + 1) * size]]
            number += 1
