"""Log-probabilities in a file: the likeliest tokens of every position, what is left for all others, and of what.

A safetensors file, also for other engines to write. With W windows of S scored positions in all (each window but its
last token) and k tokens a position:

- ``tokens`` int32: all windows one after the other; ``windows`` int32 [W]: their lengths, at least 2;
- ``ids`` int32 [S, k] and ``logprobs`` float32 [S, k]: the likeliest next tokens, likeliest first, in nats;
- ``tail`` float32 [S]: the log of the probability of all tokens that are not in ``ids``, ``-inf`` for none;
- ``target`` float32 [S]: the log-probability of the text's next token.

Metadata, all text: ``format`` (``FORMAT``), ``vocabulary`` (number of tokens), ``tokenizer`` (SHA-256 of
``tokenizer.json``, empty without one), ``model`` and ``model_hash`` (whose they are; any text), ``tokens_hash``
(SHA-256 of ``tokens`` and ``windows`` as little-endian int32), ``domains`` (JSON list of W names), ``description``.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qconvert.core.errors import OutputError, SourceError, UsageError
from qconvert.parity.logits import LIKELIEST
from qconvert.parity.windows import Windows, side_by_side
from qconvert.texts.template import TOKENIZER
from qconvert.weights.source import CheckpointWeights

FORMAT = "qconvert-logprobs/1"

KEPT = 256
"""Tokens of a position that are kept, unless another number is asked for."""

_EDGE = 1 << 20
_SHAPES = {"tokens": 1, "windows": 1, "ids": 2, "logprobs": 2, "tail": 1, "target": 1}
_ROWS = ("ids", "logprobs", "tail", "target")
_TEXTS = ("vocabulary", "tokenizer", "model", "model_hash", "tokens_hash", "domains", "description")


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedLogprobs:
    """See the format above; ``ids`` int64 here, ``logprobs``, ``tail`` and ``target`` float64."""

    windows: Windows
    ids: Tensor
    logprobs: Tensor
    tail: Tensor
    target: Tensor
    vocabulary: int
    tokenizer: str
    model: str
    model_hash: str


class LikeliestScan:
    """The ``kept`` likeliest of the T next tokens of one model, while its logits pass by; see ``VocabularyScan``.

    What is left out is summed up by itself: one minus what is kept would have lost the digits of a small rest.
    """

    def __init__(self, targets: Tensor, kept: int, vocabulary: int) -> None:
        """``targets`` int64 [T]; at most ``vocabulary`` tokens are kept."""
        count, kept = len(targets), min(kept, vocabulary)
        self._targets = targets
        self._values = torch.full((count, kept), -torch.inf)
        self._ids = torch.full((count, kept), -1)
        self._top = torch.full((count,), -torch.inf)
        self._rest = torch.zeros(count, dtype=torch.float64)
        self._target = torch.full((count,), torch.nan)

    def add(self, first_row: int, first_token: int, logits: Tensor) -> None:
        """Take float32 logits [t, v]."""
        rows, kept = slice(first_row, first_row + logits.shape[0]), self._values.shape[1]
        top = torch.maximum(self._top[rows], logits.amax(1))
        shrink = (self._top[rows] - top).exp().to(torch.float64)
        best, ids = logits.topk(min(kept, logits.shape[1]), dim=1)
        outside = (logits - top.unsqueeze(1)).exp_().scatter_(1, ids, 0.0).sum(1, dtype=torch.float64)
        values, order = torch.cat((self._values[rows], best), dim=1).sort(dim=1, descending=True)
        dropped = (values[:, kept:] - top.unsqueeze(1)).exp().sum(1, dtype=torch.float64)
        self._rest[rows] = self._rest[rows] * shrink + outside + dropped
        self._values[rows] = values[:, :kept]
        self._ids[rows] = torch.cat((self._ids[rows], ids + first_token), dim=1).gather(1, order[:, :kept])
        self._top[rows] = top
        inside = self._targets[rows] - first_token
        hit = (inside >= 0) & (inside < logits.shape[1])
        target = logits.gather(1, inside.clamp(0, logits.shape[1] - 1).unsqueeze(1)).squeeze(1)
        self._target[rows] = torch.where(hit, target, self._target[rows])

    def result(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``ids``, ``logprobs``, ``tail`` and ``target`` once the whole vocabulary has passed."""
        relative = self._values.to(torch.float64) - self._top.to(torch.float64).unsqueeze(1)
        log_sum = (relative.exp().sum(1) + self._rest).log()
        target = self._target.to(torch.float64) - self._top - log_sum
        return self._ids, relative - log_sum.unsqueeze(1), self._rest.log() - log_sum, target


