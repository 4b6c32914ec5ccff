"""How far two models' next-token distributions lie apart, token by token.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LIKELIEST = 5
"""Tokens of either model that are compared as sets."""

_RUN = 256
"""Entries whose float32 sum goes into a float64 one."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenScores:
    """What each of T scored positions says.

    Attributes:
        kl: KL(original || converted) in nats, float64 [T].
        kl_reverse: KL(converted || original).
        agree: whether both models' likeliest token is the same, bool [T].
        likeliest: the share of the original's ``LIKELIEST`` likeliest tokens that are among the converted model's.
        nll_original: negative log-likelihood of the text's next token, float64 [T].
        nll_converted: the same for the converted model.
    """

    kl: Floats
    kl_reverse: Floats
    agree: NDArray[np.bool_]
    likeliest: Floats
    nll_original: Floats
    nll_converted: Floats


class VocabularyScan:
    """Scores T tokens while both heads' logits pass by, some rows and some of the vocabulary at a time.

    With p, q the softmax of logits z, y: ``KL(p || q) = sum_v p_v (z_v - y_v) - logsumexp z + logsumexp y``, and the
    other way round with q_v and the signs turned. z and y are taken relative to the largest logit of each so far; sums
    are float64, of runs of ``_RUN`` entries in float32, so that neither the order nor the number of slabs matters.
    """

    def __init__(self, targets: Tensor) -> None:
        """``targets`` int64 [T]: the token that follows each position in the text."""
        tokens = targets.shape[0]
        self._targets = targets
        self._top = torch.full((2, tokens), -torch.inf)
        self._best = torch.zeros((2, tokens), dtype=torch.int64)
        self._sum = torch.zeros((2, tokens), dtype=torch.float64)
        self._cross = torch.zeros((2, tokens), dtype=torch.float64)
        self._target = torch.full((2, tokens), torch.nan)
        self._likely = torch.full((2, tokens, LIKELIEST), -torch.inf)
        self._likely_ids = torch.full((2, tokens, LIKELIEST), -1)

    def add(self, first_row: int, first_token: int, original: Tensor, converted: Tensor) -> None:
        """Take float32 logits [t, v] of positions from ``first_row`` and vocabulary entries from ``first_token``.

        Every (position, entry) pair must be given exactly once.
        """
        rows = slice(first_row, first_row + original.shape[0])
        inside = self._targets[rows] - first_token
        hit = (inside >= 0) & (inside < original.shape[1])
        at = inside.clamp(0, original.shape[1] - 1).unsqueeze(1)
        known = self._top[:, rows]
        values, best = (torch.stack(both) for both in zip(original.max(dim=1), converted.max(dim=1), strict=True))
        # a NaN must win: the scores of that position are then NaN and no limit passes
        top = torch.maximum(known, values)
        self._best[:, rows] = torch.where(values > known, best + first_token, self._best[:, rows])
        shift = torch.where(self._sum[:, rows] == 0, 0.0, (known - top).to(torch.float64))
        shrink = (known - top).exp().to(torch.float64)
        self._top[:, rows] = top
        shifted = [logits - top[side].unsqueeze(1) for side, logits in enumerate((original, converted))]
        difference = shifted[0] - shifted[1]
        for side, logits in enumerate((original, converted)):
            weight = shifted[side].exp_()
            before = self._cross[side, rows] + (shift[0] - shift[1]) * self._sum[side, rows]
            self._sum[side, rows] = self._sum[side, rows] * shrink[side] + _sum(weight)
            self._cross[side, rows] = before * shrink[side] + _sum(weight.mul_(difference))
            target = logits.gather(1, at).squeeze(1)
            self._target[side, rows] = torch.where(hit, target, self._target[side, rows])
            self._keep_likeliest(side, rows, first_token, logits)

    def _keep_likeliest(self, side: int, rows: slice, first_token: int, logits: Tensor) -> None:
        values, ids = logits.topk(min(LIKELIEST, logits.shape[1]), dim=1)
        values = torch.cat((self._likely[side, rows], values), dim=1)
        ids = torch.cat((self._likely_ids[side, rows], ids + first_token), dim=1)
        self._likely[side, rows], kept = values.topk(LIKELIEST, dim=1)
        self._likely_ids[side, rows] = ids.gather(1, kept)

    @property
    def likeliest(self) -> tuple[Tensor, Tensor]:
        """The likeliest token of the original and of the converted model so far, int64 [T] each."""
        return self._best[0], self._best[1]

    def scores(self) -> TokenScores:
        """The scores once the whole vocabulary has passed; a KL that rounding made negative is 0."""
        log_sum = self._sum.log()
        ratio = log_sum[0] - log_sum[1]
        kl = self._cross[0] / self._sum[0] - ratio
        reverse = ratio - self._cross[1] / self._sum[1]
        nll = log_sum + (self._top.to(torch.float64) - self._target)
        ours, theirs = self._likely_ids
        count = (ours[0] >= 0).sum().clamp(min=1) if len(ours) else 1
        shared = ((ours.unsqueeze(2) == theirs.unsqueeze(1)) & (ours >= 0).unsqueeze(2)).sum((1, 2))
        return TokenScores(
            kl=kl.clamp(min=0).numpy(),
            kl_reverse=reverse.clamp(min=0).numpy(),
            agree=((self._best[0] == self._best[1]) & ~kl.isnan()).numpy(),
            likeliest=(shared / count).to(torch.float64).masked_fill(kl.isnan(), 0.0).numpy(),
            nll_original=nll[0].numpy(),
            nll_converted=nll[1].numpy(),
        )


def _sum(x: Tensor) -> Tensor:
    """Row sums [T] in float64 of x [T, v], of whose runs float32 is precise enough."""
    return torch.stack([run.sum(1) for run in torch.split(x, _RUN, dim=1)]).sum(0, dtype=torch.float64)


def score(original: Tensor, converted: Tensor, targets: Tensor, rows: int = 256) -> TokenScores:
    """Scores of two whole logit matrices [T, V], ``rows`` at a time, widened to float32."""
    scan = VocabularyScan(targets)
    for start in range(0, targets.shape[0], rows):
        part = slice(start, start + rows)
        scan.add(start, 0, original[part].to(torch.float32), converted[part].to(torch.float32))
    return scan.scores()
