"""Carry out what was decided: execute a plan, record what came of it, and let a folder appear whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qconvert import __version__
from qconvert.core.errors import DataError, FormatError, PlanError, explain_going_on
from qconvert.core.plan import Folding, Plan
from qconvert.device import check_device
from qconvert.execute import warm_up
from qconvert.io.checkpoint import Checkpoint
from qconvert.io.file_record import record_folder
from qconvert.io.hashing import new_hash
from qconvert.io.shard_writer import BACKGROUND_BYTES, ShardWriter
from qconvert.manifest import MANIFEST_FILE, manifest_parts, summary
from qconvert.memory import return_large_blocks, working_memory
from qconvert.rounding_by import By, check_memory_by, run_by
from qconvert.run import CPU, Progress, check_memory
from qconvert.weights.boundaries import states_beside


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is to be written, decided from the headers of a checkpoint.

    Attributes:
        beside: files beside the weights that no source has, besides ``config.json`` and the manifest.
        policy: the rules that decided, as ``Policy.entries`` gives them.
        reencoding: what decided where codes are only moved.
        folding: what becomes of the shared expert; ``None`` where it is stored as in the source.
        package: what was asked of an ONNX package; ``None`` for a checkpoint.
        calibration: text that matrices are rounded for, or statistics of it; ``None`` for neither.
        notes: what people should know of it, one sentence each.
        accept: sees the output before it appears, and keeps it from appearing by raising.
    """

    plan: Plan
    accept: Callable[[Path], None]
    beside: Mapping[str, bytes] = field(default_factory=dict)
    policy: Sequence[Mapping[str, Any]] = ()
    reencoding: Mapping[str, Any] | None = None
    folding: Folding | None = None
    package: Mapping[str, Any] | None = None
    calibration: By | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """A finished conversion.

    Attributes:
        record: what `manifest.json` in the output says of the whole.
        bytes_before: bytes of the source's tensors.
        bytes_after: bytes of the output's tensors.
    """

    out: Path
    plan: Plan
    record: Mapping[str, Any]
    bytes_before: int
    bytes_after: int


def carry_out(
    source: Path,
    out: Path,
    decide: Callable[[Checkpoint], Task],
    *,
    jobs: int,
    max_memory: int | None,
    fresh: bool,
    read_back: bool,
    algorithm: str,
    device: torch.device = CPU,
    progress: Progress,
) -> Conversion:
    """Execute and record what ``decide`` makes of ``source``; see ``convert`` for the arguments and errors."""
    check_device(device)
    new_hash(algorithm)  # before anything is read
    with Checkpoint.open(source) as checkpoint:
        task = decide(checkpoint)
        plan = task.plan
        before = sum(info.nbytes for info in checkpoint.tensors.values())
        if max_memory is not None:
            return_large_blocks()
        warm_up(plan)
        left = working_memory(max_memory, BACKGROUND_BYTES)
        check_memory(plan, left)
        check_memory_by(task.calibration, checkpoint, jobs, left)
        identity = {
            "qconvert version": __version__,
            "source": checkpoint.file_hash,
            "policy": plan.policy_hash,
            "device": device.type,
            "calibration": "none" if task.calibration is None else task.calibration.hash,
        }
        states = states_beside(out, identity)
        writer = ShardWriter(out, plan.layout, identity=identity, fresh=fresh, read_back=read_back, algorithm=algorithm)
        with writer as sink:
            try:
                if fresh:
                    states.remove(foreign=True)
                outcomes = run_by(
                    task.calibration, plan, checkpoint, sink, jobs=jobs, memory=left, device=device, states=states,
                    progress=progress,
                )  # fmt: skip
                record = summary(
                    plan,
                    outcomes,
                    policy=task.policy,
                    reencoding=task.reencoding,
                    folding=task.folding,
                    package=task.package,
                    calibration=None if task.calibration is None else task.calibration.entry,
                    algorithm=algorithm,
                    config_hash=checkpoint.config_hash,
                    device=device.type,
                )

                def manifest(hashes: Mapping[str, str]) -> Iterator[bytes]:
                    beside = record_folder(sink.path, algorithm, without=MANIFEST_FILE)
                    yield from manifest_parts(record, beside, plan, outcomes, hashes)

                sink.finish(
                    {
                        **{name: source / name for name in plan.side_files},
                        **task.beside,
                        "config.json": plan.config_bytes,
                        MANIFEST_FILE: manifest,  # last: it speaks of all others
                    },
                    accept=task.accept,
                )
                states.remove()
            except (PlanError, FormatError, DataError):
                states.remove()
                raise  # the same would happen again: nothing is kept
            except BaseException as error:
                if sink.suspend():
                    explain_going_on(error, out)
                else:
                    states.remove()
                raise
    return Conversion(out=out, plan=plan, record=record, bytes_before=before, bytes_after=plan.layout.nbytes)
