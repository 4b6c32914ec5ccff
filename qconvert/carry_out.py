"""Carry out what was decided: execute a plan, record what came of it, and let a folder appear whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash

from qconvert import __version__
from qconvert.core.errors import DataError, FormatError, Interrupted, PlanError, QconvertError
from qconvert.core.plan import Folding, Plan
from qconvert.device import check_device
from qconvert.execute import warm_up
from qconvert.io.checkpoint import Checkpoint
from qconvert.io.file_record import record_folder
from qconvert.io.hashing import new_hash
from qconvert.io.shard_writer import BACKGROUND_BYTES, ShardWriter
from qconvert.manifest import MANIFEST_FILE, manifest_parts, summary
from qconvert.memory import resident_bytes, return_large_blocks
from qconvert.run import CPU, Progress, check_memory, run
from qconvert.sequential.calibration import Calibration
from qconvert.sequential.run import run_calibrated
from qconvert.weights.boundaries import Boundaries

DEFAULT_MEMORY = 1 << 30
"""Bytes that a conversion may add to a process that sets no limit: other work in it is none of ours to count."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is to be written, decided from the headers of a checkpoint.

    Attributes:
        beside: files beside the weights that no source has, besides ``config.json`` and the manifest.
        policy: the rules that decided, as ``Policy.entries`` gives them.
        reencoding: what decided where codes are only moved.
        folding: what becomes of the shared expert; ``None`` where it is stored as in the source.
        package: what was asked of an ONNX package; ``None`` for a checkpoint.
        calibration: text that matrices are rounded for; ``None`` where they are rounded to nearest.
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
    calibration: Calibration | None = None
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
        identity = {
            "qconvert version": __version__,
            "source": checkpoint.file_hash,
            "policy": plan.policy_hash,
            "device": device.type,
            "calibration": "none" if task.calibration is None else task.calibration.hash,
        }
        states = _states(out, identity)
        if fresh:
            states.remove()
        with ShardWriter(out, plan.layout, identity=identity, fresh=fresh, algorithm=algorithm) as sink:
            try:
                if task.calibration is None:
                    outcomes = run(plan, checkpoint, sink, jobs=jobs, memory=left, device=device, progress=progress)
                else:
                    outcomes = run_calibrated(
                        plan, checkpoint, sink, task.calibration, jobs=jobs, memory=left, states=states,
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
                    _explain(error, out)
                states.remove()
                raise
    return Conversion(out=out, plan=plan, record=record, bytes_before=before, bytes_after=plan.layout.nbytes)


def _states(out: Path, identity: Mapping[str, str]) -> Boundaries:
    """Where a calibrated conversion keeps what is between two layers; beside the output, which has no room for it."""
    same = xxhash.xxh3_128_hexdigest(json.dumps(identity, sort_keys=True).encode())
    return Boundaries(
        folder=out.parent / f".{out.name}.states", identity=same, advice="start over with --fresh, or remove it"
    )


def _explain(error: BaseException, out: Path) -> None:
    """Raise the error again with how to go on, if it is one for people."""
    hint = f"What is finished of {out} is kept: the same command goes on from there, with --fresh it starts over."
    if isinstance(error, KeyboardInterrupt):
        raise Interrupted(f"Interrupted. {hint}") from error
    if isinstance(error, QconvertError):
        raise type(error)(f"{error}\n{hint}") from error


def working_memory(limit: int | None, beside: int = 0) -> int:
    """What steps may hold: what remains of a limit for the whole process, or of the default, less what goes beside.

    Raises:
        PlanError: nothing remains.
    """
    if limit is None:
        return DEFAULT_MEMORY - beside
    held = resident_bytes() + beside
    if held >= limit:
        raise PlanError(
            f"the process needs {held / 2**20:.0f} MiB before the first step, more than the limit of "
            f"{limit / 2**20:.0f} MiB: raise --max-memory"
        )
    return limit - held
