"""One matrix on its way from the source to the output, rounded by what its inputs look like. N rows, K inputs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qconvert.core.errors import DataError, PlanError
from qconvert.core.plan import Quantize, Rescale, Step
from qconvert.core.quantized import QuantizedTensor
from qconvert.encode import check_scale_range, second_scale
from qconvert.execute import Fit, Folded, Loss, Outcome
from qconvert.formats.table import format_named
from qconvert.io.checkpoint import Checkpoint
from qconvert.io.piece import Piece
from qconvert.io.sink import Sink
from qconvert.largest_values import LargestValues
from qconvert.matrix_reader import MatrixReader, SourceHash
from qconvert.numerics.awq import rescaled
from qconvert.numerics.finite import all_finite
from qconvert.numerics.gptq import gptq
from qconvert.numerics.hessian import Factor, Hessian
from qconvert.numerics.importance import quantize_by_importance
from qconvert.plan.row_blocks import row_blocks, rows_together


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounded:
    """Rows of a matrix, rounded.

    Attributes:
        quantized: what is stored.
        meaning: what that means for the inputs as they are in the source, float32 [R, K].
        nearest_loss: ``sum of e H e^T`` of rounding to nearest.
        loss: the same of ``meaning``.
    """

    quantized: QuantizedTensor
    meaning: Tensor
    nearest_loss: float
    loss: float


Way = Callable[[Tensor, int, Quantize, float], Rounded]
"""Rounds rows [R, K] of any float type, the first of which has a number, as an action says, with its second scale."""


def with_feedback(factor: Factor) -> Way:
    """Rounding with error feedback, see ``gptq``."""

    def way(rows: Tensor, begin: int, action: Quantize, second: float) -> Rounded:
        found = gptq(rows, action.scheme, factor, second=second)
        return Rounded(
            quantized=found.quantized,
            meaning=found.quantized.dequantize(),
            nearest_loss=found.nearest_loss,
            loss=found.loss,
        )

    return way


def to_nearest(
    hessian: Hessian,
    *,
    columns: Tensor | None = None,
    rows_over: Tensor | None = None,
    losses: tuple[float, float] = (0.0, 0.0),
) -> Way:
    """Rounding to nearest with scales that are searched by what inputs count, of a matrix that may be scaled before.

    Args:
        hessian: of the inputs.
        columns: [K], what columns are multiplied by, because inputs are divided by it.
        rows_over: [N], what rows are divided by, because what reads the outputs is multiplied by it.
        losses: of rounding to nearest and of this, where they are known.
    """
    mean_squares = hessian.matrix.diagonal()
    if columns is not None:
        mean_squares = mean_squares / columns.square()

    def way(rows: Tensor, begin: int, action: Quantize, second: float) -> Rounded:
        scaled = rows.to(torch.float32)
        over = None if rows_over is None else rows_over[begin : begin + len(rows), None]
        if columns is not None:
            scaled = scaled * columns
        if over is not None:
            scaled = scaled / over
        quantized = quantize_by_importance(scaled, action.scheme, mean_squares, second=second).quantized
        meaning = quantized.dequantize()
        if columns is not None:
            meaning /= columns
        if over is not None:
            meaning *= over
        nearest, loss = losses if begin == 0 else (0.0, 0.0)  # of the whole matrix
        return Rounded(quantized=quantized, meaning=meaning, nearest_loss=nearest, loss=loss)

    return way


class Rounder:
    """Rounds the matrices of steps and writes them; any thread may call it."""

    def __init__(self, source: Checkpoint, sink: Sink, stop: threading.Event, done: Callable[[Step], None]) -> None:
        """``done`` is told of each step that is through, by the thread that did it; ``stop`` ends all reading."""
        self._source, self._sink, self._stop, self._done = source, sink, stop, done
        self._largest = LargestValues()
        self._threads = threading.local()
        self.outcomes: dict[str, Outcome] = {}

    def round(
        self,
        step: Step,
        way: Way,
        tokens: int,
        support: str,
        *,
        wanted: bool = True,
        folded: Folded | None = None,
    ) -> Tensor:
        """Round a matrix, write it unless an earlier run has, and return what its codes mean.

        Args:
            step: one that rounds.
            way: how.
            tokens: of text that reached it.
            support: what its Hessian rests on, for the record.
            wanted: whether the meaning is needed, which takes 4 bytes an element.
            folded: what its rows are divided by, for the record.

        Returns:
            Float32 [N, K]; [0, K] where it is not ``wanted``.

        Raises:
            DataError: a weight is NaN or infinite; names file and tensor.
        """
        action, read, reading = step.action, self._reader(), step.reading
        if not isinstance(action, Quantize):
            raise PlanError(f"{step.key} is not rounded")
        shape = read.shape(reading)
        form = format_named(action.format)
        specs = form.parts(action.scheme, shape)
        second = second_scale(action, self._largest.of(action.scale_over, read))
        source_hash = SourceHash(self._sink.algorithm, step.inputs)
        write = step.key not in self._sink.finished
        pieces = {spec.suffix: self._sink.piece(f"{action.module}.{spec.suffix}") for spec in specs} if write else {}
        meaning = torch.empty(shape if wanted else (0, shape[1]))
        squared_error = signal = nearest_loss = loss = 0.0
        for begin, end in row_blocks(*shape, rows_together(reading.packed, form.row_block(action.scheme, shape))):
            rows = read.rows(reading, begin, end, source_hash)
            with read.naming(reading, action.module):
                rounded = way(rows, begin, action, second)
                check_scale_range(rounded.quantized)
            if wanted:
                meaning[begin:end] = rounded.meaning
            w = rows.to(torch.float32).flatten()
            lost = rounded.meaning.flatten() - w
            squared_error += float(lost.dot(lost))
            signal += float(w.dot(w))
            nearest_loss += rounded.nearest_loss
            loss += rounded.loss
            if write:
                parts = form.pack(rounded.quantized, shape=shape)
                for spec in specs:
                    if spec.rows_per_row or begin == 0:
                        pieces[spec.suffix].append(parts[spec.suffix])
        outcome = Outcome(
            source_hash=source_hash.hexdigest(),
            loss=Loss(squared_error=squared_error, signal=signal),
            fit=Fit(nearest_loss=nearest_loss, loss=loss, tokens=tokens, support=support, inputs=shape[1]),
            folded=folded,
        )
        self._finish(step, list(pieces.values()), outcome)
        return meaning

    def check(self, step: Step) -> None:
        """Refuse what the source has for a step that rounds or rescales.

        Raises:
            DataError: a weight is NaN or infinite; names file and tensor.
        """
        action, read, reading = step.action, self._reader(), step.reading
        match action:
            case Quantize(module=name) | Rescale(name=name):
                pass
            case _:
                raise PlanError(f"{step.key} is neither rounded nor rescaled")
        for begin, end in row_blocks(*read.shape(reading), rows_together(reading.packed, 1)):
            with read.naming(reading, name):
                if not all_finite(read.rows(reading, begin, end, None)):
                    raise DataError("has NaN or infinite values")

    def rescale(
        self,
        step: Step,
        *,
        columns: Tensor | None = None,
        over: Tensor | None = None,
        wanted: bool = True,
        folded: Folded | None = None,
    ) -> Tensor:
        """Write a matrix that keeps its bits between what is folded, and return what it means; see ``rescaled``.

        Args:
            step: one that rescales.
            columns: [K], what its columns are multiplied by.
            over: [N], what its rows are divided by.
            wanted: whether the meaning is needed.
            folded: for the record, where its rows are divided.

        Returns:
            Float32 [N, K]; [0, K] where it is not ``wanted``.

        Raises:
            DataError: a weight is NaN or infinite, or becomes so; names file and tensor.
        """
        action, read, reading = step.action, self._reader(), step.reading
        if not isinstance(action, Rescale):
            raise PlanError(f"{step.key} is not rescaled")
        shape = read.shape(reading)
        source_hash = SourceHash(self._sink.algorithm, step.inputs)
        pieces = [self._sink.piece(action.name)] if step.key not in self._sink.finished else []
        meaning = torch.empty(shape if wanted else (0, shape[1]))
        squared_error = signal = 0.0
        for begin, end in row_blocks(*shape, rows_together(reading.packed, 1)):
            rows = read.rows(reading, begin, end, source_hash)
            some = None if over is None else over[begin:end]
            stored, found = rescaled(rows, action.dtype.torch_dtype, columns=columns, over=some)
            with read.naming(reading, action.name):
                if not all_finite(stored):
                    raise DataError(f"has NaN or infinite values in {action.dtype}")
            if wanted:
                meaning[begin:end] = found
            w = rows.to(torch.float32).flatten()
            lost = found.flatten() - w
            squared_error += float(lost.dot(lost))
            signal += float(w.dot(w))
            for piece in pieces:
                piece.append(stored)
        loss = Loss(squared_error=squared_error, signal=signal)
        self._finish(step, pieces, Outcome(source_hash=source_hash.hexdigest(), loss=loss, folded=folded))
        return meaning

    def replace(self, step: Step, weight: Tensor, folded: Folded) -> None:
        """Write the weight [D] of a norm that is folded in place of what the source has.

        Args:
            step: one that rescales.
            weight: in the type of the step.
            folded: for the record.
        """
        action, read, reading = step.action, self._reader(), step.reading
        if not isinstance(action, Rescale):
            raise PlanError(f"{step.key} is not rescaled")
        source_hash = SourceHash(self._sink.algorithm, step.inputs)
        rows, _ = read.shape(reading)
        read.rows(reading, 0, rows, source_hash)
        pieces = [self._sink.piece(action.name)] if step.key not in self._sink.finished else []
        for piece in pieces:
            piece.append(weight)
        self._finish(step, pieces, Outcome(source_hash=source_hash.hexdigest(), folded=folded))

    def _finish(self, step: Step, pieces: Sequence[Piece], outcome: Outcome) -> None:
        """Commit what an earlier run has not, and keep the outcome."""
        if pieces:
            self._sink.commit(step.key, list(pieces), outcome.note())
        self.outcomes[step.key] = outcome
        self._done(step)

    def _reader(self) -> MatrixReader:
        if not hasattr(self._threads, "reader"):
            self._threads.reader = MatrixReader(self._source, self._stop)
        reader: MatrixReader = self._threads.reader
        return reader
