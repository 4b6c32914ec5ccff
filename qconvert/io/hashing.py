"""Hashes of tensors: xxh3-128 as a rule, sha256 for those who must."""

from __future__ import annotations

import hashlib
from typing import Protocol

import xxhash

from qconvert.core.errors import UsageError

XXH3 = "xxh3_128"
SHA256 = "sha256"
ALGORITHMS = (XXH3, SHA256)


class Hash(Protocol):
    """What every hash of the standard library can do."""

    def update(self, data: memoryview, /) -> None:
        """Take more bytes."""

    def hexdigest(self) -> str:
        """The hash of all bytes so far."""


def new_hash(algorithm: str) -> Hash:
    """An empty hash.

    Raises:
        UsageError: an algorithm that is not among ``ALGORITHMS``.
    """
    if algorithm == XXH3:
        return xxhash.xxh3_128()
    if algorithm == SHA256:
        return hashlib.sha256()
    raise UsageError(f"hash {algorithm!r} is not available; choose one of {', '.join(ALGORITHMS)}")
