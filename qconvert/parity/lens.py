"""KL over layers: what both models would say if they ended after a layer, at a few positions.

The final norm and the output matrix read the state behind every layer as they read the last one ("logit lens"), so that
a divergence can be followed from the layer that brings it in to the one that carries it into the logits.

Shapes: T tokens, D hidden, L layers, P positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from qconvert.parity.heads import Side, scan_heads
from qconvert.parity.logits import VocabularyScan
from reference_model.each import Each
from reference_model.layer_pass import LayerRecord
from reference_model.layerwise import HiddenStates, finish
from reference_model.load import ActivationStore

POSITIONS = 256
"""Read behind every layer; the output matrix costs as much there as that many tokens, times the layers."""


class Lens:
    """The states of some positions behind every layer, of several sides: the original first."""

    def __init__(self, batches: Sequence[Tensor], depth: int, sides: int, store: ActivationStore) -> None:
        """``batches`` int64 [B, T] each; of all positions with a next token ``POSITIONS`` are read, evenly spread."""
        self._depth, self._store = depth, store
        self._sides = [HiddenStates(store=store, count=depth, name=f"lens.{n}") for n in range(sides)]
        counts = torch.tensor([ids.shape[0] * (ids.shape[1] - 1) for ids in batches])
        total = int(counts.sum())
        chosen = torch.arange(min(POSITIONS, total)) * total // min(POSITIONS, total)
        first = counts.cumsum(0) - counts
        self._chosen = [
            chosen[(chosen >= begin) & (chosen < begin + count)] - begin
            for begin, count in zip(first.tolist(), counts.tolist(), strict=True)
        ]
        self._rows: dict[int, list[Tensor]] = {}

    def see(self, side: int, record: LayerRecord) -> None:
        """Take what a layer gives for a batch; batches come in their order."""
        rows = self._rows.setdefault(side, [])
        rows.append(record.hidden[:, :-1].flatten(0, 1)[self._chosen[record.batch]])
        if record.batch == len(self._chosen) - 1:
            # of a window the last position is never read
            states = torch.cat((*self._rows.pop(side), record.hidden[:1, -1]))
            self._sides[side].put(record.layer, states.unsqueeze(0))

    def kept(self, before: int) -> Iterator[tuple[str, Tensor]]:
        """The states behind all layers before ``before``, by name."""
        for n, side in enumerate(self._sides):
            for layer in range(before):
                yield f"lens.{n}.{layer}", side[layer]

    def restore(self, before: int, kept: Callable[[str], Tensor]) -> None:
        """Take up what ``kept`` of an earlier run has given."""
        for n, side in enumerate(self._sides):
            for layer in range(before):
                side.put(layer, kept(f"lens.{n}.{layer}"))

    def divergences(self, sides: Sequence[Side], each: Each) -> list[tuple[float, ...]]:
        """Mean KL(original || converted) of the positions behind each layer, for each side but the first.

        ``sides`` say whose norm, output matrix and rounding read the states.
        """
        reading = [
            Side(source=side.source, hidden=states, rounding=side.rounding)
            for side, states in zip(sides, self._sides, strict=True)
        ]
        for side in reading:
            finish(side.source.config.text, side.source, side.hidden, torch.float32)
        positions = self._sides[0][0].shape[1] - 1
        scans = [VocabularyScan(torch.zeros(self._depth * positions, dtype=torch.int64)) for _ in reading[1:]]
        scan_heads(reading, [(scan.add, (0, n)) for n, scan in enumerate(scans, start=1)], each=each)
        return [tuple(scan.scores().kl.reshape(self._depth, positions).mean(axis=1).tolist()) for scan in scans]
