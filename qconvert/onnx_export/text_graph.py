"""The decoder as an ONNX graph, in the contract of onnxruntime-genai."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from qconvert import __version__
from qconvert.core.role import Kind
from qconvert.onnx_export import placing
from qconvert.onnx_export.blocks import Decoder
from qconvert.onnx_export.graph_writer import GraphWriter
from qconvert.onnx_export.operator_set import OperatorSet
from qconvert.onnx_export.states import (
    HIDDEN_STATES,
    INPUT_IDS,
    INPUTS_EMBEDS,
    LOGITS,
    ROUTER,
    TAPS,
    State,
    layer_states,
    tap_name,
)
from qconvert.onnx_export.weight import Weight, Weights
from reference_model.config import TextConfig
from reference_model.rope import axis_of_planes, inverse_frequencies


def place(
    graph: GraphWriter,
    operators: OperatorSet,
    config: TextConfig,
    weights: Weights,
    tokens: ir.Value,
    mask: ir.Value,
    positions: ir.Value,
    *,
    accuracy_level: int,
) -> Decoder:
    """What all layers share, from the inputs that say where the tokens stand: ids [B, S] or embeddings [B, S, D]."""
    with graph.scope("placing"):
        count, before, real = placing.new_tokens(graph, tokens, mask)
        frequencies, factor = inverse_frequencies(config)
        return Decoder(
            graph,
            operators,
            config,
            weights,
            bias=placing.attention_bias(graph, mask, before, operators.unseen),
            packing=placing.packing(graph, real, count, config.linear_conv_kernel_dim),
            rotation=placing.rotation(
                graph, positions, frequencies.numpy(), factor, axis_of_planes(config.rope.mrope_section).numpy()
            ),
            accuracy_level=accuracy_level,
        )


def inputs_of(graph: GraphWriter, states: Sequence[State], kinds: Sequence[ir.DataType]) -> list[ir.Value]:
    """States that a call is given, stored in ``kinds``, as float32."""
    given = [graph.input(state.past, kind, state.shape("past")) for state, kind in zip(states, kinds, strict=True)]
    return [graph.cast(value, kind, ir.DataType.FLOAT) for value, kind in zip(given, kinds, strict=True)]


def head_of(config: TextConfig, weights: Weights) -> Weight:
    """The output matrix: the embedding itself when they are tied."""
    return weights(Kind.EMBEDDING if config.tie_word_embeddings else Kind.HEAD)


def following_norm(layer: int, layers: int) -> tuple[Kind, int | None]:
    """What reads the output of a layer: the first norm of the next, or the last of all."""
    return (Kind.NORM, None) if layer + 1 == layers else (Kind.INPUT_NORM, layer + 1)


def text_graph(
    config: TextConfig,
    weights: Weights,
    operators: OperatorSet,
    *,
    accuracy_level: int,
    cache: ir.DataType = ir.DataType.FLOAT,
    hidden: bool = False,
    embedded: bool = False,
    taps: bool = False,
    last_logits: bool = False,
) -> ir.Model:
    """Tokens to logits, in the operators of one set.

    Inputs: ``input_ids`` int64 [B, S], or with ``embedded`` ``inputs_embeds`` [B, S, D]; ``attention_mask`` int64
    [B, A], 1 or, at padding, 0, which may be anywhere; ``position_ids`` int64 [3, B, S]; for every attention layer
    ``past_key_values.{i}.key`` and ``.value`` [B, M, P, K], for every other ``past.{i}.conv`` [B, C, W - 1] and
    ``past.{i}.recurrent`` [B, Hv, dk, dv], zeros at first. Keys and values are of the type ``cache``, all else
    float32. Outputs: ``logits`` [B, S, V], or with
    ``last_logits`` [B, 1, V] of each row's last real token, with ``hidden`` also
    ``hidden_states`` [B, S, D], from which a prediction head drafts, all states as ``present...``, and with
    ``taps`` those ``TAPS`` of each layer. Source: the contract of onnxruntime-genai 0.18.
    """
    graph = GraphWriter("decoder", opset=operators.opset)
    integer, real_number = ir.DataType.INT64, ir.DataType.FLOAT
    if embedded:
        tokens = graph.input(INPUTS_EMBEDS, real_number, ("batch", "sequence", config.hidden_size))
    else:
        tokens = graph.input(INPUT_IDS, integer, ("batch", "sequence"))
    mask = graph.input("attention_mask", integer, ("batch", "total"))
    positions = graph.input("position_ids", integer, (3, "batch", "sequence"))
    decoder = place(graph, operators, config, weights, tokens, mask, positions, accuracy_level=accuracy_level)
    x = tokens if embedded else operators.look_up(graph, weights(Kind.EMBEDDING), tokens)
    x = decoder.packed(x)
    normal = decoder.norm(x, Kind.INPUT_NORM, 0)
    present: list[tuple[ir.Value, State, ir.DataType]] = []
    tapped: list[tuple[str, ir.Value]] = []
    for layer, kind in enumerate(config.layer_types):
        with graph.scope(f"layers.{layer}"):
            states = layer_states(config, layer)
            kinds = [cache if state.grows else real_number for state in states]
            past = inputs_of(graph, states, kinds)
            if kind == "full_attention":
                mixed, *after = decoder.attention(decoder.unpacked(normal), layer, past[0], past[1])
                mixed = decoder.packed(mixed)
            else:
                mixed, *after = decoder.linear_attention(normal, layer, past[0], past[1])
            x, normal = decoder.added_norm(x, mixed, Kind.POST_ATTENTION_NORM, layer)
            made, router = decoder.moe(normal, layer)
            x, normal = decoder.added_norm(x, made, *following_norm(layer, config.num_hidden_layers))
            inside = (mixed, made, router, x)
            tapped += [(tap_name(layer, tap), decoder.unpacked(value)) for tap, value in zip(TAPS, inside, strict=True)]
            present += zip(after, states, kinds, strict=True)
    outside = decoder.unpacked(normal)
    scored = decoder.last_real(normal) if last_logits else outside
    logits = operators.linear(graph, scored, head_of(config, weights), accuracy_level)
    if hidden:
        graph.output(outside, HIDDEN_STATES, real_number, ("batch", "sequence", config.hidden_size))
    graph.output(logits, LOGITS, real_number, ("batch", 1 if last_logits else "sequence", config.vocab_size))
    for value, state, stored in present:
        graph.output(graph.cast(value, real_number, stored), state.present, stored, state.shape("total"))
    for name, value in tapped if taps else ():
        width = config.num_experts if name.endswith(ROUTER) else config.hidden_size
        graph.output(value, name, real_number, ("batch", "sequence", width))
    return graph.model(__version__)