def tokens_hash(windows: Windows) -> str:
    """See ``tokens_hash`` above."""
    rows = [row for ids in windows.batches for row in ids]
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int32)
    flat = torch.cat(rows).to(torch.int32)
    return hashlib.sha256(flat.numpy().astype("<i4").tobytes() + lengths.numpy().astype("<i4").tobytes()).hexdigest()


def tokenizer_hash(model: Path) -> str:
    """SHA-256 of the tokenizer of a checkpoint; empty without one."""
    path = model / TOKENIZER
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def model_hash(source: CheckpointWeights) -> str:
    """SHA-256 of the configuration and of the first and last MiB of each weight file: cheap, and whose weights."""
    digest = hashlib.sha256()
    for path in sorted(source.checkpoint.path.iterdir()):
        if path.name == "config.json" or path.suffix == ".safetensors":
            digest.update(f"{path.name} {path.stat().st_size}".encode())
            with path.open("rb") as file:
                digest.update(file.read(_EDGE))
                file.seek(max(0, path.stat().st_size - _EDGE))
                digest.update(file.read(_EDGE))
    return digest.hexdigest()


def save_logprobs(path: Path, scan: LikeliestScan, windows: Windows, source: CheckpointWeights) -> None:
    """Write what ``scan`` has seen of the model ``source`` over ``windows``, whole or not at all.

    Raises:
        OutputError: the file cannot be written.
    """
    ids, logprobs, tail, target = scan.result()
    rows = [row for batch in windows.batches for row in batch]
    tensors = {
        "tokens": torch.cat(rows).to(torch.int32),
        "windows": torch.tensor([len(row) for row in rows], dtype=torch.int32),
        "ids": ids.to(torch.int32),
        "logprobs": logprobs.to(torch.float32),
        "tail": tail.to(torch.float32),
        "target": target.to(torch.float32),
    }
    folder = source.checkpoint.path
    said = {
        "format": FORMAT,
        "vocabulary": str(source.config.text.vocab_size),
        "tokenizer": tokenizer_hash(folder),
        "model": str(folder),
        "model_hash": model_hash(source),
        "tokens_hash": tokens_hash(windows),
        "domains": json.dumps([name for names in windows.domains for name in names]),
        "description": windows.description,
    }
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(tensors, beside, metadata=said)
        beside.replace(path)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"cannot write log-probabilities to {path}: {error}") from error
    finally:
        beside.unlink(missing_ok=True)


