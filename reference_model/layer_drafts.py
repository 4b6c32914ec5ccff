"""The prediction head over whole token batches, its weights in memory one layer at a time, its experts one by one.

Shapes: B batch, T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from reference_model.config import TextConfig
from reference_model.layer_pass import ROWS_BYTES, Batch, Lane, LayerRecord, pass_layer
from reference_model.layerwise import HiddenStates, look_up
from reference_model.load import WeightSource, fill_weights
from reference_model.mtp import MultiTokenPredictor


@torch.no_grad()
def run_drafts(
    config: TextConfig,
    source: WeightSource,
    batches: Sequence[Tensor],
    hidden: HiddenStates,
    drafts: HiddenStates,
    dtype: torch.dtype,
    *,
    rows_bytes: int = ROWS_BYTES,
) -> None:
    """What the prediction head makes of every position but the last, told the token that follows it in the batch.

    Args:
        config: of the decoder.
        source: weights, those of the head among them; they must have been checked.
        batches: int64 [B, T] each, T at least 2.
        hidden: the decoder's outputs [B, T, D] of ``run_layers``.
        drafts: takes [B, T - 1, D], inputs of the shared output matrix: position t scores token t + 2.
        dtype: of the computation.
        rows_bytes: as in ``run_layers``.

    Raises:
        KeyError: the source holds no prediction head.
    """
    head = enter_head(config, source, batches, hidden, drafts, dtype)

    def wait(record: LayerRecord) -> None:
        drafts.put(record.batch, record.hidden)

    lane = Lane(take=drafts.__getitem__, give=wait)
    shifted = [Batch(ids=ids[:, 1:]) for ids in batches]
    for n in range(config.mtp_num_hidden_layers):
        pass_layer(config, source, n, shifted, (lane,), dtype, block="mtp.layers", rows_bytes=rows_bytes)
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
) -> MultiTokenPredictor:
    """Put what the head's first layer reads into ``drafts``; arguments and errors as for ``run_drafts``.

    Returns the head without its layers: what is left to do behind them is its ``norm``.
    """
    with torch.device("meta"):
        head = MultiTokenPredictor(config)
    fill_weights(head, source, dtype, prefix="mtp.", skip=("layers.",))
    for b, ids in enumerate(batches):
        following = look_up(source, ids[:, 1:], dtype)
        told = head.pre_fc_norm_embedding(following), head.pre_fc_norm_hidden(hidden[b][:, :-1])
        drafts.put(b, head.fc(torch.cat(told, dim=-1)))
    return head
