"""A plan printed for people: one line per decision, and what engines make of the output."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qconvert.arch.shapes import expected_shape
from qconvert.cli import console
from qconvert.core.errors import OutputError
from qconvert.core.plan import Plan, Quantize, Reencode
from qconvert.core.role import EXPERT_KINDS, TensorRole
from qconvert.formats.engine_limits import Written, engine_limits
from qconvert.formats.engine_rules import FOR_ENGINE
from qconvert.plan.document import plan_text
from reference_model.config import ModelConfig
from reference_model.config_fold import FOLD, note_of

_LISTED = 3
"""Names of what is left out that a line has; ``--json`` has them all."""


def show_plan(plan: Plan, *, engines: bool = True) -> None:
    """One line per action and reason, what ``engines`` make of it, and what is left out.

    ``--dry-run --json`` has every tensor.
    """
    groups: dict[tuple[str, str], tuple[list[str], int, int]] = {}
    for role, action, reason, tensors, nbytes in plan.decisions():
        roles, count, size = groups.get((action, reason), ([], 0, 0))
        groups[action, reason] = ([*roles, role], count + tensors, size + nbytes)
    table = console.plain_table("action", ">tensors", ">bytes", "what", "why")
    for (action, reason), (roles, count, size) in groups.items():
        what = ", ".join(dict.fromkeys(console.family(role) for role in roles))
        if len(what) > 60:
            what = f"all of {roles[0].partition('.')[0]}"
        table.add_row(action, f"{count:,}", console.gigabytes(size), what, reason)
    console.show(table)
    if plan.source_quantization is not None and any(isinstance(step.action, Quantize) for step in plan.steps):
        console.say(
            f"note: the source is quantized ({plan.source_quantization['quant_method']}): errors are against what it "
            "means dequantized, not against the checkpoint that it was made from",
            style="yellow",
        )
    for limit in limits(plan) if engines else ():
        console.say(f"note: {limit}", style="yellow")
    reasons: dict[str, list[str]] = {}
    for name, reason in plan.left_out:
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        more = f" and {len(names) - _LISTED:,} more" if len(names) > _LISTED else ""
        console.say(f"left out: {', '.join(names[:_LISTED])}{more} ({reason})")


def refuse_existing(out: Path) -> None:
    """Refuse an output that is there already.

    Raises:
        OutputError: it is.
    """
    if os.path.lexists(out):
        raise OutputError(f"{out} exists already; choose another output folder or remove it")


def preview(
    plan: Plan, out: Path, *, json: bool, engines: bool = True, beside: Mapping[str, Any] | None = None
) -> None:
    """What ``--dry-run`` prints; ``beside`` are further keys of its JSON document.

    Raises:
        OutputError: ``out`` is there already.
    """
    refuse_existing(out)
    if json:
        console.show_parts(plan_text(plan, beside))
    else:
        show_plan(plan, engines=engines)


def limits(plan: Plan) -> list[str]:
    """What engines refuse of it, or read otherwise; a folded shared expert first."""
    config = ModelConfig.from_dict(plan.config)
    written = {
        _way(step.role, step.action, config) for step in plan.steps if isinstance(step.action, Quantize | Reencode)
    }
    note = note_of(plan.config)
    own = ([FOLDED_LIMIT] if note.get(FOLD) else []) + ([ALONE_LIMIT] if note.get(FOR_ENGINE) else [])
    return own + [str(limit) for limit in engine_limits(written)]


def _way(role: TensorRole, action: Quantize | Reencode, config: ModelConfig) -> Written:
    if role.kind in EXPERT_KINDS:
        return Written(scheme=action.scheme, format=action.format, experts=True)
    rows, cols = expected_shape(role, config)
    return Written(scheme=action.scheme, format=action.format, experts=False, shape=(rows, cols))


ALONE_LIMIT = (
    "it is for vLLM alone: routed experts of its layers may have several schemes, which transformers refuses; hold it "
    "to `qconvert check --engine vllm`"
)

FOLDED_LIMIT = (
    "transformers, vLLM and SGLang do not load it: its shared expert is folded into routed ones, for `qconvert "
    "export-onnx` and other graphs with one kernel for all experts"
)
