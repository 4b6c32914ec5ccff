"""AWQ always stores zero points. Where all of them are the middle of the range, its codes are symmetric ones."""

from __future__ import annotations

from dataclasses import replace

from qconvert.core.plan import Packed, Reading
from qconvert.formats.awq import Awq
from qconvert.formats.transposed import ZEROS
from qconvert.io.checkpoint import Checkpoint
from qconvert.plan.source import PlannedSource

_MIDDLE = int.from_bytes(b"\x88" * 4, "little", signed=True)
"""Eight zero points of 8."""


def read_as_symmetric(checkpoint: Checkpoint, source: PlannedSource) -> PlannedSource:
    """``source`` with symmetric schemes for AWQ's, if no zero point says otherwise: half a byte a group is read.

    It holds for all matrices or for none, so that an output has one scheme where its source has one.

    Raises:
        SourceError: a file cannot be read.
    """
    zeros = [
        part.tensor
        for reading in source.quantized.values()
        if _has_zeros(reading.packed)
        for part in reading.inputs
        if part.tensor.endswith(f".{ZEROS}")
    ]
    if not zeros or any(bool((checkpoint.read(name) != _MIDDLE).any()) for name in zeros):
        return source
    known: dict[Packed, Packed] = {}
    quantized = {name: _symmetric(reading, known) for name, reading in source.quantized.items()}
    return replace(source, quantized=quantized)


def _has_zeros(packed: Packed | None) -> bool:
    return packed is not None and packed.format == Awq().name and not packed.scheme.symmetric


def _symmetric(reading: Reading, known: dict[Packed, Packed]) -> Reading:
    packed = reading.packed
    if packed is None or not _has_zeros(packed):
        return reading
    shared = known.setdefault(packed, replace(packed, scheme=replace(packed.scheme, symmetric=True)))
    return replace(reading, packed=shared)
