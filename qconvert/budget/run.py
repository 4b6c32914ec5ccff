"""A whole decision: what is measured already, what is not, what fits, and what other budgets would buy."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from qconvert.budget.decide import Choices, Decision, Point, Way, both, frontier, uniform, within
from qconvert.budget.losses import Losses, read_losses
from qconvert.budget.measure import measure
from qconvert.budget.parts import Part, parts_of
from qconvert.budget.policy_file import rules_of
from qconvert.budget.sizes import Size, file_bytes, size_of
from qconvert.core.errors import PlanError, UsageError
from qconvert.core.plan import Plan
from qconvert.core.scheme import int4
from qconvert.io.fingerprint import fingerprint
from qconvert.parity.tensors import Progress
from qconvert.plan.builder import build_plan
from qconvert.plan.layout import DEFAULT_SHARD_BYTES
from qconvert.plan.policy import Policy, Rule, default_policy
from qconvert.weights.source import CheckpointWeights

POINTS = 48
"""Budgets whose least cost is told beside the one that was asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """What parts are measured on.

    Attributes:
        batches: int64 [B, T] each.
        record: where they come from, see ``CalibrationWindows``.
    """

    batches: Sequence[Tensor]
    record: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What is wanted.

    Attributes:
        target: bytes of all files with weights, headers included; ``None`` where ``bits`` are given.
        bits: of the tensors that the budget decides, for each of their weights, scales included.
        schemes: names in ``parts.SCHEMES``.
        layers_apart: routed experts of each layer may have a scheme of their own.
        search: scales are searched, in what is measured.
        search_written: and in what is written; not where a method chooses scales for what inputs count.
        rules: of the user; what they decide, the budget does not.
        text_named: the user says which text; measurements on another one are refused.
    """

    losses: Path
    target: int | None = None
    bits: float | None = None
    schemes: tuple[str, ...]
    layers_apart: bool = False
    search: bool = False
    search_written: bool = False
    rules: tuple[Rule, ...] = ()
    text_named: bool = False
    from_quantized: bool = False
    shard_bytes: int = DEFAULT_SHARD_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Budgeted:
    """What came of it.

    Attributes:
        rules: those of the user, then those of the decision.
        own: those of the decision alone.
        plan: what the rules make of the source, rounded to nearest.
        measured: how many sensitivities were measured for it; the others were in the file.
        file_bytes: what the plan's files with weights take.
        beside: bytes of the files that no budget changes.
        weights: numbers in all parts.
        points: what other budgets buy.
        uniform: what every part, or the routed experts alone, in one scheme takes and costs, by a name.
    """

    decision: Decision
    rules: tuple[Rule, ...]
    own: tuple[Rule, ...]
    plan: Plan
    losses: Losses
    measured: int
    file_bytes: int
    beside: int
    weights: int
    points: tuple[Point, ...]
    uniform: tuple[tuple[str, Point], ...]

    def bits(self, size: Size) -> float:
        """Of each weight of all parts together."""
        return 8 * size.tensors / self.weights


def decide(
    source: Path,
    asked: Asked,
    text: Callable[[], Text],
    *,
    accept: Callable[[Plan], None] = lambda plan: None,
    progress: Progress = lambda phase, done, total: None,
    tell: Callable[[str], None] = lambda line: None,
) -> Budgeted:
    """Measure what is not known of the checkpoint ``source``, and choose.

    Args:
        source: folder of the original.
        asked: what is wanted.
        text: makes what parts are measured on; not called where all is known.
        accept: sees the plan in which every part has its fewest bits, before anything is measured, and refuses by
            raising what no decision could mend.
        progress: of measuring.
        tell: is told how long it will take.

    Raises:
        SourceError: no checkpoint that can be read, or a damaged file of sensitivities.
        UsageError: sensitivities of other weights or on another text, or nothing to decide.
        PlanError: the bytes do not suffice; says which do.
        DataError, FormatError, OutputError: see ``measure``.
    """
    with CheckpointWeights.open(source) as weights:
        parts = parts_of(weights, asked.schemes, rules=asked.rules)
        if not any(part.schemes for part in parts):
            raise UsageError(
                "there is nothing that a budget could decide: the rules of the policy decide everything, or no matrix "
                f"can be stored in {', '.join(asked.schemes)}"
            )
        free = Choices(ways=tuple(_ways(weights, part) for part in parts), layers_apart=asked.layers_apart)
        count = sum(math.prod(weights.stored[role].shape) for part in parts for role in part.roles)
        room = _room(free, asked, count, _Written(weights, asked), accept)
        losses, measured = _losses(weights, asked, parts, text, progress, tell)
        choices = replace(free, ways=tuple(tuple(_costing(way, losses) for way in ways) for ways in free.ways))
        decision = room.best_of(choices)
        plan = room.written.plan(decision)
    own = _own(decision, asked)
    return Budgeted(
        decision=decision,
        rules=(*asked.rules, *own),
        own=own,
        losses=losses,
        measured=measured,
        plan=plan,
        file_bytes=file_bytes(plan),
        beside=room.beside,
        weights=count,
        points=frontier(choices, both, POINTS),
        uniform=tuple(_uniform(choices, asked.schemes)),
    )


def _ways(weights: CheckpointWeights, part: Part) -> tuple[Way, ...]:
    """What a part takes, before it is known what it costs."""
    return tuple(
        Way(part=part, scheme=name, size=size_of(weights, part, name), kl=0.0) for name in (None, *part.schemes)
    )


def _costing(way: Way, losses: Losses) -> Way:
    return way if way.scheme is None else replace(way, kl=losses.among_others(way.part, way.scheme))


def policy_of(rules: Sequence[Rule]) -> Policy:
    """``rules`` before the default ones, which keep everything that no budget decides."""
    return default_policy(int4(), rules=tuple(rules))


def _losses(
    weights: CheckpointWeights,
    asked: Asked,
    parts: Sequence[Part],
    text: Callable[[], Text],
    progress: Progress,
    tell: Callable[[str], None],
) -> tuple[Losses, int]:
    """What is known of the parts, and how many of it was measured now."""
    mark = fingerprint(weights.checkpoint)
    known = read_losses(asked.losses, mark, search=asked.search)
    if known is not None and known.complete(parts) and not asked.text_named:
        return known, 0
    found = text()
    if known is None:
        known = Losses(path=asked.losses, fingerprint=mark, text=found.record, search=asked.search)
    elif any(known.text.get(key) != found.record[key] for key in ("ids_sha256", "window")):
        raise UsageError(
            f"{known.path} was measured on {text_said(known.text)}, now it is {text_said(found.record)}: give the same "
            "text and numbers, or name another file with --sensitivities"
        )
    missing = len(known.missing(parts)) + len(known.missing_together(parts))
    measure(weights, found.batches, known, parts, progress=progress, tell=tell)
    return known, missing


def text_said(record: Mapping[str, Any]) -> str:
    """Which text, in words."""
    domains = record.get("domains")
    names = ", ".join(map(str, domains)) if isinstance(domains, Mapping) else "a text"
    return f"{record.get('tokens')} tokens of {names} in windows of {record.get('window')}, seed {record.get('seed')}"


class _Written:
    """What the files of a decision take, from its plan."""

    def __init__(self, weights: CheckpointWeights, asked: Asked) -> None:
        self._weights, self._asked = weights, asked

    def __call__(self, decision: Decision) -> int:
        return file_bytes(self.plan(decision))

    def plan(self, decision: Decision) -> Plan:
        """What the rules of a decision, and those of the user, make of the source."""
        return build_plan(
            self._weights.checkpoint,
            policy_of((*self._asked.rules, *_own(decision, self._asked))),
            shard_bytes=self._asked.shard_bytes,
            from_quantized=self._asked.from_quantized,
        )


def _own(decision: Decision, asked: Asked) -> tuple[Rule, ...]:
    return rules_of(decision, search=asked.search_written, whole=not asked.rules, budget=said(asked))


def said(asked: Asked) -> str:
    """The budget in words."""
    return f"{asked.target:,} bytes" if asked.bits is None else f"{asked.bits:g} bits per weight"


def _tensors(size: Size) -> int:
    return size.tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class _Room:
    """A budget that can be kept.

    Attributes:
        limit: bytes of tensors where bits are asked for, else of all files.
        beside: bytes of files that no decision changes.
        written: what the files of a decision take, from its plan.
    """

    asked: Asked
    limit: int
    beside: int
    written: _Written

    def best_of(self, choices: Choices) -> Decision:
        """The decision that costs least of those that fit; there is one."""
        if self.asked.bits is None:
            others = any(rule.scheme is not None for rule in self.asked.rules)
            return within(choices, self.limit, choices.lightest(both), self.beside, self.written, others=others)
        found = choices.decide(self.limit, _tensors)
        return choices.lightest(_tensors) if found is None else found


def _room(choices: Choices, asked: Asked, count: int, written: _Written, accept: Callable[[Plan], None]) -> _Room:
    """Hold the budget against what the parts take, which is known before anything is measured.

    Raises:
        PlanError: it does not suffice, or for the model as it is.
        UsageError: there is none.
    """
    counted = both if asked.bits is None else _tensors
    least = choices.lightest(counted)
    plan = written.plan(least)
    accept(plan)
    smallest = file_bytes(plan)
    beside = smallest - least.size.both
    if asked.bits is not None:
        limit = math.floor(asked.bits * count / 8)
        if least.size.tensors > limit:
            raise PlanError(
                f"{said(asked)} are impossible: with every part at its fewest bits there are "
                f"{8 * least.size.tensors / count:.5g}, scales included, and the files take {smallest:,} bytes; ask "
                "for as many, or name schemes with fewer"
            )
    elif asked.target is None:
        raise UsageError("no budget: give bytes or bits")
    else:
        limit = asked.target
        if smallest > limit:
            raise PlanError(
                f"{said(asked)} are impossible: with every part at its fewest bits the files take {smallest:,} bytes, "
                f"of which {beside:,} are what no budget changes; ask for as many, or name schemes with fewer bits"
            )
    kept = sum(counted(ways[0].size) for ways in choices.ways)
    if not asked.rules and kept + (beside if asked.bits is None else 0) <= limit:
        raise PlanError(f"{said(asked)} hold the model as it is: there is nothing to round, copy it")
    return _Room(asked=asked, limit=limit, beside=beside, written=written)


def _uniform(choices: Choices, schemes: Sequence[str]) -> list[tuple[str, Point]]:
    found = []
    for experts_only in (False, True):
        for name in schemes:
            one = uniform(choices, name, experts_only=experts_only)
            label = f"routed experts {name}" if experts_only else f"all {name}"
            found.append((label, Point(size=one.size, kl=one.kl, proven=True)))
    return found
