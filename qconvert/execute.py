"""One step: a tensor's whole path from source bytes to written bytes, readable on one screen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from qconvert.core.by_statistics import IMATRIX, InputStatistics
from qconvert.core.dtypes import DType
from qconvert.core.errors import DataError, PlanError
from qconvert.core.plan import (
    Cast,
    Dequantize,
    Formula,
    Keep,
    Matrix,
    Mosaic,
    Plan,
    Quantize,
    Reading,
    Reencode,
    Rescale,
    Slice,
    Step,
)
from qconvert.encode import NO_AIDS, WEIGHT, Aids, cast, encode, move, second_scale
from qconvert.formats.table import format_named
from qconvert.io.piece import Piece
from qconvert.io.sink import Sink
from qconvert.largest_values import LargestValues
from qconvert.matrices import codes_of, first_reading, rounded_of, rows_at_once, rows_of, shape_of, size_of
from qconvert.matrix_reader import MatrixReader, SourceHash
from qconvert.mosaic import check_left_behind, lay_moved, lay_plain, lay_rounded
from qconvert.numerics.finite import all_finite
from qconvert.plan.row_blocks import row_blocks

Matrices = tuple[tuple[Matrix, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """What rounding one matrix cost: sums over its elements."""

    squared_error: float
    signal: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """How well a matrix was rounded for its inputs.

    Attributes:
        nearest_loss: mean squared error of its outputs, summed over them, if it were rounded to nearest; 0 where that
            is not known.
        loss: the same as it was rounded.
        tokens: that reached it.
        support: what its second moments rest on, see ``numerics.hessian.Support``.
        inputs: how many it has.
    """

    nearest_loss: float
    loss: float
    tokens: int
    support: str
    inputs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Folded:
    """What a tensor is divided by, because what reads it is multiplied by that.

    Attributes:
        fold: its name.
        exponent: to which mean sizes of inputs were raised; 0 where nothing is divided.
        strength: mean of ``|log2|`` of the factors.
        loss: squared error of outputs of what reads it, over that of the same without the fold; ``None`` where that is
            not known.
        flips: share of the router's choices that are others, because the router is rounded again; ``None`` where the
            tensor does not reach it.
        given_up: whether these were too many, so that nothing is divided.
    """

    fold: str
    exponent: float
    strength: float
    loss: float | None
    flips: float | None = None
    given_up: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What is known of a finished step.

    Attributes:
        source_hash: hash of the source bytes that it read, by the sink's algorithm.
        loss: of a rounded matrix, also to BF16; ``None`` for a copy.
        scale_error: of a matrix whose codes were moved, the largest relative error of a scale.
        fit: of a matrix that was rounded by what its inputs look like.
        folded: of a tensor that is divided.
    """

    source_hash: str
    loss: Loss | None = None
    scale_error: float | None = None
    fit: Fit | None = None
    folded: Folded | None = None

    def note(self) -> dict[str, Any]:
        """As plain JSON, every digit kept."""
        note: dict[str, Any] = {"source": self.source_hash}
        if self.loss is not None:
            note["loss"] = [self.loss.squared_error, self.loss.signal]
        if self.scale_error is not None:
            note["scale_error"] = self.scale_error
        if self.fit is not None:
            note["fit"] = asdict(self.fit)
        if self.folded is not None:
            note["folded"] = asdict(self.folded)
        return note

    @classmethod
    def of_note(cls, note: Mapping[str, Any]) -> Outcome:
        """The inverse of ``note``."""
        loss, fit, folded = note.get("loss"), note.get("fit"), note.get("folded")
        return cls(
            source_hash=note["source"],
            loss=loss and Loss(squared_error=loss[0], signal=loss[1]),
            scale_error=note.get("scale_error"),
            fit=fit and Fit(**fit),
            folded=folded and Folded(**folded),
        )


_TRIAL = 256
"""Rows and columns of a matrix that any scheme takes."""


def warm_up(plan: Plan) -> None:
    """Load the code that the steps of ``plan`` will run, in this thread and before memory is counted.

    Two threads that import numba at the same time break it, and what is mapped would be nobody's.
    """
    actions = {
        (action.scheme, action.format, action.search, action.method): action
        for action in (step.action for step in plan.steps)
        if isinstance(action, Quantize)
    }
    trial = torch.ones(_TRIAL, _TRIAL, dtype=torch.bfloat16)
    all_finite(trial)
    for formula in Formula:
        cast(trial, DType.F32, formula)
    cast(trial, DType.BF16)
    for action in actions.values():
        encode(
            trial, action, (_TRIAL, _TRIAL), Aids(importance=torch.ones(_TRIAL) if action.method == IMATRIX else None)
        )


def execute(
    step: Step,
    read: MatrixReader,
    sink: Sink,
    device: torch.device,
    largest: LargestValues,
    inputs: InputStatistics | None = None,
) -> Outcome:
    """Carry one step out; ``inputs`` are of the source's matrices, for steps whose errors are weighted by them."""
    source_hash = SourceHash(sink.algorithm, step.inputs)
    loss: Loss | None = None
    scale_error: float | None = None
    match step.action:
        case _ if step.mosaic is not None:
            aids = _aids(step, read, largest, inputs)
            loss, scale_error, pieces = _lay(step, step.mosaic, read, sink, source_hash, device, aids)
        case Keep(name=name):
            pieces = [_keep(step.inputs[0], name, read, sink, source_hash)]
        case Dequantize(name=name):
            loss, pieces = _cast(step.matrices, name, DType.BF16, Formula.SAME, read, sink, source_hash)
        case Cast(name=name, dtype=dtype, formula=formula):
            loss, pieces = _cast(step.matrices, name, dtype, formula, read, sink, source_hash)
        case Rescale():
            raise PlanError(f"{step.key} is scaled by what text gives, and no text is run")
        case Quantize() as action:
            aids = _aids(step, read, largest, inputs)
            loss, pieces = _quantize(step.matrices, action, read, sink, source_hash, device, aids)
        case Reencode() as action:
            scale_error, pieces = _reencode(step.matrices, action, read, sink, source_hash)
    outcome = Outcome(source_hash=source_hash.hexdigest(), loss=loss, scale_error=scale_error)
    sink.commit(step.key, pieces, outcome.note())
    return outcome


