"""A conversion done again without writing: is every byte of it where it should be?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from qconvert import __version__
from qconvert.core.fault import Fault
from qconvert.core.plan import Keep, Plan, Step
from qconvert.core.tensor_info import TensorInfo
from qconvert.execute import Outcome
from qconvert.io.checkpoint import Checkpoint
from qconvert.io.comparing_sink import ComparingSink
from qconvert.io.file_record import record_file
from qconvert.io.hashing import new_hash
from qconvert.io.source_folder import CONFIG_FILE, INDEX_FILE, WEIGHTS_SUFFIX
from qconvert.manifest import (
    MANIFEST_FILE,
    SCALE_ERROR,
    SOURCE_QUANTIZATION,
    of_quantized,
    scale_error_by_role,
    sqnr_by_role,
)
from qconvert.manifest_reader import Manifest
from qconvert.repeat import Repeated, repeated
from qconvert.rounding_by import By, run_by
from qconvert.run import Progress, check_memory
from qconvert.sequential.calibration import METHODS

_SAME_DB = 0.01
"""Sums over blocks of another size differ far less, any other rounding far more."""


def compare_with_source(
    source: Path,
    out: Path,
    manifest: Manifest,
    stored: Mapping[str, tuple[int, TensorInfo]],
    *,
    jobs: int,
    memory: int,
    device: torch.device,
    by: By | None,
    progress: Progress,
) -> list[Fault]:
    """Repeat the conversion of ``source`` that ``manifest`` tells of and compare it with ``out``.

    Args:
        source: folder with the original checkpoint.
        out: folder with the converted one.
        manifest: what ``out`` says of itself.
        stored: the tensors of ``out``: the open file that each is in, and where.
        jobs: steps that run at once.
        memory: bytes that they may hold together.
        device: where matrices are rounded.
        by: what ``out`` was rounded by besides the weights.
        progress: called with source bytes done and in all.

    Raises:
        SourceError: ``source`` is no checkpoint that can be converted, or the manifest's policy cannot be repeated.
        PlanError, FormatError, DataError: ``source`` cannot be converted as the manifest says.
    """
    again = repeated(out, manifest, by)
    with Checkpoint.open(source) as checkpoint:
        repeat = again(checkpoint)
        plan = repeat.plan
        planned = {info.name: info for info in plan.layout.tensors}
        faults = [
            *_of_files(checkpoint, repeat, manifest),
            *_of_tensors(plan, planned, manifest),
        ]
        sink = ComparingSink(planned, stored, out, manifest.algorithm)
        outcomes = run_by(by, plan, checkpoint, sink, jobs=jobs, memory=memory, device=device, progress=progress)
        faults += _of_bytes(checkpoint, plan, manifest, stored, outcomes, sink.different)
    if not faults:
        faults += _of_losses(manifest, sqnr_by_role(plan, outcomes))
        faults += _of_scales(manifest, scale_error_by_role(plan, outcomes))
    return faults


def check_repeatable(source: Path, out: Path, manifest: Manifest, memory: int, by: By | None) -> None:
    """Find out what ``compare_with_source`` would refuse before anybody waits for ``out`` to be read; see there."""
    again = repeated(out, manifest, by)
    with Checkpoint.open(source) as checkpoint:
        check_memory(again(checkpoint).plan, memory)


def unlike_the_conversion(manifest: Manifest, device: torch.device) -> Iterator[str]:
    """Reasons why the conversion may give other bytes when it is repeated here."""
    if manifest.version != __version__:
        yield f"converted by qconvert {manifest.version}, compared by {__version__}: versions may round differently"
    if manifest.device != device.type:
        yield f"rounded on {manifest.device}, compared on {device.type}: devices may round ties differently"
    if manifest.calibration is not None and manifest.calibration.get("method") in METHODS:
        yield "calibrated: another machine or build of torch adds products up in another order, and rounds otherwise"


def _of_files(checkpoint: Checkpoint, repeat: Repeated, manifest: Manifest) -> Iterator[Fault]:
    plan = repeat.plan
    if checkpoint.config_hash != manifest.config_hash:
        yield Fault(
            file=CONFIG_FILE, what=f"the source's has the hash {checkpoint.config_hash}, not {manifest.config_hash}"
        )
    if plan.policy_hash != manifest.policy_hash:
        yield Fault(
            file=MANIFEST_FILE, what=f"policy_hash is {manifest.policy_hash}, its rules give {plan.policy_hash}"
        )
    rounded = manifest.reencoding is None
    told = of_quantized(plan.source_quantization, rounded=rounded).get(SOURCE_QUANTIZATION)
    if told != manifest.source_quantization:
        what = f"{SOURCE_QUANTIZATION} is {manifest.source_quantization}, the source gives {told}"
        yield Fault(file=MANIFEST_FILE, what=what)
    keys = ("role", "action", "reason", "tensors", "bytes")
    decisions = [dict(zip(keys, one, strict=True)) for one in plan.decisions()]
    for expected in decisions:
        if expected not in manifest.decisions:
            yield Fault(file=MANIFEST_FILE, what=f"the policy decides {expected}, the manifest does not")
    for found in manifest.decisions:
        if found not in decisions:
            yield Fault(file=MANIFEST_FILE, what=f"lists {dict(found)}, which the policy does not decide")
    made = {**repeat.beside, CONFIG_FILE: plan.config_bytes}
    for name, content in made.items():
        written = new_hash(manifest.algorithm)
        written.update(memoryview(content))
        if name in manifest.files and manifest.files[name].digest != written.hexdigest():
            yield Fault(file=name, what="is not what the conversion writes")
    beside = {name for name in manifest.files if not name.endswith(WEIGHTS_SUFFIX)} - {INDEX_FILE}
    for name in sorted(beside ^ {*made, *plan.side_files}):
        yield Fault(file=name, what=f"is in {'the output' if name in beside else 'the source'} only")
    for name in sorted(beside.intersection(plan.side_files)):
        if record_file(checkpoint.path / name, manifest.algorithm) != manifest.files[name]:
            yield Fault(file=name, what="is not the source's")


def _of_tensors(plan: Plan, planned: Mapping[str, TensorInfo], manifest: Manifest) -> Iterator[Fault]:
    """What the manifest says of tensors, compared with what the plan says."""
    for name in sorted(manifest.tensors.keys() - planned.keys()):
        yield Fault(file=MANIFEST_FILE, tensor=name, what="the conversion does not write it")
    for step in plan.steps:
        for name in step.outputs:
            entry = manifest.tensors.get(name)
            if entry is None:
                yield Fault(file=MANIFEST_FILE, tensor=name, what="the conversion writes it, the manifest has it not")
                continue
            decision, part, info = manifest.decisions[entry.decision], step.inputs[0], planned[name]
            pairs: tuple[tuple[str, Any, Any], ...] = (
                ("its role is", decision["role"], step.role.path),
                ("its action is", decision["action"], str(step.action)),
                ("its reason is", decision["reason"], step.action.reason),
                ("its type is", entry.dtype, info.dtype),
                ("its shape is", entry.shape, info.shape),
                ("it was made from", (entry.source, entry.begin, entry.end), (part.tensor, part.begin, part.end)),
            )
            for phrase, found, expected in pairs:
                if found != expected:
                    yield Fault(file=MANIFEST_FILE, tensor=name, what=f"{phrase} {expected}, the manifest says {found}")


def _of_bytes(
    checkpoint: Checkpoint,
    plan: Plan,
    manifest: Manifest,
    stored: Mapping[str, tuple[int, TensorInfo]],
    outcomes: Mapping[str, Outcome],
    different: Counter[str],
) -> Iterator[Fault]:
    """Sources that have changed; what came out of one is not compared, for it must differ."""
    for step in plan.steps:
        changed = _changed_source(step, manifest, outcomes[step.key])
        if changed is not None:
            part = step.inputs[0]
            shard = checkpoint.path / checkpoint.tensors[part.tensor].shard
            what = f"rows {part.begin} .. {part.end} {changed}: the source has changed since, or is another one"
            yield Fault(file=str(shard), tensor=part.tensor, what=what)
            continue
        for name in step.outputs:
            if different[name]:
                info = stored[name][1]
                expected = "the source's" if isinstance(step.action, Keep) else f"those that {step.action} gives"
                what = f"{different[name]} of {info.nbytes} bytes differ from {expected}"
                yield Fault(file=info.shard, tensor=name, what=what)


def _changed_source(step: Step, manifest: Manifest, outcome: Outcome) -> str | None:
    for entry in (manifest.tensors[name] for name in step.outputs if name in manifest.tensors):
        if entry.source_hash != outcome.source_hash:
            return f"have the hash {outcome.source_hash}, not {entry.source_hash}"
    return None


def _of_losses(manifest: Manifest, expected: Mapping[str, float | None]) -> Iterator[Fault]:
    for role in sorted(manifest.sqnr_db.keys() | expected.keys()):
        said, found = manifest.sqnr_db.get(role), expected.get(role)
        same = said == found or (said is not None and found is not None and abs(said - found) <= _SAME_DB)
        if not same:
            yield Fault(file=MANIFEST_FILE, what=f"sqnr_db of {role} is {said}, the conversion gives {found}")


def _of_scales(manifest: Manifest, expected: Mapping[str, float]) -> Iterator[Fault]:
    told = manifest.scale_error or {}
    if told != expected:
        yield Fault(file=MANIFEST_FILE, what=f"{SCALE_ERROR} is {told}, the conversion gives {expected}")
