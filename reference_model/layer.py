"""One decoder layer: mix over time, then experts, each behind a norm and around a residual."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reference_model.attention import AttentionCache, AttentionKind, GatedAttention
from reference_model.cache import LayerCache
from reference_model.config import LayerType, TextConfig
from reference_model.delta_net import DeltaNetCache, GatedDeltaNet
from reference_model.load import WeightSource, fill_weights
from reference_model.moe import Routing, SparseMoe
from reference_model.norm import RMSNorm
from reference_model.span import Span


class DecoderLayer(nn.Module):
    """``h = x + mix(input_layernorm(x))``, then ``h + mlp(post_attention_layernorm(h))``.

    ``mix`` is ``linear_attn`` or ``self_attn`` by the layer's type; x [B, T, D].
    """

    def __init__(self, config: TextConfig, layer_type: LayerType, attention: AttentionKind = "sdpa") -> None:
        super().__init__()
        self.layer_type: LayerType = layer_type
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if layer_type == "linear_attention":
            self.linear_attn = GatedDeltaNet(config)
        else:
            self.self_attn = GatedAttention(config, attention)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SparseMoe(config)

    def mix(self, x: Tensor, span: Span, cache: LayerCache | None = None) -> tuple[Tensor, LayerCache]:
        """The first half: x [B, T, D] plus what its tokens take from each other, and the cache with them in it.

        Padding comes out as finite numbers without meaning.

        Raises:
            TypeError: the cache is of another type of layer.
        """
        normal = self.input_layernorm(x)
        if span.packing is not None:
            normal = span.packing.pack(normal)
        new: LayerCache
        if self.layer_type == "linear_attention":
            if isinstance(cache, AttentionCache):
                raise TypeError("a linear attention layer was given the cache of a full attention layer")
            mixed, new = self.linear_attn(normal, span, cache)
        else:
            if isinstance(cache, DeltaNetCache):
                raise TypeError("a full attention layer was given the cache of a linear attention layer")
            mixed, new = self.self_attn(normal, span, cache)
        return x + (mixed if span.packing is None else span.packing.unpack(mixed)), new

    def forward(self, x: Tensor, span: Span, cache: LayerCache | None = None) -> tuple[Tensor, Routing, LayerCache]:
        """Run x [B, T, D]; gives [B, T, D], where the tokens went, and the cache."""
        mixed, new = self.mix(x, span, cache)
        out, routing = self.mlp(self.post_attention_layernorm(mixed))
        return mixed + out, routing, new


def load_layer(
    config: TextConfig,
    source: WeightSource,
    prefix: str,
    layer_type: LayerType,
    dtype: torch.dtype,
    attention: AttentionKind = "sdpa",
) -> DecoderLayer:
    """A layer without its routed experts."""
    with torch.device("meta"):
        layer = DecoderLayer(config, layer_type, attention)
    fill_weights(layer, source, dtype, prefix=prefix, skip=("mlp.experts.",))
    return layer


def same_weights(one: DecoderLayer, other: DecoderLayer) -> bool:
    """Whether two layers of ``load_layer``, of the same configuration, have the same weights."""
    if one.layer_type != other.layer_type:
        return False
    ours, theirs = (
        {name: weight for name, weight in layer.named_parameters() if not weight.is_meta} for layer in (one, other)
    )
    return ours.keys() == theirs.keys() and all(torch.equal(weight, theirs[name]) for name, weight in ours.items())
