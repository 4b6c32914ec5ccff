"""The prediction head over whole token batches, its weights in memory one layer at a time, its experts one by one.

Shapes: B batch, T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

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
from reference_model.layerwise import HiddenStates, look_up
from reference_model.load import WeightSource, fill_weights
from reference_model.mtp import MultiTokenPredictor


def has_prediction_head(config: TextConfig, source: WeightSource) -> bool:
    """Whether a model has a prediction head, and ``source`` its weights."""
    return config.mtp_num_hidden_layers > 0 and "mtp.fc.weight" in source.specs()


@torch.no_grad()
def run_drafts(
    config: TextConfig,
    source: WeightSource,
    batches: Sequence[Tensor],
    hidden: HiddenStates,
    drafts: HiddenStates,
    dtype: torch.dtype,
    *,
    on_layer: Callable[[LayerRecord], None] | None = None,
    input_roundings: Sequence[InputRounding] | None = None,
    rows_bytes: int = ROWS_BYTES,
    each: Each = one_by_one,
) -> None:
    """What the prediction head makes of every position but the last, told the token that follows it in the batch.

    Args:
        config: of the decoder.
        source: weights, those of the head among them; they must have been checked.
        batches: int64 [B, T] each, T at least 2.
        hidden: the decoder's outputs [B, T, D] of ``run_layers``.
        drafts: takes [B, T - 1, D], inputs of the shared output matrix: position t scores token t + 2.
        dtype: of the computation.
        on_layer: sees every layer's result for every batch.
        input_roundings: what is done to the inputs of matrices, ``mtp.fc`` among them, for each batch.
        rows_bytes: as in ``run_layers``.
        each: as in ``pass_layer``.

    Raises:
        KeyError: the source holds no prediction head.
    """
    head = enter_head(config, source, batches, hidden, drafts, dtype, input_roundings=input_roundings)

    def wait(record: LayerRecord) -> None:
        drafts.put(record.batch, record.hidden)
        if on_layer is not None:
            on_layer(record)

    def lane(rounding: InputRounding, numbers: tuple[int, ...] | None) -> Lane:
        return Lane(take=drafts.__getitem__, give=wait, rounding=rounding, batches=numbers)

    lanes = [lane(leave_inputs, None)]
    if input_roundings is not None:
        lanes = [lane(rounding, (b,)) for b, rounding in enumerate(input_roundings)]
    shifted = [Batch(ids=ids[:, 1:]) for ids in batches]
    for n in range(config.mtp_num_hidden_layers):
        pass_layer(config, source, n, shifted, lanes, dtype, block="mtp.layers", rows_bytes=rows_bytes, each=each)
    for b in range(len(batches)):
        drafts.put(b, head.norm(drafts[b]))


@torch.no_grad()
def enter_head(
    config: TextConfig,
    source: WeightSource,
    batches: Sequence[Tensor],
    hidden: HiddenStates,
    drafts: HiddenStates,
    dtype: torch.dtype,
    *,
    input_roundings: Sequence[InputRounding] | None = None,
) -> MultiTokenPredictor:
    """Put what the head's first layer reads into ``drafts``; arguments and errors as for ``run_drafts``.

    Returns the head without its layers: what is left to do behind them is its ``norm``.
    """
    with torch.device("meta"):
        head = MultiTokenPredictor(config)
    fill_weights(head, source, dtype, prefix="mtp.", skip=("layers.",))
    for b, ids in enumerate(batches):
        following = look_up(source, ids[:, 1:], dtype)
        told = torch.cat((head.pre_fc_norm_embedding(following), head.pre_fc_norm_hidden(hidden[b][:, :-1])), dim=-1)
        before = None if input_roundings is None else input_roundings[b]("mtp.fc")
        drafts.put(b, head.fc(told if before is None else before(told)))
    return head
