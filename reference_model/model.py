"""The decoder from tokens to logits, and the multi-token prediction head beside it.

``state_dict`` keys are checkpoint names without their prefix (``model.`` or ``model.language_model.``): ``layers.0.
linear_attn.in_proj_qkv.weight``, ``embed_tokens.weight``, ``norm.weight``; ``lm_head.weight`` and ``mtp.*`` have none.

Shapes: B batch, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from reference_model.attention import AttentionCache, AttentionKind
from reference_model.config import TextConfig
from reference_model.layer import DecoderLayer, LayerCache
from reference_model.moe import Routing
from reference_model.mtp import MtpOutput, MultiTokenPredictor
from reference_model.norm import RMSNorm
from reference_model.rope import rotation

HEAD_ROWS = 256
"""Tokens whose logits are computed at once: 254 MB in fp32 at the public vocabulary."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    """State of a decoded prefix: one entry a layer, and the number of tokens. A forward makes a new one.

    ``next_position`` int64 [B] is one more than the largest position so far, whatever the positions were: less than
    ``length`` after an image, whose tokens share positions.
    """

    layers: tuple[LayerCache, ...]
    length: int
    next_position: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """What a forward gives.

    Attributes:
        logits: [B, T, V], or [B, 1, V] when only the last were asked for.
        hidden: decoder output after the final norm [B, T, D].
        hidden_states: input of the first layer, then each layer's output [B, T, D]; ``None`` unless asked for.
        routings: where each layer's tokens went, and its router logits.
        cache: to go on from.
    """

    logits: Tensor
    hidden: Tensor
    hidden_states: tuple[Tensor, ...] | None
    routings: tuple[Routing, ...]
    cache: Cache

    @property
    def router_logits(self) -> tuple[Tensor, ...]:
        """[B T, E] a layer."""
        return tuple(routing.logits for routing in self.routings)


class CausalLM(nn.Module):
    """Qwen3.5-MoE's text model: ``head(norm(layers(embed(ids))))``."""

    def __init__(self, config: TextConfig, attention: AttentionKind = "sdpa") -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, kind, attention) for kind in config.layer_types)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.mtp_num_hidden_layers:
            self.mtp = MultiTokenPredictor(config, attention)

    @property
    def head_weight(self) -> Tensor:
        """The output matrix [V, D]: the embedding itself when they are tied."""
        return self.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def head(self, hidden: Tensor) -> Tensor:
        """Logits of hidden [B, T, D], a few rows at a time: [B, T, V]."""
        return head_logits(hidden, self.head_weight)

    def forward(
        self,
        input_ids: Tensor,
        *,
        embeddings: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        keep_hidden_states: bool = False,
        last_logits_only: bool = False,
    ) -> Output:
        """Run tokens [B, T] after those of ``cache``.

        ``embeddings`` [B, T, D] stand for those of the tokens, where some are not of the table. ``position_ids``
        [3, B, T] are the time, height and width of each token; by default all three count on from the largest one of
        the cache.
        """
        if position_ids is None:
            position_ids = text_positions(input_ids, 0 if cache is None else cache.next_position)
        x = self.embed_tokens(input_ids) if embeddings is None else embeddings
        by = rotation(self.config, position_ids, x.dtype)
        states, routings, caches = [x], [], []
        for n, layer in enumerate(self.layers):
            x, routing, layer_cache = layer(x, by, None if cache is None else cache.layers[n])
            routings.append(routing)
            caches.append(layer_cache)
            if keep_hidden_states:
                states.append(x)
        hidden = self.norm(x)
        seen = input_ids.shape[1] + (0 if cache is None else cache.length)
        next_position = position_ids.amax((0, 2)) + 1
        if cache is not None:
            next_position = next_position.maximum(cache.next_position)
        return Output(
            logits=self.head(hidden[:, -1:] if last_logits_only else hidden),
            hidden=hidden,
            hidden_states=tuple(states) if keep_hidden_states else None,
            routings=tuple(routings),
            cache=Cache(layers=tuple(caches), length=seen, next_position=next_position),
        )

    def draft(
        self,
        hidden: Tensor,
        next_ids: Tensor,
        *,
        position_ids: Tensor | None = None,
        cache: tuple[LayerCache, ...] | None = None,
    ) -> MtpOutput:
        """Run the prediction head: ``head(result.hidden)`` scores the token after ``next_ids``.

        ``hidden`` [B, T, D] is ``Output.hidden`` at positions t, ``next_ids`` [B, T] the tokens at t + 1,
        ``position_ids`` [3, B, T] the positions t (by default counted on from the cache).
        """
        if position_ids is None:
            first = cache[0] if cache else None
            position_ids = text_positions(next_ids, first.length if isinstance(first, AttentionCache) else 0)
        by = rotation(self.config, position_ids, hidden.dtype)
        out: MtpOutput = self.mtp(self.embed_tokens(next_ids), hidden, by, cache)
        return out


def head_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """``hidden weight^T`` over at most HEAD_ROWS rows at once; hidden [..., D], weight [V, D], result [..., V].

    Fixed row blocks make the whole-model run and the layer-wise run the same products, bit for bit.
    """
    flat = hidden.reshape(-1, hidden.shape[-1])
    rows = [functional.linear(part, weight) for part in torch.split(flat, HEAD_ROWS)]
    return torch.cat(rows).view(*hidden.shape[:-1], weight.shape[0])


def text_positions(input_ids: Tensor, start: int | Tensor) -> Tensor:
    """Positions start, start + 1, ... for plain text: int64 [3, B, T] for ids [B, T]; start is one for all or [B]."""
    batch, tokens = input_ids.shape
    first = torch.as_tensor(start, device=input_ids.device).view(-1, 1)
    return (first + torch.arange(tokens, device=input_ids.device)).expand(3, batch, tokens)


def initialize(model: CausalLM, seed: int) -> None:
    """Give every weight the value that training starts from, the same for the same seed.

    Matrices are Gaussian with deviation ``initializer_range``; offset norms are 0 and gated norms 1; ``A_log`` is the
    logarithm of a uniform number of (0.01, 16), ``dt_bias`` 1; the convolution is uniform in +-1 / sqrt(W).
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("linear_attn.norm.weight", "dt_bias")):
                weight.fill_(1.0)
            elif name.endswith("norm.weight") or "layernorm" in name or "pre_fc_norm" in name:
                weight.zero_()
            elif name.endswith("A_log"):
                weight.uniform_(0.01, 16.0, generator=generator).log_()
            elif name.endswith("conv1d.weight"):
                bound = weight.shape[-1] ** -0.5
                weight.uniform_(-bound, bound, generator=generator)
            else:
                weight.normal_(0.0, model.config.initializer_range, generator=generator)
