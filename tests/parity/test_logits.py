"""Scores of logits equal an independent float64 computation, however the vocabulary is cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qconvert.parity.limits import bounds, judged
from qconvert.parity.logits import TokenScores, VocabularyScan, score, summarize
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
    return kl, z.argmax(1) == y.argmax(1), -np.log(p[rows, at]), -np.log(q[rows, at])


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
    kl, agree, nll_original, nll_converted = textbook(original, converted, targets)
    atol = LIMITS["scan_kl"] + LIMITS["scan_kl_shift"] * abs(shift)
    np.testing.assert_allclose(found.kl, kl, atol=atol, rtol=LIMITS["scan"])
    np.testing.assert_allclose(found.nll_original, nll_original, atol=LIMITS["scan"], rtol=LIMITS["scan_nll_rel"])
    np.testing.assert_allclose(found.nll_converted, nll_converted, atol=LIMITS["scan"], rtol=LIMITS["scan_nll_rel"])
    assert (found.agree == agree).all()


def test_equal_models_have_no_divergence_at_all() -> None:
    logits = 5 * torch.randn(30, 400, generator=torch.Generator().manual_seed(3))
    found = score(logits, logits, torch.arange(30))
    assert found.kl.max() == 0
    assert found.agree.all()


def test_a_nan_fails_every_limit_that_it_touches() -> None:
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(3))
    logits[2, 0] = 9.0  # also where the search for a maximum starts
    broken = logits.clone()
    broken[2, 5] = torch.nan
    found = score(logits, broken, torch.arange(4))
    assert np.isnan(found.kl).tolist() == [False, False, True, False]
    assert not found.agree[2]
    metrics = {m.name: m for m in judged(summarize(found, "as served"), bounds(kl_mean=10.0, perplexity_ratio=1e9))[0]}
    assert metrics["kl_mean"].verdict.value == "fail"
    assert metrics["perplexity_ratio"].verdict.value == "fail"


def scores_of(kl: np.ndarray) -> TokenScores:
    n = len(kl)
    rng = np.random.default_rng(1)
    nll = rng.exponential(2.0, n)
    return TokenScores(kl=kl, agree=rng.random(n) < 0.9, nll_original=nll, nll_converted=nll + 0.1)


def test_summary_equals_numpy() -> None:
    scores = scores_of(np.random.default_rng(0).exponential(0.01, 5000))
    found = {m.name: m for m in summarize(scores, "weights only")}
    assert found["kl_mean"].value == pytest.approx(scores.kl.mean())
    assert found["kl_median"].value == np.sort(scores.kl)[2499]
    assert found["kl_p99"].value == np.sort(scores.kl)[4949]
    assert found["kl_max"].value == scores.kl.max()
    assert found["top1_agreement"].value == pytest.approx(scores.agree.mean())
    assert found["perplexity_original"].value == pytest.approx(np.exp(scores.nll_original.mean()))
    assert found["perplexity_ratio"].value == pytest.approx(np.exp(0.1))
    assert found["perplexity_ratio"].high - found["perplexity_ratio"].low <= LIMITS["same_draws"]


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
