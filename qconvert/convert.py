"""A whole conversion: open, plan, execute, record. What the command line calls and what Python users call."""

from __future__ import annotations

from pathlib import Path

import torch

from qconvert.carry_out import Conversion, Task, carry_out
from qconvert.column_order import check_column_order
from qconvert.core.plan import Folding, Plan
from qconvert.engine_check.run import refuse_unreadable, refuse_unreadable_plan
from qconvert.exact_scales import check_scales
from qconvert.io.checkpoint import Checkpoint
from qconvert.io.hashing import XXH3
from qconvert.io.shard_writer import BACKGROUND_BYTES
from qconvert.memory import working_memory
from qconvert.plan.builder import build_plan
from qconvert.plan.layout import DEFAULT_SHARD_BYTES
from qconvert.plan.policy import Policy
from qconvert.plan.reencoding import Reencoding, plan_reencoding
from qconvert.plan.refolding import plan_folding
from qconvert.rounding_by import By, check_memory_by, plan_by
from qconvert.run import CPU, Progress, check_memory


def plan_conversion(
    source: Path,
    policy: Policy,
    *,
    jobs: int = 2,
    max_memory: int | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    from_quantized: bool = False,
    fold: bool = False,
    calibration: By | None = None,
) -> Plan:
    """Decide what happens to every tensor of ``source``; reads headers only. Arguments as for ``convert``.

    Raises:
        SourceError: ``source`` is no checkpoint that can be converted.
        PlanError: the policy asks for something impossible, or the memory does not suffice.
        FormatError: a matrix does not fit the format of its scheme.
    """
    with Checkpoint.open(source) as checkpoint:
        plan = build_plan(checkpoint, policy, shard_bytes=shard_bytes, from_quantized=from_quantized, fold=fold)
        plan = plan_by(plan, checkpoint, calibration)
        refuse_unreadable_plan(plan, source)
        memory = working_memory(max_memory, BACKGROUND_BYTES)
        check_memory(plan, memory)
        check_memory_by(calibration, checkpoint, jobs, memory)
    return plan


def convert(
    source: Path,
    out: Path,
    policy: Policy,
    *,
    jobs: int = 2,
    max_memory: int | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    from_quantized: bool = False,
    fold: bool = False,
    calibration: By | None = None,
    fresh: bool = False,
    read_back: bool = True,
    algorithm: str = XXH3,
    device: torch.device = CPU,
    progress: Progress = lambda done, total: None,
) -> Conversion:
    """Convert ``source`` into the new folder ``out``, which appears whole or not at all.

    A run that was killed, interrupted or stopped by a full disk goes on when it is called again with the same
    arguments, and gives the bytes of one that was not; ``jobs`` and ``max_memory`` may differ.

    Args:
        source: folder with a checkpoint.
        out: folder that does not exist yet.
        policy: decides every tensor.
        jobs: steps that run at once; the bytes do not depend on it.
        max_memory: bytes that the whole process may hold, what it holds already included; ``None`` lets the
            conversion add ``DEFAULT_MEMORY``.
        shard_bytes: largest output file.
        from_quantized: take a source that is quantized already: its matrices are dequantized in float32, one at a
            time, and rounded anew; losses are against these numbers.
        fold: round the shared expert and store it as routed ones, see ``refold``.
        calibration: round matrices for what this text lets reach them, or by statistics of ``source``; ``None``
            rounds them to nearest.
        fresh: start over instead of going on from what an earlier run left.
        read_back: compare every byte that is written with its hash after it is durable, before ``out`` appears; what
            an earlier run left is compared in any case.
        algorithm: hash of the tensors in the manifest, one of ``hashing.ALGORITHMS``.
        device: where matrices are rounded: by compiled kernels on a CPU, by the plain torch expressions elsewhere.
        progress: called with source bytes done and in all.

    Raises:
        UsageError: a device that is not there, or an unknown algorithm.
        SourceError, PlanError, FormatError, OutputError, DataError: see ``plan_conversion`` and ``run``.
        Interrupted: on a ``KeyboardInterrupt`` after which a run can go on.
    """

    def decide(checkpoint: Checkpoint) -> Task:
        plan = build_plan(checkpoint, policy, shard_bytes=shard_bytes, from_quantized=from_quantized, fold=fold)
        plan = plan_by(plan, checkpoint, calibration)
        refuse_unreadable_plan(plan, source)
        folding = Folding.FOLDED if fold else None
        return Task(
            plan=plan, policy=policy.entries(), folding=folding, calibration=calibration, accept=refuse_unreadable
        )

    return carry_out(
        source,
        out,
        decide,
        jobs=jobs,
        max_memory=max_memory,
        fresh=fresh,
        read_back=read_back,
        algorithm=algorithm,
        device=device,
        progress=progress,
    )


