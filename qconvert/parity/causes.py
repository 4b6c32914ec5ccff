"""Named faults with their evidence, worst first."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from qconvert.core.role import Kind, Part, Section, TensorRole

ONE_BY_ONE = 3
"""Faults of one kind in one layer that are listed one by one; more become one line."""


class Severity(enum.Enum):
    """Whether a cause alone fails a report."""

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"


class CauseKind(enum.Enum):
    """What went wrong; in the order in which a report lists them."""

    CONFIG = "config"
    MISSING = "missing"
    CONTRADICTION = "contradiction"
    SHAPE = "shape"
    NOT_FINITE = "not_finite"
    BAD_SCALE = "bad_scale"
    SWAPPED = "gate_up_swapped"
    REPLACED = "expert_replaced"
    MISPLACED = "misplaced"
    TRANSPOSED = "transposed"
    SCALE_FACTOR = "scale_factor"
    LOST = "lost_block"
    DAMAGED = "damaged_block"
    OFFSET_NORM = "offset_norm"
    STATE = "state_not_carried"
    PADDING = "padding_not_masked"
    PART = "part_computed_otherwise"
    EXECUTION = "unexplained_execution"
    UNEXPLAINED = "unexplained_error"
    SERVING = "serving_file"
    CHANGED = "changed"
    CAST = "cast"
    EXTRA = "extra"


_SEVERITIES = dict.fromkeys(CauseKind, Severity.ERROR) | {
    CauseKind.CHANGED: Severity.WARNING,
    CauseKind.CAST: Severity.NOTE,
    CauseKind.EXTRA: Severity.WARNING,
}
_ORDER = {kind: i for i, kind in enumerate(CauseKind)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """One fault.

    Attributes:
        kind: what it is.
        severity: an error fails the report.
        role: where it is; of several, the first; ``None`` for what is no tensor.
        where: the same in words.
        evidence: the numbers that prove it.
        tensors: names in the converted checkpoint, or in the original where nothing is there.
    """

    kind: CauseKind
    severity: Severity
    role: TensorRole | None
    where: str
    evidence: str
    tensors: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.where}: {self.evidence}"


def cause(
    kind: CauseKind,
    role: TensorRole | None,
    evidence: str,
    tensors: Iterable[str] = (),
    *,
    where: str | None = None,
    severity: Severity | None = None,
) -> Cause:
    """A cause with the severity of its kind, at the place of ``role``."""
    return Cause(
        kind=kind,
        severity=severity or _SEVERITIES[kind],
        role=role,
        where=where or ("" if role is None else place(role)),
        evidence=evidence,
        tensors=tuple(tensors),
    )


def place(role: TensorRole) -> str:
    """Where a tensor is, for example ``layer 2 expert 7 up`` or ``mtp fc``."""
    return " ".join(part for part in (place_of_expert(role), matrix_name(role)) if part)


def place_of_expert(role: TensorRole) -> str:
    """The layer and expert of a role, for example ``layer 2 expert 7``; empty for a tensor of the whole decoder."""
    said = [] if role.section is Section.TEXT else [role.section.value]
    said += [] if role.layer is None else [f"layer {role.layer}"]
    said += [] if role.expert is None else [f"expert {role.expert}"]
    return " ".join(said)


def matrix_name(role: TensorRole) -> str:
    """The tensor inside its layer or expert, for example ``up`` or ``attention.query``."""
    name = role.kind.value.removeprefix("expert.") if role.expert is not None else role.kind.value
    return name if role.part is Part.WEIGHT else f"{name}.{role.part.value}"


def ranked(causes: Iterable[Cause]) -> tuple[Cause, ...]:
    """Errors first, then by kind, layer and expert; many of one kind in one layer as one."""
    ordered = sorted(causes, key=_rank)
    out: list[Cause] = []
    for _, group in groupby(ordered, key=lambda c: (c.severity, c.kind, _rank(c)[2:4])):
        members = list(group)
        role = members[0].role
        several = role is not None and len(members) > ONE_BY_ONE
        out.extend([_together(members, role)] if several and role is not None else members)
    return tuple(out)


def _together(members: Sequence[Cause], role: TensorRole) -> Cause:
    first = members[0]
    where = place_of_expert(replace(role, expert=None)) or "outside the layers"
    return replace(
        first,
        where=where,
        evidence=f"{len(members)} times {first.kind.value.replace('_', ' ')}, for example {first}",
        tensors=tuple(name for member in members for name in member.tensors),
    )


_SEVERITY_ORDER = {severity: i for i, severity in enumerate(Severity)}
_SECTION_ORDER = {section: i for i, section in enumerate(Section)}
_KIND_ORDER = {kind: i for i, kind in enumerate(Kind)}


def _rank(one: Cause) -> tuple[int, ...]:
    role = one.role
    if role is None:
        return _SEVERITY_ORDER[one.severity], _ORDER[one.kind]
    return (
        _SEVERITY_ORDER[one.severity],
        _ORDER[one.kind],
        _SECTION_ORDER[role.section],
        -1 if role.layer is None else role.layer,
        -1 if role.expert is None else role.expert,
        _KIND_ORDER[role.kind],
    )
