"""What a rule is: data that says where it comes from, and a function that finds what breaks it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum

from qconvert.engine_check.view import View


class Engine(Enum):
    """An engine and the version whose rules these are; the value is what the command line calls it."""

    VLLM = "vllm"
    TRANSFORMERS = "transformers"
    SGLANG = "sglang"

    def __str__(self) -> str:
        return {"vllm": "vLLM 0.32", "transformers": "transformers 5.23", "sglang": "SGLang 0.5.23"}[self.value]


class Effect(Enum):
    """What becomes of a checkpoint that breaks a rule."""

    WRONG = "loads and answers with wrong numbers"
    FAILS = "does not load"
    NOTE = "loads, with a limit"


class Proof(Enum):
    """How a rule is known."""

    RUN = "run"
    READ = "read, not run"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One module, or ``config.json`` itself, that breaks a rule, and how."""

    module: str
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One demand of one version of one engine.

    Attributes:
        demands: what must hold, in one sentence.
        source: file and function in the engine's source, or the test of ours that ran it.
        happens: what the engine does otherwise.
        remedy: what to do.
        find: everything in a checkpoint that breaks it.
        announced: a limit of a format that `qconvert quantize` speaks of when it writes it, and no fault of what it
            wrote.
    """

    id: str
    engine: Engine
    demands: str
    source: str
    proof: Proof
    effect: Effect
    happens: str
    remedy: str
    find: Callable[[View], Iterable[Finding]]
    announced: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Violation:
    """All modules that break one rule in one way."""

    rule: Rule
    detail: str
    modules: tuple[str, ...]


def violations(rule: Rule, view: View) -> Iterator[Violation]:
    """What breaks ``rule``, one violation for each way."""
    ways: dict[str, dict[str, None]] = {}
    for finding in rule.find(view):
        ways.setdefault(finding.detail, {})[finding.module] = None
    for detail, modules in ways.items():
        yield Violation(rule=rule, detail=detail, modules=tuple(modules))
