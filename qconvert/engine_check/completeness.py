"""Nothing is missing, nothing is there that has no place, and every shape is what the configuration says."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import islice

from qconvert.arch.names import name_of, role_of
from qconvert.arch.shapes import expected_roles
from qconvert.core.role import EXPERT_KINDS, Section, TensorRole
from qconvert.engine_check.rule import Effect, Engine, Finding, Proof, Rule
from qconvert.engine_check.view import View, quantized_stack
from qconvert.formats.declared import read_declared
from qconvert.io.checkpoint import Checkpoint
from qconvert.quantized_view import ProblemKind, QuantizedView, view

_MOST_MISSING = 10_000
"""Names are made for no more: a configuration may ask for millions of experts that no tensor bears out."""


def stored_problems(checkpoint: Checkpoint) -> Iterator[tuple[ProblemKind, str, str]]:
    """Tensors and modules that are missing, unknown, doubled, misshapen or stored in parts that do not fit.

    What is stored otherwise than the lists declare is left to the rules about lists, and experts in stacks whose layout
    is not known to theirs.

    Raises:
        SourceError: another architecture, or a configuration that cannot be read.
    """
    seen = view(checkpoint)
    declared = read_declared(checkpoint.config)
    spoken_of: set[TensorRole | None] = set()
    opaque: set[tuple[Section, int | None]] = set()
    for problem in seen.problems:
        block = quantized_stack(checkpoint.tensors.get(problem.name))
        if block is not None:
            role = role_of(f"{block}.gate_up_proj")
            opaque.add((role.section, role.layer))
            if problem.kind in (ProblemKind.UNREADABLE, ProblemKind.UNKNOWN):
                continue
        spoken_of.add(problem.role)
        kept = problem.role in seen.stored
        about_lists = problem.name not in checkpoint.tensors and kept == (declared.of(problem.name) is not None)
        if not about_lists:
            yield problem.kind, problem.name, problem.message
    missing = (
        role
        for role in _expected(seen)
        if role not in seen.stored
        and role not in spoken_of
        and not (role.kind in EXPERT_KINDS and (role.section, role.layer) in opaque)
    )
    for role in islice(missing, _MOST_MISSING):
        yield ProblemKind.MISSING, name_of(role, seen.naming), "is missing"


def _expected(seen: QuantizedView) -> Iterator[TensorRole]:
    """Every tensor, experts one by one; a draft head that is not stored at all is not asked for."""
    stored = any(role.section is Section.MTP for role in seen.stored)
    return expected_roles(seen.config, stacked=False, mtp_layers=None if stored else 0)


_MISSHAPEN = (ProblemKind.MISSHAPEN, ProblemKind.UNREADABLE)


def _problems(view: View, *, kinds: tuple[ProblemKind, ...]) -> Iterator[Finding]:
    for kind, name, message in view.problems:
        if kind in kinds:
            yield Finding(module=name, detail=message)


def _problems_of_the_model(view: View, *, kinds: tuple[ProblemKind, ...]) -> Iterator[Finding]:
    """Without the draft head, which transformers does not read."""
    return (finding for finding in _problems(view, kinds=kinds) if not finding.module.startswith("mtp."))


_COMPLETE = "every tensor that config.json asks for is there, with every part of a quantized one"
_NO_OTHER = "no tensor is there that the model has no place for"
_SHAPES = "every tensor has the shape that config.json asks for, and parts of a quantized one the types of its scheme"
_AGAIN = "convert again, or copy the file again; `qconvert verify` names what changed"
_TAKE_OUT = "take it out, or give it the name under which the engine looks for it"
_VLLM = "vllm: models/qwen3_5.py Qwen3_5Model.load_weights"
_TRANSFORMERS = "transformers: modeling_utils.py PreTrainedModel._load_pretrained_model"
_SGLANG = "sglang: models/qwen3_5.py Qwen3_5MoeForConditionalGeneration.load_weights"

COMPLETENESS_RULES: tuple[Rule, ...] = (
    Rule(
        id="vllm-missing",
        engine=Engine.VLLM,
        demands=_COMPLETE,
        source="tests/engines/test_vllm.py FAULTS 'a layer's up missing'",
        proof=Proof.RUN,
        effect=Effect.WRONG,
        happens="says nothing and answers with what was in memory",
        remedy=_AGAIN,
        find=partial(_problems, kinds=(ProblemKind.MISSING,)),
    ),
    Rule(
        id="vllm-unknown",
        engine=Engine.VLLM,
        demands=_NO_OTHER,
        source=f"{_VLLM}, models/utils.py AutoWeightsLoader",
        proof=Proof.READ,
        effect=Effect.WRONG,
        happens="passes over it with a line in the log inside the decoder and the draft head, and stops elsewhere",
        remedy=_TAKE_OUT,
        find=partial(_problems, kinds=(ProblemKind.UNKNOWN,)),
    ),
    Rule(
        id="vllm-misshapen",
        engine=Engine.VLLM,
        demands=_SHAPES,
        source="vllm: model_executor/parameter.py BasevLLMParameter, layers/linear.py weight_loader",
        proof=Proof.READ,
        effect=Effect.FAILS,
        happens="ends with an assertion",
        remedy=_AGAIN,
        find=partial(_problems, kinds=_MISSHAPEN),
    ),
    Rule(
        id="transformers-missing",
        engine=Engine.TRANSFORMERS,
        demands=_COMPLETE,
        source=_TRANSFORMERS,
        proof=Proof.READ,
        effect=Effect.WRONG,
        happens="fills it with random numbers and warns",
        remedy=_AGAIN,
        find=partial(_problems_of_the_model, kinds=(ProblemKind.MISSING,)),
    ),
    Rule(
        id="transformers-unknown",
        engine=Engine.TRANSFORMERS,
        demands=_NO_OTHER,
        source=_TRANSFORMERS,
        proof=Proof.READ,
        effect=Effect.WRONG,
        happens="passes over it with a warning",
        remedy=_TAKE_OUT,
        find=partial(_problems_of_the_model, kinds=(ProblemKind.UNKNOWN,)),
    ),
    Rule(
        id="transformers-misshapen",
        engine=Engine.TRANSFORMERS,
        demands=_SHAPES,
        source=_TRANSFORMERS,
        proof=Proof.READ,
        effect=Effect.FAILS,
        happens="raises an error that lists what differs in size",
        remedy=_AGAIN,
        find=partial(_problems_of_the_model, kinds=_MISSHAPEN),
    ),
    Rule(
        id="sglang-missing",
        engine=Engine.SGLANG,
        demands=_COMPLETE,
        source=_SGLANG,
        proof=Proof.READ,
        effect=Effect.WRONG,
        happens="does not look for it and answers with what was in memory",
        remedy=_AGAIN,
        find=partial(_problems, kinds=(ProblemKind.MISSING,)),
    ),
    Rule(
        id="sglang-unknown",
        engine=Engine.SGLANG,
        demands=_NO_OTHER,
        source=_SGLANG,
        proof=Proof.READ,
        effect=Effect.WRONG,
        happens="passes over it with a line in the log, of experts without one",
        remedy=_TAKE_OUT,
        find=partial(_problems, kinds=(ProblemKind.UNKNOWN,)),
    ),
    Rule(
        id="sglang-misshapen",
        engine=Engine.SGLANG,
        demands=_SHAPES,
        source="sglang: model_loader/weight_utils.py default_weight_loader, layers/parameter.py",
        proof=Proof.READ,
        effect=Effect.FAILS,
        happens="ends with an assertion",
        remedy=_AGAIN,
        find=partial(_problems, kinds=_MISSHAPEN),
    ),
)
