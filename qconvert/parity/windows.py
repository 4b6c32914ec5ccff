"""The tokens that both models are run on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import reference_model
from qconvert.core.errors import UsageError
from qconvert.parity.summary import TokenPlaces
from qconvert.texts.batching import BATCH_TOKENS, check_vocabulary, in_turns
from qconvert.texts.documents import Reader, Text

HELD_OUT = Path(reference_model.__file__).parent / "demo" / "heldout"
"""Texts of several domains that the demo checkpoint was not trained on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """Token windows.

    Attributes:
        batches: int64 [B, T] each, at least two tokens a window.
        domains: for each batch the names of the texts that its rows are of.
        description: where they come from, for the report.
    """

    batches: tuple[Tensor, ...]
    domains: tuple[tuple[str, ...], ...]
    description: str

    @property
    def tokens(self) -> int:
        """Tokens in all windows."""
        return sum(batch.numel() for batch in self.batches)

    @property
    def targets(self) -> Tensor:
        """What follows each position that has a next token, through all rows of all batches: int64 [S]."""
        return torch.cat([batch[:, 1:].flatten() for batch in self.batches])

    @property
    def places(self) -> TokenPlaces:
        """Where the same positions stand."""
        names = tuple(dict.fromkeys(chain.from_iterable(self.domains)))
        numbers = {name: n for n, name in enumerate(names)}
        rows = [
            (ids.shape[1] - 1, numbers[name])
            for ids, domains in zip(self.batches, self.domains, strict=True)
            for name in domains
        ]
        return TokenPlaces(
            position=np.concatenate([np.arange(length) for length, _ in rows]),
            domain=np.concatenate([np.full(length, number) for length, number in rows]),
            domains=names,
        )


def text_windows(model: Path, texts: Sequence[Text], length: int, limit: int) -> Windows:
    """Windows of the documents in ``texts``, read by the tokenizer of the checkpoint ``model``.

    Files take turns, window by window, until ``limit`` tokens are reached.

    Raises:
        UsageError: a text cannot be read or is too short, or the checkpoint has no ``tokenizer.json``.
        SourceError: the tokenizer cannot be read.
    """
    reader = Reader(model)
    files = [
        [
            (text.name, part)
            for document in reader.documents(text)
            for part in torch.split(document, length)
            if len(part) > 1
        ]
        for text in texts
    ]
    turns = in_turns(files)
    if not turns:
        raise UsageError(f"{', '.join(str(text.path) for text in texts)}: fewer than two tokens")
    names = ", ".join(text.path.name for text in texts)
    return side_by_side(turns, limit, f"text: {names}")


def random_windows(vocabulary: int, length: int, tokens: int, seed: int) -> Windows:
    """Windows of uniformly random tokens, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (max(tokens, 2),), generator=generator)
    parts = [("random", part) for part in torch.split(ids, length) if len(part) > 1]
    return side_by_side(parts, tokens, f"random tokens, seed {seed}: perplexity says nothing")


def choose_windows(
    model: Path, vocabulary: int, *, texts: Sequence[Text], tokens: int, length: int, seed: int
) -> Windows:
    """Windows of ``texts``; without any of the held-out texts that come along; without a tokenizer random ones.

    Raises:
        UsageError: see ``text_windows``, or windows or tokens below 2, or token ids outside the ``vocabulary``.
    """
    if length < 2 or tokens < 2:
        raise UsageError(f"windows of {length} tokens and {tokens} tokens in all: both must be at least 2")
    if not texts and (model / "tokenizer.json").is_file() and HELD_OUT.is_dir():
        texts = [Text(name=path.stem, path=path) for path in sorted(HELD_OUT.glob("*.txt"))]
    if not texts:
        return random_windows(vocabulary, length, tokens, seed)
    found = text_windows(model, texts, length, tokens)
    for ids in found.batches:
        check_vocabulary(ids, vocabulary, model, found.description)
    return found


def side_by_side(windows: Iterable[tuple[str, Tensor]], limit: int, description: str) -> Windows:
    """Windows of one length side by side, about ``BATCH_TOKENS`` together; the last window is cut at ``limit``."""
    batches: list[list[Tensor]] = []
    domains: list[list[str]] = []
    left = limit
    for name, window in windows:
        part = window[:left]
        if len(part) < 2:
            break
        left -= len(part)
        fits = batches and len(batches[-1][0]) == len(part) and (len(batches[-1]) + 1) * len(part) <= BATCH_TOKENS
        if not fits:
            batches.append([])
            domains.append([])
        batches[-1].append(part)
        domains[-1].append(name)
    return Windows(
        batches=tuple(torch.stack(batch) for batch in batches),
        domains=tuple(tuple(names) for names in domains),
        description=description,
    )
