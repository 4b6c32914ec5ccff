"""The same forward with one layer's weights in memory at a time, and of the routed experts one expert at a time.

All batches wait in a store with their hidden states [B, T, D] while a layer is loaded, pass it one after another, and
wait for the next. For the same batches and number of threads the results equal those of the whole model bit for bit:
every product has the same operands.

What is in memory, besides what the store keeps there: one layer without its experts, one expert, and the tokens of
as many batches as ``ROWS_BYTES`` allows, at least one. Only the tokens that enter an expert together have to be there
together, so that it is read once for all of them.

Shapes: B batch, T tokens, D hidden, V vocabulary, k experts a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from reference_model.attention import AttentionKind
from reference_model.config import TextConfig
from reference_model.layer import DecoderLayer
from reference_model.load import (
    ActivationStore,
    MemoryStore,
    WeightSource,
    check_weights,
    fill_weights,
    load_expert,
)
from reference_model.model import HEAD_ROWS, CausalLM, row_logits, vocabulary_blocks
from reference_model.moe import Dispatch, Routing, Visits, combine, dispatch, expert_mlp
from reference_model.norm import RMSNorm
from reference_model.span import check_ids, check_places, place_tokens

ROWS_BYTES = 1 << 30
"""Memory for the tokens that pass the experts of a layer together: 13,000 tokens of 35B in fp32."""

InputRounding = Callable[[str], Callable[[Tensor], Tensor] | None]
"""What an engine does to the inputs of a matrix before it multiplies, by the matrix's name without ``.weight``.

Of routed experts ``layers.0.mlp.experts.gate_up_proj`` and ``.down_proj`` are asked for; ``None`` leaves inputs alone.
"""


def leave_inputs(name: str) -> None:
    """The ``InputRounding`` of engines that round no activations."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRecord:
    """What one layer did to one batch: its output ``hidden`` [B, T, D], and where its tokens went."""

    layer: int
    batch: int
    hidden: Tensor
    routing: Routing


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitRows:
    """Logits [rows, V] of tokens ``begin`` to ``begin + rows`` of a batch, counted through its flattened [B T]."""

    batch: int
    begin: int
    logits: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class HiddenStates:
    """Hidden states [B, T, D] of all batches, in a store."""

    store: ActivationStore
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, batch: int) -> Tensor:
        if not 0 <= batch < self.count:
            raise IndexError(f"batch {batch} of {self.count}")
        return self.store.get(f"hidden.{batch}")

    def put(self, batch: int, hidden: Tensor) -> None:
        """Let a batch wait."""
        self.store.put(f"hidden.{batch}", hidden)

    def drop(self, batch: int) -> None:
        """Forget a batch."""
        self.store.drop(f"hidden.{batch}")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Batch:
    ids: Tensor
    mask: Tensor | None
    positions: Tensor | None
    embeddings: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Visit:
    """A batch before the experts: ``hidden`` [B, T, D], and the normed ``inputs`` [B T, D] of what follows.

    ``rows`` [B T k, D] are copies of the inputs sorted by expert; ``parts``, views of them by expert, take the outputs.
    """

    hidden: Tensor
    inputs: Tensor
    routing: Routing
    visits: Visits
    where: Dispatch
    rows: Tensor
    parts: tuple[Tensor, ...]


def run_layerwise(
    config: TextConfig,
    source: WeightSource,
    batches: Sequence[Tensor],
    dtype: torch.dtype,
    *,
    attention_masks: Sequence[Tensor | None] | None = None,
    position_ids: Sequence[Tensor | None] | None = None,
    embeddings: Sequence[Tensor | None] | None = None,
    attention: AttentionKind = "sdpa",
    on_layer: Callable[[LayerRecord], None] | None = None,
    store: ActivationStore | None = None,
    rows_bytes: int = ROWS_BYTES,
) -> Iterator[LogitRows]:
    """Logits of token batches [B, T], a few hundred rows at a time, in the order of the batches.

    The output matrix is read in blocks, once for ``HEAD_ROWS`` rows. Arguments and errors as ``run_layers``; nothing
    runs before the first result is asked for, and a batch leaves the store after its last one.
    """
    hidden = run_layers(
        config,
        source,
        batches,
        dtype,
        attention_masks=attention_masks,
        position_ids=position_ids,
        embeddings=embeddings,
        attention=attention,
        on_layer=on_layer,
        store=store,
        rows_bytes=rows_bytes,
    )
    for batch in range(len(hidden)):
        begin = 0
        for rows in torch.split(hidden[batch].flatten(0, 1), HEAD_ROWS):
            yield LogitRows(batch=batch, begin=begin, logits=_logits(config, source, rows, dtype))
            begin += len(rows)
        hidden.drop(batch)


