"""Full attention of every fourth layer: grouped heads, normed queries and keys, a sigmoid gate on the output.

Shapes: B batch, T new tokens, S all tokens (past and new), D hidden, N query heads, M key/value heads, K head width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from reference_model.config import TextConfig
from reference_model.norm import RMSNorm, widen
from reference_model.rope import rotate
from reference_model.span import Span

AttentionKind = Literal["sdpa", "plain"]


def known_kind(kind: AttentionKind) -> AttentionKind:
    """The kind itself; ``ValueError`` for a name that is none."""
    if kind not in get_args(AttentionKind):
        raise ValueError(f"attention is {kind!r}, expected one of {', '.join(get_args(AttentionKind))}")
    return kind


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCache:
    """Rotated keys and values of the tokens seen so far, both [B, S, M, K]; a step makes a new one.

    S is the length of the longest row; a shorter one has its tokens first, then numbers without meaning.
    """

    keys: Tensor
    values: Tensor

    def rewind(self, lengths: Tensor) -> AttentionCache:
        """The cache of the first ``lengths`` [B] tokens of each row."""
        longest = int(lengths.max())
        return AttentionCache(keys=self.keys[:, :longest], values=self.values[:, :longest])


def causal_attention(
    queries: Tensor, keys: Tensor, values: Tensor, kind: AttentionKind, visible: Tensor | None = None
) -> Tensor:
    """Attend from the last T of S positions to all that precede them.

    ``softmax(q k^T / sqrt(K)) v`` over positions j <= i; query head n reads key/value head n * M // N. Queries
    [B, T, N, K], keys and values [B, S, M, K]; result [B, T, N, K] in the dtype of the queries. ``visible``
    [B, 1, T, S] says instead which keys each query sees. ``plain`` writes the formula out, with the softmax in at
    least fp32; ``sdpa`` leaves it to torch.
    """
    new, seen = queries.shape[1], keys.shape[1]
    groups = queries.shape[2] // keys.shape[2]
    q = queries.transpose(1, 2)
    k, v = (x.repeat_interleave(groups, dim=2).transpose(1, 2) for x in (keys, values))
    mask = torch.ones(new, seen, dtype=torch.bool, device=q.device).tril(seen - new) if visible is None else visible
    if kind == "sdpa":
        whole, single = visible is None and new == seen, visible is None and new == 1
        out = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=None if whole or single else mask, is_causal=whole
        )
    else:
        scores = (q @ k.transpose(-1, -2)) / math.sqrt(q.shape[-1])
        out = widen(scores).masked_fill(~mask, -math.inf).softmax(-1).to(q.dtype) @ v
    return out.transpose(1, 2)


class GatedAttention(nn.Module):
    """Attention whose output is gated, per head and dimension, by the token that asks.

    ``o_proj(sigmoid(gate) * attend(rotate(q_norm(q)), rotate(k_norm(k)), v))``. ``q_proj`` gives every head its query
    and its gate side by side: rows [n, query K | gate K].
    """

    def __init__(self, config: TextConfig, kind: AttentionKind = "sdpa") -> None:
        super().__init__()
        self.kind = known_kind(kind)
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, 2 * config.query_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.key_value_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.key_value_dim, bias=False)
        self.o_proj = nn.Linear(config.query_dim, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, x: Tensor, span: Span, cache: AttentionCache | None = None) -> tuple[Tensor, AttentionCache]:
        """Mix (packed) x [B, T, D] over time; gives [B, T, D] and the cache that includes these tokens."""
        batch, new, _ = x.shape
        queries, gate = self.q_proj(x).view(batch, new, -1, 2 * self.head_dim).chunk(2, dim=-1)
        queries = rotate(self.q_norm(queries), span.by)
        keys = rotate(self.k_norm(self.k_proj(x).view(batch, new, -1, self.head_dim)), span.by)
        values = self.v_proj(x).view(batch, new, -1, self.head_dim)
        visible = None
        if span.packing is not None:
            keys = span.packing.append(None if cache is None else cache.keys, keys)
            values = span.packing.append(None if cache is None else cache.values, values)
            visible = span.packing.visible(keys.shape[1])
        elif cache is not None:
            keys, values = torch.cat((cache.keys, keys), dim=1), torch.cat((cache.values, values), dim=1)
        mixed = causal_attention(queries, keys, values, self.kind, visible) * torch.sigmoid(gate)
        out: Tensor = self.o_proj(mixed.reshape(batch, new, -1))
        return out, AttentionCache(keys=keys, values=values).rewind(span.lengths)
