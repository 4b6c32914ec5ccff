"""Attention and linear attention over whole rows, right or with one of the faults that engines have.

The formulas are those of ``reference_model``; written so that each thing that an engine may leave out can be left out.

Shapes: B rows, T tokens, D hidden, N / M query and key-value heads of width K, Hk / Hv key and value heads of linear
attention, C channels and W taps of the convolution, P tokens of earlier calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from torch.nn import functional

from reference_model.attention import GatedAttention, causal_attention
from reference_model.config import TextConfig
from reference_model.delta_net import GatedDeltaNet, recent_inputs
from reference_model.delta_rule import chunked_gated_delta_rule
from reference_model.norm import rms_normalize
from reference_model.rope import rotate, rotation
from reference_model.span import pack_rows, text_positions

Broken = frozenset[str]
"""What is left out or done otherwise; see ``faults.py``."""

RIGHT: Broken = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """Where tokens [B, T] stand.

    Attributes:
        config: of the decoder.
        real: which are no padding, bool [B, T].
        calls: how many tokens came in each call.
    """

    config: TextConfig
    real: Tensor
    calls: tuple[int, ...]

    def bounds(self, together: bool) -> Iterator[tuple[int, int]]:
        """First and one past the last token of each call, or of all calls ``together``."""
        yield from pairwise(accumulate((sum(self.calls),) if together else self.calls, initial=0))

    def positions(self, broken: Broken) -> Tensor:
        """Positions int64 [3, B, T]; padding has that of the real token that comes next in its call."""
        real = torch.ones_like(self.real) if "positions of padding" in broken else self.real
        parts, first = [], torch.zeros(len(real), dtype=torch.int64)
        for begin, end in self.bounds(False):
            part = real[:, begin:end]
            parts.append(text_positions(len(real), end - begin, first, part))
            if "positions of calls" not in broken:
                first = first + part.sum(1)
        return torch.cat(parts, dim=2)


Mixer = Callable[[Tensor, Placed, Broken], Tensor]


def linear_attention(net: GatedDeltaNet, x: Tensor, at: Placed, broken: Broken = RIGHT) -> Tensor:
    """What a DeltaNet layer adds to x [B, T, D], which is normed."""
    rows, tokens, _ = x.shape
    real = at.real.unsqueeze(-1)
    mixed = _convolution(net, net.in_proj_qkv(x), at, broken)
    q, k, v = torch.split(mixed, [net.key_dim, net.key_dim, net.value_dim], dim=-1)
    q, k = (one.reshape(rows, tokens, -1, net.key_head) for one in (q, k))
    v = v.reshape(rows, tokens, -1, net.value_head)
    if "order of key heads" in broken:
        q, k = (one.repeat(1, 1, v.shape[2] // one.shape[2], 1) for one in (q, k))
    g = -net.A_log.exp() * functional.softplus(net.in_proj_a(x) + net.dt_bias)
    beta = torch.sigmoid(net.in_proj_b(x))
    if "decay" in broken:
        g = torch.zeros_like(g)
    if "strength" in broken:
        beta = torch.ones_like(beta)
    if "memory sees padding" not in broken:
        g, beta = g * real, beta * real
    read = [
        chunked_gated_delta_rule(*(part[:, begin:end] for part in (q, k, v, g, beta)))[0]
        for begin, end in at.bounds("memory of calls" not in broken)
    ]
    out = torch.cat(read, dim=1)
    gate = net.in_proj_z(x).view_as(out)
    normal = net.norm.weight * rms_normalize(out, net.norm.eps) if "gate" in broken else net.norm(out, gate)
    added: Tensor = net.out_proj(normal.flatten(-2))
    return added


def _convolution(net: GatedDeltaNet, raw: Tensor, at: Placed, broken: Broken) -> Tensor:
    """``silu(conv(raw))`` [B, T, C], of the real tokens of each row side by side."""
    if "convolution" in broken:
        return functional.silu(raw)
    found = []
    for begin, end in at.bounds(False):
        part, packing = raw[:, begin:end], pack_rows(at.real[:, begin:end])
        past = _window(net, raw[:, :begin], at.real[:, :begin], broken)
        if "convolution sees padding" in broken:
            found.append(net.conv1d(part, past))
        else:
            found.append(packing.unpack(net.conv1d(packing.pack(part), past)))
    mixed = torch.cat(found, dim=1)
    return mixed if "activation of the convolution" in broken else functional.silu(mixed)


def _window(net: GatedDeltaNet, raw: Tensor, real: Tensor, broken: Broken) -> Tensor:
    """What the convolution has of earlier calls, whose inputs are ``raw`` [B, P, C]: its last W - 1 [B, W - 1, C]."""
    tokens = raw.shape[1]
    before = raw.new_zeros(len(raw), net.conv1d.weight.shape[-1] - 1, raw.shape[-1])
    if "convolution of calls" in broken or not tokens:
        return before
    packing = pack_rows(torch.ones_like(real) if "window sees padding" in broken else real)
    return recent_inputs(torch.cat((before, packing.pack(raw)), dim=1), packing.counts, tokens)


def attention(net: GatedAttention, x: Tensor, at: Placed, broken: Broken = RIGHT) -> Tensor:
    """What an attention layer adds to x [B, T, D], which is normed."""
    rows, tokens, _ = x.shape
    queries, gate = net.q_proj(x).view(rows, tokens, -1, 2 * net.head_dim).chunk(2, dim=-1)
    if "query is gate" in broken:
        queries, gate = gate, queries
    keys = net.k_proj(x).view(rows, tokens, -1, net.head_dim)
    values = net.v_proj(x).view(rows, tokens, -1, net.head_dim)
    if "norms of queries and keys" not in broken:
        queries, keys = net.q_norm(queries), net.k_norm(keys)
    if "rotation" not in broken:
        by = rotation(at.config, at.positions(broken), x.dtype)
        queries, keys = rotate(queries, by), rotate(keys, by)
    if "order of key heads" in broken:
        keys, values = (one.repeat(1, 1, queries.shape[2] // one.shape[2], 1) for one in (keys, values))
    mixed = _attend(queries, keys, values, at, broken)
    if "gate" not in broken:
        mixed = mixed * torch.sigmoid(gate)
    added: Tensor = net.o_proj(mixed.reshape(rows, tokens, -1))
    return added


def _attend(queries: Tensor, keys: Tensor, values: Tensor, at: Placed, broken: Broken) -> Tensor:
    """Each call's queries over all that is before them, [B, T, N, K]."""
    tokens = queries.shape[1]
    places = torch.arange(tokens)
    call = torch.repeat_interleave(torch.arange(len(at.calls)), torch.tensor(at.calls))
    seen = torch.ones(tokens, tokens, dtype=torch.bool) if "order in time" in broken else places <= places[:, None]
    if "keys of calls" in broken or "order in time" in broken:
        seen = seen & ((call == call[:, None]) if "keys of calls" in broken else (call <= call[:, None]))
    visible = seen.unsqueeze(0).expand(len(queries), -1, -1)
    if "attention sees padding" not in broken:
        visible = visible & at.real[:, None, :]
    # padding that sees nothing sees itself: a softmax over nothing is not a number
    visible = (visible | torch.eye(tokens, dtype=torch.bool)).unsqueeze(1)
    if "keys of calls are zero" not in broken:
        return causal_attention(queries, keys, values, "plain", visible)
    found = []
    for begin, end in at.bounds(False):
        late = (places >= begin).view(1, -1, 1, 1)
        seen_keys, seen_values = ((one * late)[:, :end] for one in (keys, values))
        mask = visible[:, :, begin:end, :end]
        found.append(causal_attention(queries[:, begin:end], seen_keys, seen_values, "plain", mask))
    return torch.cat(found, dim=1)
