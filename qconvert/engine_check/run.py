"""All rules, and a checkpoint held to them."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qconvert.arch.families import read_config
from qconvert.core.errors import OutputError, PlanError
from qconvert.core.plan import Plan
from qconvert.core.tensor_info import TensorInfo
from qconvert.engine_check.completeness import COMPLETENESS_RULES, stored_problems
from qconvert.engine_check.fold_rules import FOLD_RULES
from qconvert.engine_check.limit_rules import LIMIT_RULES
from qconvert.engine_check.list_rules import LIST_RULES
from qconvert.engine_check.rule import Effect, Engine, Rule, Violation, violations
from qconvert.engine_check.scheme_rules import SCHEME_RULES
from qconvert.engine_check.size_rules import SIZE_RULES
from qconvert.engine_check.view import build_view
from qconvert.formats.engine_rules import FOR_ENGINE
from qconvert.io.checkpoint import Checkpoint
from qconvert.io.shard_file import open_shard
from qconvert.io.source_folder import CONFIG_FILE, WEIGHTS_SUFFIX, read_whole
from qconvert.io.strict_json import parse_object
from reference_model.config_fold import note_of

RULES: tuple[Rule, ...] = (*COMPLETENESS_RULES, *FOLD_RULES, *LIST_RULES, *SCHEME_RULES, *SIZE_RULES, *LIMIT_RULES)
"""Every rule, those about the whole checkpoint first."""

_SHOWN = 10
_NUMBER = re.compile(r"\.\d+(?=\.)")
_OWN = (Engine.VLLM, Engine.TRANSFORMERS)
"""What is written is held to engines that the tests run, or to the one that alone it is for."""


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
        """Violations with which an engine does not load the checkpoint or its draft head, or loads it wrongly."""
        return tuple(one for one in self.found if one.effect is not Effect.NOTE)

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
        "effect": one.effect.value,
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
        view = replace(build_view(config, checkpoint.config, checkpoint.tensors.values(), tp=tp), problems=problems)
    chosen = [rule for rule in RULES if rule.engine in engines]
    found = tuple(one for rule in chosen for one in violations(rule, view))
    return EngineCheck(
        out=path, engines=tuple(one for one in Engine if one in engines), tp=tp, rules=len(chosen), found=found
    )


def refuse_unreadable_plan(plan: Plan, source: Path) -> None:
    """Refuse what vLLM or transformers would not read as it is meant, before a byte is written.

    Announced limits are no reason, and that nothing is missing is the plan's to hold.

    Raises:
        PlanError: what breaks a rule, with the rule.
    """
    listed = _unreadable(plan.config, plan.layout.tensors, source)
    if listed:
        raise PlanError(f"what is asked for would not be read as it is meant:\n{listed}")


def refuse_unreadable(folder: Path) -> None:
    """The same of what was written, from disk.

    Headers are read one after the other: together they take memory that grows with the checkpoint.

    Raises:
        OutputError: what breaks a rule, with the rule.
        SourceError: the folder cannot be read back.
    """
    raw = parse_object(read_whole(folder / CONFIG_FILE), str(folder / CONFIG_FILE))
    listed = _unreadable(raw, _headers(folder), folder)
    if listed:
        raise OutputError(f"what was written would not be read as it is meant; nothing has appeared:\n{listed}")


def _unreadable(raw: Mapping[str, Any], tensors: Iterable[TensorInfo], where: Path) -> str:
    view = build_view(read_config(raw, where), raw, tensors)
    named = note_of(raw).get(FOR_ENGINE)
    engines = [engine for engine in _OWN if engine.value == named] or _OWN
    chosen = [rule for rule in RULES if rule.engine in engines and not rule.announced]
    return "\n".join(describe(one) for rule in chosen for one in violations(rule, view))


def _headers(folder: Path) -> Iterator[TensorInfo]:
    for path in sorted(folder.glob(f"*{WEIGHTS_SUFFIX}")):
        file = open_shard(path)
        os.close(file.fd)
        yield from file.header.tensors


def describe(one: Violation) -> str:
    """A violation in a line for people; modules that differ in numbers only are one kind."""
    rule = one.rule
    kinds: dict[str, list[str]] = {}
    for module in one.modules:
        kinds.setdefault(_NUMBER.sub(".*", module), []).append(module)
    shown = [names[0] if len(names) == 1 else f"{kind} ({len(names):,})" for kind, names in kinds.items()]
    more = f" and {len(shown) - _SHOWN:,} more kinds" if len(shown) > _SHOWN else ""
    return (
        f"{rule.engine}, {rule.id} ({rule.proof.value}): {', '.join(shown[:_SHOWN])}{more}: {one.detail}; "
        f"it {rule.happens}: {rule.remedy}"
    )
