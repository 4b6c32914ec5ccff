"""Execute a plan: every step that is left, several at once, within a limit of memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from itertools import islice

import torch

from qconvert.core.by_statistics import InputStatistics
from qconvert.core.errors import PlanError
from qconvert.core.plan import Plan, Step
from qconvert.execute import Outcome, execute, warm_up
from qconvert.io.checkpoint import Checkpoint
from qconvert.io.sink import Sink
from qconvert.largest_values import LargestValues
from qconvert.matrix_reader import MatrixReader, StoppedError
from qconvert.memory import give_back
from qconvert.numerics.threads import one_thread

CPU = torch.device("cpu")

READ_AHEAD_STEPS = 4
"""Steps before its turn at which the input of a step is fetched: reading cold files takes longer than rounding."""

READ_AHEAD_PARTS = 4
"""Of a step's inputs that are fetched: those of one matrix, and not all experts of a stack."""

Progress = Callable[[int, int], None]


def run(
    plan: Plan,
    source: Checkpoint,
    sink: Sink,
    *,
    jobs: int = 2,
    memory: int | None = None,
    device: torch.device = CPU,
    inputs: InputStatistics | None = None,
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
        inputs: what the inputs of matrices are like, for a plan that was made by it.
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
    total = sum(step_bytes(source, step) for step in plan.steps)
    outcomes = {step.key: Outcome.of_note(sink.finished[step.key]) for step in plan.steps if step.key in sink.finished}
    left = [step for step in plan.steps if step.key not in outcomes]
    done = total - sum(step_bytes(source, step) for step in left)
    progress(done, total)
    lock = threading.Lock()
    stop = threading.Event()
    waiting, later = iter(left), islice(left, READ_AHEAD_STEPS, None)
    largest = LargestValues()

    def work() -> None:
        nonlocal done
        reader = MatrixReader(source, stop)
        while not stop.is_set():
            with lock:
                step, announced = next(waiting, None), next(later, None)
            if step is None:
                return
            if announced is not None:
                for part in announced.inputs[:READ_AHEAD_PARTS]:
                    source.will_read(part.tensor, part.begin, part.end)
            with budget.holding(step.peak_bytes, stop, reader.release):
                outcome = execute(step, reader, sink, device, largest, inputs)
            with lock:
                done += step_bytes(source, step)
                outcomes[step.key] = outcome
                progress(done, total)

    warm_up(plan)
    with one_thread(), ThreadPoolExecutor(jobs, thread_name_prefix="step") as pool:
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


def step_bytes(source: Checkpoint, step: Step) -> int:
    """Bytes that a step reads."""
    return sum((part.end - part.begin) * source.tensors[part.tensor].row_bytes for part in step.inputs)


class _Budget:
    """Bytes that running steps hold together; a step waits until it fits."""

    def __init__(self, limit: int | None) -> None:
        self._limit = limit
        self._held = 0
        self._changed = threading.Condition()

    @contextmanager
    def holding(self, amount: int, stop: threading.Event, release: Callable[[], None]) -> Iterator[None]:
        """Wait for ``amount``; whoever waits has nothing, which ``release`` sees to."""
        with self._changed:
            if self._limit is not None and self._held + amount > self._limit:
                limit = self._limit
                release()
                give_back()
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
