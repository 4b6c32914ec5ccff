"""Scores of logits equal an independent float64 computation, however the vocabulary is cut."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from qconvert.parity.limits import bounds, judged
from qconvert.parity.logits import LIKELIEST, TokenScores, VocabularyScan, score
from qconvert.parity.summary import Draws, TokenPlaces, percentile_curve, summarize, summarize_parts
from tests.tolerances import tolerances

LIMITS = tolerances("parity")


def textbook(original: Tensor, converted: Tensor, targets: Tensor) -> tuple[np.ndarray, ...]:
    """Direct softmax in float64: sum p log(p / q), and -log p of the targets."""
    z, y = original.double().numpy(), converted.double().numpy()
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    q = np.exp(y - y.max(1, keepdims=True))
    q /= q.sum(1, keepdims=True)
    kl = (p * (np.log(p) - np.log(q))).sum(1)
    rows = np.arange(len(z))
    at = targets.numpy()
    reverse = (q * (np.log(q) - np.log(p))).sum(1)
    first = min(LIKELIEST, z.shape[1])
    best = [np.argsort(-x, axis=1)[:, :first].tolist() for x in (z, y)]
    shared = np.array([len(set(ours) & set(theirs)) / first for ours, theirs in zip(*best, strict=True)])
    return kl, reverse, z.argmax(1) == y.argmax(1), shared, -np.log(p[rows, at]), -np.log(q[rows, at])


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    tokens=st.integers(1, 40),
    words=st.integers(2, 90),
    slab=st.integers(1, 100),
    rows=st.integers(1, 50),
    noise=st.sampled_from([0.0, 0.01, 0.3, 3.0]),
    shift=st.sampled_from([0.0, -50.0, 300.0]),
)
@example(seed=382, tokens=24, words=68, slab=7, rows=1, noise=0.3, shift=-50.0)  # two equal logits
def test_a_scan_in_any_pieces_equals_the_textbook(
    seed: int, tokens: int, words: int, slab: int, rows: int, noise: float, shift: float
) -> None:
    gen = torch.Generator().manual_seed(seed)
    original = 3 * torch.randn(tokens, words, generator=gen)
    converted = original + noise * torch.randn(tokens, words, generator=gen) + shift
    targets = torch.randint(words, (tokens,), generator=gen)
    scan = VocabularyScan(targets)
    for first in range(0, words, slab):
        for row in range(0, tokens, rows):
            part = (slice(row, row + rows), slice(first, first + slab))
            scan.add(row, first, original[part], converted[part])
    found = scan.scores()
    kl, reverse, agree, shared, nll_original, nll_converted = textbook(original, converted, targets)
    atol = LIMITS["scan_kl"] + LIMITS["scan_kl_shift"] * abs(shift)
    np.testing.assert_allclose(found.kl, kl, atol=atol, rtol=LIMITS["scan"])
    np.testing.assert_allclose(found.nll_original, nll_original, atol=LIMITS["scan"], rtol=LIMITS["scan_nll_rel"])
    np.testing.assert_allclose(found.nll_converted, nll_converted, atol=LIMITS["scan"], rtol=LIMITS["scan_nll_rel"])
    np.testing.assert_allclose(found.kl_reverse, reverse, atol=atol, rtol=LIMITS["scan"])
    assert (found.agree == agree).all()
    clear = apart(original) & apart(converted)
    np.testing.assert_allclose(found.likeliest[clear], shared[clear])


def apart(logits: Tensor) -> np.ndarray:
    """Where the fifth logit is larger than the sixth: which of two equal ones is among the likeliest says nothing."""
    if logits.shape[1] <= LIKELIEST:
        return np.ones(len(logits), dtype=np.bool_)
    top = logits.topk(LIKELIEST + 1).values
    return (top[:, -2] > top[:, -1]).numpy()


def test_equal_models_have_no_divergence_at_all() -> None:
    logits = 5 * torch.randn(30, 400, generator=torch.Generator().manual_seed(3))
    found = score(logits, logits, torch.arange(30))
    assert found.kl.max() == found.kl_reverse.max() == 0
    assert found.agree.all()
    assert (found.likeliest == 1).all()


def test_a_nan_fails_every_limit_that_it_touches() -> None:
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(3))
    logits[2, 0] = 9.0  # also where the search for a maximum starts
    broken = logits.clone()
    broken[2, 5] = torch.nan
    found = score(logits, broken, torch.arange(4))
    for divergence in (found.kl, found.kl_reverse):
        assert np.isnan(divergence).tolist() == [False, False, True, False]
    assert not found.agree[2]
    assert found.likeliest[2] == 0
    metrics = {m.name: m for m in judged(summarize(found, "as served"), bounds(kl_mean=10.0, perplexity_ratio=1e9))[0]}
    assert metrics["kl_mean"].verdict.value == "fail"
    assert metrics["perplexity_ratio"].verdict.value == "fail"
    assert {name for name, one in metrics.items() if one.verdict.value == "pass"} == {
        "top1_agreement", "top5_agreement", "perplexity_original",
    }  # fmt: skip


def scores_of(kl: np.ndarray) -> TokenScores:
    n = len(kl)
    rng = np.random.default_rng(1)
    nll = rng.exponential(2.0, n)
    return TokenScores(
        kl=kl,
        kl_reverse=kl[::-1].copy() * 2,
        agree=rng.random(n) < 0.9,
        likeliest=rng.integers(0, 6, n) / 5,
        nll_original=nll,
        nll_converted=nll + 0.1,
    )


def test_the_summary_is_that_of_plain_python_and_of_llama_cpp() -> None:
    scores = scores_of(np.random.default_rng(0).exponential(0.01, 5001))
    found = {m.name: m.value for m in summarize(scores, "weights only")}
    change = np.exp(-scores.nll_converted) - np.exp(-scores.nll_original)

    def percentile(values: np.ndarray, fraction: float) -> float:
        """As in llama.cpp's tools/perplexity."""
        ascending = sorted(values.tolist())
        place = fraction * (len(ascending) - 1)
        below = int(place)
        place -= below
        return (1 - place) * ascending[below] + place * ascending[min(below + 1, len(ascending) - 1)]

    expected = {
        "top1_agreement": scores.agree.sum() / 5001,
        "top5_agreement": scores.likeliest.sum() / 5001,
        "perplexity_original": statistics.geometric_mean(np.exp(scores.nll_original)),
        "perplexity_converted": statistics.geometric_mean(np.exp(scores.nll_converted)),
        "perplexity_ratio": math.exp(0.1),
        "delta_p_mean": change.sum() / 5001,
        "delta_p_rms": math.sqrt((change * change).sum() / 5001),
    }
    for name, values in (("kl", scores.kl), ("kl_reverse", scores.kl_reverse)):
        expected |= {
            f"{name}_mean": statistics.fmean(values),
            f"{name}_max": max(values),
            f"{name}_median": statistics.median(values.tolist()),
        }
        expected |= {f"{name}_p{n}": percentile(values, float(f"0.{n}")) for n in (90, 99, 999)}
    assert found == {name: pytest.approx(value, rel=LIMITS["summary"]) for name, value in expected.items()}


