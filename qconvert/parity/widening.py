"""A policy that spends more bytes on the parts of a converted model that cost most, and repeats it otherwise.

What engines demand holds: stacked matrices alike, one scheme for all routed experts, one for a whole checkpoint where
the loader knows only one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import tomlkit

from qconvert.arch.names import module_of, name_of
from qconvert.core.errors import FormatError, PlanError, UsageError
from qconvert.core.role import EXPERT_KINDS, STACKED_KINDS, Section, TensorRole
from qconvert.core.scheme import INT8, Group, Int, Scheme, int4
from qconvert.formats.engine_rules import ModuleDecision, verify
from qconvert.formats.table import format_for, scheme_for, stored_bytes
from qconvert.parity.attribution import KNEE, Attribution, Worth, above_knee
from qconvert.parity.role_groups import RoleGroup, wholes
from qconvert.plan.policy import Policy, Rule
from qconvert.weights.source import CheckpointWeights


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """How a matrix is stored: ``scheme`` and the loader that reads it, or neither where it stays as it is."""

    scheme: Scheme | None = None
    method: str | None = None


KEEP = Decision()

_AS_BEFORE = "as in the converted checkpoint"

Decisions = Mapping[TensorRole, Decision]


@dataclass(frozen=True, slots=True, kw_only=True)
class Widened:
    """A policy file, empty where none can be written, and what it does or why there is none."""

    text: str
    advice: str


def widened(
    found: Attribution, groups: Sequence[RoleGroup], original: CheckpointWeights, converted: CheckpointWeights
) -> Widened:
    """The policy of ``converted`` with the groups above the knee, or the layers of them that matter, in a wider scheme.

    Integers of four bits in large groups get groups of 32, everything else of four bits becomes int8, and of eight
    bits stays as it was, routed experts excepted: those would be the original again.
    """
    if converted.config.text.folded_experts or original.config.text.folded_experts:
        return Widened(text="", advice="No policy: the shared expert is folded into the routed ones.")
    now: dict[TensorRole, Decision] = {role: _decision(converted, role) for role in _matrices(converted)}
    named = {group.name: group for group in groups}
    reasons: dict[TensorRole, str] = {}
    said = []
    for worth in (one for one in found.groups if one.group in above_knee(found.groups)):
        layers = _layers_that_matter(found, worth.group)
        roles = frozenset(role for role in wholes(named[worth.group].roles) if layers is None or role.layer in layers)
        roles = _with_stacks(roles, now)
        if roles & reasons.keys():
            continue  # stored like a group that was worth more, and widened with it
        step = _first_that_engines_take(roles, now, converted)
        if step is None:
            said.append(f"{worth.group}: nothing wider that engines take")
            continue
        before = sum(_stored_bytes(role, now, original, converted) for role in roles)
        now |= step
        after = sum(_stored_bytes(role, now, original, converted) for role in roles)
        what = ", ".join(sorted({str(one.scheme or "kept") for one in step.values()}))
        said.append(f"{_named(roles)} to {what} for {(after - before) / 1e6:+.2f} MB")
        reason = f"{worth.group}: {worth.worth:.3g} of {found.kl:.3g} nats of KL come from it"
        reasons |= dict.fromkeys(step, reason)
    if not reasons:
        return Widened(text="", advice=f"No policy: {'; '.join(said) or 'no group is surely worth anything'}.")
    try:
        entries = Policy(rules=tuple(_rules(now, reasons))).entries()
        Policy.of_entries(entries, "the policy")
    except (FormatError, UsageError) as error:
        return Widened(text="", advice=f"No policy: {error}.")
    head = "".join(f"# {line}\n" for line in ("What the converted checkpoint is, but for:", *said))
    return Widened(text=f"{head}\n{tomlkit.dumps({'rule': entries})}", advice=f"The policy puts {'; '.join(said)}.")


def _named(roles: Iterable[TensorRole]) -> str:
    names = {role.path.rpartition(".")[0] if role.kind in EXPERT_KINDS else role.path for role in roles}
    layers = sorted({role.layer for role in roles if role.layer is not None})
    return f"{', '.join(sorted(names))} of {len(layers)} layers" if layers else ", ".join(sorted(names))


def _matrices(source: CheckpointWeights) -> Iterator[TensorRole]:
    for role, stored in source.stored.items():
        if role.section is not Section.VISION and len(stored.shape) == 2 and role.kind.value != "embedding":
            yield role


def _decision(source: CheckpointWeights, role: TensorRole) -> Decision:
    stored = source.stored[role]
    if stored.format is None or stored.scheme is None:
        return KEEP
    return Decision(scheme=stored.scheme, method=stored.format.quant_method)


def _layers_that_matter(found: Attribution, group: str) -> frozenset[int] | None:
    """The fewest layers that are worth ``KNEE`` of what all are; ``None`` for all, and where some were left out."""
    known = [one for one in found.layers if one.group == group and one.layer is not None]
    if not known or any(name == group for name, _ in found.left_out):
        return None
    chosen: list[Worth] = []
    total = sum(max(0.0, one.worth) for one in known)
    for one in sorted(known, key=lambda one: -one.worth):
        if sum(max(0.0, other.worth) for other in chosen) >= KNEE * total:
            break
        chosen.append(one)
    return None if len(chosen) == len(known) else frozenset(one.layer for one in chosen if one.layer is not None)


def _with_stacks(roles: frozenset[TensorRole], now: Decisions) -> frozenset[TensorRole]:
    """``roles`` that are quantized, with what must be stored like them."""
    quantized = {role for role in roles if now.get(role, KEEP).scheme is not None}
    if any(role.kind in EXPERT_KINDS for role in quantized):
        quantized |= {role for role in now if role.section is Section.TEXT and role.kind in EXPERT_KINDS}
    for kinds in STACKED_KINDS:
        places = {(role.section, role.layer, role.expert) for role in quantized if role.kind in kinds}
        quantized |= {role for role in now if role.kind in kinds and (role.section, role.layer, role.expert) in places}
    return frozenset(quantized)


def _first_that_engines_take(
    roles: frozenset[TensorRole], now: Decisions, source: CheckpointWeights
) -> dict[TensorRole, Decision] | None:
    experts = any(role.kind in EXPERT_KINDS for role in roles)
    schemes = {now[role].scheme for role in roles}
    methods = {now[role].method for role in roles if now[role].method is not None}
    if not roles or len(methods) != 1:
        return None
    method = methods.pop()
    candidates = [*_wider(schemes)] + ([] if experts else [None])
    for scheme in candidates:
        try:
            choice = KEEP if scheme is None else Decision(scheme=scheme_for(scheme, method), method=method)
            step = dict.fromkeys(roles, choice)
            verify(tuple(_module_decisions(dict(now) | step, source)))
        except (FormatError, PlanError):
            continue
        return step
    return None


def _wider(schemes: Iterable[Scheme | None]) -> Iterator[Scheme]:
    """What is tried in turn in place of ``schemes``, which are of one stack."""
    known = [scheme for scheme in schemes if scheme is not None]
    if any(scheme.weight_bits > 4 for scheme in known):
        return
    if all(scheme.grid == Int(bits=4) and _large_groups(scheme) for scheme in known):
        yield int4(32, symmetric=all(scheme.symmetric for scheme in known))
    yield INT8


def _large_groups(scheme: Scheme) -> bool:
    return not isinstance(scheme.blocking, Group) or scheme.blocking.size > 32


def _module_decisions(decisions: Decisions, source: CheckpointWeights) -> Iterator[ModuleDecision]:
    for role, one in decisions.items():
        rows, cols = source.stored[role].shape
        yield ModuleDecision(
            name=module_of(name_of(role, source.view.naming)),
            shape=(rows, cols),
            scheme=one.scheme,
            format=None if one.scheme is None else format_for(one.scheme, one.method).name,
        )


def _stored_bytes(
    role: TensorRole, decisions: Decisions, original: CheckpointWeights, converted: CheckpointWeights
) -> int:
    one = decisions[role]
    if one == _decision(converted, role):
        return converted.stored_bytes(role)
    if one.scheme is None:
        return original.stored_bytes(role)
    rows, cols = converted.stored[role].shape
    return stored_bytes(one.scheme, (rows, cols), one.method)


def _rules(decisions: Decisions, reasons: Mapping[TensorRole, str]) -> Iterator[Rule]:
    """A rule for each kind of matrix that is quantized anywhere, for some layers where not all are alike."""
    by_match: dict[str, dict[tuple[Decision, str], set[int | None]]] = {}
    for role, one in decisions.items():
        reason = reasons.get(role, _AS_BEFORE)
        for match in _matches(role):
            by_match.setdefault(match, {}).setdefault((one, reason), set()).add(role.layer)
    for match, found in by_match.items():
        if found.keys() == {(KEEP, _AS_BEFORE)} and not match.startswith("text.expert."):
            continue  # as the default rules have it
        for (one, reason), layers in found.items():
            usual = one.scheme is None or format_for(one.scheme).quant_method == one.method
            yield Rule(
                match=match,
                scheme=one.scheme,
                method=None if usual else one.method,
                reason=reason,
                layers=None if len(found) == 1 else frozenset(layer for layer in layers if layer is not None),
            )


def _matches(role: TensorRole) -> tuple[str, ...]:
    """Patterns of a policy for the matrix; of a ``q_proj`` its halves, for four-bit floats must name the gate."""
    if role.kind in EXPERT_KINDS:
        return (f"{role.section.value}.expert.*",)
    return tuple(one.path for one in role.halves or (role,))
