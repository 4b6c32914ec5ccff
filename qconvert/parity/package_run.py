"""What a package computes over the windows of a comparison, kept until the other side passes by.

A package is run whole, by ONNX Runtime. Its logits wait in slabs of the vocabulary, in the order in which those of the
other side will come.

Shapes: B windows, T tokens, D hidden, E experts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qconvert.core.errors import UsageError
from qconvert.parity.heads import HEAD_ROWS, HEAD_SLAB
from qconvert.parity.layers import Passed
from qconvert.weights.spill import SpillStore
from reference_model.config import TextConfig

if TYPE_CHECKING:
    from qconvert.onnx_export.runtime import Package, PackageOutput

CALL_BYTES = 1 << 28
"""Of logits that one call may give: a long vocabulary takes fewer windows at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    """Windows that were run together: ``first``, one past the ``last`` position that they score."""

    batch: int
    first: int
    last: int


@dataclass(slots=True, kw_only=True)
class PackageRun:
    """What a package made of all windows; everything large waits in ``store``.

    Attributes:
        sees: whether it has a vision tower.
        tapped: whether it gives the states of its layers.
        layered: whether they were kept.
        accepted: whether each guess of its prediction head is what the package itself chooses, see ``DraftScores``;
            ``None`` where it has no head, or where drafts were not asked for.
        calls: in the order of the positions.
    """

    store: SpillStore
    name: str
    config: TextConfig
    sees: bool = False
    tapped: bool = False
    layered: bool = False
    accepted: NDArray[np.bool_] | None = None
    calls: list[_Call] = field(default_factory=list)

    def logits(self, first_row: int, first_token: int, rows: int) -> Tensor:
        """Float32 logits [rows, v] of positions from ``first_row`` on, of the slab that begins at ``first_token``."""
        found = [
            self.store.get(f"{self.name}.{n}.logits.{first_token}")[
                max(first_row - call.first, 0) : first_row + rows - call.first
            ]
            for n, call in enumerate(self.calls)
            if call.first < first_row + rows and first_row < call.last
        ]
        return torch.cat(found)

    def passed(self, layer: int, batch: int) -> Passed:
        """What a layer made of a batch, and where the router sent its tokens."""
        chosen = [n for n, call in enumerate(self.calls) if call.batch == batch]
        hidden, router = (
            torch.cat([self.store.get(f"{self.name}.{n}.{tap}.{layer}") for n in chosen])
            for tap in ("hidden", "router")
        )
        best, experts = router.flatten(0, 1).softmax(-1).topk(self.config.num_experts_per_tok, dim=-1)
        return Passed(hidden=hidden, experts=experts, weights=best / best.sum(-1, keepdim=True))

    def slabs(self) -> Iterator[tuple[int, int, int]]:
        """First position, first vocabulary entry and number of positions of all that ``logits`` can give."""
        total = self.calls[-1].last
        for first in range(0, self.config.vocab_size, HEAD_SLAB):
            for row in range(0, total, HEAD_ROWS):
                yield row, first, min(HEAD_ROWS, total - row)


def check_runs(folder: Path) -> None:
    """Refuse a package that cannot run here, before anything takes time.

    Raises:
        UsageError: ONNX Runtime is not installed.
        SourceError: it was exported for another provider than the CPU.
    """
    from qconvert.onnx_export.runtime import check_provider

    check_provider(folder)


def run_package(
    folder: Path,
    config: TextConfig,
    batches: Sequence[Tensor],
    store: SpillStore,
    *,
    name: str = "package",
    drafts: bool = False,
    layers: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> PackageRun:
    """Let ONNX Runtime run the package in ``folder`` over token windows [B, T].

    Args:
        folder: of the package.
        config: of its decoder.
        batches: int64 [B, T] each.
        store: takes the logits.
        name: tells two packages in one store apart.
        drafts: also let its prediction head guess, where it has one.
        layers: also keep the states of its layers, where it gives them.
        progress: is told of windows.

    Raises:
        SourceError, UsageError: ONNX Runtime is missing, refuses the package, or lacks an operator.
    """
    from qconvert.onnx_export.runtime import Package

    package = Package(folder)
    run, row, done = PackageRun(store=store, name=name, config=config, sees=package.sees), 0, 0
    guessed: list[NDArray[np.bool_]] = []
    total = sum(len(ids) for ids in batches)
    for b, ids in enumerate(batches):
        length = ids.shape[1]
        for part in torch.split(ids, max(1, CALL_BYTES // (length * config.vocab_size * 4))):
            progress(done, total)
            out = run_text(package, part)
            logits = every_logit(package, part, out)
            call = _Call(batch=b, first=row, last=row + len(part) * (length - 1))
            _keep(run, call, out, logits[:, :-1].flatten(0, 1), layers=layers)
            if drafts and package.drafts and out.hidden is not None:
                guessed.append(_guesses(package, part, out, logits))
            row, done = call.last, done + len(part)
    progress(total, total)
    if guessed:
        run.accepted = np.concatenate(guessed)
    return run


def run_text(package: Package, ids: Tensor, **given: Any) -> PackageOutput:
    """``Package.forward`` of ids [B, T] that are all text: comparisons show no pictures."""
    tokens = ids.numpy()
    return package.forward(tokens, embeddings=package.look_up(tokens) if package.sees else None, **given)


def every_logit(package: Package, ids: Tensor, out: PackageOutput) -> Tensor:
    """Logits [B, T, V] of all tokens; one by one from a package that scores the last token of a call alone.

    Raises:
        UsageError: the vocabulary is none of the tokens'.
    """
    if out.logits.shape[1] == ids.shape[1]:
        return torch.from_numpy(out.logits).to(torch.float32)
    found, cache = [], None
    for token in torch.split(ids, 1, dim=1):
        one = run_text(package, token, cache=cache)
        cache = one.cache
        found.append(torch.from_numpy(one.logits).to(torch.float32))
    return torch.cat(found, dim=1)


def _keep(run: PackageRun, call: _Call, out: PackageOutput, logits: Tensor, *, layers: bool) -> None:
    n = len(run.calls)
    if logits.shape[1] != run.config.vocab_size:
        raise UsageError(f"the package scores {logits.shape[1]} tokens, its config.json has {run.config.vocab_size}")
    for first in range(0, run.config.vocab_size, HEAD_SLAB):
        run.store.put(f"{run.name}.{n}.logits.{first}", logits[:, first : first + HEAD_SLAB].contiguous())
    run.tapped = bool(out.taps)
    for layer in range(run.config.num_hidden_layers if layers and out.taps else 0):
        for tap in ("hidden", "router"):
            values = torch.from_numpy(out.taps[f"taps.{layer}.{tap}"]).to(torch.float32)
            run.store.put(f"{run.name}.{n}.{tap}.{layer}", values)
        run.layered = True
    run.calls.append(call)


def _guesses(package: Package, ids: Tensor, out: PackageOutput, logits: Tensor) -> NDArray[np.bool_]:
    """Whether the head's guess of token t + 2, told token t + 1, is what the decoder chooses there: bool, flat."""
    if out.hidden is None or ids.shape[1] < 3:
        return np.zeros(0, dtype=bool)
    guess = package.draft(out.hidden[:, :-1], ids[:, 1:].numpy()).logits.argmax(-1)
    chosen = logits.argmax(-1).numpy()
    result: NDArray[np.bool_] = (guess[:, :-1] == chosen[:, 1:-1]).ravel()
    return result
