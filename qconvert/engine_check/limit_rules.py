"""Formats that an engine refuses or reads wrongly, whatever the lists say: what `quantize` announces, as rules."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from qconvert.engine_check.rule import Effect, Engine, Finding, Proof, Rule
from qconvert.engine_check.view import View
from qconvert.formats.declaration import Declaration
from qconvert.formats.engine_limits import LIMITS, Limit, Written

_EFFECTS = {"refused": Effect.FAILS, "wrong": Effect.WRONG, "restricted": Effect.NOTE}


def _written(view: View) -> Iterator[tuple[str, Written]]:
    """Every way of storing, with the modules that are stored so."""
    for linear in view.linears:
        if linear.quantized and linear.declaration is not None:
            yield linear.name, _way(linear.declaration, experts=False, shape=linear.shape)
    for block in view.experts:
        for declaration in block.declarations:
            if block.quantized and declaration is not None:
                yield block.name, _way(declaration, experts=True)


def _way(declaration: Declaration, *, experts: bool, shape: tuple[int, int] | None = None) -> Written:
    return Written(scheme=declaration.scheme, format=declaration.format.name, experts=experts, shape=shape)


def _limited(view: View, *, limit: Limit) -> Iterator[Finding]:
    for name, written in _written(view):
        if limit.applies(written):
            yield Finding(module=name, detail=f"stored as {written.scheme} in {written.format}")


LIMIT_RULES: tuple[Rule, ...] = tuple(
    Rule(
        id=limit.id,
        engine=next(engine for engine in Engine if str(engine) == limit.engine),
        demands=f"{limit.engine} {limit.says}",
        source=limit.source,
        proof=Proof.RUN if limit.proof == "run" else Proof.READ,
        effect=_EFFECTS[limit.effect],
        happens=limit.says,
        remedy="use another engine, or convert to another scheme",
        find=partial(_limited, limit=limit),
        announced=True,
    )
    for limit in LIMITS
)
