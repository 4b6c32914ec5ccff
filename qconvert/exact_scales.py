"""Scales that a loader could not hold exactly are found before anything is written."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from math import prod

from qconvert.core.errors import DataError, FormatError
from qconvert.core.plan import Mosaic, Packed, Plan, Reading, Reencode, Slice, Step, Tile
from qconvert.core.scheme import Int
from qconvert.encode import move, stored_scales
from qconvert.formats.base import PartSpec
from qconvert.formats.base import check_scales as refuse_impossible
from qconvert.formats.table import format_named
from qconvert.io.checkpoint import Checkpoint
from qconvert.matrix_reader import MatrixReader


def check_scales(plan: Plan, source: Checkpoint) -> None:
    """Read the scales of all matrices whose codes are to be stored with scales of another type: two bytes a group.

    Of a matrix with a second scale the first rows are stored on trial.

    Raises:
        DataError: scales are zero, infinite or NaN, or not exact in the type in which they are stored or held; names
            file and tensor.
        SourceError: a file cannot be read.
    """
    reader = MatrixReader(source, threading.Event())
    for step in plan.steps:
        action = step.action
        if not isinstance(action, Reencode) or action.allow_scale_rounding:
            continue
        for reading in _readings(step):
            packed = reading.packed
            if packed is None:
                continue
            try:
                if packed.scheme.scale.second is not None and packed.format != action.format:
                    _try(reading, action, packed, reader)
                elif action.scheme.scale != packed.scheme.scale:
                    for part in _scales_of(reading, packed):
                        scales = source.read(part.tensor, part.begin, part.end)
                        refuse_impossible(scales, part.tensor, signed=isinstance(packed.scheme.grid, Int))
                        stored_scales(scales, action)
            except (DataError, FormatError) as error:
                first = reading.inputs[0]
                raise DataError(f"{reader.info(first).shard}: {first.tensor}, for {action.module}: {error}") from None


def _readings(step: Step) -> Iterator[Reading]:
    """All matrices that a step reads, each of them once."""
    matrices = (one for halves in step.matrices for one in halves)
    tiles = (one.tiles if isinstance(one, Mosaic) else (one,) for one in matrices)
    return iter(dict.fromkeys(one.reading if isinstance(one, Tile) else one for some in tiles for one in some))


def _try(reading: Reading, action: Reencode, packed: Packed, reader: MatrixReader) -> None:
    rows = format_named(packed.format).row_block(packed.scheme, packed.shape)
    parts = reader.parts(reading, 0, rows, None)
    move(reader.unpacked(reading, 0, rows, parts), action, packed.shape)


def _scales_of(reading: Reading, packed: Packed) -> list[Slice]:
    """The parts that are scales: as many as the scheme has, in its type."""
    specs = format_named(packed.format).parts(packed.scheme, packed.shape)
    return [part for spec, part in zip(specs, reading.inputs, strict=True) if _are_scales(spec, packed)]


def _are_scales(spec: PartSpec, packed: Packed) -> bool:
    scheme = packed.scheme
    return spec.dtype is scheme.scale.dtype and prod(spec.shape) == prod(scheme.scale_shape(*packed.shape))
