"""Checkpoint -> plan of the same checkpoint with its shared expert folded, or unfolded: nothing else changes."""

from __future__ import annotations

from qconvert.arch.families import quant_method
from qconvert.core.errors import FormatError
from qconvert.core.plan import Folding, Plan, Slice
from qconvert.formats.table import METHODS
from qconvert.io.checkpoint import Checkpoint
from qconvert.plan.decided import Decided, assemble, declared_once, keep
from qconvert.plan.folding import (
    fold_shared_experts,
    folded_config,
    folding_hash,
    unfold_shared_experts,
    unfolded_config,
)
from qconvert.plan.layout import DEFAULT_SHARD_BYTES
from qconvert.plan.reencoding import Reencoding, decide_moves
from qconvert.plan.source import PlannedSource, look_at

_KEPT = "as it is"


def plan_folding(checkpoint: Checkpoint, folding: Folding, *, shard_bytes: int = DEFAULT_SHARD_BYTES) -> Plan:
    """Decide every tensor of ``checkpoint``, plain or quantized; reads headers only.

    Raises:
        SourceError: no checkpoint that can be read, or one that is folded already, or not.
        PlanError: shared and routed experts are not stored alike, or an engine would not read the lists.
        FormatError: a format that is read only, or codes that cannot be cut.
    """
    source = look_at(checkpoint, from_quantized=True)
    decided, census = _as_it_is(checkpoint, source), source.census
    config = declared_once(checkpoint.config, source)
    if folding is Folding.FOLDED:
        decided, config = fold_shared_experts(decided, census, checkpoint.path), folded_config(config)
    else:
        decided, config = unfold_shared_experts(decided, census, checkpoint.path), unfolded_config(config)
    return assemble(
        checkpoint, source, decided, config=config, decided_by=folding_hash(folding), shard_bytes=shard_bytes
    )


def _as_it_is(checkpoint: Checkpoint, source: PlannedSource) -> list[Decided]:
    """Every tensor copied: plain ones as they lie, quantized ones part by part."""
    census = source.census
    if not source.quantized:
        return [
            keep(
                info,
                role,
                Slice(tensor=name, begin=0, end=info.numel // info.row_width),
                info.shape,
                name=name,
                reason=_KEPT,
            )
            for name, role in census.roles.items()
            for info in (census.tensors[name],)
        ]
    method = quant_method(checkpoint.config)
    if method is None or method not in METHODS:
        raise FormatError(
            f"{checkpoint.path}: quant_method {method!r} is read only, so its codes cannot be stored in other places: "
            "use `qconvert convert` first"
        )
    return decide_moves(checkpoint, source, Reencoding(method=method))
