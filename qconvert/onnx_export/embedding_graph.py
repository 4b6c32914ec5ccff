"""The embedding of a prompt with images as an ONNX graph, in the contract of onnxruntime-genai."""

from __future__ import annotations

import onnx_ir as ir

from qconvert import __version__
from qconvert.core.role import Kind
from qconvert.onnx_export.graph_writer import GraphWriter
from qconvert.onnx_export.operator_set import OperatorSet
from qconvert.onnx_export.states import IMAGE_FEATURES, INPUT_IDS, INPUTS_EMBEDS
from qconvert.onnx_export.weight import Weights


def embedding_graph(weights: Weights, operators: OperatorSet, picture_tokens: tuple[int, ...]) -> ir.Model:
    """Tokens to embeddings; ``picture_tokens`` take theirs from the vision tower, in the order in which they stand.

    Inputs: ``input_ids`` int64 [B, S]; ``image_features`` [F, D], one a picture token of all rows, or none: then every
    token has the embedding of the table, for a model may draw the id of an image itself. Another number is refused by
    ScatterND. Output: ``inputs_embeds`` [B, S, D]. Source: the contract of onnxruntime-genai 0.18 for ``qwen3_5_moe``.
    """
    graph = GraphWriter("embedding", opset=operators.opset)
    table = weights(Kind.EMBEDDING)
    ids = graph.input(INPUT_IDS, ir.DataType.INT64, ("batch", "sequence"))
    features = graph.input(IMAGE_FEATURES, ir.DataType.FLOAT, ("image_tokens", table.shape[1]))
    embedded = operators.look_up(graph, table, ids)
    given = graph.op("Greater", graph.op("Shape", features, end=1), graph.integers(0))
    pictured = graph.op("Equal", ids, graph.integer(picture_tokens[0]))
    for token in picture_tokens[1:]:
        pictured = graph.op("Or", pictured, graph.op("Equal", ids, graph.integer(token)))
    places = graph.op("Transpose", graph.op("NonZero", graph.op("And", pictured, given)), perm=(1, 0))
    seen = graph.op("ScatterND", embedded, places, features)
    graph.output(seen, INPUTS_EMBEDS, ir.DataType.FLOAT, ("batch", "sequence", table.shape[1]))
    return graph.model(__version__)
