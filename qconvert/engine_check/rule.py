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
    DRAFT_WRONG = "loads, and its draft head guesses from wrong numbers"
    DRAFT_FAILS = "loads, but its draft head does not"
    NOTE = "loads, with a limit"


_OF_DRAFTS = {Effect.WRONG: Effect.DRAFT_WRONG, Effect.FAILS: Effect.DRAFT_FAILS}
"""vLLM and SGLang load the draft head as a model of its own, and transformers does not read it."""


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
    """All modules that break one rule in one way, those of the draft head apart from all others."""

    rule: Rule
    detail: str
    modules: tuple[str, ...]

    @property
    def effect(self) -> Effect:
        """What becomes of the checkpoint, or of its draft head alone."""
        return _OF_DRAFTS.get(self.rule.effect, self.rule.effect) if _of_draft(self.modules[0]) else self.rule.effect


def violations(rule: Rule, view: View) -> Iterator[Violation]:
    """What breaks ``rule``, one violation for each way."""
    ways: dict[tuple[str, bool], dict[str, None]] = {}
    for finding in rule.find(view):
        ways.setdefault((finding.detail, _of_draft(finding.module)), {})[finding.module] = None
    for (detail, _), modules in ways.items():
        yield Violation(rule=rule, detail=detail, modules=tuple(modules))


def _of_draft(module: str) -> bool:
    return module.startswith("mtp.")
