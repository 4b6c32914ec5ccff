"""The Gated DeltaNet layer: three of every four layers mix tokens with a recurrent memory instead of attention.

    x ─ in_proj_qkv ─ causal conv ─ silu ─ q, k, v ─┐
    x ─ in_proj_a ─ g (decay)  ─────────────────────┼─ delta rule ─ gated norm ─ out_proj
    x ─ in_proj_b ─ beta (strength) ────────────────┘                  │
    x ─ in_proj_z ─────────────────────────────────────────────────────┘

All that a token does to the memory (``delta_rule``) it decides itself, by projections of its own hidden state x: what
to ask (q), where to write (k), what (v), how much to believe it (beta), and how much to forget first (g). For g it
asks for a step ``softplus(in_proj_a(x) + dt_bias)`` > 0, and each head forgets at a rate of its own, ``exp(A_log)``:
the memory shrinks by ``exp(-rate * step)``, as anything that decays does over a time. Heads of small rates remember
for long.

The convolution lets q, k and v see the three tokens before: keys such as "what came after this word" need two tokens,
and the memory has no positions to tell neighbours by. z decides, dimension by dimension, how much of what was read
gets out; the norm before it makes up for reads whose size depends on how full the memory is. (The layer
is that of Yang, Kautz and Hatamizadeh 2024, "Gated Delta Networks", arXiv 2412.06464, its decay that of Mamba-2: Dao
and Gu 2024, arXiv 2405.21060.)

Between calls a layer keeps the memory and the last inputs of the convolution. Padding must change neither: its g and
beta are set to zero (``still``), and the convolution's inputs are taken from before it.

Shapes: B batch, T tokens, D hidden, Hk / Hv key and value heads, dk / dv their widths, C = 2 Hk dk + Hv dv channels,
W width of the convolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from reference_model.config import TextConfig
from reference_model.delta_rule import chunked_gated_delta_rule, recurrent_gated_delta_rule
from reference_model.norm import GatedRMSNorm, widen
from reference_model.span import Span


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaNetCache:
    """What a DeltaNet layer remembers, of a size that does not grow. Never written to: a step makes a new one.

    Attributes:
        conv: the last W - 1 inputs of the convolution, before it [B, W - 1, C].
        recurrent: state of the delta rule [B, Hv, dk, dv], in at least fp32.
        replay: the last forward's way from one state to the next, when that may have to be taken back.
    """

    conv: Tensor
    recurrent: Tensor
    replay: Replay | None = None

    def rewind(self, lengths: Tensor) -> DeltaNetCache:
        """The cache of the first ``lengths`` [B] tokens of each row.

        Raises:
            ValueError: that is before the last forward, or that forward was not to be taken back.
        """
        if self.replay is None or bool((lengths < self.replay.starts).any()):
            raise ValueError("a DeltaNet layer can only be rewound into its last forward, if that was rewindable")
        return self.replay.upto(lengths - self.replay.starts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """All that changes a DeltaNet layer's memory in T tokens, so that fewer of them can be run again.

    This is far less than a state for every token: a few vectors a head instead of a matrix.

    Attributes:
        starts: int64 [B], tokens of each row before.
        inputs: of the convolution [B, W - 1 + T, C], the first W - 1 from before.
        k, v, g, beta: arguments of the delta rule, as it has them.
        state: memory before [B, Hv, dk, dv]; ``None`` is zero.
    """

    starts: Tensor
    inputs: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    state: Tensor | None

    def upto(self, counts: Tensor) -> DeltaNetCache:
        """The cache after the first ``counts`` [B] tokens of each row."""
        late = torch.arange(self.v.shape[1], device=counts.device) >= counts[:, None]
        g, beta = still(self.g, late), still(self.beta, late)
        _, state = recurrent_gated_delta_rule(self.k, self.k, self.v, g, beta, self.state)
        return DeltaNetCache(conv=recent_inputs(self.inputs, counts, self.v.shape[1]), recurrent=state)

    def states(self, ends: Sequence[int]) -> Tensor:
        """The memory after the first ``end`` tokens of the batch for each of the ascending ``ends`` >= 1.

        [len(ends), B, Hv, dk, dv]. With padding, these are tokens of the packed rows.
        """
        found: dict[int, Tensor] = {}
        begin, state = 0, self.state
        for end in dict.fromkeys(ends):
            k, v, g, beta = (x[:, begin:end] for x in (self.k, self.v, self.g, self.beta))
            _, state = chunked_gated_delta_rule(k, k, v, g, beta, state)
            begin, found[end] = end, state
        return torch.stack([found[end] for end in ends])


def still(x: Tensor, late: Tensor) -> Tensor:
    """Decay or strength x [B, T, Hv] with zeros at the ``late`` tokens [B, T]: they neither decay nor write."""
    return x.masked_fill(late.unsqueeze(-1), 0.0)


def recent_inputs(inputs: Tensor, counts: Tensor, tokens: int) -> Tensor:
    """The W - 1 inputs before token ``counts[b]`` of each row: inputs [B, W - 1 + tokens, C] -> [B, W - 1, C]."""
    window = torch.arange(inputs.shape[1] - tokens, device=inputs.device)
    rows = torch.arange(inputs.shape[0], device=inputs.device)
    return inputs[rows[:, None], counts[:, None] + window]


class CausalConv(nn.Module):
    """Depthwise causal convolution, the same few taps for each channel: no bias, weight [C, 1, W]."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, width))
        nn.init.uniform_(self.weight, -(width**-0.5), width**-0.5)

    def forward(self, x: Tensor, past: Tensor) -> Tensor:
        """``y_t = sum_j weight_j x_{t - W + 1 + j}``, summed in at least fp32.

        x [B, T, C] is preceded by past [B, W - 1, C]; y [B, T, C] has the dtype of x.
        """
        taps = widen(self.weight).squeeze(1).unbind(-1)
        inputs = widen(torch.cat((past, x), dim=1))
        total = inputs[:, : x.shape[1]] * taps[0]
        for j, tap in enumerate(taps[1:], start=1):
            total = total + inputs[:, j : j + x.shape[1]] * tap
        return total.to(x.dtype)


