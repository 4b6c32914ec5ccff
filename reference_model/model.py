"""The decoder from tokens to logits, and the multi-token prediction head beside it.

``state_dict`` keys are checkpoint names without their prefix (``model.`` or ``model.language_model.``): ``layers.0.
linear_attn.in_proj_qkv.weight``, ``embed_tokens.weight``, ``norm.weight``; ``lm_head.weight`` and ``mtp.*`` have none.

Shapes: B batch, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from reference_model.attention import AttentionKind
from reference_model.cache import Cache
from reference_model.config import TextConfig
from reference_model.layer import DecoderLayer
from reference_model.moe import Routing
from reference_model.mtp import MtpOutput, MultiTokenPredictor
from reference_model.norm import RMSNorm
from reference_model.span import Span, check_ids, last_real, place_tokens

HEAD_ROWS = 256
"""Tokens whose logits are computed at once: 254 MB in fp32 at the public vocabulary."""

HEAD_COLUMNS = 16_384
"""Entries of the vocabulary that one product scores: 134 MB of the public head in fp32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """What a forward gives. At padding there are numbers without meaning.

    Attributes:
        logits: [B, T, V], or [B, 1, V] when only those of each row's last token were asked for.
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
        """Logits of hidden [B, T, D]: [B, T, V]."""
        return head_logits(hidden, self.head_weight)

    def forward(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        embeddings: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        keep_hidden_states: bool = False,
        last_logits_only: bool = False,
        rewindable: bool = False,
    ) -> Output:
        """Run tokens after those of ``cache``; every row as if it were alone.

        Args:
            input_ids: int64 [B, T].
            attention_mask: [B, T], zero where these tokens are padding, which may be anywhere.
            embeddings: [B, T, D], instead of those of the tokens, where some are not of the table.
            position_ids: [3, B, T], time, height and width of each token; by default all three count on, over real
                tokens, from the largest one of the cache.
            cache: of the tokens before.
            keep_hidden_states: asks for them.
            last_logits_only: asks for the logits of each row's last real token alone.
            rewindable: makes a cache that can be rewound to before these tokens or to any of them.

        Raises:
            ValueError: ids are not of the vocabulary, not [B, T] or none, or something else does not fit them.
        """
        check_ids(self.config, input_ids, embeddings)
        x = self.embed_tokens(input_ids) if embeddings is None else self._of_own_dtype("embeddings", embeddings)
        span = self._span(x, len(self.layers), attention_mask, position_ids, cache, rewindable)
        states, routings, caches = [x], [], []
        for n, layer in enumerate(self.layers):
            x, routing, layer_cache = layer(x, span, None if cache is None else cache.layers[n])
            routings.append(routing)
            caches.append(layer_cache)
            if keep_hidden_states:
                states.append(x)
        hidden = self.norm(x)
        return Output(
            logits=self.head(last_real(hidden, attention_mask) if last_logits_only else hidden),
            hidden=hidden,
            hidden_states=tuple(states) if keep_hidden_states else None,
            routings=tuple(routings),
            cache=Cache(layers=tuple(caches), lengths=span.lengths, next_position=span.next_position),
        )

    def draft(
        self,
        hidden: Tensor,
        next_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        embeddings: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
    ) -> MtpOutput:
        """Run the prediction head: ``head(result.hidden)`` scores the token after ``next_ids``.

        ``hidden`` [B, T, D] is ``Output.hidden`` at positions t, or that of the last draft; ``next_ids`` [B, T] are the
        tokens at t + 1, and ``embeddings`` [B, T, D] theirs, where some are not of the table. ``position_ids``
        [3, B, T] (by default counted on from the cache) and ``attention_mask`` [B, T] are those of the positions t.

        Raises:
            ValueError: the model has no prediction head, or shapes do not fit; the message says which.
        """
        if not self.config.mtp_num_hidden_layers:
            raise ValueError("the model has no prediction head to draft with: mtp_num_hidden_layers is 0")
        check_ids(self.config, next_ids, embeddings)
        if hidden.shape != (*next_ids.shape, self.config.hidden_size):
            raise ValueError(
                f"hidden is {list(hidden.shape)}, expected {[*next_ids.shape, self.config.hidden_size]}: one state for "
                "each of next_ids"
            )
        x = self.embed_tokens(next_ids) if embeddings is None else self._of_own_dtype("embeddings", embeddings)
        span = self._span(
            self._of_own_dtype("hidden", hidden), len(self.mtp.layers), attention_mask, position_ids, cache
        )
        out: MtpOutput = self.mtp(x, hidden, span, cache)
        return out

    def _of_own_dtype(self, name: str, x: Tensor) -> Tensor:
        own = self.embed_tokens.weight.dtype
        if x.dtype != own:
            raise ValueError(f"{name} is {x.dtype}, but the model computes in {own}: cast it")
        return x

    def _span(
        self,
        x: Tensor,
        layers: int,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache | None,
        rewindable: bool = False,
    ) -> Span:
        if cache is not None and len(cache.layers) != layers:
            raise ValueError(
                f"the cache has {len(cache.layers)} layers, expected {layers}: decoder and prediction head have each "
                "their own"
            )
        return place_tokens(
            self.config,
            x,
            attention_mask=attention_mask,
            position_ids=position_ids,
            starts=None if cache is None else cache.lengths,
            next_position=None if cache is None else cache.next_position,
            rewindable=rewindable,
        )


def head_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """``hidden weight^T`` for hidden [..., D] and weight [V, D], some rows and some columns at a time: [..., V].

    Fixed blocks make the whole-model run and the layer-wise run the same products, bit for bit.
    """
    blocks = torch.split(weight, HEAD_COLUMNS)
    parts = [row_logits(rows, blocks) for rows in torch.split(hidden.reshape(-1, hidden.shape[-1]), HEAD_ROWS)]
    return _joined(parts, 0).view(*hidden.shape[:-1], weight.shape[0])


def row_logits(rows: Tensor, blocks: Iterable[Tensor]) -> Tensor:
    """Logits [rows, V] of at most HEAD_ROWS rows, from the output matrix in blocks of HEAD_COLUMNS rows."""
    return _joined([functional.linear(rows, block) for block in blocks], -1)


def vocabulary_blocks(size: int) -> list[tuple[int, int]]:
    """First and one past the last entry of each block of the output matrix."""
    return [(begin, min(begin + HEAD_COLUMNS, size)) for begin in range(0, size, HEAD_COLUMNS)]


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    """``torch.cat`` that does not copy a single part."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
