"""Tensors that only one of two checkpoints has, and those that contradict themselves."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence

from qconvert.core.role import Kind, Section, TensorRole
from qconvert.parity.causes import Cause, CauseKind, cause, place_of_expert
from qconvert.weights.source import CheckpointWeights

NAMED = 8
"""Tensor names that one line of evidence lists."""


def absent(original: CheckpointWeights, converted: CheckpointWeights, without: Collection[Section]) -> Iterator[Cause]:
    """Tensors that only one of the two has, and those that contradict themselves."""
    told = set()
    for problem in converted.problems:
        if problem.role is not None:
            told.add(problem.role)
            yield cause(CauseKind.CONTRADICTION, problem.role, problem.message, (problem.name,))
        else:
            yield cause(CauseKind.EXTRA, None, problem.message, (problem.name,), where=problem.name)
    one_matrix = tied(original)
    for kind, ours, theirs in (
        (CauseKind.MISSING, original, converted),
        (CauseKind.EXTRA, converted, original),
    ):
        only = [role for role in ours.stored if role not in theirs.stored and role not in told]
        only = [role for role in only if not (one_matrix and role.kind is Kind.HEAD)]
        for section in Section:
            mine = [role for role in only if role.section is section and section not in without]
            if mine and all(role in set(mine) for role in ours.stored if role.section is section):
                yield _whole_section(kind, ours, section, mine)
                continue
            for where, members in _by_place(mine).items():
                names = tuple(ours.stored[role].name for role in members)
                listed = ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
                verb = "missing in the converted checkpoint" if kind is CauseKind.MISSING else "not in the original"
                yield cause(kind, members[0], f"{verb}: {listed}", names, where=where or None)


def tied(source: CheckpointWeights) -> bool:
    """Whether a checkpoint has no output matrix of its own."""
    return source.config.text.tie_word_embeddings


def _whole_section(
    kind: CauseKind, source: CheckpointWeights, section: Section, members: Sequence[TensorRole]
) -> Cause:
    what = {Section.TEXT: "decoder", Section.MTP: "MTP head", Section.VISION: "vision tower"}[section]
    verb = "was dropped" if kind is CauseKind.MISSING else "is not in the original"
    names = tuple(source.stored[role].name for role in members)
    return cause(kind, members[0], f"the {what} {verb}: all {len(members)} tensors", names, where=section.value)


def _by_place(roles: Iterable[TensorRole]) -> dict[str, list[TensorRole]]:
    places: dict[str, list[TensorRole]] = {}
    for role in roles:
        places.setdefault(place_of_expert(role), []).append(role)
    return places
