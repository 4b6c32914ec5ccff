"""The new tokens of a batch: where they stand, and how rows of unequal length share it.

Padding may lie anywhere in a batch [B, T], and its rows may go on from prefixes of different lengths. Wherever tokens
meet (attention, convolution, delta rule) the real ones of each row are packed to the left, in order; what is left
behind them comes later in time, so causality hides it, and the memory is told not to decay and not to write.

Shapes: B batch, T new tokens, S tokens past and new, D anything.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reference_model.config import TextConfig
from reference_model.rope import Rotation, rotation


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """How the real tokens of each row are moved to its beginning, and where in the row's whole past they belong.

    Attributes:
        order: int64 [B, T]; packed token i is token ``order[b, i]`` of the batch. Padding comes last.
        counts: int64 [B], real tokens.
        starts: int64 [B], tokens that came before.
    """

    order: Tensor
    counts: Tensor
    starts: Tensor

    @property
    def real(self) -> Tensor:
        """Which packed tokens are real: bool [B, T]."""
        return torch.arange(self.order.shape[1], device=self.order.device) < self.counts[:, None]

    @property
    def slots(self) -> Tensor:
        """Places of the packed tokens in the row's past and present: int64 [B, T]."""
        return self.starts[:, None] + torch.arange(self.order.shape[1], device=self.order.device)

    def pack(self, x: Tensor) -> Tensor:
        """[B, T, ...] as in the batch -> real tokens first."""
        return x[_rows(x), self.order]

    def unpack(self, x: Tensor) -> Tensor:
        """The way back; padding gets finite numbers without meaning."""
        return x[_rows(x), self.order.argsort(dim=1)]

    def append(self, past: Tensor | None, x: Tensor) -> Tensor:
        """Put packed x [B, T, ...] behind each row's own past [B, max(starts), ...]: [B, max(starts) + T, ...].

        Whatever a row has beyond its own tokens is overwritten, or later than all of them.
        """
        whole = torch.zeros_like(x) if past is None else torch.cat((past, torch.zeros_like(x)), dim=1)
        return whole.index_put((_rows(x), self.slots), x)

    def visible(self, seen: int) -> Tensor:
        """Which of ``seen`` places each packed token may look at, those up to its own: bool [B, 1, T, S].

        Padding looks at whatever is there, so that no row of it is empty: a softmax over nothing is not a number.
        """
        return (torch.arange(seen, device=self.order.device) <= self.slots[:, :, None]).unsqueeze(1)


