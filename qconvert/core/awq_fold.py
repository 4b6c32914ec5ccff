"""Where AWQ may divide what a tensor gives and multiply what reads it: the folds that the architecture admits.

Nothing is folded through a convolution and its SiLU, a gate, or the norms of queries and keys: none of them lets a
factor through.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum

from qconvert.core.errors import UsageError
from qconvert.core.role import Kind


class AwqFold(Enum):
    """What is divided and who makes up for it; the value is what users and manifests say."""

    UP_DOWN = "up-down"
    POST_ATTENTION = "post-attention"
    INPUT = "input"
    VALUE = "value"
    LINEAR_NORM = "linear-norm"

    @property
    def parts(self) -> FoldedParts:
        """The kinds of tensors that take part."""
        return _PARTS[self]


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldedParts:
    """Of one layer, or of one expert.

    Attributes:
        producers: whose outputs are divided: a norm, or matrices whose rows are.
        readers: whose columns are multiplied, all of them.
        offset: what a norm adds to its weight; ``None`` where the producer is a matrix.
    """

    producers: tuple[Kind, ...]
    readers: tuple[Kind, ...]
    offset: float | None = None


_PARTS: Mapping[AwqFold, FoldedParts] = {
    AwqFold.UP_DOWN: FoldedParts(
        producers=(Kind.EXPERT_UP, Kind.SHARED_UP), readers=(Kind.EXPERT_DOWN, Kind.SHARED_DOWN)
    ),
    AwqFold.POST_ATTENTION: FoldedParts(
        producers=(Kind.POST_ATTENTION_NORM,),
        readers=(
            Kind.EXPERT_GATE, Kind.EXPERT_UP, Kind.EXPERT_GATE_UP, Kind.SHARED_GATE, Kind.SHARED_UP, Kind.ROUTER,
            Kind.SHARED_EXPERT_GATE,
        ),
        offset=1.0,
    ),
    AwqFold.INPUT: FoldedParts(
        producers=(Kind.INPUT_NORM,),
        readers=(
            Kind.ATTENTION_QUERY, Kind.ATTENTION_KEY, Kind.ATTENTION_VALUE, Kind.LINEAR_QKV, Kind.LINEAR_Z,
            Kind.LINEAR_A, Kind.LINEAR_B,
        ),
        offset=1.0,
    ),
    AwqFold.VALUE: FoldedParts(producers=(Kind.ATTENTION_VALUE,), readers=(Kind.ATTENTION_OUTPUT,)),
    AwqFold.LINEAR_NORM: FoldedParts(producers=(Kind.LINEAR_NORM,), readers=(Kind.LINEAR_OUTPUT,), offset=0.0),
}  # fmt: skip

DEFAULT_FOLDS: tuple[AwqFold, ...] = (AwqFold.UP_DOWN,)

NO_FOLDS = "none"
"""How users ask for rounding without any."""


def folds_named(text: str) -> tuple[AwqFold, ...]:
    """The folds that a user asks for, with commas between them, in the order of ``AwqFold``.

    Raises:
        UsageError: one has another name.
    """
    asked = [] if text == NO_FOLDS else [name.strip() for name in text.split(",")]
    known = {fold.value: fold for fold in AwqFold}
    for name in asked:
        if name not in known:
            raise UsageError(f"fold {name!r} is unknown; expected {NO_FOLDS}, or some of {', '.join(known)}")
    return tuple(fold for fold in AwqFold if fold.value in asked)


def folds_said(folds: Iterable[AwqFold]) -> str:
    """The inverse of ``folds_named``."""
    return ",".join(fold.value for fold in folds) or NO_FOLDS
