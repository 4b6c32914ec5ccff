"""How far two models' next-token distributions lie apart: per token, then summarised with intervals.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qconvert.core.metric import Metric

BLOCK_TOKENS = 64
"""Consecutive tokens resampled together: their divergences are not independent."""

RESAMPLES = 1000

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenScores:
    """What each of T scored positions says.

    Attributes:
        kl: KL(original || converted) in nats, float64 [T].
        agree: whether both models' likeliest token is the same, bool [T].
        nll_original: negative log-likelihood of the text's next token, float64 [T].
        nll_converted: the same for the converted model.
    """

    kl: Floats
    agree: NDArray[np.bool_]
    nll_original: Floats
    nll_converted: Floats


class VocabularyScan:
    """Scores T tokens while both heads' logits pass by, some rows and some of the vocabulary at a time.

    With p, q the softmax of logits z, y: ``KL = sum_v p_v (z_v - y_v) - logsumexp z + logsumexp y``. The sums are kept
    relative to the largest logit so far and in float64, so that neither the order nor the number of slabs matters.
    """

    def __init__(self, targets: Tensor) -> None:
        """``targets`` int64 [T]: the token that follows each position in the text."""
        tokens = targets.shape[0]
        self._targets = targets
        self._top = torch.full((2, tokens), -torch.inf)
        self._best = torch.zeros((2, tokens), dtype=torch.int64)
        self._sum = torch.zeros((2, tokens), dtype=torch.float64)
        self._cross = torch.zeros(tokens, dtype=torch.float64)
        self._target = torch.full((2, tokens), torch.nan)

    def add(self, first_row: int, first_token: int, original: Tensor, converted: Tensor) -> None:
        """Take float32 logits [t, v] of positions from ``first_row`` and vocabulary entries from ``first_token``.

        Every (position, entry) pair must be given exactly once.
        """
        rows = slice(first_row, first_row + original.shape[0])
        inside = self._targets[rows] - first_token
        hit = (inside >= 0) & (inside < original.shape[1])
        at = inside.clamp(0, original.shape[1] - 1).unsqueeze(1)
        weights = []
        for side, logits in enumerate((original, converted)):
            value, best = logits.max(dim=1)
            known = self._top[side, rows]
            # a NaN must win: the scores of that position are then NaN and no limit passes
            top = torch.maximum(known, value)
            self._best[side, rows] = torch.where(value > known, best + first_token, self._best[side, rows])
            shrink = (known - top).exp().to(torch.float64)
            weight = (logits - top.unsqueeze(1)).exp_()
            self._sum[side, rows] = self._sum[side, rows] * shrink + weight.sum(1, dtype=torch.float64)
            self._top[side, rows] = top
            target = logits.gather(1, at).squeeze(1)
            self._target[side, rows] = torch.where(hit, target, self._target[side, rows])
            weights.append((weight, shrink))
        weight, shrink = weights[0]
        cross = weight.mul_(original - converted).sum(1, dtype=torch.float64)
        self._cross[rows] = self._cross[rows] * shrink + cross

    def scores(self) -> TokenScores:
        """The scores once the whole vocabulary has passed; a KL that rounding made negative is 0."""
        log_sum = self._top.to(torch.float64) + self._sum.log()
        kl = self._cross / self._sum[0] - log_sum[0] + log_sum[1]
        nll = log_sum - self._target.to(torch.float64)
        return TokenScores(
            kl=kl.clamp(min=0).numpy(),
            agree=((self._best[0] == self._best[1]) & ~kl.isnan()).numpy(),
            nll_original=nll[0].numpy(),
            nll_converted=nll[1].numpy(),
        )


def score(original: Tensor, converted: Tensor, targets: Tensor, rows: int = 256) -> TokenScores:
    """Scores of two whole logit matrices [T, V], ``rows`` at a time, widened to float32."""
    scan = VocabularyScan(targets)
    for start in range(0, targets.shape[0], rows):
        part = slice(start, start + rows)
        scan.add(start, 0, original[part].to(torch.float32), converted[part].to(torch.float32))
    return scan.scores()


def summarize(scores: TokenScores, where: str, seed: int = 0) -> tuple[Metric, ...]:
    """KL, top-1 agreement and perplexities, each with its 95% bootstrap interval.

    Percentile bootstrap over blocks of ``BLOCK_TOKENS`` consecutive tokens (Kunsch 1989), ``RESAMPLES`` draws, the
    same draws for every number, so that perplexities are compared on the same tokens.
    """
    draws = _Draws(len(scores.kl), seed)

    def mean(name: str, values: Floats, unit: str, high: bool = False) -> Metric:
        return _metric(name, where, float(values.mean()), draws.means(values), unit, high)

    def percentile(name: str, share: float) -> Metric:
        value = float(np.percentile(scores.kl, 100 * share, method="inverted_cdf"))
        return _metric(name, where, value, draws.percentiles(scores.kl, share), "nats", False)

    def perplexity(name: str, nll: Floats) -> Metric:
        with np.errstate(over="ignore"):
            return _metric(name, where, float(np.exp(nll.mean())), np.exp(draws.means(nll)), "", False)

    worst = float(scores.kl.max())
    return (
        mean("kl_mean", scores.kl, "nats"),
        percentile("kl_median", 0.5),
        percentile("kl_p99", 0.99),
        Metric(name="kl_max", where=where, value=worst, low=worst, high=worst, unit="nats"),
        mean("top1_agreement", scores.agree.astype(np.float64), "fraction", high=True),
        perplexity("perplexity_original", scores.nll_original),
        perplexity("perplexity_converted", scores.nll_converted),
        perplexity("perplexity_ratio", scores.nll_converted - scores.nll_original),
    )


def _metric(name: str, where: str, value: float, sampled: Floats, unit: str, high: bool) -> Metric:
    low, top = (float(q) for q in np.percentile(sampled, (2.5, 97.5)))
    return Metric(
        name=name,
        where=where,
        value=value,
        # an interval that the estimate itself falls out of (few, skewed tokens) is stretched to it
        low=min(low, value),
        high=max(top, value),
        unit=unit,
        better="high" if high else "low",
    )


class _Draws:
    """Which blocks of consecutive tokens each resample holds, and how often; short texts use smaller blocks."""

    def __init__(self, tokens: int, seed: int) -> None:
        self.size = max(1, min(BLOCK_TOKENS, tokens // 8))
        blocks = -(-tokens // self.size)
        self.lengths = np.minimum(self.size, tokens - self.size * np.arange(blocks))
        generator = np.random.default_rng(seed)
        self.counts = generator.multinomial(blocks, np.full(blocks, 1 / blocks), size=RESAMPLES).astype(np.float64)

    def means(self, values: Floats) -> Floats:
        """The mean of each resample, [RESAMPLES]."""
        sums = np.add.reduceat(values, self.size * np.arange(len(self.lengths)))
        out: Floats = self.counts @ sums / (self.counts @ self.lengths)
        return out

    def percentiles(self, values: Floats, share: float) -> Floats:
        """For each resample the smallest value that at least ``share`` of its tokens do not exceed, [RESAMPLES]."""
        order = np.argsort(values, kind="stable")
        block_of = order // self.size
        out = np.empty(len(self.counts))
        for i, count in enumerate(self.counts):
            reached = np.cumsum(count[block_of])
            out[i] = values[order[np.searchsorted(reached, share * reached[-1])]]
        return out