def pack_rows(real: Tensor, starts: Tensor | None = None) -> Packing:
    """The packing of the ``real`` tokens, bool [B, T]; ``starts`` [B] came before, none by default."""
    counts = real.sum(1)
    order = (~real).argsort(dim=1, stable=True)
    return Packing(order=order, counts=counts, starts=torch.zeros_like(counts) if starts is None else starts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """What layers have to know about the new tokens of a batch.

    Attributes:
        by: rotations of the (packed) tokens.
        packing: ``None`` when there is no padding and all rows go on from the same length.
        starts: int64 [B], tokens of each row that came before.
        lengths: int64 [B], the same once these tokens have been added.
        next_position: int64 [B], one more than the largest position of the row.
        rewindable: whether the caches shall remember how to take these tokens back.
    """

    by: Rotation
    packing: Packing | None
    starts: Tensor
    lengths: Tensor
    next_position: Tensor
    rewindable: bool = False


def place_tokens(
    config: TextConfig,
    x: Tensor,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    starts: Tensor | None = None,
    next_position: Tensor | None = None,
    rewindable: bool = False,
) -> Span:
    """The span of new tokens x [B, T, D], B and T above 0, in the dtype of x.

    Args:
        config: for the rotary embedding.
        x: embeddings, or hidden states.
        attention_mask: [B, T], zero (or false) where there is padding.
        position_ids: int64 [3, B, T]; by default real tokens count on from ``next_position``.
        starts: int64 [B], tokens of each row that came before; ``None`` for none.
        next_position: int64 [B], position of the first token by default; ``None`` for 0.
        rewindable: handed on.

    Raises:
        ValueError: mask, positions or what came before do not fit the tokens.
    """
    batch, tokens = x.shape[:2]
    check_places((batch, tokens), attention_mask, position_ids)
    if starts is not None and starts.shape != (batch,):
        raise ValueError(f"the cache is of a batch of {len(starts)} rows, the new tokens are of {batch}")
    zero = torch.zeros(batch, dtype=torch.int64, device=x.device)
    starts = zero if starts is None else starts
    next_position = zero if next_position is None else next_position
    real = None if attention_mask is None else attention_mask.bool()
    packing = None
    if real is not None and not bool(real.all()):
        packing = pack_rows(real, starts)
    elif bool((starts != starts[0]).any()):
        packing = pack_rows(torch.ones(batch, tokens, dtype=torch.bool, device=x.device), starts)
    if position_ids is None:
        position_ids = text_positions(batch, tokens, next_position, real)
    counted = position_ids if real is None else position_ids.masked_fill(~real, -1)
    if packing is not None:
        position_ids = packing.pack(position_ids.movedim(0, -1)).movedim(-1, 0)
    return Span(
        by=rotation(config, position_ids, x.dtype),
        packing=packing,
        starts=starts,
        lengths=starts + (tokens if packing is None else packing.counts),
        next_position=next_position.maximum(counted.amax((0, 2)) + 1),
        rewindable=rewindable,
    )


def check_ids(config: TextConfig, ids: Tensor, embeddings: Tensor | None = None) -> None:
    """Raise ``ValueError`` unless ids are int64 or int32 [B, T], not none, and known or beside ``embeddings``."""
    if ids.ndim != 2 or ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"token ids are {ids.dtype} {list(ids.shape)}, expected whole numbers [rows, tokens] of 32 or 64 bits"
        )
    if not ids.numel():
        raise ValueError(f"{ids.shape[0]} rows of {ids.shape[1]} tokens: expected at least one token to run")
    if embeddings is None:
        beyond = (ids < 0) | (ids >= config.vocab_size)
        if bool(beyond.any()):
            raise ValueError(f"token id {int(ids[beyond][0])} is not of the vocabulary, 0 to {config.vocab_size - 1}")
    elif embeddings.shape != (*ids.shape, config.hidden_size):
        raise ValueError(
            f"embeddings is {list(embeddings.shape)}, expected {[*ids.shape, config.hidden_size]}: one a token id"
        )


def check_places(shape: tuple[int, ...], attention_mask: Tensor | None, position_ids: Tensor | None = None) -> None:
    """Raise ``ValueError`` unless a mask is zeros and ones of ``shape`` [B, T], positions whole numbers [3, B, T]."""
    if attention_mask is not None:
        if attention_mask.shape != shape:
            raise ValueError(
                f"attention_mask is {list(attention_mask.shape)}, expected {list(shape)}: it marks new tokens "
                "alone, a cache knows its own"
            )
        other = attention_mask[(attention_mask != 0) & (attention_mask != 1)]
        if other.numel():
            raise ValueError(f"attention_mask holds {other[0].item()}, expected 1 at real tokens and 0 at padding")
    if position_ids is not None and (
        position_ids.shape != (3, *shape) or position_ids.dtype not in (torch.int64, torch.int32)
    ):
        raise ValueError(
            f"position_ids is {position_ids.dtype} {list(position_ids.shape)}, expected torch.int64 "
            f"{[3, *shape]}: time, height and width of each new token"
        )


def text_positions(batch: int, tokens: int, first: Tensor, real: Tensor | None = None) -> Tensor:
    """Positions of plain text on all three axes: int64 [3, B, T], counting on from ``first`` [B].

    With ``real`` [B, T] only real tokens count; padding before them has the position of the first.
    """
    steps = torch.arange(tokens, device=first.device) if real is None else (real.cumsum(1) - 1).clamp(min=0)
    return (first[:, None] + steps).expand(3, batch, tokens)


def last_real(x: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The last real token of each row of x [B, T, ...]: [B, 1, ...]."""
    if attention_mask is None:
        return x[:, -1:]
    last = (attention_mask.bool() * torch.arange(1, x.shape[1] + 1, device=x.device)).argmax(1, keepdim=True)
    return x[_rows(x), last]


def _rows(x: Tensor) -> Tensor:
    """Row numbers that broadcast over tokens: int64 [B, 1]."""
    return torch.arange(x.shape[0], device=x.device)[:, None]
