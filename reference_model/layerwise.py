"""The same forward with one layer's weights in memory at a time, and of the routed experts one expert at a time.

All batches wait with their hidden states [B, T, D] while a layer is loaded, passed by each of them, and freed. For the
same batches and number of threads the results equal those of the whole model bit for bit: every product has the same
operands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from reference_model.attention import AttentionKind
from reference_model.config import TextConfig
from reference_model.layer import DecoderLayer
from reference_model.load import WeightSource, load_expert, load_tensor, load_weights
from reference_model.model import HEAD_ROWS
from reference_model.moe import Routing, combine, dispatch, expert_mlp
from reference_model.norm import RMSNorm
from reference_model.span import place_tokens

InputRounding = Callable[[str], Callable[[Tensor], Tensor] | None]
"""What an engine does to the inputs of a matrix before it multiplies, by the matrix's name without ``.weight``.

Of routed experts ``layers.0.mlp.experts.gate_up_proj`` and ``.down_proj`` are asked for; ``None`` leaves inputs alone.
"""


def leave_inputs(name: str) -> None:
    """The ``InputRounding`` of engines that round no activations."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRecord:
    """What one layer did to one batch: its output ``hidden`` [B, T, D], and where its tokens went."""

    layer: int
    batch: int
    hidden: Tensor
    routing: Routing


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitRows:
    """Logits [rows, V] of tokens ``begin`` to ``begin + rows`` of a batch, counted through its flattened [B T]."""

    batch: int
    begin: int
    logits: Tensor


def run_layerwise(
    config: TextConfig,
    source: WeightSource,
    batches: Sequence[Tensor],
    dtype: torch.dtype,
    *,
    attention_masks: Sequence[Tensor | None] | None = None,
    position_ids: Sequence[Tensor | None] | None = None,
    attention: AttentionKind = "sdpa",
    on_layer: Callable[[LayerRecord], None] | None = None,
) -> Iterator[LogitRows]:
    """Logits of token batches [B, T], a few hundred rows at a time, in the order of the batches.

    ``on_layer`` sees every layer's result for every batch. ``attention_masks`` [B, T], zero at padding, and
    ``position_ids`` [3, B, T] have one entry a batch. Nothing runs before the first result is asked for.

    Raises:
        WeightError: weights of a layer are missing or do not fit; raised when that layer is reached.
    """
    hidden = run_layers(
        config,
        source,
        batches,
        dtype,
        attention_masks=attention_masks,
        position_ids=position_ids,
        attention=attention,
        on_layer=on_layer,
    )
    yield from logit_rows(config, source, hidden, dtype)


@torch.no_grad()
def run_layers(
    config: TextConfig,
    source: WeightSource,
    batches: Sequence[Tensor],
    dtype: torch.dtype,
    *,
    attention_masks: Sequence[Tensor | None] | None = None,
    position_ids: Sequence[Tensor | None] | None = None,
    attention: AttentionKind = "sdpa",
    on_layer: Callable[[LayerRecord], None] | None = None,
    input_rounding: InputRounding = leave_inputs,
) -> list[Tensor]:
    """Hidden states [B, T, D] after the final norm, one a batch; arguments as ``run_layerwise``.

    ``input_rounding`` simulates engines that round activations.
    """
    embedding = load_tensor(source, "embed_tokens.weight", (config.vocab_size, config.hidden_size))
    hidden = [functional.embedding(ids, embedding).to(dtype) for ids in batches]
    del embedding
    nothing = [None] * len(batches)
    spans = [
        place_tokens(config, x, attention_mask=mask, position_ids=positions)
        for x, mask, positions in zip(hidden, attention_masks or nothing, position_ids or nothing, strict=True)
    ]
    for n, kind in enumerate(config.layer_types):
        with torch.device("meta"):
            layer = DecoderLayer(config, kind, attention)
        load_weights(layer, source, dtype, prefix=f"layers.{n}.", skip=("mlp.experts.",))
        _round_inputs(layer, f"layers.{n}.", input_rounding)
        hidden = [layer.mix(x, span)[0] for x, span in zip(hidden, spans, strict=True)]
        inputs = [layer.post_attention_layernorm(x).view(-1, x.shape[-1]) for x in hidden]
        routings: list[Routing] = [layer.mlp.gate(x) for x in inputs]
        routed = _run_experts(config, source, f"layers.{n}.mlp.experts", inputs, routings, dtype, input_rounding)
        for b, (x, out) in enumerate(zip(inputs, routed, strict=True)):
            hidden[b] = hidden[b] + (out + layer.mlp.shared(x)).view_as(hidden[b])
            if on_layer is not None:
                on_layer(LayerRecord(layer=n, batch=b, hidden=hidden[b], routing=routings[b]))
    with torch.device("meta"):
        norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
    load_weights(norm, source, dtype, prefix="norm.")
    return [norm(x) for x in hidden]


def _round_inputs(layer: DecoderLayer, prefix: str, input_rounding: InputRounding) -> None:
    """Round what enters the linear modules of a layer; routed experts are none."""
    for name, module in layer.named_modules():
        rounding = input_rounding(prefix + name) if isinstance(module, nn.Linear) else None
        if rounding is not None:
            module.register_forward_pre_hook(partial(_replace_input, rounding))


def _replace_input(rounding: Callable[[Tensor], Tensor], module: nn.Module, args: tuple[Tensor]) -> Tensor:
    return rounding(args[0])


def _run_experts(
    config: TextConfig,
    source: WeightSource,
    name: str,
    inputs: Sequence[Tensor],
    routings: Sequence[Routing],
    dtype: torch.dtype,
    input_rounding: InputRounding,
) -> list[Tensor]:
    """What ``moe.Experts`` computes, for all batches: experts outside, so that each is read once, if reached at all."""
    wheres = [dispatch(routing.experts, config.num_experts) for routing in routings]
    rows = [x.index_select(0, where.token) for x, where in zip(inputs, wheres, strict=True)]
    parts = [torch.split(x, where.counts) for x, where in zip(rows, wheres, strict=True)]
    round_x, round_inner = input_rounding(f"{name}.gate_up_proj"), input_rounding(f"{name}.down_proj")
    for e in range(config.num_experts):
        visitors = [part[e] for part in parts if part[e].shape[0]]
        if not visitors:
            continue
        gate_up, down = load_expert(source, name, e, config.hidden_size, config.moe_intermediate_size, dtype)
        for visitor in visitors:
            visitor.copy_(expert_mlp(visitor, gate_up, down, round_x, round_inner))
    return [combine(x, where, r.weights) for x, where, r in zip(rows, wheres, routings, strict=True)]


@torch.no_grad()
def logit_rows(
    config: TextConfig, source: WeightSource, hidden: Sequence[Tensor], dtype: torch.dtype
) -> Iterator[LogitRows]:
    """Logits of hidden states [B, T, D] after the final norm, at most ``HEAD_ROWS`` rows at a time."""
    name = "embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    weight = load_tensor(source, name, (config.vocab_size, config.hidden_size)).to(dtype)
    for batch, x in enumerate(hidden):
        begin = 0
        for part in torch.split(x.reshape(-1, x.shape[-1]), HEAD_ROWS):
            yield LogitRows(batch=batch, begin=begin, logits=functional.linear(part, weight))
            begin += part.shape[0]