def test_the_ratio_of_perplexities_is_compared_on_the_same_tokens() -> None:
    scores = scores_of(np.random.default_rng(0).exponential(0.01, 5000))
    found = {m.name: m for m in summarize(scores, "weights only")}
    assert found["perplexity_ratio"].high - found["perplexity_ratio"].low <= LIMITS["same_draws"]
    assert found["perplexity_original"].high - found["perplexity_original"].low > 0.01


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9, 0.999, 1.0])
def test_a_resample_has_the_quantiles_of_the_tokens_that_it_repeats(share: float) -> None:
    values = np.random.default_rng(2).exponential(1.0, 200)
    draws = Draws(200, seed=3)
    blocks = np.split(values, range(draws.size, 200, draws.size))
    sampled = draws.quantiles(values, [share])[:, 0]
    for counts, found in zip(draws.counts[:20], sampled, strict=False):
        repeated = np.concatenate([np.tile(b, int(count)) for b, count in zip(blocks, counts, strict=True)])
        assert found == pytest.approx(np.quantile(repeated, share))


def test_parts_are_summaries_of_their_tokens() -> None:
    scores = scores_of(np.random.default_rng(0).exponential(0.01, 600))
    places = TokenPlaces(position=np.tile(np.arange(150), 4), domain=np.repeat([0, 1, 0, 1], 150), domains=("a", "b"))
    found = {(m.name, m.where): m for m in summarize_parts(scores, "m", places)}
    wheres = ["m, positions 0-63", "m, positions 64-127", "m, positions 128-149", "m, domain a", "m, domain b"]
    assert list(dict.fromkeys(where for _, where in found)) == wheres
    second = (places.position >= 64) & (places.position < 128)
    assert found["kl_mean", wheres[1]].value == pytest.approx(scores.kl[second].mean())
    assert found["top1_agreement", wheres[4]].value == pytest.approx(scores.agree[places.domain == 1].mean())
    assert all(m.low <= m.value <= m.high for m in found.values())
    one = TokenPlaces(position=np.zeros(600, dtype=int), domain=np.zeros(600, dtype=int), domains=("a",))
    assert not list(summarize_parts(scores, "m", one))


