"""What rounding one part of an otherwise original model costs: what a planner weighs against bytes.

The divergence of the whole model is, as long as it is small, a quadratic form of all rounding errors, and errors of
different matrices hardly know of each other: what each part costs alone adds up to about what all cost together,
whichever scheme each of them has. So one measurement for each part and scheme serves every plan. What is restored in a
finished conversion (``attribution.py``) tells more of that conversion, and of no other.

Shapes: B windows, T tokens, S scored positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qconvert.core.errors import FormatError
from qconvert.core.role import EXPERT_KINDS, Kind, Section, TensorRole
from qconvert.core.scheme import Scheme
from qconvert.formats.table import format_for, stored_bytes
from qconvert.parity.attribution import TOGETHER
from qconvert.parity.heads import Side
from qconvert.parity.input_rounding import rounding_of
from qconvert.parity.kept_states import KeptStates
from qconvert.parity.role_groups import RoleGroup, role_groups, wholes
from qconvert.parity.summary import Draws
from qconvert.parity.tensors import Progress
from qconvert.parity.variants import Setting, Variant, run_variants
from qconvert.weights.overlay import RoundedWeights
from qconvert.weights.source import CheckpointWeights
from reference_model.layer_pass import ROWS_BYTES, Batch, Lane, LayerRecord, leave_inputs, pass_layer
from reference_model.layerwise import HiddenStates, embed, finish
from reference_model.load import ActivationStore

ROUNDABLE = EXPERT_KINDS | {
    Kind.SHARED_GATE,
    Kind.SHARED_UP,
    Kind.SHARED_DOWN,
    Kind.ATTENTION_QUERY,
    Kind.ATTENTION_KEY,
    Kind.ATTENTION_VALUE,
    Kind.ATTENTION_OUTPUT,
    Kind.LINEAR_QKV,
    Kind.LINEAR_Z,
    Kind.LINEAR_OUTPUT,
}
"""What engines read quantized."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A part and the scheme that it is rounded to: ``layer`` is ``None`` for a group in all layers."""

    group: str
    layer: int | None
    roles: frozenset[TensorRole]
    scheme: Scheme


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """What a piece costs.

    Attributes:
        kl: mean KL(original || original with the piece rounded), nats, activations as served.
        low: of its 95% interval; ``high`` is the other end.
        bytes_rounded: of its tensors in the scheme, scales and all.
        bytes_original: of the same as they are.
    """

    piece: Piece
    kl: float
    low: float
    high: float
    bytes_rounded: int
    bytes_original: int


def roundable(source: CheckpointWeights) -> tuple[RoleGroup, ...]:
    """The groups of what engines read quantized; output gates are with the queries, one stored matrix."""
    roles = [role for role in source.stored if role.section is Section.TEXT and role.kind in ROUNDABLE]
    return role_groups(roles, gates_apart=False)


def pieces_of(
    source: CheckpointWeights, groups: Sequence[RoleGroup], schemes: Sequence[Scheme], *, by_layer: bool = True
) -> tuple[Piece, ...]:
    """Every group, or every layer of every group, in every scheme that all of its matrices can be stored in."""
    out = []
    for group in groups:
        for scheme in schemes:
            if not all(storable(source, role, scheme) for role in wholes(group.roles)):
                continue
            for layer in group.layers if by_layer else (None,):
                roles = group.roles if layer is None else group.of_layer(layer)
                out.append(Piece(group=group.name, layer=layer, roles=roles, scheme=scheme))
    return tuple(out)


def storable(source: CheckpointWeights, role: TensorRole, scheme: Scheme) -> bool:
    """Whether the usual format of a scheme holds the matrix with ``role``."""
    rows, cols = source.stored[role].shape
    try:
        format_for(scheme).check(scheme, (rows, cols))
    except FormatError:
        return False
    return True


@torch.no_grad()
def own_states(
    source: CheckpointWeights,
    batches: Sequence[Tensor],
    store: ActivationStore,
    *,
    rows_bytes: int = ROWS_BYTES,
    progress: Progress = lambda phase, done, total: None,
) -> KeptStates:
    """Run a model by itself over token windows [B, T], and keep what it had before each layer and at the end.

    Raises:
        OutputError: ``store`` cannot keep them.
    """
    config, rows = source.config.text, [Batch(ids=ids) for ids in batches]
    kept = KeptStates(store=store, count=len(rows))
    embed(config, source, rows, kept.before(0), torch.float32)
    for n in range(config.num_hidden_layers):
        after = kept.before(n + 1)

        def give(record: LayerRecord, after: HiddenStates = after) -> None:
            after.put(record.batch, record.hidden)

        lane = Lane(take=kept.before(n).__getitem__, give=give)
        pass_layer(config, source, n, rows, (lane,), torch.float32, rows_bytes=rows_bytes)
        progress("layers", n + 1, config.num_hidden_layers)
    kept.keep(kept.before(config.num_hidden_layers), kept.original)
    finish(config, source, kept.original, torch.float32)
    return kept


def sensitivities(
    source: CheckpointWeights,
    batches: Sequence[Tensor],
    states: KeptStates,
    pieces: Sequence[Piece],
    store: ActivationStore,
    *,
    search: bool = False,
    rows_bytes: int = ROWS_BYTES,
    seed: int = 0,
    progress: Progress = lambda phase, done, total: None,
) -> Iterator[Sensitivity]:
    """Round one piece after the other, some side by side; each is given as soon as it is known.

    Whoever keeps what came can leave it out of ``pieces`` the next time: pieces do not depend on each other.

    Args:
        source: the original.
        batches: int64 [B, T] each.
        states: what ``own_states`` of the same two has kept.
        pieces: of the original's roles; the last layers first are cheap first.
        store: where hidden states wait.
        search: choose scales by mean squared error, as ``quantize --search`` does.
        rows_bytes: see ``Setting``.
        seed: of the bootstrap.
        progress: see ``run_variants``.

    Raises:
        DataError, FormatError, ValueError: see ``numerics.rounding.quantize``.
        OutputError: hidden states cannot be kept.
    """
    reference = Side(source=source, hidden=states.original)
    setting = Setting(
        model=source,
        before=states.before,
        reference=reference,
        batches=batches,
        store=store,
        rows_bytes=rows_bytes,
    )
    for at in range(0, len(pieces), TOGETHER):
        wave = pieces[at : at + TOGETHER]
        variants = [
            Variant(
                over=RoundedWeights(base=source, scheme=piece.scheme, search=search),
                roles=piece.roles,
                rounding=rounding_of(dict.fromkeys(wholes(piece.roles), piece.scheme.activation)) or leave_inputs,
            )
            for piece in wave
        ]
        for piece, kl in zip(wave, run_variants(setting, variants, progress, phase="rounded alone"), strict=True):
            number = Draws(len(kl), seed).mean("kl_alone", "as served", kl, "nats")
            whole = wholes(piece.roles)
            yield Sensitivity(
                piece=piece,
                kl=number.value,
                low=number.low,
                high=number.high,
                bytes_rounded=sum(_bytes(source, role, piece.scheme) for role in whole),
                bytes_original=sum(map(source.stored_bytes, whole)),
            )


def _bytes(source: CheckpointWeights, role: TensorRole, scheme: Scheme) -> int:
    rows, cols = source.stored[role].shape
    return stored_bytes(scheme, (rows, cols))
