"""A folded shared expert: engines look it up under its own name, and the router has fewer rows than there are experts.

The counts of a folded checkpoint's configuration are those of what is stored, so that the router's shape gives it away:
an engine stops, instead of running without a shared expert.
"""

from __future__ import annotations

from collections.abc import Iterator

from qconvert.engine_check.rule import Effect, Engine, Finding, Proof, Rule
from qconvert.engine_check.view import View
from reference_model.config_fold import FOLD, NOTE

_DEMANDS = "the shared expert is stored under its own name, beside as many experts as the router has rows"
_REMEDY = "`qconvert unfold` for this engine; folded checkpoints are for ONNX Runtime: `qconvert export-onnx`"


def _folded(view: View) -> Iterator[Finding]:
    text = view.config.text
    if text.folded_experts:
        yield Finding(
            module=f"config.json {NOTE}.{FOLD}",
            detail=f"{text.num_experts} experts are routed, {text.folded_experts} more hold the shared expert",
        )


FOLD_RULES: tuple[Rule, ...] = (
    Rule(
        id="vllm-folded",
        engine=Engine.VLLM,
        demands=_DEMANDS,
        source="vllm: models/qwen3_next.py Qwen3NextSparseMoeBlock, layers/linear.py ReplicatedLinear.weight_loader",
        proof=Proof.READ,
        effect=Effect.FAILS,
        happens="makes a router with a row for every expert that config.json counts, and stops at the stored one",
        remedy=_REMEDY,
        find=_folded,
        announced=True,
    ),
    Rule(
        id="transformers-folded",
        engine=Engine.TRANSFORMERS,
        demands=_DEMANDS,
        source="tests/test_folding.py test_transformers_does_not_load_it",
        proof=Proof.RUN,
        effect=Effect.FAILS,
        happens="makes a router with a row for every expert that config.json counts, and stops at the stored one",
        remedy=_REMEDY,
        find=_folded,
        announced=True,
    ),
    Rule(
        id="sglang-folded",
        engine=Engine.SGLANG,
        demands=_DEMANDS,
        source="sglang: srt/models/qwen2_moe.py Qwen2MoeSparseMoeBlock, srt/layers/linear.py "
        "ReplicatedLinear.weight_loader",
        proof=Proof.READ,
        effect=Effect.FAILS,
        happens="makes a router with a row for every expert that config.json counts, and stops at the stored one; it "
        "fuses a shared expert by itself when it loads",
        remedy=_REMEDY,
        find=_folded,
        announced=True,
    ),
)
