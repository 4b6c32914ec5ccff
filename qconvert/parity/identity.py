"""Whose numbers a matrix holds when they are not its own: swaps, neighbours, transposes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qconvert.core.role import EXPERT_KINDS, Kind, TensorRole
from qconvert.numerics.error import error_sums
from qconvert.parity.causes import Cause, CauseKind, cause, matrix_name, place, place_of_expert
from qconvert.parity.pairs import Matrices, pair_sums
from qconvert.weights.source import CheckpointWeights

FINGERPRINT_ROWS = 16
"""Leading rows that are compared first: 16 rows of 128 inputs give unrelated matrices a cosine of 0.02."""

CANDIDATE = 0.3
"""Cosine of fingerprints from which the whole matrices are compared; 4-bit rounding keeps 0.98 and more."""

PROVED = 0.8
"""Cosine of whole matrices that names a match, when the matrix's own is below half of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """A converted matrix holds the original's ``other``: the cosine with it, and with its own."""

    other: TensorRole
    cosine: float
    own: float


def find_matches(original: Matrices, converted: Matrices, suspects: Sequence[TensorRole]) -> Mapping[TensorRole, Match]:
    """Which original matrix each suspect really holds, where that can be proved.

    Routed experts are looked for inside their layer, other matrices among all of the same shape; the suspect's own
    role stands for its transpose.
    """
    found: dict[TensorRole, Match] = {}
    for block in _blocks(original, suspects):
        prints: Tensor | None = None
        for suspect in block.suspects:
            shape, own = original.stored[suspect].shape, pair_sums((original, suspect), (converted, suspect)).cosine
            if len(shape) != 2 or own > PROVED / 2:
                continue
            if shape[0] == shape[1]:
                turned = error_sums(original.matrix(suspect).T, converted.matrix(suspect)).cosine
                if turned >= PROVED:
                    found[suspect] = Match(other=suspect, cosine=turned, own=own)
                    continue
            if prints is None:
                prints = torch.stack([_fingerprint(original, role) for role in block.candidates])
            likeness = prints @ _fingerprint(converted, suspect)
            best = int(likeness.argmax())
            other = block.candidates[best]
            if other == suspect or float(likeness[best]) < CANDIDATE:
                continue
            proof = pair_sums((original, other), (converted, suspect)).cosine
            if proof >= PROVED:
                found[suspect] = Match(other=other, cosine=proof, own=own)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Block:
    suspects: tuple[TensorRole, ...]
    candidates: tuple[TensorRole, ...]


def _blocks(original: Matrices, suspects: Sequence[TensorRole]) -> Iterator[_Block]:
    """Suspects with the roles that they could be mistaken for, so that fingerprints are made once for many."""
    groups: dict[tuple[object, ...], list[TensorRole]] = {}
    for role in suspects:
        groups.setdefault(_group(original, role), []).append(role)
    for key, members in groups.items():
        candidates = tuple(role for role in original.stored if _group(original, role) == key)
        yield _Block(suspects=tuple(members), candidates=candidates)


def _group(original: Matrices, role: TensorRole) -> tuple[object, ...]:
    shape = original.stored[role].shape
    if role.kind in EXPERT_KINDS:
        return role.section, role.layer, shape
    return None, None, shape


def _fingerprint(source: Matrices, role: TensorRole) -> Tensor:
    """The leading rows as one vector of length 1."""
    block = source.row_block(role)
    end = min(-(-FINGERPRINT_ROWS // block) * block, source.stored[role].shape[0])
    flat = source.matrix(role, 0, end)[:FINGERPRINT_ROWS].reshape(-1)
    return flat / flat.square().sum().sqrt().clamp(min=1e-30)


def name_matches(matches: Mapping[TensorRole, Match], converted: CheckpointWeights) -> Iterator[Cause]:
    """One cause for an expert whose gate and up are swapped or that is another expert, else one for each matrix."""
    left = dict(matches)

    def names(*roles: TensorRole) -> tuple[str, ...]:
        return tuple(converted.stored[role].name for role in roles)

    for role in matches:
        if role.kind is not Kind.EXPERT_GATE and role.kind is not Kind.SHARED_GATE:
            continue
        up = replace(role, kind=Kind.EXPERT_UP if role.kind is Kind.EXPERT_GATE else Kind.SHARED_UP)
        if up in left and left[role].other == up and left[up].other == role:
            first, second = left.pop(role), left.pop(up)
            yield cause(
                CauseKind.SWAPPED,
                role,
                f"cosine {min(first.cosine, second.cosine):.4f} with gate and up swapped, "
                f"{max(first.own, second.own, key=abs):.4f} as stored",
                names(role, up),
                where=place_of_expert(role) + ("" if role.kind is Kind.EXPERT_GATE else " shared expert"),
            )
    for role in matches:
        if role.expert is None or role not in left:
            continue
        other = left[role].other.expert
        same = [
            one
            for kind in (Kind.EXPERT_GATE, Kind.EXPERT_UP, Kind.EXPERT_DOWN)
            if (one := replace(role, kind=kind)) in left and left[one].other == replace(one, expert=other)
        ]
        if other == role.expert or not same:
            continue
        taken = [left.pop(one) for one in same]
        what = "" if len(same) == 3 else f" {' and '.join(matrix_name(one) for one in same)}"
        yield cause(
            CauseKind.REPLACED,
            same[0],
            f"holds the{what} weights of expert {other}: cosine {min(m.cosine for m in taken):.4f} with it, "
            f"{max((m.own for m in taken), key=abs):.4f} with its own",
            names(*same),
            where=place_of_expert(role),
        )
    for role, match in left.items():
        if match.other == role:
            text = f"cosine {match.cosine:.4f} when transposed, {match.own:.4f} as stored"
            yield cause(CauseKind.TRANSPOSED, role, text, names(role))
        else:
            text = f"holds {place(match.other)}: cosine {match.cosine:.4f} with it, {match.own:.4f} with its own"
            yield cause(CauseKind.MISPLACED, role, text, names(role))
