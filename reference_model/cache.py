"""State of a decoded prefix, row by row."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from reference_model.attention import AttentionCache
from reference_model.delta_net import DeltaNetCache

LayerCache = AttentionCache | DeltaNetCache


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    """What the tokens so far have left behind. Never written to: a forward makes a new one.

    Attributes:
        layers: one entry a layer.
        lengths: int64 [B], tokens of each row; padding leaves nothing behind and does not count.
        next_position: int64 [B], one more than the largest position so far, whatever the positions were: less than
            ``lengths`` after an image, whose tokens share positions.
    """

    layers: tuple[LayerCache, ...]
    lengths: Tensor
    next_position: Tensor

    def rewind(self, lengths: Tensor) -> Cache:
        """The cache of the first ``lengths`` [B] tokens of each row.

        Attention forgets any number of tokens. DeltaNet's memory cannot be undone, only replayed: as far back as the
        beginning of the last forward, if that was ``rewindable``. Tokens taken back are text, one position each.

        Raises:
            ValueError: a row would grow, or would go back further than its layers remember, or rows are missing.
        """
        if lengths.shape != self.lengths.shape or bool((lengths < 0).any()):
            raise ValueError(f"lengths is {lengths.tolist()}, expected one count for each of {len(self.lengths)} rows")
        if bool((lengths == self.lengths).all()):
            return self
        if bool((lengths > self.lengths).any()):
            raise ValueError(f"rows of {self.lengths.tolist()} tokens cannot be rewound to {lengths.tolist()}")
        return Cache(
            layers=tuple(layer.rewind(lengths) for layer in self.layers),
            lengths=lengths,
            next_position=self.next_position - (self.lengths - lengths),
        )
