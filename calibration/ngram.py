"""How well counts alone predict text: the losses that a trained model has to beat."""

from __future__ import annotations

import torch
from torch import Tensor


def unigram_loss(train: Tensor, windows: Tensor, vocab_size: int) -> float:
    """Mean of ``-log p(t)`` in nats with ``p(t) = (n(t) + 1) / (N + V)``.

    Training ids int64 [N]; test windows int64 [W, T], of which the first token is not scored.
    """
    return float(-_unigram(train, vocab_size).log()[windows[:, 1:]].mean())


def bigram_loss(train: Tensor, windows: Tensor, vocab_size: int, pull: float = 100.0) -> float:
    """Mean of ``-log p(t | s)`` in nats, in float64, with ``p(t | s) = (n(s, t) + c p(t)) / (n(s) + c)``.

    A Dirichlet prior of strength c = ``pull`` at the unigram (MacKay and Peto 1995, "A hierarchical Dirichlet language
    model"). Training ids int64 [N]; test windows int64 [W, T], of which the first token is not scored.
    """
    unigram = _unigram(train, vocab_size)
    pairs = torch.bincount(train[:-1] * vocab_size + train[1:], minlength=vocab_size**2).view(vocab_size, vocab_size)
    before, after = windows[:, :-1], windows[:, 1:]
    joint = pairs[before, after].double() + pull * unigram[after]
    return float(-(joint / (pairs.sum(1)[before].double() + pull)).log().mean())


def _unigram(train: Tensor, vocab_size: int) -> Tensor:
    counts = torch.bincount(train, minlength=vocab_size).double() + 1
    return counts / counts.sum()
