"""How often the prediction head guesses what its model would choose, before and after a conversion.

Shapes: B windows, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qconvert.core.metric import Metric
from qconvert.parity.heads import Side, scan_heads
from qconvert.parity.summary import Draws
from qconvert.weights.source import CheckpointWeights
from qconvert.weights.spill import SpillStore
from reference_model.each import Each, one_by_one
from reference_model.layer_drafts import has_prediction_head, run_drafts
from reference_model.layerwise import HiddenStates


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftScores:
    """Whether each guess is what its own model chooses, given the text up to there: bool [P] of both models.

    Position t of a window guesses token t + 2 from the text up to t + 1, all positions but the last two.
    """

    original: NDArray[np.bool_]
    converted: NDArray[np.bool_]


def has_drafts(source: CheckpointWeights) -> bool:
    """Whether a checkpoint has a prediction head, and its weights."""
    return has_prediction_head(source.config.text, source)


def accepted(
    source: CheckpointWeights,
    batches: Sequence[Tensor],
    hidden: HiddenStates,
    chosen: Tensor,
    memory: int,
    each: Each = one_by_one,
) -> NDArray[np.bool_]:
    """See ``DraftScores``, of one model.

    Args:
        source: its weights; of the head's inputs none are rounded.
        batches: int64 [B, T] each.
        hidden: final outputs [B, T, D].
        chosen: its likeliest token at every position but the last of each window, int64, in their order.
        memory: bytes for the head's states, and again for the tokens that enter its experts together.
        each: as in ``pass_layer``.
    """
    config = source.config.text
    best = _Best(sum(ids.shape[0] * (ids.shape[1] - 2) for ids in batches))
    with SpillStore(memory) as store:
        drafts = HiddenStates(store=store, count=len(batches), name="draft")
        run_drafts(config, source, batches, hidden, drafts, torch.float32, rows_bytes=memory, each=each)
        scan_heads([Side(source=source, hidden=drafts)], [(best.add, (0,))], each=each)
    # the choice after token t + 1 stands one place further in its window
    counts = [ids.shape[0] * (ids.shape[1] - 1) for ids in batches]
    later = [
        part.view(ids.shape[0], -1)[:, 1:].flatten()
        for part, ids in zip(torch.split(chosen, counts), batches, strict=True)
    ]
    result: NDArray[np.bool_] = (best.tokens == torch.cat(later)).numpy()
    return result


def draft_metrics(found: DraftScores, where: str, seed: int) -> Iterator[Metric]:
    """The shares of accepted guesses, and how much of it is lost, on the same tokens."""
    before, after = (one.astype(np.float64) for one in (found.original, found.converted))
    if not len(before):
        return
    draws = Draws(len(before), seed)
    yield draws.mean("draft_acceptance_original", where, before, "fraction", high=True)
    yield draws.mean("draft_acceptance_converted", where, after, "fraction", high=True)
    yield draws.mean("draft_acceptance_lost", where, before - after, "fraction")


class _Best:
    """The likeliest token of every position; NaN has none."""

    def __init__(self, count: int) -> None:
        self.tokens = torch.full((count,), -1)
        self._top = torch.full((count,), -torch.inf)

    def add(self, first_row: int, first_token: int, logits: Tensor) -> None:
        """Take float32 logits [t, v]."""
        rows = slice(first_row, first_row + len(logits))
        value, best = logits.max(dim=1)
        better = value > self._top[rows]
        self.tokens[rows] = torch.where(better, best + first_token, self.tokens[rows])
        self._top[rows] = torch.maximum(self._top[rows], value)