def plan_codes(
    source: Path, reencoding: Reencoding, *, max_memory: int | None = None, shard_bytes: int = DEFAULT_SHARD_BYTES
) -> Plan:
    """Decide what ``move_codes`` does to every tensor of ``source``; reads headers, the order of inputs, and scales.

    Raises:
        SourceError: ``source`` is no checkpoint that can be read, or is not quantized.
        PlanError, FormatError: the codes cannot be moved: another grid, other blocks, zero points, activation order.
        DataError: scales cannot be held exactly, and ``reencoding`` does not allow to round them.
    """
    with Checkpoint.open(source) as checkpoint:
        plan = _plan_codes(checkpoint, reencoding, shard_bytes)
    refuse_unreadable_plan(plan, source)
    check_memory(plan, working_memory(max_memory, BACKGROUND_BYTES))
    return plan


def _plan_codes(checkpoint: Checkpoint, reencoding: Reencoding, shard_bytes: int) -> Plan:
    plan = plan_reencoding(checkpoint, reencoding, shard_bytes=shard_bytes)
    check_column_order(plan, checkpoint)
    check_scales(plan, checkpoint)
    return plan


def move_codes(
    source: Path,
    out: Path,
    reencoding: Reencoding,
    *,
    jobs: int = 2,
    max_memory: int | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    fresh: bool = False,
    read_back: bool = True,
    algorithm: str = XXH3,
    progress: Progress = lambda done, total: None,
) -> Conversion:
    """Move the codes of the quantized checkpoint ``source`` into another loader's format in the new folder ``out``.

    Nothing is rounded: every matrix of the output dequantizes to exactly the numbers of the source, also after the
    loader has cast its scales; what is not quantized is copied. Arguments as for ``convert``, which see also for what
    happens to a run that ends early.

    Raises:
        SourceError, PlanError, FormatError: see ``plan_codes``.
        DataError: codes that are NaN, or scales that cannot be held exactly and ``reencoding`` does not allow to round.
        UsageError, OutputError, Interrupted: see ``convert``.
    """

    def decide(checkpoint: Checkpoint) -> Task:
        plan = _plan_codes(checkpoint, reencoding, shard_bytes)
        refuse_unreadable_plan(plan, source)
        return Task(plan=plan, reencoding=reencoding.entry, accept=refuse_unreadable)

    return carry_out(
        source,
        out,
        decide,
        jobs=jobs,
        max_memory=max_memory,
        fresh=fresh,
        read_back=read_back,
        algorithm=algorithm,
        progress=progress,
    )


def plan_refolding(
    source: Path, folding: Folding, *, max_memory: int | None = None, shard_bytes: int = DEFAULT_SHARD_BYTES
) -> Plan:
    """Decide what ``refold`` does to every tensor of ``source``; reads headers, and the order of inputs.

    Raises:
        SourceError, PlanError, FormatError: see ``plan.refolding.plan_folding``.
    """
    with Checkpoint.open(source) as checkpoint:
        plan = _plan_refolding(checkpoint, folding, shard_bytes)
    refuse_unreadable_plan(plan, source)
    check_memory(plan, working_memory(max_memory, BACKGROUND_BYTES))
    return plan


def _plan_refolding(checkpoint: Checkpoint, folding: Folding, shard_bytes: int) -> Plan:
    plan = plan_folding(checkpoint, folding, shard_bytes=shard_bytes)
    check_column_order(plan, checkpoint)
    return plan


def refold(
    source: Path,
    out: Path,
    folding: Folding,
    *,
    jobs: int = 2,
    max_memory: int | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    fresh: bool = False,
    read_back: bool = True,
    algorithm: str = XXH3,
    progress: Progress = lambda done, total: None,
) -> Conversion:
    """Store the shared expert of ``source`` as further routed experts in the new folder ``out``, or undo that.

    Folded, a layer has E + n experts; every token visits the last n, each with the weight sigmoid(x . gate), beside the
    k that the router chooses among the others. Nothing is rounded: the outputs are the same but for the order of sums,
    and unfolding gives the source's tensors bit for bit. ``config.json`` has the counts of what is stored, and the
    original ones in its ``qconvert`` block. Arguments as for ``convert``.

    Raises:
        SourceError, PlanError, FormatError: see ``plan_refolding``.
        DataError: NaN or infinite weights, or pieces of a shared expert that do not belong together.
        UsageError, OutputError, Interrupted: see ``convert``.
    """

    def decide(checkpoint: Checkpoint) -> Task:
        plan = _plan_refolding(checkpoint, folding, shard_bytes)
        refuse_unreadable_plan(plan, source)
        return Task(plan=plan, folding=folding, accept=refuse_unreadable)

    return carry_out(
        source,
        out,
        decide,
        jobs=jobs,
        max_memory=max_memory,
        fresh=fresh,
        read_back=read_back,
        algorithm=algorithm,
        progress=progress,
    )
