"""One layer: its inputs are looked at, its matrices rounded and written, and its outputs go on.

Attention and delta rule come first, for their matrices decide what experts read.

Shapes: B windows, T tokens of a window, N tokens in all, D hidden.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from qconvert.core.role import Section
from qconvert.numerics.threads import in_order
from qconvert.sequential.experts import Experts
from qconvert.sequential.mixer import round_mixer
from qconvert.sequential.places import LayerSteps
from qconvert.sequential.post_attention import fold_before_experts
from qconvert.sequential.shop import Shop
from qconvert.weights.rows import RowStore
from qconvert.weights.source import CheckpointWeights
from reference_model.config import LayerType
from reference_model.layer import DecoderLayer, load_layer
from reference_model.layerwise import HiddenStates
from reference_model.moe import Visits
from reference_model.span import place_tokens


@torch.no_grad()
def round_layer(
    shop: Shop, section: Section, number: int, steps: LayerSteps, hidden: HiddenStates, *, onward: bool
) -> None:
    """Round a layer of the decoder or of the prediction head, and replace ``hidden`` [B, T, D] by what it gives.

    Args:
        shop: what to work with.
        section: ``TEXT`` or ``MTP``.
        number: of the layer.
        steps: what to round; nothing is to pass it only.
        hidden: its inputs, which it takes.
        onward: whether its outputs are needed; they are not computed otherwise, and ``hidden`` is left as it is.
    """
    layer = _load(shop.weights, section, number)
    if steps.mixer or steps.mixed:
        round_mixer(shop, layer, steps, hidden)
    config = shop.weights.config.text
    total = sum(hidden[b].shape[0] * hidden[b].shape[1] for b in range(len(hidden)))
    room = partial(RowStore, total, config.hidden_size, limit=shop.rows_bytes, folder=shop.folder)
    with room(torch.bfloat16) as inputs, room(torch.float32) as sums:
        visits = _mix(shop, layer, hidden, inputs)
        experts = Experts(shop, layer, (section, number), steps, inputs, visits)
        fold_before_experts(experts, lambda: (_read_by_experts(shop, layer, b) for b in range(len(hidden))))
        experts.round_routed(sums if onward else None)
        experts.round_shared()
        begin = 0
        for b in range(len(hidden)) if onward else ():
            mixed = shop.store.get(f"mixed.{b}")
            flat = layer.post_attention_layernorm(mixed).flatten(0, 1)
            routed = sums.rows(begin, begin + len(flat))
            hidden.put(b, mixed + layer.mlp.with_shared(flat, routed).view_as(mixed))
            begin += len(flat)
        for b in range(len(hidden)):
            shop.store.drop(f"mixed.{b}")


def _load(weights: CheckpointWeights, section: Section, number: int) -> DecoderLayer:
    config = weights.config.text
    kind: LayerType = config.layer_types[number] if section is Section.TEXT else "full_attention"
    block = "layers" if section is Section.TEXT else "mtp.layers"
    return load_layer(config, weights, f"{block}.{number}.", kind, torch.float32)


def _read_by_experts(shop: Shop, layer: DecoderLayer, b: int) -> Tensor:
    """What experts read of batch ``b`` that has passed the first half, float32 [B T, D]."""
    normed: Tensor = layer.post_attention_layernorm(shop.store.get(f"mixed.{b}"))
    return normed.flatten(0, 1)


def _mix(shop: Shop, layer: DecoderLayer, hidden: HiddenStates, inputs: RowStore) -> Visits:
    """The first half of the layer: what it gives waits as ``mixed``, what experts read in ``inputs`` [N, D]."""

    def enter(b: int) -> tuple[Tensor, Tensor, Visits]:
        x = hidden[b]
        mixed, _ = layer.mix(x, place_tokens(shop.weights.config.text, x))
        flat = layer.post_attention_layernorm(mixed).flatten(0, 1)
        return mixed, flat, layer.mlp.visits(flat, layer.mlp.gate(flat))

    experts, weights, begin = [], [], 0
    for b, (mixed, flat, visits) in enumerate(in_order(shop.pool, enter, range(len(hidden)), shop.jobs)):
        shop.store.put(f"mixed.{b}", mixed)
        inputs.put(begin, flat)
        begin += len(flat)
        experts.append(visits.experts)
        weights.append(visits.weights)
    return Visits(experts=torch.cat(experts), weights=torch.cat(weights))
