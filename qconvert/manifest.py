"""`manifest.json` beside the converted weights: what was decided, what it cost, and the hash of every tensor."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from math import log10
from typing import Any

from qconvert import __version__
from qconvert.core.plan import Plan, Quantize
from qconvert.io.hashing import new_hash
from qconvert.run import Loss, Outcome

MANIFEST_FILE = "manifest.json"


def summary(plan: Plan, outcomes: Mapping[str, Outcome], *, algorithm: str, config_hash: str) -> dict[str, Any]:
    """What a manifest says of the whole; the same input and options give the same, however the input is sharded.

    ``algorithm`` is that of the tensors' hashes, ``config_hash`` the xxh3-128 of the source's ``config.json``.
    """
    return {
        "qconvert": __version__,
        "hash": algorithm,
        "config_hash": config_hash,
        "source_hash": _source_hash(plan, outcomes, algorithm),
        "policy_hash": plan.policy_hash,
        "decisions": [
            {"role": role, "action": action, "reason": reason, "tensors": tensors, "bytes": nbytes}
            for role, action, reason, tensors, nbytes in plan.decisions()
        ],
        "left_out": dict(plan.left_out),
        "sqnr_db": sqnr_by_role(plan, outcomes),
    }


def manifest_parts(
    head: Mapping[str, Any], plan: Plan, outcomes: Mapping[str, Outcome], hashes: Mapping[str, str]
) -> Iterator[bytes]:
    """The file's content: ``summary`` and then every output tensor on a line of its own.

    A tensor has its hash, the number of its decision, which gives scheme and reason, and the source rows that it was
    made from with their hash.
    """
    numbers = {(one["role"], one["action"], one["reason"]): n for n, one in enumerate(head["decisions"])}
    yield json.dumps(head, indent=1)[:-2].encode() + b',\n "tensors": {'
    separator = b"\n"
    for step in plan.steps:
        part = step.inputs[0]
        entry = {
            "decision": numbers[step.role.path, str(step.action), step.action.reason],
            "source": part.tensor,
            "rows": [part.begin, part.end],
            "source_hash": outcomes[step.key].source_hash,
        }
        for name in step.outputs:
            yield separator + f"  {json.dumps(name)}: {json.dumps({'hash': hashes[name], **entry})}".encode()
            separator = b",\n"
    yield b"\n }\n}\n"


def sqnr_by_role(plan: Plan, outcomes: Mapping[str, Outcome]) -> dict[str, float | None]:
    """Signal to rounding error in dB, ``10 log10(sum w^2 / sum (w - w_hat)^2)``, over all matrices of a role.

    ``None`` where nothing was lost.
    """
    sums: dict[str, tuple[float, float]] = {}
    for step in plan.steps:
        loss = outcomes[step.key].loss
        if isinstance(step.action, Quantize) and loss is not None:
            signal, error = sums.get(step.role.path, (0.0, 0.0))
            sums[step.role.path] = (signal + loss.signal, error + loss.squared_error)
    return {path: db(Loss(squared_error=error, signal=signal)) for path, (signal, error) in sums.items()}


def db(loss: Loss) -> float | None:
    """Signal to rounding error in dB; ``None`` where nothing was lost."""
    return round(10.0 * log10(loss.signal / loss.squared_error), 4) if loss.signal and loss.squared_error else None


def _source_hash(plan: Plan, outcomes: Mapping[str, Outcome], algorithm: str) -> str:
    """Hash over all that was read: names, rows, and hashes of their bytes."""
    digest = new_hash(algorithm)
    for step in plan.steps:
        part = step.inputs[0]
        line = f"{part.tensor} {part.begin} {part.end} {outcomes[step.key].source_hash}\n"
        digest.update(memoryview(line.encode()))
    return digest.hexdigest()
