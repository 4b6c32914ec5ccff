"""N-gram losses against sums written out, and against what is known of them."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from calibration.ngram import bigram_loss, unigram_loss

IDS = st.lists(st.integers(0, 4), min_size=3, max_size=30)


@given(train=IDS, test=IDS)
def test_losses_are_the_sums_of_their_formulas(train: list[int], test: list[int]) -> None:
    p = [(train.count(t) + 1) / (len(train) + 5) for t in range(5)]
    pairs = list(pairwise(train))
    uni, bi = 0.0, 0.0
    for before, after in pairwise(test):
        uni -= math.log(p[after])
        seen = sum(1 for first, _ in pairs if first == before)
        bi -= math.log((pairs.count((before, after)) + 2.0 * p[after]) / (seen + 2.0))
    count = len(test) - 1
    arguments = torch.tensor(train), torch.tensor([test]), 5
    assert math.isclose(unigram_loss(*arguments), uni / count, rel_tol=1e-12)
    assert math.isclose(bigram_loss(*arguments, pull=2.0), bi / count, rel_tol=1e-12)


def test_a_strong_prior_makes_bigrams_unigrams() -> None:
    train, test = torch.arange(50) % 5, torch.tensor([[0, 3, 1, 4]])
    assert math.isclose(bigram_loss(train, test, 5, pull=1e12), unigram_loss(train, test, 5), rel_tol=1e-9)
