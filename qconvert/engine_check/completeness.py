"""Nothing is missing, nothing is there that has no place, and every shape is what the configuration says."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from qconvert.arch.names import name_of, role_of
from qconvert.arch.shapes import expected_roles
from qconvert.core.role import EXPERT_KINDS, Section, TensorRole
from qconvert.engine_check.rule import Effect, Engine, Finding, Proof, Rule
from qconvert.engine_check.view import CACHE_SCALES, View, quantized_stack
from qconvert.formats.declared import read_declared
from qconvert.io.checkpoint import Checkpoint
from qconvert.quantized_view import QuantizedView, view

_MOST_MISSING = 10_000
"""Names are made for no more: a configuration may ask for millions of experts that no tensor bears out."""


def stored_problems(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    """Tensors and modules that are missing, unknown, doubled, misshapen or stored in parts that do not fit.

    What is stored otherwise than the lists declare is left to the rules about lists, quantized experts in stacks to
    theirs.

    Raises:
        SourceError: another architecture, or a configuration that cannot be read.
    """
    seen = view(checkpoint)
    declared = read_declared(checkpoint.config)
    spoken_of: set[TensorRole | None] = set()
    opaque: set[tuple[Section, int | None]] = set()
    for problem in seen.problems:
        if problem.name.rpartition(".")[2] in CACHE_SCALES:
            continue
        block = quantized_stack(checkpoint.tensors.get(problem.name))
        if block is not None:
            role = role_of(f"{block}.gate_up_proj")
            opaque.add((role.section, role.layer))
            continue
        spoken_of.add(problem.role)
        kept = problem.role in seen.stored
        about_lists = problem.name not in checkpoint.tensors and kept == (declared.of(problem.name) is not None)
        if not about_lists:
            yield problem.name, problem.message
    missing = (
        role
        for role in _expected(seen)
        if role not in seen.stored
        and role not in spoken_of
        and not (role.kind in EXPERT_KINDS and (role.section, role.layer) in opaque)
    )
    for role in islice(missing, _MOST_MISSING):
        yield name_of(role, seen.naming), "is missing"


def _expected(seen: QuantizedView) -> Iterator[TensorRole]:
    """Every tensor, experts one by one; a draft head that is not stored at all is not asked for."""
    stored = any(role.section is Section.MTP for role in seen.stored)
    return expected_roles(seen.config, stacked=False, mtp_layers=None if stored else 0)


def _problems(view: View) -> Iterator[Finding]:
    for name, message in view.problems:
        yield Finding(module=name, detail=message)


def _problems_of_the_model(view: View) -> Iterator[Finding]:
    """Without the draft head, which transformers does not read."""
    return (finding for finding in _problems(view) if not finding.module.startswith("mtp."))


_DEMANDS = "every tensor that config.json asks for is there in its type and shape, and no other"

COMPLETENESS_RULES: tuple[Rule, ...] = (
    Rule(
        id="vllm-complete",
        engine=Engine.VLLM,
        demands=_DEMANDS,
        source="tests/engines/test_vllm.py FAULTS 'a layer's up missing'",
        proof=Proof.RUN,
        effect=Effect.WRONG,
        happens="says nothing of a tensor that is missing and answers with what was in memory; stops at one that it "
        "does not know, or whose shape differs",
        remedy="convert again, or copy the file again; `qconvert verify` names what changed",
        find=_problems,
    ),
    Rule(
        id="transformers-complete",
        engine=Engine.TRANSFORMERS,
        demands=_DEMANDS,
        source="transformers: modeling_utils.py PreTrainedModel._load_pretrained_model",
        proof=Proof.READ,
        effect=Effect.WRONG,
        happens="fills what is missing with random numbers and warns",
        remedy="convert again, or copy the file again",
        find=_problems_of_the_model,
    ),
    Rule(
        id="sglang-complete",
        engine=Engine.SGLANG,
        demands=_DEMANDS,
        source="sglang: models/qwen3_5.py Qwen3_5MoeForConditionalGeneration.load_weights",
        proof=Proof.READ,
        effect=Effect.WRONG,
        happens="does not look for what is missing; passes over what it does not know with a line in the log",
        remedy="convert again, or copy the file again",
        find=_problems,
    ),
)
