"""Greedy text from a package, with its rates."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from qconvert.core.errors import SourceError, UsageError
from qconvert.io.source_folder import read_whole
from qconvert.io.strict_json import parse_object
from qconvert.onnx_export.drafted import Drafted, Drafter, go_on
from qconvert.onnx_export.runtime import Package, PackageOutput
from qconvert.onnx_export.session import PackageCache

PREFILL_TOKENS = 512
"""Tokens of a prompt that are run at once: the scores of attention and the logits grow with them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What was generated.

    Attributes:
        tokens: without the prompt; the last one ends the text, or there are as many as were allowed.
        prefill_rate: tokens of the prompt a second.
        decode_rate: tokens a second after the first; ``None`` where there are none.
        drafted: guesses of the prediction head.
        accepted: those that were right.
    """

    prompt_tokens: int
    tokens: list[int]
    prefill_rate: float
    decode_rate: float | None
    drafted: int = 0
    accepted: int = 0


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a package.

    Raises:
        SourceError: ``tokenizer.json`` is missing, no JSON or no tokenizer.
    """
    path = folder / "tokenizer.json"
    raw = read_whole(path)
    if "model" not in parse_object(raw, str(path)):  # tokenizers has no exception of its own
        raise SourceError(f"{path} is no tokenizer: it has no model")
    return Tokenizer.from_str(raw.decode())


def generate(
    package: Package,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    draft: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> Generation:
    """Go on from ``prompt`` with the most likely token each time, until one ends the text.

    With ``draft`` the prediction head guesses ahead; the text is the same, but where rounding decides between tokens.

    Raises:
        UsageError: the prompt is empty, or the package cannot draft.
    """
    if not prompt:
        raise UsageError("the prompt has no tokens: nothing to go on from")
    ids = np.asarray([prompt], dtype=np.int64)
    drafter = Drafter(package) if draft else None
    start = time.perf_counter()
    cache: PackageCache | None = None
    for begin in range(0, ids.shape[1], PREFILL_TOKENS):
        piece = ids[:, begin : begin + PREFILL_TOKENS]
        out = package.forward(piece, cache=cache)
        cache = out.cache
        if drafter is not None:
            drafter.follow(out, piece)
    filled = time.perf_counter()
    if drafter is not None:
        text = go_on(package, drafter, out, max_tokens=max_tokens, progress=progress)
    else:
        text = _one_by_one(package, out, max_tokens, progress)
    seconds = time.perf_counter() - filled
    return Generation(
        prompt_tokens=len(prompt),
        tokens=text.tokens,
        prefill_rate=len(prompt) / (filled - start),
        decode_rate=(len(text.tokens) - 1) / seconds if len(text.tokens) > 1 else None,
        drafted=text.drafted,
        accepted=text.accepted,
    )


def _one_by_one(package: Package, out: PackageOutput, max_tokens: int, progress: Callable[[int], None]) -> Drafted:
    tokens = [int(out.logits[0, -1].argmax())]
    while len(tokens) < max_tokens and tokens[-1] not in package.end_tokens:
        out = package.forward(np.asarray([tokens[-1:]], dtype=np.int64), cache=out.cache)
        tokens.append(int(out.logits[0, -1].argmax()))
        progress(len(tokens))
    return Drafted(tokens=tokens, drafted=0, accepted=0)
