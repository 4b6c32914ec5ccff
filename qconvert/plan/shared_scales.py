"""Which matrices have one second scale together: those that engines stack into one product."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace

from qconvert.core.plan import Quantize, Reading, Step
from qconvert.core.role import STACKED_KINDS, Kind, Section

_FIRST = {kind: kinds[0] for kinds in STACKED_KINDS for kind in kinds}

_Stack = tuple[Section, Kind, int | None, int | None]


def share_second_scales(steps: Iterable[Step]) -> Iterator[Step]:
    """The same steps; those that round to a scheme with a second scale know over which matrices it is taken.

    vLLM keeps one second scale for a stack and takes the largest of its parts for all (vLLM 0.32).
    """
    steps = list(steps)
    stacks: dict[_Stack, list[Reading]] = defaultdict(list)
    for step in steps:
        if _has_second(step):
            stacks[_stack(step)].append(step.reading)
    together = {stack: tuple(readings) for stack, readings in stacks.items()}
    for step in steps:
        if _has_second(step) and isinstance(step.action, Quantize):
            step = replace(step, action=replace(step.action, scale_over=together[_stack(step)]))
        yield step


def _has_second(step: Step) -> bool:
    return isinstance(step.action, Quantize) and step.action.scheme.shares_second_scale


def _stack(step: Step) -> _Stack:
    role = step.role
    return role.section, _FIRST.get(role.kind, role.kind), role.layer, role.expert
