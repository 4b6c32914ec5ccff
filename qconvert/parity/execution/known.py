"""Faults that engines have, by the block that has them: what is done otherwise, and how one says it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qconvert.parity.causes import CauseKind
from qconvert.parity.execution.mixers import Broken

Needs = Literal["", "calls", "padding"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """One fault.

    Attributes:
        broken: what the reference does otherwise to have it too.
        said: what the engine does.
        needs: what tokens must come in for it to show: several calls, or padding.
    """

    kind: CauseKind
    broken: Broken
    said: str
    needs: Needs = ""


def _fault(kind: CauseKind, said: str, *broken: str, needs: Needs = "") -> Known:
    return Known(kind=kind, broken=frozenset(broken), said=said, needs=needs)


_STATE, _PADDING, _PART = CauseKind.STATE, CauseKind.PADDING, CauseKind.PART

_NORM = _fault(_PART, "the norm before it multiplies with w instead of 1 + w", "offset of the norm")

LINEAR = (
    _fault(_STATE, "its memory starts empty in each call: the state is not carried", "memory of calls", needs="calls"),
    _fault(
        _STATE,
        "its convolution starts empty in each call: its last inputs are not carried",
        "convolution of calls",
        needs="calls",
    ),
    _fault(
        _STATE,
        "memory and convolution start empty in each call: no state is carried",
        "memory of calls",
        "convolution of calls",
        needs="calls",
    ),
    _fault(_PADDING, "padding is written to its memory, or decays it", "memory sees padding", needs="padding"),
    _fault(_PADDING, "padding enters its convolution", "convolution sees padding", needs="padding"),
    _fault(_PADDING, "its convolution carries padding into the next call", "window sees padding", needs="padding"),
    _fault(
        _PADDING,
        "padding enters its convolution, and is carried into the next call",
        "convolution sees padding",
        "window sees padding",
        needs="padding",
    ),
    _fault(
        _PADDING,
        "padding enters its convolution and its memory",
        "convolution sees padding",
        "memory sees padding",
        needs="padding",
    ),
    _fault(
        _PADDING,
        "padding enters its convolution and its memory, and is carried into the next call: nothing is masked",
        "convolution sees padding",
        "window sees padding",
        "memory sees padding",
        needs="padding",
    ),
    _fault(_PART, "its output gate is missing", "gate"),
    _fault(_PART, "its memory does not decay", "decay"),
    _fault(_PART, "it writes with a strength of 1", "strength"),
    _fault(_PART, "its convolution is missing", "convolution"),
    _fault(_PART, "the activation of its convolution is missing", "activation of the convolution"),
    _fault(_PART, "value heads read the key heads of others: repeated, not each several times", "order of key heads"),
    _NORM,
)

ATTENTION = (
    _fault(_STATE, "it sees no keys of earlier calls: the cache is not carried", "keys of calls", needs="calls"),
    _fault(_STATE, "keys and values of earlier calls are zeros", "keys of calls are zero", needs="calls"),
    _fault(_STATE, "positions start from 0 in each call", "positions of calls", needs="calls"),
    _fault(
        _STATE,
        "it sees no keys of earlier calls, and positions start from 0 in each call: the cache is not carried",
        "keys of calls",
        "positions of calls",
        needs="calls",
    ),
    _fault(_PADDING, "it sees padding", "attention sees padding", needs="padding"),
    _fault(_PADDING, "positions count padding", "positions of padding", needs="padding"),
    _fault(
        _PADDING,
        "it sees padding, and positions count it: nothing is masked",
        "attention sees padding",
        "positions of padding",
        needs="padding",
    ),
    _fault(_PART, "its output gate is missing", "gate"),
    _fault(_PART, "queries and gates are taken for each other", "query is gate"),
    _fault(_PART, "queries and keys are not rotated", "rotation"),
    _fault(_PART, "queries and keys are not normed", "norms of queries and keys"),
    _fault(_PART, "tokens see later ones", "order in time"),
    _fault(_PART, "query heads read the key heads of others: repeated, not each several times", "order of key heads"),
    _NORM,
)

EXPERTS = (
    _fault(_PART, "the routed part agrees, the shared expert is missing", "shared expert"),
    _fault(_PART, "the gate of the shared expert is missing", "gate of the shared expert"),
    _fault(_PART, "the shared expert agrees, the routed ones are missing", "routed experts"),
    _fault(_PART, "routing weights are not divided by their sum", "sum of routing weights"),
    _fault(_PART, "all chosen experts count the same: the routing weights are missing", "routing weights"),
    _fault(_PART, "gate and up rows are taken for each other", "gate and up"),
    _NORM,
)
