"""Execute a plan: a tensor's whole path from source bytes to written bytes, readable on one screen."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from qconvert.core.errors import DataError, PlanError
from qconvert.core.plan import Dequantize, Keep, Plan, Quantize, Reading, Reencode, Slice, Step
from qconvert.encode import WEIGHT, encode, move, second_scale, to_bf16
from qconvert.formats.table import format_named
from qconvert.io.checkpoint import Checkpoint
from qconvert.io.piece import Piece
from qconvert.io.sink import Sink
from qconvert.largest_values import LargestValues
from qconvert.matrix_reader import MatrixReader, SourceHash, StoppedError
from qconvert.numerics.finite import all_finite
from qconvert.plan.row_blocks import row_blocks, rows_together

CPU = torch.device("cpu")

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """What rounding one matrix cost: sums over its elements."""

    squared_error: float
    signal: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What is known of a finished step.

    Attributes:
        source_hash: hash of the source bytes that it read, by the sink's algorithm.
        loss: of a rounded matrix, also to BF16; ``None`` for a copy.
        scale_error: of a matrix whose codes were moved, the largest relative error of a scale.
    """

    source_hash: str
    loss: Loss | None = None
    scale_error: float | None = None

    def note(self) -> dict[str, Any]:
        """As plain JSON, every digit kept."""
        note: dict[str, Any] = {"source": self.source_hash}
        if self.loss is not None:
            note["loss"] = [self.loss.squared_error, self.loss.signal]
        if self.scale_error is not None:
            note["scale_error"] = self.scale_error
        return note

    @classmethod
    def of_note(cls, note: Mapping[str, Any]) -> Outcome:
        """The inverse of ``note``."""
        loss = note.get("loss")
        return cls(
            source_hash=note["source"],
            loss=loss and Loss(squared_error=loss[0], signal=loss[1]),
            scale_error=note.get("scale_error"),
        )


def run(
    plan: Plan,
    source: Checkpoint,
    sink: Sink,
    *,
    jobs: int = 2,
    memory: int | None = None,
    device: torch.device = CPU,
    progress: Progress = lambda done, total: None,
) -> dict[str, Outcome]:
    """Write every tensor of ``plan`` into ``sink`` that an earlier run has not finished.

    The bytes do not depend on ``jobs``, on the order of steps or on interruptions.

    Args:
        plan: what to do.
        source: the checkpoint that the plan was made for.
        sink: takes the bytes; finishing, suspending or aborting it is the caller's.
        jobs: steps that run at once.
        memory: bytes that the running steps may hold together by the plan's prediction; ``None`` is no limit.
        device: where matrices are rounded.
        progress: called with source bytes done and in all.

    Returns:
        What is known of every step, by its key.

    Raises:
        PlanError: a step needs more than ``memory``.
        DataError: a weight is NaN or infinite, parts of a quantized matrix contradict each other, or scales cannot be
            moved as they are; names file and tensor.
        SourceError: the source changed or cannot be read.
        OutputError: the output cannot be written.
    """
    if memory is not None:
        check_memory(plan, memory)
    budget = _Budget(memory)
    total = sum(_bytes(source, step) for step in plan.steps)
    outcomes = {step.key: Outcome.of_note(sink.finished[step.key]) for step in plan.steps if step.key in sink.finished}
    left = [step for step in plan.steps if step.key not in outcomes]
    done = total - sum(_bytes(source, step) for step in left)
    progress(done, total)
    lock = threading.Lock()
    stop = threading.Event()
    waiting = iter(left)
    largest = LargestValues()

    def work() -> None:
        nonlocal done
        reader = MatrixReader(source, stop)
        while not stop.is_set():
            with lock:
                step = next(waiting, None)
            if step is None:
                return
            with budget.holding(step.peak_bytes, stop):
                outcome = execute(step, reader, sink, device, largest)
            with lock:
                done += _bytes(source, step)
                outcomes[step.key] = outcome
                progress(done, total)

    with _one_thread_a_step(), ThreadPoolExecutor(jobs, thread_name_prefix="step") as pool:
        try:
            futures = [pool.submit(work) for _ in range(jobs)]  # one for each step would take two kilobytes of each
            finished, _ = wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()
            budget.wake()
            pool.shutdown(wait=True)
        for failure in (future.exception() for future in finished):
            if failure is not None and not isinstance(failure, StoppedError):
                raise failure
    return outcomes


def check_memory(plan: Plan, memory: int) -> None:
    """Refuse a plan whose largest step does not fit.

    Raises:
        PlanError: names the step and what it needs.
    """
    step = plan.largest_step
    if step.peak_bytes > memory:
        raise PlanError(
            f"{step.outputs[0]} needs {step.peak_bytes / 2**20:.0f} MiB at once, "
            f"but only {memory / 2**20:.0f} MiB are left of the memory limit: raise --max-memory"
        )


