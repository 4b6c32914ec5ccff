"""The halves of ``q_proj``: two roles that a policy decides apart, and one stored matrix, which has one scheme.

The wider decision holds for both: what a policy says of the output gate is not undone by what it says of the query.
"""

from __future__ import annotations

from dataclasses import replace
from math import inf

from qconvert.core.errors import PlanError
from qconvert.core.role import Part, TensorRole
from qconvert.core.scheme import Codebook, Float, Scheme
from qconvert.plan.policy import Policy, Rule


def decide(policy: Policy, role: TensorRole, name: str) -> tuple[Rule, tuple[Rule, ...]]:
    """What is done with the tensor ``name`` of ``role``, and the rules that say so: of a ``q_proj``, one of each half.

    Raises:
        PlanError: no rule decides, a rule that does not name the output gate rounds it to a four-bit float, or the
            halves have two schemes of one width.
    """
    if not role.halves:
        rule = policy.decide(role)
        return rule, (rule,)
    query, gate = (policy.decide(half) for half in role.halves)
    _check_gate(gate, role, name)
    return _wider(query, gate, name), (query, gate)


def _check_gate(rule: Rule, role: TensorRole, name: str) -> None:
    """Reports tell of two to six times the perplexity from four-bit floats in the gate half, of none from the query."""
    if rule.scheme is None or not _is_small_float(rule.scheme) or not rule.matches(role):
        return
    gate = next(half for half in role.halves if half.part is Part.OUTPUT_GATE)
    raise PlanError(
        f"the policy's rule {rule.match!r} rounds {name} to {rule.scheme}, and half of its rows are the output gate, "
        "which four-bit floats ruin: put a rule before it that keeps text.attention.[qkv]*, which engines stack, or "
        f"gives them 8 bits, or one with match = {gate.path!r} if you mean it"
    )


def _is_small_float(scheme: Scheme) -> bool:
    return scheme.grid == Float(kind="e2m1") or isinstance(scheme.grid, Codebook)


def _wider(query: Rule, gate: Rule, name: str) -> Rule:
    if _stored(query) == _stored(gate):
        return query
    if _width(query) == _width(gate):
        raise PlanError(
            f"the policy gives the halves of {name} two schemes of one width, {query.scheme} by its rule "
            f"{query.match!r} and {gate.scheme} by {gate.match!r}, and one stored matrix has one: give both the same"
        )
    wider, half = (query, Part.QUERY) if _width(query) > _width(gate) else (gate, Part.OUTPUT_GATE)
    return replace(wider, reason=f"{wider.reason}; said of its {half.value}, and one stored matrix has one scheme")


def _stored(rule: Rule) -> tuple[Scheme | None, str | None, bool]:
    return rule.scheme, rule.method, rule.search


def _width(rule: Rule) -> float:
    return inf if rule.scheme is None else rule.scheme.weight_bits
