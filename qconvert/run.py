"""Execute a plan: a tensor's whole path from source bytes to written bytes, readable on one screen."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qconvert.core.errors import DataError, PlanError
from qconvert.core.plan import Keep, Plan, Quantize, Slice, Step
from qconvert.core.tensor_info import TensorInfo
from qconvert.encode import encode, second_scale
from qconvert.formats.table import format_named
from qconvert.io.checkpoint import Checkpoint, byte_view
from qconvert.io.hashing import Hash, new_hash
from qconvert.io.piece import Piece
from qconvert.io.sink import Sink
from qconvert.numerics.finite import all_finite, largest_of
from qconvert.plan.row_blocks import row_blocks

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
        loss: of a rounded matrix; ``None`` for a copy.
    """

    source_hash: str
    loss: Loss | None

    def note(self) -> dict[str, Any]:
        """As plain JSON, every digit kept."""
        note: dict[str, Any] = {"source": self.source_hash}
        return note if self.loss is None else {**note, "loss": [self.loss.squared_error, self.loss.signal]}

    @classmethod
    def of_note(cls, note: Mapping[str, Any]) -> Outcome:
        """The inverse of ``note``."""
        loss = note.get("loss")
        return cls(source_hash=note["source"], loss=loss and Loss(squared_error=loss[0], signal=loss[1]))


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
        DataError: a weight is NaN or infinite; the message names file and tensor.
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

    def work() -> None:
        nonlocal done
        reader = _Reader(source, stop)
        while not stop.is_set():
            with lock:
                step = next(waiting, None)
            if step is None:
                return
            with budget.holding(step.peak_bytes, stop):
                outcome = execute(step, reader, sink, device)
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
            if failure is not None and not isinstance(failure, _StoppedError):
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


def execute(step: Step, read: _Reader, sink: Sink, device: torch.device) -> Outcome:
    """Carry one step out."""
    part = step.inputs[0]
    source_hash = new_hash(sink.algorithm)
    match step.action:
        case Keep(name=name):
            loss, pieces = None, [_keep(part, name, read, sink, source_hash)]
        case Quantize() as action:
            loss, pieces = _quantize(part, action, read, sink, source_hash, device)
    outcome = Outcome(source_hash=source_hash.hexdigest(), loss=loss)
    sink.commit(step.key, pieces, outcome.note())
    return outcome


def _keep(part: Slice, name: str, read: _Reader, sink: Sink, source_hash: Hash) -> Piece:
    info = read.info(part)
    piece = sink.piece(name)
    for begin, end in row_blocks(part.end - part.begin, info.row_width, 1):
        rows = read(part, begin, end, source_hash)
        if not all_finite(rows):
            raise DataError(f"{info.shard}: {part.tensor} has NaN or infinite values")
        piece.append(rows)
    return piece


def _quantize(
    part: Slice, action: Quantize, read: _Reader, sink: Sink, source_hash: Hash, device: torch.device
) -> tuple[Loss, list[Piece]]:
    info = read.info(part)
    shape = (part.end - part.begin, info.shape[-1])
    form = format_named(action.format)
    specs = form.parts(action.scheme, shape)
    pieces = {spec.suffix: sink.piece(f"{action.module}.{spec.suffix}") for spec in specs}
    squared_error = signal = 0.0
    second = second_scale(action, _largest(action, read))
    for begin, end in row_blocks(*shape, form.row_block(action.scheme, shape)):
        rows = read(part, begin, end, source_hash).to(device)
        try:
            encoded = encode(rows, action, shape, second)
        except DataError as error:
            raise DataError(f"{info.shard}: {part.tensor}, for {action.module}: {error}") from None
        for spec in specs:
            if spec.rows_per_row or begin == 0:
                pieces[spec.suffix].append(encoded.parts[spec.suffix].cpu())
        squared_error += encoded.squared_error
        signal += encoded.signal
    return Loss(squared_error=squared_error, signal=signal), list(pieces.values())


def _largest(action: Quantize, read: _Reader) -> float:
    """The largest value of all matrices that share a second scale: they are read once more for it."""
    largest = 0.0
    for part in action.scale_over:
        info = read.info(part)
        for begin, end in row_blocks(part.end - part.begin, info.row_width, 1):
            found = largest_of(read(part, begin, end, None))
            if not math.isfinite(found):
                raise DataError(f"{info.shard}: {part.tensor} has NaN or infinite values")
            largest = max(largest, found)
    return largest


def _bytes(source: Checkpoint, step: Step) -> int:
    return sum((part.end - part.begin) * source.tensors[part.tensor].row_bytes for part in step.inputs)


class _StoppedError(Exception):
    """Another step has failed, or the run is interrupted."""


class _Reader:
    """Reads rows for one thread at a time into memory that it uses again."""

    def __init__(self, source: Checkpoint, stop: threading.Event) -> None:
        self._source = source
        self._stop = stop
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def info(self, part: Slice) -> TensorInfo:
        return self._source.tensors[part.tensor]

    def __call__(self, part: Slice, begin: int, end: int, into: Hash | None) -> Tensor:
        """Rows ``begin`` to ``end`` of a part, valid until the next call; their bytes go into the hash, if any.

        Raises:
            _StoppedError: the run has ended.
        """
        if self._stop.is_set():
            raise _StoppedError
        needed = (end - begin) * self.info(part).row_bytes
        if self._buffer.numel() < needed:
            self._buffer = torch.empty(needed, dtype=torch.uint8)
        rows = self._source.read(part.tensor, part.begin + begin, part.begin + end, buffer=self._buffer)
        if into is not None:
            into.update(byte_view(self._buffer[:needed]))
        return rows


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