def execute(step: Step, read: MatrixReader, sink: Sink, device: torch.device, largest: LargestValues) -> Outcome:
    """Carry one step out."""
    source_hash = SourceHash(sink.algorithm, step.inputs)
    loss: Loss | None = None
    scale_error: float | None = None
    match step.action:
        case Keep(name=name):
            pieces = [_keep(step.inputs[0], name, read, sink, source_hash)]
        case Dequantize(name=name):
            loss, pieces = _dequantize(step.reading, name, read, sink, source_hash)
        case Quantize() as action:
            loss, pieces = _quantize(step.reading, action, read, sink, source_hash, device, largest)
        case Reencode() as action:
            scale_error, pieces = _reencode(step.reading, action, read, sink, source_hash)
    outcome = Outcome(source_hash=source_hash.hexdigest(), loss=loss, scale_error=scale_error)
    sink.commit(step.key, pieces, outcome.note())
    return outcome


def _keep(part: Slice, name: str, read: MatrixReader, sink: Sink, source_hash: SourceHash) -> Piece:
    info = read.info(part)
    piece = sink.piece(name)
    for begin, end in row_blocks(part.end - part.begin, info.row_width, 1):
        rows = read.stored(part, begin, end, source_hash)
        if not all_finite(rows):
            raise DataError(f"{info.shard}: {part.tensor} has NaN or infinite values")
        piece.append(rows)
    return piece


def _dequantize(
    reading: Reading, name: str, read: MatrixReader, sink: Sink, source_hash: SourceHash
) -> tuple[Loss, list[Piece]]:
    piece = sink.piece(name)
    squared_error = signal = 0.0
    for begin, end in row_blocks(*read.shape(reading), rows_together(reading.packed, 1)):
        rows = read.rows(reading, begin, end, source_hash)
        with _named(reading, read, name):
            cast = to_bf16(rows)
        piece.append(cast.parts[WEIGHT])
        squared_error += cast.squared_error
        signal += cast.signal
    return Loss(squared_error=squared_error, signal=signal), [piece]


def _quantize(
    reading: Reading,
    action: Quantize,
    read: MatrixReader,
    sink: Sink,
    source_hash: SourceHash,
    device: torch.device,
    largest: LargestValues,
) -> tuple[Loss, list[Piece]]:
    shape = read.shape(reading)
    form = format_named(action.format)
    specs = form.parts(action.scheme, shape)
    pieces = {spec.suffix: sink.piece(f"{action.module}.{spec.suffix}") for spec in specs}
    squared_error = signal = 0.0
    second = second_scale(action, largest.of(action.scale_over, read))
    for begin, end in row_blocks(*shape, rows_together(reading.packed, form.row_block(action.scheme, shape))):
        rows = read.rows(reading, begin, end, source_hash).to(device)
        with _named(reading, read, action.module):
            encoded = encode(rows, action, shape, second)
        for spec in specs:
            if spec.rows_per_row or begin == 0:
                pieces[spec.suffix].append(encoded.parts[spec.suffix].cpu())
        squared_error += encoded.squared_error
        signal += encoded.signal
    return Loss(squared_error=squared_error, signal=signal), list(pieces.values())


def _reencode(
    reading: Reading, action: Reencode, read: MatrixReader, sink: Sink, source_hash: SourceHash
) -> tuple[float, list[Piece]]:
    shape = read.shape(reading)
    form = format_named(action.format)
    specs = form.parts(action.scheme, shape)
    pieces = {spec.suffix: sink.piece(f"{action.module}.{spec.suffix}") for spec in specs}
    packed, scale_error = reading.packed, 0.0
    same = packed is not None and (packed.format, packed.scheme) == (action.format, action.scheme)
    for begin, end in row_blocks(*shape, rows_together(packed, form.row_block(action.scheme, shape))):
        stored = read.parts(reading, begin, end, source_hash)
        quantized = read.unpacked(reading, begin, end, stored)
        with _named(reading, read, action.module):
            moved = move(quantized, action, shape, stored if same else None)
        for spec in specs:
            if spec.rows_per_row or begin == 0:
                pieces[spec.suffix].append(moved.parts[spec.suffix])
        scale_error = max(scale_error, moved.scale_error)
    return scale_error, list(pieces.values())


@contextmanager
def _named(reading: Reading, read: MatrixReader, becomes: str) -> Iterator[None]:
    """Say which tensor an error speaks of."""
    try:
        yield
    except DataError as error:
        part = reading.inputs[0]
        raise DataError(f"{read.info(part).shard}: {part.tensor}, for {becomes}: {error}") from None


def _bytes(source: Checkpoint, step: Step) -> int:
    return sum((part.end - part.begin) * source.tensors[part.tensor].row_bytes for part in step.inputs)


class _Budget:
    """Bytes that running steps hold together; a step waits until it fits."""

    def __init__(self, limit: int | None) -> None:
        self._limit = limit
        self._held = 0
        self._changed = threading.Condition()

    @contextmanager
    def holding(self, amount: int, stop: threading.Event) -> Iterator[None]:
        with self._changed:
            if self._limit is not None:
                limit = self._limit
                self._changed.wait_for(lambda: self._held + amount <= limit or stop.is_set())
            self._held += amount
        try:
            yield
        finally:
            with self._changed:
                self._held -= amount
                self._changed.notify_all()

    def wake(self) -> None:
        """Let steps that wait see that the run has ended."""
        with self._changed:
            self._changed.notify_all()


@contextmanager
def _one_thread_a_step() -> Iterator[None]:
    """Torch sums in an order that depends on its thread count: give every step one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
