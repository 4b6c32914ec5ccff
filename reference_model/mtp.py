"""Multi-token prediction: one more layer that guesses the token after the next one.

Shapes: B batch, T tokens, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from reference_model.attention import AttentionKind
from reference_model.cache import Cache
from reference_model.config import TextConfig
from reference_model.layer import DecoderLayer
from reference_model.moe import Routing
from reference_model.norm import RMSNorm
from reference_model.span import Span


@dataclass(frozen=True, slots=True, kw_only=True)
class MtpOutput:
    """``hidden`` [B, T, D] after the final norm: input of the shared head, and of the next draft step.

    Routings have one entry a layer.
    """

    hidden: Tensor
    routings: tuple[Routing, ...]
    cache: Cache


class MultiTokenPredictor(nn.Module):
    """``norm(layers(fc [pre_fc_norm_embedding(e_{t+1}) ; pre_fc_norm_hidden(h_t)]))``.

    h_t is the decoder's output at t after its final norm, e_{t+1} the embedding of the token that follows; the shared
    head then scores token t + 2. fc [D, 2D], embedding first. The layers are full attention with experts.
    """

    def __init__(self, config: TextConfig, attention: AttentionKind = "sdpa") -> None:
        super().__init__()
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.pre_fc_norm_embedding = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.pre_fc_norm_hidden = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.layers = nn.ModuleList(
            DecoderLayer(config, "full_attention", attention) for _ in range(config.mtp_num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        embeddings: Tensor,
        hidden: Tensor,
        span: Span,
        cache: Cache | None = None,
    ) -> MtpOutput:
        """Draft one token further.

        Args:
            embeddings: of the tokens at positions t + 1 [B, T, D].
            hidden: normed decoder outputs (or the last draft's ``hidden``) at positions t [B, T, D].
            span: of positions t.
            cache: of an earlier call, for the tokens before these.
        """
        x = self.fc(torch.cat((self.pre_fc_norm_embedding(embeddings), self.pre_fc_norm_hidden(hidden)), dim=-1))
        caches, routings = [], []
        for n, layer in enumerate(self.layers):
            x, routing, new = layer(x, span, None if cache is None else cache.layers[n])
            routings.append(routing)
            caches.append(new)
        return MtpOutput(
            hidden=self.norm(x),
            routings=tuple(routings),
            cache=Cache(layers=tuple(caches), lengths=span.lengths, next_position=span.next_position),
        )