@torch.no_grad()
def run_layers(
    config: TextConfig,
    source: WeightSource,
    batches: Sequence[Tensor],
    dtype: torch.dtype,
    *,
    attention_masks: Sequence[Tensor | None] | None = None,
    position_ids: Sequence[Tensor | None] | None = None,
    embeddings: Sequence[Tensor | None] | None = None,
    attention: AttentionKind = "sdpa",
    on_layer: Callable[[LayerRecord], None] | None = None,
    input_rounding: InputRounding = leave_inputs,
    store: ActivationStore | None = None,
    rows_bytes: int = ROWS_BYTES,
) -> HiddenStates:
    """Hidden states [B, T, D] of token batches [B, T] after the final norm.

    Args:
        config: of the decoder.
        source: weights, of which the prediction head's and the vision tower's are not looked at.
        batches: int64 [B, T] each.
        dtype: of the computation.
        attention_masks: [B, T], zero at padding, or ``None``, one entry a batch.
        position_ids: [3, B, T], or ``None`` to count real tokens, one entry a batch.
        embeddings: [B, T, D] instead of those of the table, such as ``MultimodalLM.embed`` makes them, or ``None``; one
            entry a batch.
        attention: as in ``CausalLM``.
        on_layer: sees every layer's result for every batch.
        input_rounding: simulates engines that round activations.
        store: where batches wait; in memory by default. The results stay there.
        rows_bytes: memory for what enters the experts of a layer together. Less of it reads every expert more often.

    Raises:
        WeightError: weights are missing, left over, or do not fit, all of them named; nothing has been read then.
        ValueError: ids are not of the vocabulary or not [B, T], or something else does not fit them; nothing has been
            read then either.
    """
    inputs = _inputs(config, batches, attention_masks, position_ids, embeddings)
    _check_decoder(config, source)
    hidden = HiddenStates(store=MemoryStore() if store is None else store, count=len(batches))
    for b, batch in enumerate(inputs):
        ready = batch.embeddings
        hidden.put(b, _embed(source, batch.ids, dtype) if ready is None else ready.to(dtype))
    for n in range(config.num_hidden_layers):
        layer = _load_layer(config, source, n, dtype, attention, input_rounding)
        for group in _groups(config, batches, dtype, rows_bytes):
            visits = [_enter(config, layer, hidden[b], inputs[b]) for b in group]
            _run_experts(config, source, f"layers.{n}.mlp.experts", visits, dtype, input_rounding)
            for b in group:
                visit = visits.pop(0)
                routed = combine(visit.rows, visit.where, visit.visits.weights)
                out = visit.hidden + layer.mlp.with_shared(visit.inputs, routed).view_as(visit.hidden)
                hidden.put(b, out)
                if on_layer is not None:
                    on_layer(LayerRecord(layer=n, batch=b, hidden=out, routing=visit.routing))
    with torch.device("meta"):
        norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
    fill_weights(norm, source, dtype, prefix="norm.")
    for b in range(len(hidden)):
        hidden.put(b, norm(hidden[b]))
    return hidden


def _inputs(
    config: TextConfig,
    batches: Sequence[Tensor],
    attention_masks: Sequence[Tensor | None] | None,
    position_ids: Sequence[Tensor | None] | None,
    embeddings: Sequence[Tensor | None] | None,
) -> list[_Batch]:
    given = {"attention_masks": attention_masks, "position_ids": position_ids, "embeddings": embeddings}
    for name, entries in given.items():
        if entries is not None and len(entries) != len(batches):
            raise ValueError(f"{name} has {len(entries)} entries for {len(batches)} batches, expected one for each")
    masks, positions, ready = ([None] * len(batches) if entries is None else entries for entries in given.values())
    inputs = [
        _Batch(ids=ids, mask=masks[b], positions=positions[b], embeddings=ready[b]) for b, ids in enumerate(batches)
    ]
    for batch in inputs:
        check_ids(config, batch.ids, batch.embeddings)
        check_places(batch.ids.shape, batch.mask, batch.positions)
    return inputs


