"""A plan as JSON: for people, for diffs and for whoever checks a conversion before it runs."""

from __future__ import annotations

from typing import Any

from qconvert.core.plan import Keep, Plan, Step


def plan_document(plan: Plan) -> dict[str, Any]:
    """Everything that the plan decided, in plan order, with plain JSON values."""
    return {
        "source_hash": plan.source_hash,
        "policy_hash": plan.policy_hash,
        "side_files": list(plan.side_files),
        "left_out": dict(plan.left_out),
        "config": plan.config,
        "steps": [_step(step) for step in plan.steps],
        "layout": [
            {
                "name": info.name,
                "dtype": info.dtype.value,
                "shape": list(info.shape),
                "shard": info.shard,
                "begin": info.begin,
                "end": info.end,
            }
            for info in plan.layout.tensors
        ],
    }


def _step(step: Step) -> dict[str, Any]:
    action = step.action
    rounding = {} if isinstance(action, Keep) else {"format": action.format, "search": action.search}
    return {
        "inputs": [{"tensor": part.tensor, "rows": [part.begin, part.end]} for part in step.inputs],
        "role": str(step.role),
        "action": "keep" if isinstance(action, Keep) else str(action.scheme),
        "reason": action.reason,
        **rounding,
        "outputs": list(step.outputs),
        "peak_bytes": step.peak_bytes,
    }
