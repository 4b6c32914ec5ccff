"""The same forward with one layer's weights in memory at a time, and of the routed experts one expert at a time.

All batches wait in a store with their hidden states [B, T, D] while a layer is loaded, pass it one after another, and
wait for the next. For the same batches and number of threads the results equal those of the whole model bit for bit:
every product has the same operands.

What is in memory, besides what the store keeps there: one layer without its experts, one expert, and the tokens of
as many batches as ``ROWS_BYTES`` allows, at least one. Only the tokens that enter an expert together have to be there
together, so that it is read once for all of them.

Shapes: B batch, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from reference_model.attention import AttentionKind
from reference_model.config import TextConfig
from reference_model.each import Each, one_by_one
from reference_model.layer_pass import (
    ROWS_BYTES,
    Batch,
    InputRounding,
    Lane,
    LayerRecord,
    leave_inputs,
    pass_layer,
)
from reference_model.load import ActivationStore, MemoryStore, WeightSource, check_weights, fill_weights
from reference_model.model import HEAD_COLUMNS, HEAD_ROWS, CausalLM, row_logits, vocabulary_blocks
from reference_model.norm import RMSNorm
from reference_model.span import check_ids, check_places

NEAR_ROWS = 8
"""How far apart rows of the embedding may be that are read with what lies between them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitRows:
    """Logits [rows, V] of tokens ``begin`` to ``begin + rows`` of a batch, counted through its flattened [B T]."""

    batch: int
    begin: int
    logits: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class HiddenStates:
    """Hidden states [B, T, D] of all batches, in a store, under a ``name`` of their own."""

    store: ActivationStore
    count: int
    name: str = "hidden"

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, batch: int) -> Tensor:
        if not 0 <= batch < self.count:
            raise IndexError(f"batch {batch} of {self.count}")
        return self.store.get(f"{self.name}.{batch}")

    def put(self, batch: int, hidden: Tensor) -> None:
        """Let a batch wait."""
        self.store.put(f"{self.name}.{batch}", hidden)

    def drop(self, batch: int) -> None:
        """Forget a batch."""
        self.store.drop(f"{self.name}.{batch}")


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
    each: Each = one_by_one,
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
        each: as in ``pass_layer``.

    Raises:
        WeightError: weights are missing, left over, or do not fit, all of them named; nothing has been read then.
        ValueError: ids are not of the vocabulary or not [B, T], or something else does not fit them; nothing has been
            read then either.
    """
    inputs = _inputs(batches, attention_masks, position_ids, embeddings)
    hidden = HiddenStates(store=MemoryStore() if store is None else store, count=len(batches))
    embed(config, source, inputs, hidden, dtype)

    def wait(record: LayerRecord) -> None:
        hidden.put(record.batch, record.hidden)
        if on_layer is not None:
            on_layer(record)

    lane = Lane(take=hidden.__getitem__, give=wait, rounding=input_rounding)
    for n in range(config.num_hidden_layers):
        pass_layer(config, source, n, inputs, (lane,), dtype, attention=attention, rows_bytes=rows_bytes, each=each)
    finish(config, source, hidden, dtype)
    return hidden


def embed(
    config: TextConfig, source: WeightSource, batches: Sequence[Batch], hidden: HiddenStates, dtype: torch.dtype
) -> None:
    """Check the weights of ``source``, then put the inputs of the first layer into ``hidden``.

    Raises:
        WeightError, ValueError: see ``run_layers``.
    """
    for batch in batches:
        check_ids(config, batch.ids, batch.embeddings)
        check_places(batch.ids.shape, batch.mask, batch.positions)
    _check_decoder(config, source)
    for b, batch in enumerate(batches):
        ready = batch.embeddings
        hidden.put(b, look_up(source, batch.ids, dtype) if ready is None else ready.to(dtype))


def finish(config: TextConfig, source: WeightSource, hidden: HiddenStates, dtype: torch.dtype) -> None:
    """The final norm, in place of the last layer's outputs."""
    with torch.device("meta"):
        norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
    fill_weights(norm, source, dtype, prefix="norm.")
    for b in range(len(hidden)):
        hidden.put(b, norm(hidden[b]))


def _inputs(
    batches: Sequence[Tensor],
    attention_masks: Sequence[Tensor | None] | None,
    position_ids: Sequence[Tensor | None] | None,
    embeddings: Sequence[Tensor | None] | None,
) -> list[Batch]:
    given = {"attention_masks": attention_masks, "position_ids": position_ids, "embeddings": embeddings}
    for name, entries in given.items():
        if entries is not None and len(entries) != len(batches):
            raise ValueError(f"{name} has {len(entries)} entries for {len(batches)} batches, expected one for each")
    masks, positions, ready = ([None] * len(batches) if entries is None else entries for entries in given.values())
    return [Batch(ids=ids, mask=masks[b], positions=positions[b], embeddings=ready[b]) for b, ids in enumerate(batches)]


def _check_decoder(config: TextConfig, source: WeightSource) -> None:
    with torch.device("meta"):
        decoder = CausalLM(replace(config, mtp_num_hidden_layers=0))
    check_weights(decoder, source, skip=("mtp.", "visual."))


def look_up(source: WeightSource, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Look ids [B, T] up: each row of the table is read once, those that lie close together at one go; [B, T, D]."""
    wanted, places = torch.unique(ids, return_inverse=True)
    apart = (wanted.diff() > NEAR_ROWS) | ((wanted // HEAD_COLUMNS).diff() != 0)
    ends = apart.nonzero().flatten() + 1
    table = [
        source.rows("embed_tokens.weight", int(run[0]), int(run[-1]) + 1)[run - run[0]].to(dtype, copy=True)
        for run in torch.tensor_split(wanted, ends.tolist())
    ]
    return functional.embedding(places, torch.cat(table))


@torch.no_grad()
def _logits(config: TextConfig, source: WeightSource, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Logits [rows, V] of hidden states [rows, D]."""
    name = "embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    blocks = (source.rows(name, begin, end).to(dtype) for begin, end in vocabulary_blocks(config.vocab_size))
    return row_logits(rows, blocks)
