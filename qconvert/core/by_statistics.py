"""Rounding by what the inputs of matrices were like, as statistics of an earlier run tell it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import xxhash
from torch import Tensor

from qconvert.core.errors import UsageError
from qconvert.core.role import TensorRole

IMATRIX = "imatrix"
STATISTICS = "statistics"


class InputStatistics(Protocol):
    """What the inputs of a checkpoint's matrices were like on some text."""

    @property
    def hash(self) -> str:
        """Of all that they say."""
        ...

    @property
    def entry(self) -> Mapping[str, Any]:
        """What manifests say of them: their ``hash`` and where they come from, as plain JSON."""
        ...

    def has(self, role: TensorRole) -> bool:
        """Whether the inputs of the matrix with ``role`` were looked at."""
        ...

    def tokens(self, role: TensorRole) -> int:
        """Tokens that the matrix has seen; 0 of an expert that none reached.

        Raises:
            KeyError: nothing was looked at for ``role``.
        """
        ...

    def importance(self, role: TensorRole) -> Tensor:
        """What each of the K inputs of the matrix counts: mean squares, float32 [K].

        Raises:
            KeyError: nothing was looked at for ``role``.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ByStatistics:
    """How matrices are rounded, all at once and in any order, unlike methods that run the model.

    Attributes:
        method: ``IMATRIX``, scales searched under what each input counts.
        statistics: of the checkpoint that is converted.
    """

    method: str
    statistics: InputStatistics

    @property
    def entry(self) -> dict[str, Any]:
        """What manifests say of it."""
        return {"method": self.method, STATISTICS: dict(self.statistics.entry)}

    @property
    def hash(self) -> str:
        """xxh3-128 of all that the bytes depend on besides weights and policy."""
        return xxhash.xxh3_128_hexdigest(repr((self.method, self.statistics.hash)).encode())


def check_statistics(noted: Mapping[str, Any] | None, given: ByStatistics | None, where: str) -> None:
    """Refuse to repeat a conversion by other statistics than those that it was done by.

    Args:
        noted: what its manifest says of how inputs were looked at; ``None`` where they were not.
        given: what it is to be repeated by.
        where: begins the message.

    Raises:
        UsageError: there are none, there are some and none were used, or they are others.
    """
    statistics = None if noted is None else noted.get(STATISTICS)
    if noted is None or not isinstance(statistics, Mapping):
        if given is not None:
            raise UsageError(f"{where} was not rounded by statistics: drop --stats")
        return
    told = f"{where} was rounded by {noted.get('method')} and statistics with the hash {statistics.get('hash')}"
    if given is None:
        raise UsageError(f"{told}: give them with --stats")
    if (given.method, given.statistics.hash) != (noted.get("method"), statistics.get("hash")):
        raise UsageError(f"{told}; those in --stats have {given.statistics.hash}")
