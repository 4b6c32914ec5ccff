"""`qconvert.json` beside the converted weights: what was decided, what it cost, and the hash of every tensor."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import log10
from typing import Any

from qconvert import __version__
from qconvert.core.plan import Plan, Quantize
from qconvert.run import Loss

MANIFEST_FILE = "qconvert.json"


def manifest(plan: Plan, losses: Mapping[str, Loss], hashes: Mapping[str, str]) -> dict[str, Any]:
    """The record of a finished conversion; the same input and options give the same record."""
    return {
        "qconvert": __version__,
        "source_hash": plan.source_hash,
        "policy_hash": plan.policy_hash,
        "decisions": [
            {"role": role, "action": action, "reason": reason, "tensors": tensors, "bytes": nbytes}
            for role, action, reason, tensors, nbytes in plan.decisions()
        ],
        "left_out": dict(plan.left_out),
        "sqnr_db": sqnr_by_role(plan, losses),
        "xxh3_128": {name: hashes[name] for name in sorted(hashes)},
    }


def manifest_bytes(record: Mapping[str, Any]) -> bytes:
    """The file's content."""
    return (json.dumps(record, indent=1) + "\n").encode()


def sqnr_by_role(plan: Plan, losses: Mapping[str, Loss]) -> dict[str, float | None]:
    """Signal to rounding error in dB, ``10 log10(sum w^2 / sum (w - w_hat)^2)``, over all matrices of a role.

    ``None`` where nothing was lost.
    """
    sums: dict[str, tuple[float, float]] = {}
    for step in plan.steps:
        if isinstance(step.action, Quantize):
            loss = losses[step.action.module]
            signal, error = sums.get(step.role.path, (0.0, 0.0))
            sums[step.role.path] = (signal + loss.signal, error + loss.squared_error)
    return {path: _db(signal, error) for path, (signal, error) in sums.items()}


def _db(signal: float, error: float) -> float | None:
    return round(10.0 * log10(signal / error), 4) if signal and error else None
