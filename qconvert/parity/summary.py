"""The scores of many tokens as a few numbers with intervals: over all of them, by position and by domain.

Where ``llama-perplexity --kl-divergence`` of llama.cpp gives the same number, the definition is its own: mean and
maximum KL, percentiles by linear interpolation between neighbouring values, ``exp`` of the mean difference of negative
log-likelihoods as the ratio of perplexities, mean and root mean square of the change of the probability of the text's
next token, the share of positions with the same likeliest token. Two things differ: intervals are resampled here and
normal approximations there, and here every position counts that has a next token, there the second half of each window.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from qconvert.core.metric import Metric
from qconvert.parity.logits import Floats, TokenScores
from qconvert.parity.series import Curve

BLOCK_TOKENS = 64
"""Consecutive tokens resampled together: their divergences are not independent."""

RESAMPLES = 1000

CELLS = 256
"""Runs of sorted values that are counted as one; see ``_Ascent``."""

FIRST_RANGE = 64
"""Positions of the first range; each further range is as long as all before it."""

PERCENTILES = (("median", 0.5), ("p90", 0.9), ("p99", 0.99), ("p999", 0.999))

CURVE_SHARES = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenPlaces:
    """Where each of T scored positions stands.

    Attributes:
        position: in its window, int64 [T].
        domain: number of its text, int64 [T].
        domains: names of the texts.
    """

    position: NDArray[np.int64]
    domain: NDArray[np.int64]
    domains: tuple[str, ...]


def summarize(scores: TokenScores, where: str, seed: int = 0) -> tuple[Metric, ...]:
    """KL both ways, agreement and perplexities, each with its 95% bootstrap interval.

    Percentile bootstrap over blocks of ``BLOCK_TOKENS`` consecutive tokens (Kunsch 1989), ``RESAMPLES`` draws, the
    same draws for every number, so that perplexities are compared on the same tokens.
    """
    draws = Draws(len(scores.kl), seed)
    change = np.exp(-scores.nll_converted) - np.exp(-scores.nll_original)
    squares = draws.mean("delta_p_rms", where, change**2, "fraction")
    return (
        *_divergence("kl", scores.kl, where, draws),
        *_divergence("kl_reverse", scores.kl_reverse, where, draws),
        draws.mean("top1_agreement", where, scores.agree.astype(np.float64), "fraction", high=True),
        draws.mean("top5_agreement", where, scores.likeliest, "fraction", high=True),
        draws.perplexity("perplexity_original", where, scores.nll_original),
        draws.perplexity("perplexity_converted", where, scores.nll_converted),
        draws.perplexity("perplexity_ratio", where, scores.nll_converted - scores.nll_original),
        draws.mean("delta_p_mean", where, change, "fraction", high=True),
        replace(squares, value=squares.value**0.5, low=squares.low**0.5, high=squares.high**0.5),
    )


def summarize_parts(scores: TokenScores, where: str, places: TokenPlaces, seed: int = 0) -> Iterator[Metric]:
    """KL, agreement and the ratio of perplexities by ranges of positions and by domain, where there are several."""
    ranges = tuple(_ranges(int(places.position.max(initial=0)) + 1))
    parts = [
        (f"positions {first}-{last}", (places.position >= first) & (places.position <= last)) for first, last in ranges
    ]
    for part, chosen in [
        *(parts if len(parts) > 1 else ()),
        *((f"domain {name}", places.domain == n) for n, name in enumerate(places.domains) if len(places.domains) > 1),
    ]:
        if not chosen.any():
            continue
        draws, here = Draws(int(chosen.sum()), seed), f"{where}, {part}"
        yield draws.mean("kl_mean", here, scores.kl[chosen], "nats")
        yield draws.mean("top1_agreement", here, scores.agree[chosen].astype(np.float64), "fraction", high=True)
        yield draws.perplexity("perplexity_ratio", here, (scores.nll_converted - scores.nll_original)[chosen])


def percentile_curve(scores: TokenScores, where: str) -> Curve:
    """KL(original || converted) over the share of positions that do not exceed it."""
    values = np.quantile(scores.kl, CURVE_SHARES, method="linear")
    return Curve(
        name="kl_percentiles",
        where=where,
        x_label="share of positions, %",
        y_label="KL(original || converted), nats",
        points=tuple((100 * share, float(value)) for share, value in zip(CURVE_SHARES, values, strict=True)),
    )


def _ranges(length: int) -> Iterator[tuple[int, int]]:
    first, end = 0, FIRST_RANGE
    while first < length:
        yield first, min(end, length) - 1
        first, end = end, 2 * end


def _divergence(name: str, values: Floats, where: str, draws: Draws) -> Iterator[Metric]:
    yield draws.mean(f"{name}_mean", where, values, "nats")
    shares = [share for _, share in PERCENTILES]
    found = np.quantile(values, shares, method="linear")
    sampled = draws.quantiles(values, shares)
    for n, (part, _) in enumerate(PERCENTILES):
        yield _metric(f"{name}_{part}", where, float(found[n]), sampled[:, n], "nats", False)
    worst = float(values.max())
    yield Metric(name=f"{name}_max", where=where, value=worst, low=worst, high=worst, unit="nats")


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


class Draws:
    """Which blocks of consecutive tokens each resample holds, and how often; short texts use smaller blocks."""

    def __init__(self, tokens: int, seed: int, block: int = BLOCK_TOKENS) -> None:
        """So many ``tokens``, or anything else in an order, of which ``block`` together are not independent."""
        self.size = max(1, min(block, tokens // 8))
        blocks = -(-tokens // self.size)
        self.lengths = np.minimum(self.size, tokens - self.size * np.arange(blocks))
        generator = np.random.default_rng(seed)
        self.counts = generator.multinomial(blocks, np.full(blocks, 1 / blocks), size=RESAMPLES).astype(np.float64)

    def mean(self, name: str, where: str, values: Floats, unit: str, high: bool = False) -> Metric:
        """The mean and its interval."""
        return _metric(name, where, float(values.mean()), self.means(values), unit, high)

    def median(self, name: str, where: str, values: Floats, unit: str, high: bool = False) -> Metric:
        """The median and its interval."""
        return _metric(name, where, float(np.median(values)), self.quantiles(values, (0.5,))[:, 0], unit, high)

    def perplexity(self, name: str, where: str, nll: Floats) -> Metric:
        """``exp`` of the mean and its interval."""
        with np.errstate(over="ignore"):
            return _metric(name, where, float(np.exp(nll.mean())), np.exp(self.means(nll)), "", False)

    def means(self, values: Floats) -> Floats:
        """The mean of each resample, [RESAMPLES]."""
        sums = np.add.reduceat(values, self.size * np.arange(len(self.lengths)))
        out: Floats = self.counts @ sums / (self.counts @ self.lengths)
        return out

    def quantiles(self, values: Floats, shares: Sequence[float]) -> Floats:
        """Quantiles of each resample by linear interpolation between its values, [RESAMPLES, shares]."""
        ascent = _Ascent(values, self.size, self.counts)
        last = self.counts @ self.lengths - 1
        rank = np.asarray(shares) * last[:, np.newaxis]
        below = np.floor(rank)
        out = np.empty(rank.shape)
        for n in range(len(shares)):
            lower, upper = (ascent.at(np.minimum(below[:, n] + step, last)) for step in (0, 1))
            out[:, n] = lower + (rank[:, n] - below[:, n]) * (upper - lower)
        return out


class _Ascent:
    """The values of each resample in ascending order, without writing any of them out.

    All values are sorted once and cut into cells. How many of a resample are in each cell is one product of matrices;
    only the cell that a rank falls into is counted value by value.
    """

    def __init__(self, values: Floats, size: int, counts: Floats) -> None:
        """``values`` [T] in blocks of ``size``, of which resample r holds block b ``counts[r, b]`` times."""
        order = np.argsort(values, kind="stable")
        self._values = values[order]
        self._counts = np.pad(counts, ((0, 0), (0, 1)))  # one block more, which nobody holds, fills the last cell
        self._width = -(-len(values) // CELLS)
        cells = -(-len(values) // self._width)
        blocks = np.full(cells * self._width, counts.shape[1])
        blocks[: len(values)] = order // size
        self._blocks = blocks.reshape(cells, self._width)
        held = np.zeros((cells, counts.shape[1] + 1))
        np.add.at(held, (np.arange(cells)[:, np.newaxis], self._blocks), 1.0)
        self._before = self._counts @ (np.cumsum(held, axis=0) - held).T

    def at(self, rank: Floats) -> Floats:
        """The value of each resample that has ``rank`` [RESAMPLES], from 0: the first that more than so many reach."""
        rows = np.arange(len(rank))
        cell = (self._before <= rank[:, np.newaxis]).sum(axis=1) - 1
        inside = np.take_along_axis(self._counts, self._blocks[cell], axis=1)
        reached = self._before[rows, cell][:, np.newaxis] + np.cumsum(inside, axis=1)
        found: Floats = self._values[cell * self._width + (reached > rank[:, np.newaxis]).argmax(axis=1)]
        return found
