"""A decision as the rules of an ordinary policy, and as a file of them."""

from __future__ import annotations

from collections.abc import Sequence

import tomlkit

from qconvert.budget.decide import Decision, Way
from qconvert.budget.parts import EXPERTS, SCHEMES, matches_of
from qconvert.plan.policy import Policy, Rule


def rules_of(decision: Decision, *, search: bool, whole: bool, budget: str) -> tuple[Rule, ...]:
    """Rules that decide every part as ``decision`` does.

    Args:
        decision: the scheme of each part.
        search: choose scales by mean squared error.
        whole: its parts are all that there are of their groups: a rule for all of them names no layers.
        budget: what reasons call it.
    """
    engine = "vllm" if needs_layers_apart(decision.ways) else None
    groups: dict[str, dict[str | None, list[int]]] = {}
    for way in decision.ways:
        groups.setdefault(way.part.group, {}).setdefault(way.scheme, []).append(way.part.layer)
    return tuple(
        Rule(
            match=match,
            scheme=None if scheme is None else SCHEMES[scheme],
            reason=f"least predicted KL within {budget}",
            layers=None if whole and len(found) == 1 else frozenset(layers),
            search=search and scheme is not None,
            engine=engine if scheme is not None and group == EXPERTS else None,
        )
        for group, found in groups.items()
        for scheme, layers in found.items()
        for match in matches_of(group)
    )


def needs_layers_apart(ways: Sequence[Way]) -> bool:
    """Whether the routed experts of the layers are stored in several ways, which vLLM alone reads."""
    experts = [way for way in ways if way.part.experts]
    rounded = {way.scheme for way in experts if way.scheme is not None}
    alone = any(way.scheme is None and not way.part.stacked for way in experts)
    return len(rounded) > 1 or bool(rounded and alone)


def policy_text(rules: Sequence[Rule], said: Sequence[str]) -> str:
    """A policy file; ``said`` stands before the rules, a line each."""
    head = "".join(f"# {line}\n" for line in said)
    return f"{head}\n{tomlkit.dumps({'rule': Policy(rules=tuple(rules)).entries()})}"