class GatedDeltaNet(nn.Module):
    """``out_proj(norm(delta_rule(q, k, v, g, beta), z))``.

    q, k, v come from ``silu(conv(in_proj_qkv(x)))``, rows [Hk dk | Hk dk | Hv dv];
    ``g = -exp(A_log) * softplus(in_proj_a(x) + dt_bias)`` in at least fp32; ``beta = sigmoid(in_proj_b(x))``;
    ``z = in_proj_z(x)`` gates the norm, whose weight [dv] is shared by all heads.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        heads, hidden = config.linear_num_value_heads, config.hidden_size
        self.key_dim, self.value_dim = config.key_dim, config.value_dim
        self.key_head, self.value_head = config.linear_key_head_dim, config.linear_value_head_dim
        self.in_proj_qkv = nn.Linear(hidden, config.conv_dim, bias=False)
        self.in_proj_z = nn.Linear(hidden, config.value_dim, bias=False)
        self.in_proj_b = nn.Linear(hidden, heads, bias=False)
        self.in_proj_a = nn.Linear(hidden, heads, bias=False)
        self.conv1d = CausalConv(config.conv_dim, config.linear_conv_kernel_dim)
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(0.01, 16).log())
        self.dt_bias = nn.Parameter(torch.ones(heads))
        self.norm = GatedRMSNorm(self.value_head, config.rms_norm_eps)
        self.out_proj = nn.Linear(config.value_dim, hidden, bias=False)

    def forward(self, x: Tensor, span: Span, cache: DeltaNetCache | None = None) -> tuple[Tensor, DeltaNetCache]:
        """Mix (packed) x [B, T, D] over time; gives [B, T, D] and the cache that includes these tokens."""
        batch, tokens, _ = x.shape
        raw = self.in_proj_qkv(x)
        taps = self.conv1d.weight.shape[-1]
        past = raw.new_zeros(batch, taps - 1, raw.shape[-1]) if cache is None else cache.conv
        mixed = functional.silu(self.conv1d(raw, past))
        q, k, v = torch.split(mixed, [self.key_dim, self.key_dim, self.value_dim], dim=-1)
        q, k = (y.reshape(batch, tokens, -1, self.key_head) for y in (q, k))
        v = v.reshape(batch, tokens, -1, self.value_head)
        g = -widen(self.A_log).exp() * functional.softplus(widen(self.in_proj_a(x)) + widen(self.dt_bias))
        beta = torch.sigmoid(self.in_proj_b(x))
        if span.packing is not None:
            g, beta = still(g, ~span.packing.real), still(beta, ~span.packing.real)
        before = None if cache is None else cache.recurrent
        rule = recurrent_gated_delta_rule if tokens == 1 else chunked_gated_delta_rule
        read, state = rule(q, k, v, g, beta, before)
        gate = self.in_proj_z(x).view_as(read)
        out: Tensor = self.out_proj(self.norm(read, gate).flatten(-2))
        inputs = torch.cat((past, raw), dim=1)
        recent = recent_inputs(inputs, span.lengths - span.starts, tokens)
        replay = None
        if span.rewindable:
            replay = Replay(starts=span.starts, inputs=inputs, k=k, v=v, g=g, beta=beta, state=before)
        return out, DeltaNetCache(conv=recent, recurrent=state, replay=replay)
