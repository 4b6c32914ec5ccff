"""Execute a plan: a tensor's whole path from source bytes to written bytes, readable on one screen."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod

import torch

from qconvert.core.errors import DataError, PlanError
from qconvert.core.plan import Keep, Plan, Quantize, Slice, Step
from qconvert.encode import encode
from qconvert.formats.table import format_named
from qconvert.io.checkpoint import Checkpoint
from qconvert.io.sink import Sink
from qconvert.plan.row_blocks import row_blocks

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """What rounding one matrix cost: sums over its elements."""

    squared_error: float
    signal: float


def run(
    plan: Plan,
    source: Checkpoint,
    sink: Sink,
    *,
    jobs: int = 2,
    memory: int | None = None,
    progress: Progress = lambda done, total: None,
) -> dict[str, Loss]:
    """Write every tensor of ``plan`` into ``sink``; the bytes do not depend on ``jobs`` or on the order of steps.

    Args:
        plan: what to do.
        source: the checkpoint that the plan was made for.
        sink: takes the bytes; finishing or aborting it is the caller's.
        jobs: steps that run at once.
        memory: bytes that the running steps may hold together by the plan's prediction; ``None`` is no limit.
        progress: called with source bytes done and in all.

    Returns:
        The loss of every rounded matrix by module name.

    Raises:
        PlanError: a step needs more than ``memory``.
        DataError: a weight is NaN or infinite; the message names file and tensor.
        SourceError: the source changed or cannot be read.
        OutputError: the output cannot be written.
    """
    if memory is not None:
        check_memory(plan, memory)
    budget = _Budget(memory)
    total = sum(_bytes(source, part) for step in plan.steps for part in step.inputs)
    losses: dict[str, Loss] = {}
    done = 0
    lock = threading.Lock()
    stop = threading.Event()

    def work(step: Step) -> None:
        nonlocal done
        with budget.holding(step.peak_bytes):
            if stop.is_set():
                return
            loss = execute(step, source, sink)
        with lock:
            done += sum(_bytes(source, part) for part in step.inputs)
            if isinstance(step.action, Quantize) and loss is not None:
                losses[step.action.module] = loss
            progress(done, total)

    with _one_thread_a_step(), ThreadPoolExecutor(jobs, thread_name_prefix="step") as pool:
        futures = [pool.submit(work, step) for step in plan.steps]
        try:
            finished, _ = wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
        for future in finished:
            if not future.cancelled():
                future.result()
    return losses


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


def execute(step: Step, source: Checkpoint, sink: Sink) -> Loss | None:
    """Carry one step out; returns the loss of a rounded matrix, ``None`` for a copy."""
    match step.action:
        case Keep(name=name):
            _keep(step.inputs[0], name, source, sink)
            return None
        case Quantize() as action:
            return _quantize(step.inputs[0], action, source, sink)


def _keep(part: Slice, name: str, source: Checkpoint, sink: Sink) -> None:
    info = source.tensors[part.tensor]
    offset = 0
    for begin, end in row_blocks(part.end - part.begin, info.row_width, 1):
        rows = source.read(part.tensor, part.begin + begin, part.begin + end)
        if rows.is_floating_point() and not torch.isfinite(rows).all():
            raise DataError(f"{info.shard}: {part.tensor} has NaN or infinite values")
        sink.write(name, rows, offset)
        offset += rows.nbytes


def _quantize(part: Slice, action: Quantize, source: Checkpoint, sink: Sink) -> Loss:
    info = source.tensors[part.tensor]
    shape = (part.end - part.begin, info.shape[-1])
    form = format_named(action.format)
    specs = {spec.suffix: spec for spec in form.parts(action.scheme, shape)}
    squared_error = signal = 0.0
    for begin, end in row_blocks(*shape, form.row_block(action.scheme)):
        rows = source.read(part.tensor, part.begin + begin, part.begin + end)
        try:
            encoded = encode(rows, action, shape)
        except DataError as error:
            raise DataError(f"{info.shard}: {part.tensor}, for {action.module}: {error}") from None
        for suffix, tensor in encoded.parts.items():
            spec = specs[suffix]
            if spec.rows_per_row:
                offset = spec.rows_of(begin, end)[0] * prod(spec.shape[1:]) * spec.dtype.itemsize
                sink.write(f"{action.module}.{suffix}", tensor, offset)
            elif begin == 0:
                sink.write(f"{action.module}.{suffix}", tensor)
        squared_error += encoded.squared_error
        signal += encoded.signal
    return Loss(squared_error=squared_error, signal=signal)


def _bytes(source: Checkpoint, part: Slice) -> int:
    info = source.tensors[part.tensor]
    return (part.end - part.begin) * info.row_width * info.dtype.itemsize


class _Budget:
    """Bytes that running steps hold together; a step waits until it fits."""

    def __init__(self, limit: int | None) -> None:
        self._limit = limit
        self._held = 0
        self._changed = threading.Condition()

    @contextmanager
    def holding(self, amount: int) -> Iterator[None]:
        with self._changed:
            if self._limit is not None:
                limit = self._limit
                self._changed.wait_for(lambda: self._held + amount <= limit)
            self._held += amount
        try:
            yield
        finally:
            with self._changed:
                self._held -= amount
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
