"""All rules, and a checkpoint held to them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qconvert.arch.families import read_config
from qconvert.core.errors import OutputError
from qconvert.engine_check.completeness import COMPLETENESS_RULES, stored_problems
from qconvert.engine_check.limit_rules import LIMIT_RULES
from qconvert.engine_check.list_rules import LIST_RULES
from qconvert.engine_check.rule import Effect, Engine, Rule, Violation, violations
from qconvert.engine_check.scheme_rules import SCHEME_RULES
from qconvert.engine_check.size_rules import SIZE_RULES
from qconvert.engine_check.view import build_view
from qconvert.io.checkpoint import Checkpoint

RULES: tuple[Rule, ...] = (*COMPLETENESS_RULES, *LIST_RULES, *SCHEME_RULES, *SIZE_RULES, *LIMIT_RULES)
"""Every rule, those about the whole checkpoint first."""

_SHOWN = 5
_OWN = (Engine.VLLM, Engine.TRANSFORMERS)
"""What is written is held to engines that the tests run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineCheck:
    """A checkpoint held to the rules of engines."""

    out: Path
    engines: tuple[Engine, ...]
    tp: int
    rules: int
    found: tuple[Violation, ...]

    @property
    def faults(self) -> tuple[Violation, ...]:
        """Violations with which an engine does not load the checkpoint, or loads it wrongly."""
        return tuple(one for one in self.found if one.rule.effect is not Effect.NOTE)

    def to_json(self) -> dict[str, Any]:
        """Everything, for machines."""
        return {
            "out": str(self.out),
            "engines": [str(engine) for engine in self.engines],
            "tp": self.tp,
            "rules": self.rules,
            "faults": len(self.faults),
            "violations": [_as_json(one) for one in self.found],
        }


def _as_json(one: Violation) -> Mapping[str, Any]:
    rule = one.rule
    return {
        "rule": rule.id,
        "engine": str(rule.engine),
        "effect": rule.effect.value,
        "proof": rule.proof.value,
        "source": rule.source,
        "demands": rule.demands,
        "happens": rule.happens,
        "remedy": rule.remedy,
        "detail": one.detail,
        "modules": list(one.modules),
    }


def check_checkpoint(path: Path, engines: Collection[Engine] = tuple(Engine), *, tp: int = 1) -> EngineCheck:
    """Hold the folder ``path`` to every rule of ``engines``, for ``tp`` ranks; reads headers and ``config.json`` only.

    Raises:
        SourceError: no checkpoint, another architecture, or a configuration that cannot be read.
    """
    with Checkpoint.open(path) as checkpoint:
        config = read_config(checkpoint.config, checkpoint.path)
        problems = tuple(stored_problems(checkpoint))
        view = replace(build_view(config, checkpoint.config, checkpoint.tensors, tp=tp), problems=problems)
    chosen = [rule for rule in RULES if rule.engine in engines]
    found = tuple(one for rule in chosen for one in violations(rule, view))
    return EngineCheck(
        out=path, engines=tuple(one for one in Engine if one in engines), tp=tp, rules=len(chosen), found=found
    )


def refuse_unreadable(folder: Path) -> None:
    """Refuse an output of ours that vLLM or transformers would not read as it is meant; announced limits are none.

    That nothing is missing is the writer's to hold, and costs more time than all else.

    Raises:
        OutputError: what breaks a rule, with the rule; or the folder cannot be read back.
    """
    with Checkpoint.open(folder) as checkpoint:
        view = build_view(read_config(checkpoint.config, folder), checkpoint.config, checkpoint.tensors)
    chosen = [rule for rule in RULES if rule.engine in _OWN and not rule.announced]
    found = [one for rule in chosen for one in violations(rule, view)]
    if found:
        listed = "\n".join(describe(one) for one in found)
        raise OutputError(f"what was written would not be read as it is meant; nothing has appeared:\n{listed}")


def describe(one: Violation) -> str:
    """A violation in a line for people."""
    rule = one.rule
    shown = ", ".join(one.modules[:_SHOWN])
    more = f" and {len(one.modules) - _SHOWN:,} more" if len(one.modules) > _SHOWN else ""
    return (
        f"{rule.engine}, {rule.id} ({rule.proof.value}): {shown}{more}: {one.detail}; it {rule.happens}: {rule.remedy}"
    )