def test_the_curve_of_percentiles_ascends_from_the_smallest_to_the_largest() -> None:
    scores = scores_of(np.random.default_rng(0).exponential(0.01, 600))
    points = percentile_curve(scores, "m").points
    assert points[0] == (0.0, scores.kl.min())
    assert points[-1] == (100.0, scores.kl.max())
    assert [y for _, y in points] == sorted(y for _, y in points)
    assert dict(points)[50.0] == pytest.approx(np.median(scores.kl))


def test_the_interval_of_independent_tokens_is_the_normal_one() -> None:
    scores = scores_of(np.random.default_rng(0).exponential(1.0, 20000))
    mean = {m.name: m for m in summarize(scores, "model")}["kl_mean"]
    half = 1.96 * scores.kl.std() / len(scores.kl) ** 0.5
    assert mean.value - mean.low == pytest.approx(half, rel=LIMITS["bootstrap"])
    assert mean.high - mean.value == pytest.approx(half, rel=LIMITS["bootstrap"])


def test_tokens_that_go_together_widen_the_interval() -> None:
    rng = np.random.default_rng(0)
    apart = rng.exponential(1.0, 6400)
    together = np.repeat(rng.exponential(1.0, 100), 64)
    width = [
        (lambda m: m.high - m.low)({m.name: m for m in summarize(scores_of(kl), "model")}["kl_mean"])
        for kl in (apart, together)
    ]
    assert width[1] > 5 * width[0]


def test_the_same_seed_gives_the_same_interval() -> None:
    scores = scores_of(np.random.default_rng(0).exponential(0.01, 700))
    assert summarize(scores, "model", seed=4) == summarize(scores, "model", seed=4)
    assert summarize(scores, "model", seed=4) != summarize(scores, "model", seed=5)


def test_a_limit_inside_the_interval_is_ambiguous() -> None:
    scores = scores_of(np.random.default_rng(0).exponential(0.01, 700))
    limit = float(scores.kl.mean())
    verdicts = [
        {m.name: m for m in judged(summarize(scores, "as served"), bounds(kl_mean=x))[0]}["kl_mean"].verdict.value
        for x in (limit / 2, limit, limit * 2)
    ]
    assert verdicts == ["fail", "ambiguous", "pass"]


@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 63, 65])
def test_short_texts_are_summarised(tokens: int) -> None:
    for m in summarize(scores_of(np.random.default_rng(0).exponential(0.01, tokens)), "model"):
        assert m.low <= m.value <= m.high
