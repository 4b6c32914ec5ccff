"""Runs of a package that show faults of execution: whole, in several calls, and with padding.

Shapes: B rows, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from qconvert.parity.execution.recorded import Recorded
from qconvert.weights.spill import SpillStore

if TYPE_CHECKING:
    from qconvert.onnx_export.runtime import Package
    from qconvert.onnx_export.session import PackageCache

TOKENS = 96
"""Of a row: more than a chunk of linear attention has."""

ROWS = 2

FEW = 3
"""Tokens of the row that is nearly all padding: whatever of it is remembered shows."""

WHOLE, IN_CALLS, PADDED = "in one call", "in several calls", "with padding"
PADDED_CALLS = "with padding between calls"


def probe_package(package: Package, ids: Tensor, store: SpillStore) -> Iterator[Recorded]:
    """Run int64 ids [B, T], T at least 2, in the four ways; what comes of it waits in ``store``."""
    ids = ids[:ROWS, :TOKENS]
    rows, tokens = ids.shape
    everything = torch.ones_like(ids)
    yield _run(package, WHOLE, ids, everything, (tokens,), store)
    yield _run(package, IN_CALLS, ids, everything, _calls(tokens), store)
    padded = torch.cat((ids, ids[:1].repeat(3, 1)))
    mask = torch.ones_like(padded)
    gap = max(1, tokens // 3)
    mask[rows, :gap] = 0
    mask[rows + 1, -gap:] = 0
    mask[rows + 2, : max(1, tokens - FEW)] = 0
    yield _run(package, PADDED, padded, mask, (tokens,), store)
    half = _calls(tokens)[0]
    broken = torch.ones_like(ids[:1].repeat(2, 1))
    broken[0, max(1, half - gap) : half] = 0
    broken[1, half : min(half + gap, tokens - 1)] = 0
    yield _run(package, PADDED_CALLS, ids[:1].repeat(2, 1), broken, _calls(tokens), store)


def alone(package: Package, run: Recorded, row: int) -> Tensor:
    """Logits [n, V] of the real tokens of a row in one call without padding or other rows, or of the last one alone."""
    tokens = run.ids[row][run.real[row]].unsqueeze(0).numpy()
    out = package.forward(tokens, embeddings=package.look_up(tokens) if package.sees else None)
    return torch.from_numpy(out.logits[0]).to(torch.float32)


def _calls(tokens: int) -> tuple[int, ...]:
    """A prompt, more tokens, and single ones, as far as there are any: the last token shows what was carried."""
    sizes = (max(1, tokens // 2), max(0, tokens - tokens // 2 - 2), 1, 1)
    ends = [min(end, tokens) for end in accumulate(sizes)]
    return tuple(end - begin for begin, end in pairwise([0, *ends]) if end > begin)


def _run(
    package: Package,
    name: str,
    ids: Tensor,
    mask: Tensor,
    calls: tuple[int, ...],
    store: SpillStore,
) -> Recorded:
    cache: PackageCache | None = None
    taps: dict[str, list[Tensor]] = {}
    logits, embeddings = [], []
    last: dict[int, Tensor] = {}
    for tokens, seen in zip(*(torch.split(one, list(calls), dim=1) for one in (ids, mask)), strict=True):
        given = tokens.numpy()
        looked_up = package.look_up(given) if package.sees else None
        out = package.forward(given, attention_mask=seen.numpy().astype(np.int64), cache=cache, embeddings=looked_up)
        cache = out.cache
        if out.logits.shape[1] == tokens.shape[1]:
            logits.append(torch.from_numpy(out.logits).to(torch.float32))
        if looked_up is not None:
            embeddings.append(torch.from_numpy(looked_up).to(torch.float32))
        for row, kept in enumerate(seen.bool()):
            if bool(kept.any()):
                scored = torch.from_numpy(out.logits[row]).to(torch.float32)
                last[row] = scored[int(kept.nonzero()[-1]) if len(scored) == len(kept) else -1]
        for tap, values in out.taps.items():
            taps.setdefault(tap, []).append(torch.from_numpy(values).to(torch.float32))
    for tap, parts in taps.items():
        store.put(f"{name}.{tap}", torch.cat(parts, dim=1))

    def take(layer: int, tap: str) -> Tensor | None:
        key = f"taps.{layer}.{tap}"
        return store.get(f"{name}.{key}") if key in taps else None

    whole = torch.cat(logits, dim=1) if len(logits) == len(calls) else None
    return Recorded(
        name=name,
        ids=ids,
        real=mask != 0,
        calls=calls,
        take=take,
        embeddings=torch.cat(embeddings, dim=1) if embeddings else None,
        logits=whole,
        last=torch.stack([last[row] for row in range(len(ids))]),
    )
