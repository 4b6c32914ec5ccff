"""The multi-token-prediction head as an ONNX graph, in the contract of onnxruntime-genai."""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir

from qconvert import __version__
from qconvert.core.role import Kind, Section
from qconvert.onnx_export.graph_writer import GraphWriter
from qconvert.onnx_export.operator_set import OperatorSet
from qconvert.onnx_export.states import HIDDEN_OUT, HIDDEN_STATES, LOGITS, State, attention_states
from qconvert.onnx_export.text_graph import head_of, inputs_of, place
from qconvert.onnx_export.weight import Weights
from reference_model.config import TextConfig


def mtp_graph(
    config: TextConfig,
    weights: Weights,
    operators: OperatorSet,
    *,
    layers: int,
    accuracy_level: int,
    cache: ir.DataType = ir.DataType.FLOAT,
) -> ir.Model:
    """Drafts one token further than the decoder; embedding and head are the decoder's.

    ``norm(layers(fc [pre_fc_norm_embedding(e) ; pre_fc_norm_hidden(h)]))``, see ``reference_model.mtp``. Inputs:
    ``input_ids`` int64 [B, S], the tokens after those that ``hidden_states`` [B, S, D] are of; ``attention_mask`` int64
    [B, A] and ``position_ids`` int64 [3, B, S] of the latter; ``past_key_values.{i}.key`` and ``.value`` of the type
    ``cache``. Outputs: ``logits`` [B, S, V], ``hidden_states_out`` [B, S, D] to draft on from, and ``present.{i}...``.
    Source: the contract of onnxruntime-genai 0.18.
    """
    graph = GraphWriter("prediction_head", opset=operators.opset)
    integer, real_number = ir.DataType.INT64, ir.DataType.FLOAT
    ids = graph.input("input_ids", integer, ("batch", "sequence"))
    hidden = graph.input(HIDDEN_STATES, real_number, ("batch", "sequence", config.hidden_size))
    mask = graph.input("attention_mask", integer, ("batch", "total"))
    positions = graph.input("position_ids", integer, (3, "batch", "sequence"))
    own = replace(weights, section=Section.MTP)
    decoder = place(graph, operators, config, own, ids, mask, positions, accuracy_level=accuracy_level)
    embedded = operators.look_up(graph, weights(Kind.EMBEDDING), ids)
    both = graph.op(
        "Concat", decoder.norm(embedded, Kind.MTP_EMBEDDING_NORM), decoder.norm(hidden, Kind.MTP_HIDDEN_NORM), axis=-1
    )
    x = operators.linear(graph, both, own(Kind.MTP_FC), accuracy_level)
    normal = decoder.norm(x, Kind.INPUT_NORM, 0)
    present: list[tuple[ir.Value, State]] = []
    for layer in range(layers):
        with graph.scope(f"layers.{layer}"):
            states = attention_states(config, layer)
            past = inputs_of(graph, states, [cache] * len(states))
            mixed, *after = decoder.attention(normal, layer, past[0], past[1])
            x, normal = decoder.added_norm(x, mixed, Kind.POST_ATTENTION_NORM, layer)
            made, _ = decoder.moe(normal, layer)
            x, normal = decoder.added_norm(
                x, made, *((Kind.NORM,) if layer + 1 == layers else (Kind.INPUT_NORM, layer + 1))
            )
            present += zip(after, states, strict=True)
    logits = operators.linear(graph, normal, head_of(config, weights), accuracy_level)
    graph.output(logits, LOGITS, real_number, ("batch", "sequence", config.vocab_size))
    graph.output(normal, HIDDEN_OUT, real_number, ("batch", "sequence", config.hidden_size))
    for value, state in present:
        graph.output(graph.cast(value, real_number, cache), state.present, cache, state.shape("total"))
    return graph.model(__version__)
