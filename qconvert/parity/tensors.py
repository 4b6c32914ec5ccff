"""Every weight of the original against the converted one, streamed: one matrix of each in memory at a time."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from qconvert.core.awq_fold import AwqFold
from qconvert.core.dtypes import DType
from qconvert.core.errors import FormatError
from qconvert.core.role import Kind, Section, TensorRole
from qconvert.core.scheme import Scheme
from qconvert.memory import available_bytes
from qconvert.numerics.error import ErrorSums, error_sums
from qconvert.numerics.threads import in_order, one_thread
from qconvert.parity.absent import absent, tied
from qconvert.parity.blocks import BlockSums, block_sums, joined
from qconvert.parity.causes import Cause, CauseKind, Severity, cause, ranked
from qconvert.parity.codes import CodeCounts, count_codes, dead_scales
from qconvert.parity.damage import Evidence, damage_faults, evidence, together
from qconvert.parity.faults import (
    bad_scales,
    floor_db,
    innocent,
    is_offset_by_one,
    not_finite,
    scale_faults,
)
from qconvert.parity.halves import half_sums
from qconvert.parity.identity import find_matches, name_matches
from qconvert.parity.kept import changed_faults, row_sums
from qconvert.parity.pairs import RUN_ELEMENTS, pair_sums, runs
from qconvert.parity.scalings import ScaledView, Scalings
from qconvert.weights.source import CheckpointWeights

Progress = Callable[[str, int, int], None]

PIECE_BYTES = 32 << 20
"""Plain tensors are compared in runs of rows of this size: an embedding is never in memory as a whole."""

THREAD_BYTES = 12 * 4 * RUN_ELEMENTS
"""What one comparison holds, about: a run of rows of both matrices in float32, products of them, and roundings."""


class Outcome(enum.Enum):
    """What became of a tensor."""

    IDENTICAL = "identical"
    CAST = "cast"
    QUANTIZED = "quantized"
    CHANGED = "changed"
    UNREADABLE = "unreadable"


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorComparison:
    """One tensor of both checkpoints.

    Attributes:
        name: in the converted checkpoint; the module's where it is quantized.
        scheme: how it is rounded there.
        sums: the error; NaN where the converted values are NaN or cannot be read.
        halves: of a ``q_proj`` that differs, its query and its output gate.
        stored_bytes: on disk, scales and all.
        codes: what its codes say; ``None`` for a plain tensor.
    """

    role: TensorRole
    name: str
    outcome: Outcome
    scheme: Scheme | None
    sums: ErrorSums
    halves: tuple[TensorComparison, ...] = ()
    stored_bytes: int = 0
    codes: CodeCounts | None = None

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return self.sums.elements


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleSummary:
    """All tensors of one role path and scheme together.

    Attributes:
        sqnr_db: of the pooled sums.
        worst: the lowest SQNR of a single tensor, and ``worst_name`` which.
    """

    path: str
    scheme: str
    tensors: int
    elements: int
    identical: int
    sqnr_db: float
    worst_db: float
    worst_name: str
    cosine: float
    max_error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsComparison:
    """What the weights alone say.

    Attributes:
        tensors: every tensor that both have, worst first.
        causes: named faults, worst first.
        complete: whether the converted checkpoint can be run: nothing is missing and everything can be read.
        scaled: how many tensors are divided by what those that read them are times, by fold; errors are of what they
            mean together.
    """

    tensors: tuple[TensorComparison, ...]
    causes: tuple[Cause, ...]
    complete: bool
    scaled: Mapping[AwqFold, int] = field(default_factory=dict)

    def roles(self) -> tuple[RoleSummary, ...]:
        """Summaries by role path and scheme, worst first; the halves of ``q_proj`` after the whole."""
        groups: dict[tuple[str, str], list[TensorComparison]] = {}
        for one in (each for whole in self.tensors for each in (whole, *whole.halves)):
            groups.setdefault((one.role.path, str(one.scheme or "")), []).append(one)
        return tuple(_summary(path, scheme, members) for (path, scheme), members in groups.items())


def compare_weights(
    original: CheckpointWeights,
    converted: CheckpointWeights,
    progress: Progress = lambda phase, done, total: None,
    *,
    without: Collection[Section] = (),
) -> WeightsComparison:
    """Compare all tensors by role and name the faults that the weights prove; sections ``without`` may be missing.

    Tensors are compared side by side, as many as torch has threads and memory has room; numbers do not depend on that.
    """
    causes = list(absent(original, converted, without))
    both = [role for role in original.stored if role in converted.stored]
    common = [role for role in both if original.stored[role].shape == converted.stored[role].shape]
    for role in set(both) - set(common):
        here, there = (list(source.stored[role].shape) for source in (converted, original))
        text = f"is {here}, the original is {there}"
        causes.append(cause(CauseKind.SHAPE, role, text, (converted.stored[role].name,)))
    tensors: list[TensorComparison] = []
    suspects: list[TensorRole] = []
    scaled = Scalings(original, converted)

    def one(role: TensorRole) -> tuple[TensorComparison, list[Cause]]:
        found, faults = _compare(original, converted, role, scaled)
        found = replace(found, stored_bytes=converted.stored_bytes(role))
        return _with_halves(found, original, scaled.converted_undone), faults

    jobs = max(1, min(torch.get_num_threads(), available_bytes() // 2 // THREAD_BYTES))
    common.sort(key=_turn)
    with one_thread():
        with ThreadPoolExecutor(jobs, thread_name_prefix="weights") as pool:
            for done, (found, faults) in enumerate(in_order(pool, one, common, 2 * jobs)):
                progress("weights", done, len(common))
                tensors.append(found)
                causes.extend(faults)
                low = found.sums.sqnr_db < floor_db(found.scheme)
                if low and found.outcome in (Outcome.QUANTIZED, Outcome.CHANGED):
                    suspects.append(found.role)
        progress("weights", len(common), len(common))
        causes = list(_explain(scaled.original_scaled, converted, suspects, causes))
    needed = [role for role in original.stored if not (role.kind is Kind.HEAD and tied(original))]
    needed = [role for role in needed if role.section not in without]
    complete = set(needed) <= set(common) and not any(one.outcome is Outcome.UNREADABLE for one in tensors)
    tensors.sort(key=lambda one: (_badness(one.sums.sqnr_db), one.name))
    return WeightsComparison(tensors=tuple(tensors), causes=ranked(causes), complete=complete, scaled=scaled.found)


def _turn(role: TensorRole) -> tuple[bool, str, int]:
    """What is of no layer, such as embeddings, is largest and comes first; then layers, which are scaled together."""
    return role.layer is not None, role.section.value, role.layer or 0


def _compare(
    original: CheckpointWeights, converted: CheckpointWeights, role: TensorRole, scaled: Scalings
) -> tuple[TensorComparison, list[Cause]]:
    stored, scheme = converted.stored[role], converted.scheme(role)

    def result(outcome: Outcome, sums: ErrorSums, codes: CodeCounts | None = None) -> TensorComparison:
        return TensorComparison(role=role, name=stored.name, outcome=outcome, scheme=scheme, sums=sums, codes=codes)

    if original.stored[role].plain is not None and stored.plain is not None:
        try:
            return _compare_plain(original, converted, role, scaled)
        except FormatError as error:  # only of what is laid together from several
            faults = [cause(CauseKind.CONTRADICTION, role, str(error), (stored.name,))]
            return result(Outcome.UNREADABLE, _nan_sums(math.prod(stored.shape))), faults
    blocking = None if scheme is None else scheme.blocking
    found: list[BlockSums] = []
    seen: list[Evidence] = []
    codes = None if scheme is None else CodeCounts()
    # of what is scaled, errors are of what it means in the original's place, faults of what is stored in its own
    meant = ErrorSums() if scheme is not None and scaled.touches(role) else None
    try:
        for begin, end in runs((original, role), (converted, role)):
            w = original.matrix(role, begin, end)
            quantized = None if codes is None else converted.quantized(role, begin, end)
            if codes is None or quantized is None:
                v = scaled.undone(role, converted.matrix(role, begin, end), begin)
            else:
                v = converted.meaning(quantized)
                codes += count_codes(quantized, v)
            if meant is not None:
                meant += error_sums(w, scaled.undone(role, v, begin))
                w = scaled.redone(role, w, begin)
            found.append(block_sums(w, v, blocking))
            if not math.isfinite(found[-1].max_error):
                return result(Outcome.UNREADABLE, _nan_sums(math.prod(stored.shape))), [
                    not_finite(role, stored.name, v)
                ]
            if quantized is not None and scheme is not None:
                seen.append(evidence(w, v, quantized, scheme, found[-1]))
    except FormatError as error:
        rows, cols = stored.shape
        parts = converted.parts(role)
        faults = [] if scheme is None else list(bad_scales(role, stored.name, parts, scheme, (rows, cols)))
        faults = faults or [cause(CauseKind.CONTRADICTION, role, str(error), (stored.name,))]
        codes = None if scheme is None else dead_scales(parts, scheme, (rows, cols))
        return result(Outcome.UNREADABLE, _nan_sums(rows * cols), codes), faults
    sums = joined(found)
    outcome = Outcome.QUANTIZED if scheme is not None else Outcome.CHANGED
    total = sums.total if meant is None else meant
    if scheme is None:
        return result(outcome, total, codes), list(scale_faults(role, stored.name, sums, blocking, stored.shape))
    whole = together(seen)
    faults = list(scale_faults(role, stored.name, sums, blocking, stored.shape, whole.cut))
    faults += damage_faults(role, stored.name, whole, scheme, stored.shape, {one.kind for one in faults})
    return result(outcome, total, codes), faults


def _with_halves(found: TensorComparison, original: CheckpointWeights, converted: ScaledView) -> TensorComparison:
    if not found.role.halves or found.outcome in (Outcome.IDENTICAL, Outcome.UNREADABLE):
        return found
    sums = half_sums((original, found.role), (converted, found.role))
    return replace(found, halves=tuple(replace(found, role=half, sums=one) for half, one in sums.items()))


def _compare_plain(
    original: CheckpointWeights, converted: CheckpointWeights, role: TensorRole, scaled: Scalings
) -> tuple[TensorComparison, list[Cause]]:
    stored = converted.stored[role]
    sums, identical, cast, offset = ErrorSums(), True, True, role.kind.value.endswith("norm")
    faults: list[Cause] = []
    dtypes: set[tuple[torch.dtype, torch.dtype]] = set()
    changed: list[tuple[int, BlockSums]] = []
    touched = scaled.touches(role)  # then what is equal is a fault
    for begin, w, v in _row_runs(original, converted, role):
        same = not touched and w.dtype == v.dtype and torch.equal(w.view(torch.uint8), v.view(torch.uint8))
        identical &= same
        dtypes.add((w.dtype, v.dtype))
        cast &= w.dtype != v.dtype and torch.equal(w.to(v.dtype), v)
        wide, narrow = w.to(torch.float32), scaled.undone(role, v.to(torch.float32), begin)
        sums += _same_sums(wide) if same else error_sums(wide, narrow)
        if not same:
            changed.append((begin, block_sums(wide, narrow, None)))
        offset &= not same and is_offset_by_one(wide, narrow)
        if not same and not faults and not bool(narrow.isfinite().all()):
            faults.append(not_finite(role, stored.name, narrow))
    outcome = Outcome.IDENTICAL if identical else Outcome.CAST if cast else Outcome.CHANGED
    if outcome is Outcome.CAST:
        ((before, after),) = dtypes
        severity = Severity.WARNING if role.kind in (Kind.LINEAR_A_LOG, Kind.LINEAR_DT_BIAS) else None
        said = f"stored as {DType.from_torch(after)}, the original is {DType.from_torch(before)}"
        faults.append(cause(CauseKind.CAST, role, said, (stored.name,), severity=severity))
    elif outcome is Outcome.CHANGED and not faults:
        if offset:
            text = "is stored as 1 + w, engines add the 1 themselves"
            faults.append(cause(CauseKind.OFFSET_NORM, role, text, (stored.name,)))
        else:
            rows = row_sums(changed, math.prod(stored.shape[:-1]))
            found = changed_faults(role, stored.name, sums, rows, stored.shape)
            faults += (one for one in found if one.severity is Severity.ERROR or not touched)
    comparison = TensorComparison(role=role, name=stored.name, outcome=outcome, scheme=None, sums=sums)
    return comparison, faults


def _row_runs(
    original: CheckpointWeights, converted: CheckpointWeights, role: TensorRole
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Both tensors as stored, some rows at a time, with the number of the first."""
    rows = original.stored[role].plain
    if rows is None:
        return
    count = rows.end - rows.begin
    width = math.prod(original.stored[role].shape) // max(count, 1)
    step = max(1, PIECE_BYTES // (4 * max(width, 1)))
    for begin in range(0, count, step):
        end = min(count, begin + step)
        yield begin, original.raw(role, begin, end), converted.raw(role, begin, end)


def _explain(
    original: ScaledView,
    converted: CheckpointWeights,
    suspects: Sequence[TensorRole],
    causes: Iterable[Cause],
) -> Iterator[Cause]:
    """Give suspects a cause each: another matrix's numbers, the fault that is known already, or none that is known."""
    causes = list(causes)
    guilty = [role for role in suspects if not _innocent(original, converted, role)]
    matches = find_matches(original, converted, guilty)
    explained = {one.role for one in causes if one.severity is Severity.ERROR} | matches.keys()
    unexplained = [role for role in guilty if role not in explained]
    yield from name_matches(matches, converted)
    # a matrix that holds another's numbers has no fault of its own beside that
    known = {CauseKind.SCALE_FACTOR, CauseKind.LOST, CauseKind.DAMAGED, CauseKind.CHANGED}
    better = matches.keys() | set(unexplained)
    yield from (one for one in causes if one.role not in better or one.kind not in known)
    for role in unexplained:
        sums = pair_sums((original, role), (converted, role))
        text = f"SQNR {sums.sqnr_db:.1f} dB and cosine {sums.cosine:.4f}, far below what rounding costs"
        rounded = converted.scheme(role) is not None
        severity = Severity.WARNING if rounded and sums.cosine > 0.9 else Severity.ERROR
        yield cause(CauseKind.UNEXPLAINED, role, text, (converted.stored[role].name,), severity=severity)


def _innocent(original: ScaledView, converted: CheckpointWeights, role: TensorRole) -> bool:
    """Whether rounding the original's matrix plainly costs as much."""
    return innocent(original.matrix(role), pair_sums((original, role), (converted, role)), converted.scheme(role))


def _summary(path: str, scheme: str, members: Sequence[TensorComparison]) -> RoleSummary:
    total = sum((one.sums for one in members), ErrorSums())
    worst = min(members, key=lambda one: _badness(one.sums.sqnr_db))
    return RoleSummary(
        path=path,
        scheme=scheme,
        tensors=len(members),
        elements=total.elements,
        identical=sum(one.outcome is Outcome.IDENTICAL for one in members),
        sqnr_db=total.sqnr_db,
        worst_db=worst.sums.sqnr_db,
        worst_name=worst.name,
        cosine=total.cosine,
        max_error=total.max_error,
    )


def _badness(sqnr_db: float) -> float:
    return -math.inf if math.isnan(sqnr_db) else sqnr_db


def _nan_sums(elements: int) -> ErrorSums:
    nan = math.nan
    return ErrorSums(elements=elements, signal=nan, approximated=nan, product=nan, squared_error=nan, max_error=nan)


def _same_sums(w: Tensor) -> ErrorSums:
    flat = w.reshape(-1)
    energy = float(flat.dot(flat)) if flat.numel() else 0.0
    return ErrorSums(elements=flat.numel(), signal=energy, approximated=energy, product=energy)