def _check_decoder(config: TextConfig, source: WeightSource) -> None:
    with torch.device("meta"):
        decoder = CausalLM(replace(config, mtp_num_hidden_layers=0))
    check_weights(decoder, source, skip=("mtp.", "visual."))


def _embed(source: WeightSource, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Look ids [B, T] up: each row of the table is read once, consecutive ones together; [B, T, D]."""
    wanted, places = torch.unique(ids, return_inverse=True)
    ends = (wanted.diff() != 1).nonzero().flatten() + 1
    table = [
        source.rows("embed_tokens.weight", int(run[0]), int(run[-1]) + 1).to(dtype, copy=True)
        for run in torch.tensor_split(wanted, ends.tolist())
    ]
    return functional.embedding(places, torch.cat(table))


def _load_layer(
    config: TextConfig,
    source: WeightSource,
    n: int,
    dtype: torch.dtype,
    attention: AttentionKind,
    input_rounding: InputRounding,
) -> DecoderLayer:
    """Layer n without its routed experts; what enters its linear modules is rounded."""
    with torch.device("meta"):
        layer = DecoderLayer(config, config.layer_types[n], attention)
    fill_weights(layer, source, dtype, prefix=f"layers.{n}.", skip=("mlp.experts.",))
    for name, module in layer.named_modules():
        rounding = input_rounding(f"layers.{n}.{name}") if isinstance(module, nn.Linear) else None
        if rounding is not None:
            module.register_forward_pre_hook(partial(_replace_input, rounding))
    return layer


def _replace_input(rounding: Callable[[Tensor], Tensor], module: nn.Module, args: tuple[Tensor]) -> Tensor:
    return rounding(args[0])


def _groups(config: TextConfig, batches: Sequence[Tensor], dtype: torch.dtype, rows_bytes: int) -> Iterator[range]:
    """Consecutive batches whose ``_Visit`` tensors fit into ``rows_bytes``; a batch is never cut."""
    token_bytes = (config.num_experts_per_tok + config.folded_experts + 2) * config.hidden_size * dtype.itemsize
    begin, held = 0, 0
    for b, ids in enumerate(batches):
        need = ids.numel() * token_bytes
        if b > begin and held + need > rows_bytes:
            yield range(begin, b)
            begin, held = b, 0
        held += need
    yield range(begin, len(batches))


def _enter(config: TextConfig, layer: DecoderLayer, x: Tensor, batch: _Batch) -> _Visit:
    """The first half of a layer for one batch, and where its tokens go."""
    span = place_tokens(config, x, attention_mask=batch.mask, position_ids=batch.positions)
    hidden, _ = layer.mix(x, span)
    inputs = layer.post_attention_layernorm(hidden).flatten(0, 1)
    routing: Routing = layer.mlp.gate(inputs)
    visits = layer.mlp.visits(inputs, routing)
    where = dispatch(visits.experts, config.stored_experts)
    rows = inputs.index_select(0, where.token)
    return _Visit(
        hidden=hidden,
        inputs=inputs,
        routing=routing,
        visits=visits,
        where=where,
        rows=rows,
        parts=torch.split(rows, where.counts),
    )


def _run_experts(
    config: TextConfig,
    source: WeightSource,
    name: str,
    visits: Sequence[_Visit],
    dtype: torch.dtype,
    input_rounding: InputRounding,
) -> None:
    """What ``moe.Experts`` computes, for all visits: experts outside, so that each is read once, if reached at all."""
    round_x, round_inner = input_rounding(f"{name}.gate_up_proj"), input_rounding(f"{name}.down_proj")
    for e in range(config.stored_experts):
        parts = [visit.parts[e] for visit in visits if visit.where.counts[e]]
        if not parts:
            continue
        gate_up, down = load_expert(source, name, e, dtype)
        for part in parts:
            part.copy_(expert_mlp(part, gate_up, down, round_x, round_inner))


@torch.no_grad()
def _logits(config: TextConfig, source: WeightSource, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Logits [rows, V] of hidden states [rows, D]."""
    name = "embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    blocks = (source.rows(name, begin, end).to(dtype) for begin, end in vocabulary_blocks(config.vocab_size))
    return row_logits(rows, blocks)