def _aids(step: Step, read: MatrixReader, largest: LargestValues, inputs: InputStatistics | None) -> Aids:
    """What rounding the matrix of a step takes from elsewhere; nothing for a step that rounds none."""
    action = step.action
    if not isinstance(action, Quantize):
        return NO_AIDS
    importance = None
    if action.method == IMATRIX:
        if inputs is None:
            raise PlanError(f"{action.module} is rounded by what its inputs are like, and nothing says what")
        importance = inputs.importance(step.role)
    return Aids(second=second_scale(action, largest.of(action.scale_over, read)), importance=importance)


def _keep(part: Slice, name: str, read: MatrixReader, sink: Sink, source_hash: SourceHash) -> Piece:
    info = read.info(part)
    piece = sink.piece(name)
    for begin, end in row_blocks(part.end - part.begin, info.row_width, 1):
        rows = read.stored(part, begin, end, source_hash)
        if not all_finite(rows):
            raise DataError(f"{info.shard}: {part.tensor} has NaN or infinite values")
        piece.append(rows)
    return piece


def _cast(
    matrices: Matrices,
    name: str,
    dtype: DType,
    formula: Formula,
    read: MatrixReader,
    sink: Sink,
    source_hash: SourceHash,
) -> tuple[Loss, list[Piece]]:
    piece = sink.piece(name)
    squared_error = signal = 0.0
    for readings in matrices:
        for begin, end in row_blocks(*size_of(readings[0], read), rows_at_once(readings[0], 1)):
            rows = rows_of(readings, begin, end, read, source_hash)
            with read.naming(first_reading(readings), name):
                stored = cast(rows, dtype, formula)
            piece.append(stored.parts[WEIGHT])
            squared_error += stored.squared_error
            signal += stored.signal
    return Loss(squared_error=squared_error, signal=signal), [piece]


def _quantize(
    matrices: Matrices,
    action: Quantize,
    read: MatrixReader,
    sink: Sink,
    source_hash: SourceHash,
    device: torch.device,
    aids: Aids,
) -> tuple[Loss, list[Piece]]:
    shape = shape_of(matrices[0], read)
    form = format_named(action.format)
    specs = form.parts(action.scheme, shape)
    pieces = {spec.suffix: sink.piece(f"{action.module}.{spec.suffix}") for spec in specs}
    squared_error = signal = 0.0
    for readings in matrices:
        multiple = rows_at_once(readings[0], form.row_block(action.scheme, shape))
        for begin, end in row_blocks(*size_of(readings[0], read), multiple):
            encoded = rounded_of(readings, action, begin, end, shape, read, source_hash, device, aids)
            for spec in specs:
                if spec.rows_per_row or begin == 0:
                    pieces[spec.suffix].append(encoded.parts[spec.suffix].cpu())
            squared_error += encoded.squared_error
            signal += encoded.signal
    return Loss(squared_error=squared_error, signal=signal), list(pieces.values())


def _reencode(
    matrices: Matrices, action: Reencode, read: MatrixReader, sink: Sink, source_hash: SourceHash
) -> tuple[float, list[Piece]]:
    shape = shape_of(matrices[0], read)
    form = format_named(action.format)
    specs = form.parts(action.scheme, shape)
    pieces = {spec.suffix: sink.piece(f"{action.module}.{spec.suffix}") for spec in specs}
    scale_error = 0.0
    for readings in matrices:
        first = readings[0]
        packed = first.packed if isinstance(first, Reading) else None
        same = packed is not None and (packed.format, packed.scheme) == (action.format, action.scheme)
        multiple = rows_at_once(first, form.row_block(action.scheme, shape))
        for begin, end in row_blocks(*size_of(first, read), multiple):
            quantized, stored = codes_of(readings, begin, end, read, source_hash)
            with read.naming(first_reading(readings), action.module):
                moved = move(quantized, action, shape, stored if same else None)
            for spec in specs:
                if spec.rows_per_row or begin == 0:
                    pieces[spec.suffix].append(moved.parts[spec.suffix])
            scale_error = max(scale_error, moved.scale_error)
    return scale_error, list(pieces.values())


def _lay(
    step: Step,
    mosaic: Mosaic,
    read: MatrixReader,
    sink: Sink,
    source_hash: SourceHash,
    device: torch.device,
    aids: Aids,
) -> tuple[Loss | None, float | None, list[Piece]]:
    check_left_behind(mosaic, read, step.outputs[0])
    match step.action:
        case Quantize() as action:
            laid = lay_rounded(action, mosaic, read, sink, source_hash, device, aids)
        case Reencode() as action:
            laid = lay_moved(action, mosaic, read, sink, source_hash)
            return None, laid.scale_error, laid.pieces
        case Cast() | Rescale() as action:
            raise PlanError(f"{action.name} is to be laid together in {action.dtype}, which no plan asks for")
        case action:
            laid = lay_plain(action, mosaic, read, sink, source_hash)
            if isinstance(action, Keep):
                return None, None, laid.pieces
    return Loss(squared_error=laid.squared_error, signal=laid.signal), None, laid.pieces
