"""Texts -> the token windows that calibration looks at, and a record by which they can be made again.

All windows have one length and none is padded: the documents of a domain follow each other in one stream, as in the
pre-training of such models, and its rest is left out. Domains take turns until there are enough tokens, so that each
has the same share as long as it lasts; which of its windows come first is drawn by the seed.

Shapes: B windows of a batch, T tokens of a window.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calibration.windows import cut
from qconvert.core.errors import UsageError
from qconvert.io.file_record import record_file
from qconvert.io.hashing import SHA256
from qconvert.texts.batching import BATCH_TOKENS, check_vocabulary, in_turns
from qconvert.texts.documents import Reader, Text
from qconvert.texts.template import TOKENIZER, chat_template

SHIPPED = Path(__file__).parent / "text"
"""Texts of several domains that come along."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationWindows:
    """Token windows, always the same for the same texts, tokenizer and numbers.

    Attributes:
        batches: int64 [B, T] each, about ``BATCH_TOKENS`` together; T is the same in all.
        record: where they come from, as plain JSON: ``texts`` and the ``tokenizer`` with SHA-256 hashes, ``domains``
            with their tokens, what was asked for, and ``ids_sha256`` over all token ids.
    """

    batches: tuple[Tensor, ...]
    record: Mapping[str, Any]

    @property
    def tokens(self) -> int:
        """Tokens in all windows."""
        return sum(batch.numel() for batch in self.batches)


def shipped_texts(model: Path) -> tuple[Text, ...]:
    """The texts that come along; without the conversations where ``model`` has no chat template to frame them.

    Raises:
        UsageError: the package has been installed without them.
    """
    paths = sorted(path for path in SHIPPED.glob("*") if path.suffix in (".txt", ".jsonl"))
    if not paths:
        raise UsageError(f"{SHIPPED} holds no texts: install the package whole, or give some of your own")
    framed = chat_template(model) is not None
    return tuple(Text(name=path.stem, path=path) for path in paths if framed or path.suffix != ".jsonl")


def calibration_windows(
    model: Path, vocabulary: int, *, texts: Sequence[Text], tokens: int, window: int, seed: int
) -> CalibrationWindows:
    """Windows of ``texts``, of those that come along where none are given.

    Args:
        model: folder of the checkpoint, whose tokenizer and chat template read the texts.
        vocabulary: its token ids.
        texts: of one name they are one domain.
        tokens: in all windows together at most; there are fewer where the texts hold fewer.
        window: tokens that see each other.
        seed: draws the windows of each domain.

    Raises:
        UsageError: a text cannot be read, does not fill one window or holds ids outside the vocabulary; the checkpoint
            has no tokenizer for it; or the numbers do not fit each other.
        SourceError: the tokenizer cannot be read.
    """
    if window < 2 or tokens < window:
        raise UsageError(
            f"windows of {window} tokens, {tokens} tokens in all: a window has at least 2, and there has to be one"
        )
    chosen = tuple(texts) or shipped_texts(model)
    read = _read(model, chosen)
    domains = {name: _windows(name, [one for one in read if one.text.name == name], window) for name in _names(chosen)}
    for name, found in domains.items():
        check_vocabulary(found, vocabulary, model, f"the text {name!r}")
    turns = in_turns([_drawn(name, found, seed) for name, found in domains.items()])[: tokens // window]
    rows = torch.stack([row for _, row in turns])
    record = {
        "tokens": rows.numel(),
        "tokens_asked": tokens,
        "window": window,
        "seed": seed,
        "texts": [one.entry for one in read],
        "domains": {
            name: {"tokens": sum(len(row) for taken, row in turns if taken == name), "of": found.numel()}
            for name, found in domains.items()
        },
        "tokenizer": _tokenizer_hash(model),
        "ids_sha256": _hash(rows),
    }
    return CalibrationWindows(batches=torch.split(rows, max(1, BATCH_TOKENS // window)), record=record)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Read:
    """A text, its documents one after another [N], and what records say of it."""

    text: Text
    ids: Tensor
    entry: dict[str, Any]


def _read(model: Path, texts: Sequence[Text]) -> list[_Read]:
    reader = Reader(model)
    found = []
    for text in texts:
        documents = list(reader.documents(text))
        ids = torch.cat(documents) if documents else torch.empty(0, dtype=torch.int64)
        file = record_file(text.path, SHA256)
        entry = {
            "domain": text.name,
            "file": text.path.name,
            "bytes": file.nbytes,
            "sha256": file.digest,
            "documents": len(documents),
            "tokens": len(ids),
        }
        found.append(_Read(text=text, ids=ids, entry=entry))
    return found


def _names(texts: Sequence[Text]) -> list[str]:
    return list(dict.fromkeys(text.name for text in texts))


def _windows(name: str, read: Sequence[_Read], length: int) -> Tensor:
    """Windows [W, T] of one domain.

    Raises:
        UsageError: there is not one.
    """
    stream = torch.cat([one.ids for one in read])
    try:
        return cut(stream, length)
    except ValueError as error:
        files = ", ".join(str(one.text.path) for one in read)
        raise UsageError(f"the text {name!r} ({files}): {error}; give more of it or ask for shorter windows") from None


def _drawn(name: str, windows: Tensor, seed: int) -> list[tuple[str, Tensor]]:
    """The windows in the order that the seed draws; hashes do it, for they stay what they are in other versions."""

    def place(number: int) -> bytes:
        return hashlib.sha256(f"{seed} {name} {number}".encode()).digest()

    return [(name, windows[number]) for number in sorted(range(len(windows)), key=place)]


def _hash(rows: Tensor) -> str:
    return hashlib.sha256(rows.numpy().astype("<i8").tobytes()).hexdigest()


def _tokenizer_hash(model: Path) -> str | None:
    path = model / TOKENIZER
    return record_file(path, SHA256).digest if path.is_file() else None
