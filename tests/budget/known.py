"""Losses that were not measured, for decisions about a tiny checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from qconvert.budget.losses import Loss, Losses, Together, key
from qconvert.budget.parts import DEFAULT_SCHEMES, Part, parts_of
from qconvert.budget.run import Asked, Text
from qconvert.io.fingerprint import fingerprint
from qconvert.weights.source import CheckpointWeights

SHARES = {"int4-g128": 1.3, "int4-g64": 1.1, "int4-g32": 1.0, "int8": 0.006, "fp8": 0.05}


def usual(part: Part, scheme: str) -> float:
    """Every part of another sensitivity, schemes as on trained weights."""
    return SHARES[scheme] * 1e-4 * (1 + (7 * part.layer + 3 * len(part.group)) % 11)


def known(
    source: Path,
    path: Path,
    *,
    schemes: tuple[str, ...] = DEFAULT_SCHEMES,
    loss: Callable[[Part, str], float] = usual,
    search: bool = False,
) -> Losses:
    """A file of all that could be measured."""
    with CheckpointWeights.open(source) as weights:
        found = Losses(
            path=path, fingerprint=fingerprint(weights.checkpoint), search=search,
            text={"ids_sha256": "none", "window": 8, "tokens": 16, "domains": {"made": {}}, "seed": 0},
        )  # fmt: skip
        parts = parts_of(weights, schemes)
        for part, name in found.missing(parts):
            one = loss(part, name)
            found.found[key(part, name)] = Loss(kl=one, low=one / 2, high=one * 2)
        for some, name in found.missing_together(parts):
            total = sum(found.alone(part, name) for part in some)
            found.together[name] = Together(loss=Loss(kl=total, low=total, high=total), alone=total)
    found.save()
    return found


def asked(path: Path, **more: object) -> Asked:
    """A budget over ``path``."""
    return Asked(losses=path, **{"schemes": DEFAULT_SCHEMES, **more})  # type: ignore[arg-type]  # each field is checked where it is used


def nothing_to_read() -> Text:
    """Stands for a text where none may be read."""
    raise AssertionError("all is measured: no text is read")
