"""The vision tower as an ONNX graph, in the contract of onnxruntime-genai."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from qconvert import __version__
from qconvert.core.role import Kind, Section
from qconvert.onnx_export.graph_writer import GraphWriter
from qconvert.onnx_export.operator_set import OperatorSet
from qconvert.onnx_export.states import IMAGE_FEATURES, IMAGE_GRID, PIXEL_VALUES
from qconvert.onnx_export.vision_blocks import Tower
from qconvert.onnx_export.weight import Weights
from reference_model.config import VisionConfig


def vision_graph(config: VisionConfig, weights: Weights, operators: OperatorSet) -> ir.Model:
    """Patches of images of any number and size to embeddings of the decoder, in the operators of one set.

    Inputs: ``pixel_values`` [P, C pictures size size], one row a patch, in the merger's order and image after image;
    ``image_grid_thw`` int64 [images, 3], frames, rows and columns of patches. Output: ``image_features`` [P / m^2, O].
    No frame sees another, so that a loop takes them one at a time: no patch is masked, and memory is that of the
    largest frame. Pixels that do not fill the grids are refused by Split. Source: reference_model/vision.py, and the
    contract of onnxruntime-genai 0.18 for ``qwen3_5_moe``.
    """
    graph = GraphWriter("vision", opset=operators.opset)
    integer, real_number = ir.DataType.INT64, ir.DataType.FLOAT
    of_patch = config.in_channels * config.temporal_patch_size * config.patch_size**2
    pixels = graph.input(PIXEL_VALUES, real_number, ("patches", of_patch))
    grids = graph.input(IMAGE_GRID, integer, ("images", 3))
    every = graph.op("ReduceSum", graph.op("ReduceProd", grids, graph.integers(1), keepdims=0), keepdims=1)
    # all of them and no more, which Split checks: a Reshape to that size ONNX Runtime turns into one to any size
    pixels, _ = graph.ops("Split", 2, pixels, graph.op("Concat", every, graph.integers(0), axis=0), axis=0)
    frames = graph.op("Gather", grids, graph.integer(0), axis=1)
    until = graph.op("CumSum", frames, graph.integer(0))
    nothing = graph.op("ConstantOfShape", graph.integers(0, config.out_hidden_size))
    tower = Tower(graph, operators, config, replace(weights, section=Section.VISION))
    with graph.body("frame") as body:
        turn = body.input("turn", integer, ())
        going_on = body.input("going_on", ir.DataType.BOOL, ())
        begin = body.input("begin", integer, (1,))
        before = body.input("before", real_number, ("embedded", config.out_hidden_size))
        passed = graph.op("Cast", graph.op("LessOrEqual", until, turn), to=integer.value)
        grid = graph.op("Gather", grids, graph.op("ReduceSum", passed, keepdims=0), axis=0)
        _, *sizes = graph.ops("Split", 3, grid, axis=0, num_outputs=3)
        end = graph.op("Add", begin, graph.op("Mul", *sizes))
        x = tower.linear(graph.op("Slice", pixels, begin, end, graph.integers(0)), Kind.PATCH_EMBEDDING)
        places = tower.places((sizes[0], sizes[1]))
        x = graph.op("Add", x, tower.learned(places, (sizes[0], sizes[1])))
        by = tower.rotation(places)
        for layer in range(config.depth):
            with graph.scope(f"blocks.{layer}"):
                x = tower.block(x, by, layer)
        body.output(graph.op("Identity", going_on), ir.DataType.BOOL, ())
        body.output(end, integer, (1,))
        after = graph.op("Concat", before, tower.merger(x), axis=0)
        body.output(after, real_number, ("more", config.out_hidden_size))
    turns = graph.op("ReduceSum", frames, keepdims=0)
    # a condition that is left out means true, but to onnx's reference evaluator false
    always, first = graph.constant(np.asarray(True)), graph.integers(0)
    _, features = graph.ops("Loop", 2, turns, always, first, nothing, body=body.graph)
    graph.output(features, IMAGE_FEATURES, real_number, ("image_tokens", config.out_hidden_size))
    return graph.model(__version__)
