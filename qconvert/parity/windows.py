"""The tokens that both models are run on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

import reference_model
from qconvert.core.errors import SourceError, UsageError

HELD_OUT = Path(reference_model.__file__).parent / "demo" / "heldout"
"""Texts of several domains that the demo checkpoint was not trained on."""

BATCH_TOKENS = 2048
"""Tokens that pass a layer together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """Token windows.

    Attributes:
        batches: int64 [B, T] each, at least two tokens a window.
        description: where they come from, for the report.
    """

    batches: tuple[Tensor, ...]
    description: str

    @property
    def tokens(self) -> int:
        """Tokens in all windows."""
        return sum(batch.numel() for batch in self.batches)


def text_windows(model: Path, texts: Sequence[Path], length: int, limit: int) -> Windows:
    """Windows of the files ``texts``, read by the tokenizer of the checkpoint ``model``.

    Files take turns, window by window, until ``limit`` tokens are reached.

    Raises:
        UsageError: a text cannot be read or is too short, or the checkpoint has no ``tokenizer.json``.
        SourceError: the tokenizer cannot be read.
    """
    path = model / "tokenizer.json"
    if not path.is_file():
        raise UsageError(f"{model} has no tokenizer.json to read a text with: use --tokens for random tokens")
    tokenizer = _tokenizer(path)
    files = []
    for text in texts:
        try:
            content = text.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot read the text {text}: {error}") from error
        ids = torch.tensor(tokenizer.encode(content).ids, dtype=torch.int64)
        files.append([part for part in torch.split(ids, length) if len(part) > 1])
    turns = [window for window in chain.from_iterable(zip_longest(*files)) if window is not None]
    if not turns:
        raise UsageError(f"{', '.join(map(str, texts))}: fewer than two tokens")
    names = ", ".join(text.name for text in texts)
    return Windows(batches=_batches(turns, limit), description=f"text: {names}")


def random_windows(vocabulary: int, length: int, tokens: int, seed: int) -> Windows:
    """Windows of uniformly random tokens, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (max(tokens, 2),), generator=generator)
    parts = [part for part in torch.split(ids, length) if len(part) > 1]
    return Windows(batches=_batches(parts, tokens), description=f"random tokens, seed {seed}: perplexity says nothing")


def choose_windows(model: Path, vocabulary: int, *, text: Path | None, tokens: int, length: int, seed: int) -> Windows:
    """Windows of ``text``; without one of the held-out texts that come along; without a tokenizer random ones.

    Raises:
        UsageError: see ``text_windows``, or windows or tokens below 2.
    """
    if length < 2 or tokens < 2:
        raise UsageError(f"windows of {length} tokens and {tokens} tokens in all: both must be at least 2")
    if text is not None:
        return text_windows(model, [text], length, tokens)
    held_out = sorted(HELD_OUT.glob("*.txt")) if HELD_OUT.is_dir() else []
    if held_out and (model / "tokenizer.json").is_file():
        return text_windows(model, held_out, length, tokens)
    return random_windows(vocabulary, length, tokens, seed)


def _tokenizer(path: Path) -> Tokenizer:
    try:
        # unlike from_file this raises a narrow error
        return Tokenizer.from_buffer(path.read_bytes())
    except (OSError, ValueError) as error:
        raise SourceError(f"cannot read {path}: {error}") from error


def _batches(windows: Iterable[Tensor], limit: int) -> tuple[Tensor, ...]:
    """Windows of one length side by side, about ``BATCH_TOKENS`` together; the last window is cut at ``limit``."""
    batches: list[list[Tensor]] = []
    left = limit
    for window in windows:
        part = window[:left]
        if len(part) < 2:
            break
        left -= len(part)
        fits = batches and len(batches[-1][0]) == len(part) and (len(batches[-1]) + 1) * len(part) <= BATCH_TOKENS
        if fits:
            batches[-1].append(part)
        else:
            batches.append([part])
    return tuple(torch.stack(batch) for batch in batches)
