"""Scores of two models of which at least one is known by its likeliest tokens alone, and how far they can be off.

Tokens that are not known one by one are taken together as one. By the log-sum inequality this can only lower a
divergence (Cover and Thomas, Elements of Information Theory, theorem 2.7.1), so that what is computed is a lower bound.

Shapes: T tokens, k known tokens a position, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from qconvert.parity.logits import LIKELIEST, Floats, TokenScores
from qconvert.parity.saved import SavedLogprobs

_ROWS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Truncated:
    """Lower bounds as ``scores``, and what KL(original || converted) is at most: ``kl_most`` [T], infinite if unknown.

    The reverse divergence has no such bound: the original's tail may hold next to nothing of any token.
    """

    scores: TokenScores
    kl_most: Floats

    @property
    def highest(self) -> TokenScores:
        """The scores with every divergence at its upper bound."""
        reverse = np.where(self.kl_most == self.scores.kl, self.scores.kl_reverse, np.inf)
        return replace(self.scores, kl=self.kl_most, kl_reverse=reverse)


class KnownTokensScan:
    """What one model says of some tokens of every position, while its logits pass by; see ``VocabularyScan``."""

    def __init__(self, ids: Tensor, targets: Tensor) -> None:
        """``ids`` int64 [T, k] and ``targets`` int64 [T] are asked for."""
        self._asked = torch.cat((ids, targets.unsqueeze(1)), dim=1)
        count = len(targets)
        self._values = torch.full(self._asked.shape, torch.nan)
        self._top = torch.full((count,), -torch.inf)
        self._low = torch.full((count,), torch.inf)
        self._sum = torch.zeros(count, dtype=torch.float64)
        self._rest = torch.zeros(count, dtype=torch.float64)
        self._likely = torch.full((count, LIKELIEST), -torch.inf)
        self._likely_ids = torch.full((count, LIKELIEST), -1)

    def add(self, first_row: int, first_token: int, logits: Tensor) -> None:
        """Take float32 logits [t, v]."""
        rows = slice(first_row, first_row + logits.shape[0])
        inside = self._asked[rows] - first_token
        hit = (inside >= 0) & (inside < logits.shape[1])
        values = logits.gather(1, inside.clamp(0, logits.shape[1] - 1))
        self._values[rows] = torch.where(hit, values, self._values[rows])
        top = torch.maximum(self._top[rows], logits.amax(1))
        shrink = (self._top[rows] - top).exp().to(torch.float64)
        weight = (logits - top.unsqueeze(1)).exp_()
        self._sum[rows] = self._sum[rows] * shrink + weight.sum(1, dtype=torch.float64)
        # by itself, since one minus what is known would have lost the digits of a small rest; known tokens of other
        # slabs point at one column more
        known = torch.where(hit, inside, logits.shape[1])[:, :-1]
        outside = functional.pad(weight, (0, 1)).scatter_(1, known, 0.0).sum(1, dtype=torch.float64)
        self._rest[rows] = self._rest[rows] * shrink + outside
        self._top[rows] = top
        self._low[rows] = torch.minimum(self._low[rows], logits.amin(1))
        values, ids = logits.topk(min(LIKELIEST, logits.shape[1]), dim=1)
        values = torch.cat((self._likely[rows], values), dim=1)
        ids = torch.cat((self._likely_ids[rows], ids + first_token), dim=1)
        self._likely[rows], order = values.topk(LIKELIEST, dim=1)
        self._likely_ids[rows] = ids.gather(1, order)

    def against(self, saved: SavedLogprobs, *, original: bool) -> Truncated:
        """Scores once the whole vocabulary has passed; ``original`` says that this model is the original."""
        log_sum = self._top.to(torch.float64) + self._sum.log()
        known = self._values.to(torch.float64) - log_sum.unsqueeze(1)
        here, nll = known[:, :-1], -known[:, -1]
        others = saved.vocabulary - here.shape[1]
        lowest = self._low.to(torch.float64) - log_sum
        # what is left of one cannot be less than so many times the least that any token has
        least = others * lowest.exp()
        rest = torch.maximum(self._rest / self._sum, least).log()
        if not others:
            rest = torch.full_like(rest, -torch.inf)
        nan = here.isnan().any(1) | lowest.isnan()
        rest = rest.masked_fill(nan, torch.nan)
        there, tail = saved.logprobs, saved.tail
        ours, theirs = ((here, rest), (there, tail)) if original else ((there, tail), (here, rest))
        scores = _scores(ours, theirs)
        if not others:
            most = scores[0]
        elif original:
            most = torch.full_like(tail, torch.inf)
        else:
            # every token of the tail has at most what the last known one has, here at least what the least likely has
            cap = torch.minimum(there[:, -1], tail)
            most = scores[0] + (tail.exp() * (cap - lowest - tail + rest)).clamp(min=0).where(tail > -torch.inf, 0.0)
        mine, other = self._likely_ids, saved.ids[:, :LIKELIEST]
        first, second = (mine, other) if original else (other, mine)
        nlls = (nll, -saved.target) if original else (-saved.target, nll)
        return _truncated(scores, most, first, second, nlls)


def between(ours: SavedLogprobs, theirs: SavedLogprobs) -> Truncated:
    """Scores of two files over the same tokens, of which those are known that both hold."""
    kl, reverse = [], []
    for begin in range(0, len(ours.ids), _ROWS):
        rows = slice(begin, begin + _ROWS)
        same = ours.ids[rows].unsqueeze(2) == theirs.ids[rows].unsqueeze(1)
        sides = []
        for saved, shared in ((ours, same.any(2)), (theirs, same.any(1))):
            logprobs = saved.logprobs[rows]
            left = logprobs.exp().masked_fill(shared, 0.0).sum(1) + saved.tail[rows].exp()
            sides.append((logprobs, left.log()))
        # the converted model's numbers in the original's order; tokens that only one of them holds are in the rest
        aligned = torch.where(same, sides[1][0].unsqueeze(1), -torch.inf).amax(2)
        shared = same.any(2)
        both = [torch.where(shared, values, -torch.inf) for values in (sides[0][0], aligned)]
        found = _scores((both[0], sides[0][1]), (both[1], sides[1][1]))
        kl.append(found[0])
        reverse.append(found[1])
    scores = torch.cat(kl), torch.cat(reverse)
    complete = ours.ids.shape[1] == theirs.ids.shape[1] == ours.vocabulary
    most = scores[0] if complete else torch.full_like(scores[0], torch.inf)
    first, second = (saved.ids[:, :LIKELIEST] for saved in (ours, theirs))
    return _truncated(scores, most, first, second, (-ours.target, -theirs.target))


def _scores(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """KL both ways [T] of log-probabilities [T, k] and of the rest [T] taken as one more token."""
    p, q = (torch.cat((known, rest.unsqueeze(1)), dim=1) for known, rest in (ours, theirs))
    return _divergence(p, q), _divergence(q, p)


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    # nothing costs nothing, whatever the other side says of it
    terms = torch.where(p == -torch.inf, 0.0, p.exp() * (p - q))
    return terms.sum(1).clamp(min=0)


def _truncated(
    scores: tuple[Tensor, Tensor], most: Tensor, ours: Tensor, theirs: Tensor, nlls: tuple[Tensor, Tensor]
) -> Truncated:
    kl, reverse = scores
    lost = kl.isnan()
    shared = ((ours.unsqueeze(2) == theirs.unsqueeze(1)) & (ours >= 0).unsqueeze(2)).sum((1, 2))
    count = max(int((ours[0] >= 0).sum()), 1)
    return Truncated(
        scores=TokenScores(
            kl=kl.numpy(),
            kl_reverse=reverse.numpy(),
            agree=((ours[:, 0] == theirs[:, 0]) & ~lost).numpy(),
            likeliest=(shared / count).to(torch.float64).masked_fill(lost, 0.0).numpy(),
            nll_original=nlls[0].numpy(),
            nll_converted=nlls[1].numpy(),
        ),
        kl_most=torch.maximum(most, kl).numpy(),
    )