def read_logprobs(path: Path) -> SavedLogprobs:
    """Read and check a file of log-probabilities.

    Raises:
        SourceError: it is none, or contradicts itself.
    """
    try:
        with safe_open(path, framework="pt") as file:
            said = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dictionary
    except (OSError, SafetensorError) as error:
        raise SourceError(f"cannot read log-probabilities from {path}: {error}") from error
    if said.get("format") != FORMAT:
        raise SourceError(f"{path} is of format {said.get('format')!r}, expected {FORMAT!r}")
    missing = [name for name in _TEXTS if name not in said] + [name for name in _SHAPES if name not in tensors]
    if missing:
        raise SourceError(f"{path} lacks {', '.join(missing)}")
    for name, dim in _SHAPES.items():
        if tensors[name].dim() != dim:
            raise SourceError(f"{path}: {name} is {list(tensors[name].shape)}, expected {dim} dimensions")
    lengths = [int(length) for length in tensors["windows"]]
    domains = _domains(said["domains"])
    ids, vocabulary = tensors["ids"].to(torch.int64), int(said["vocabulary"]) if said["vocabulary"].isdigit() else 0
    positions = sum(lengths) - len(lengths)
    problem = next(
        (
            text
            for text, wrong in (
                ("windows shorter than two tokens", not lengths or min(lengths) < 2),
                ("tokens do not fill the windows", sum(lengths) != tensors["tokens"].numel()),
                ("domains are no list of one name a window", domains is None or len(domains) != len(lengths)),
                (
                    "not one row for each position",
                    any(len(tensors[name]) != positions for name in _ROWS),
                ),
                ("ids and logprobs differ in shape", ids.shape != tensors["logprobs"].shape),
                (f"fewer than {LIKELIEST} tokens a position", ids.shape[1] < min(LIKELIEST, vocabulary)),
                ("ids outside the vocabulary", ids.numel() == 0 or int(ids.min()) < 0 or int(ids.max()) >= vocabulary),
            )
            if wrong
        ),
        None,
    )
    if problem is not None or domains is None:
        raise SourceError(f"{path} contradicts itself: {problem}")
    logprobs, tail = (tensors[name].to(torch.float64) for name in ("logprobs", "tail"))
    rows = torch.split(tensors["tokens"].to(torch.int64), lengths)
    windows = side_by_side(zip(domains, rows, strict=True), sum(lengths), said["description"])
    if tokens_hash(windows) != said["tokens_hash"]:
        raise SourceError(f"{path} contradicts itself: tokens_hash is not that of its tokens")
    if bool((ids.sort(1).values.diff(dim=1) == 0).any()) or bool((logprobs.diff(dim=1) > 0).any()):
        raise SourceError(f"{path} contradicts itself: ids occur twice in a position, or are not likeliest first")
    total = logprobs.exp().sum(1) + tail.exp()
    # NaN is not near 1 either
    if not bool(((total - 1).abs() <= 1e-3).all()):
        raise SourceError(f"{path} contradicts itself: the probabilities of a position do not add up to 1")
    if not bool((tensors["target"] <= 1e-3).all()):
        raise SourceError(f"{path} contradicts itself: target is no log-probability")
    return SavedLogprobs(
        windows=windows,
        ids=ids,
        logprobs=logprobs,
        tail=tail,
        target=tensors["target"].to(torch.float64),
        vocabulary=vocabulary,
        tokenizer=said["tokenizer"],
        model=said["model"],
        model_hash=said["model_hash"],
    )


def check_same_text(saved: SavedLogprobs, path: Path, *, vocabulary: int, tokenizer: str, tokens: str | None) -> None:
    """Refuse log-probabilities of other tokens than those of the other side.

    Args:
        saved: read from ``path``.
        path: for the message.
        vocabulary: of the other side.
        tokenizer: hash of the other side's; empty where it has none.
        tokens: hash of the tokens that were asked for; ``None`` takes those of the file.

    Raises:
        UsageError: vocabulary, tokenizer or tokens differ.
    """
    if saved.vocabulary != vocabulary:
        raise UsageError(f"{path} is over {saved.vocabulary} tokens, the other side over {vocabulary}")
    if saved.tokenizer and tokenizer and saved.tokenizer != tokenizer:
        raise UsageError(f"{path} was made with another tokenizer ({saved.tokenizer[:12]}, here {tokenizer[:12]})")
    if tokens is not None and tokens != tokens_hash(saved.windows):
        raise UsageError(
            f"{path} is of other tokens than the text, --tokens and --window give here: drop these options to take the "
            "file's own tokens, or save the log-probabilities again"
        )


def _domains(text: str) -> list[str] | None:
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, list) and all(isinstance(name, str) for name in found) else None
