"""Time ONNX Runtime's fused operators on a CPU beside the plain ones that packages have instead.

    python benchmarks/bench_nodes.py [--rounds 20] [--threads 2]

The sizes are those of 35B-A3B. Each graph is written by the sets of operators themselves: the fused one as ``--ep
cuda`` has it, in float32, the plain one as ``--ep cpu`` does. Both run in one process in turns, for 1 and for 512
tokens; printed are the fastest runs as a Markdown table, and the largest difference of the outputs over the largest
output.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnxruntime

from qconvert.core.dtypes import DType
from qconvert.onnx_export.contrib import Contrib
from qconvert.onnx_export.cuda import Cuda
from qconvert.onnx_export.graph_writer import GraphWriter
from qconvert.onnx_export.weight import Weight
from reference_model.presets import PRESETS

TEXT = PRESETS["35b-a3b"].text
EPSILON = TEXT.rms_norm_eps
HIDDEN = (1, "tokens", TEXT.hidden_size)
VALUES = (1, "tokens", TEXT.value_dim)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One operator.

    Attributes:
        name: of the fused operator.
        shapes: of what the graph takes by name; "tokens" stands for how many there are.
        body: writes it in a set of operators, from the inputs in their order.
    """

    name: str
    shapes: dict[str, tuple[int | str, ...]]
    body: Callable[[GraphWriter, Contrib, list[ir.Value]], ir.Value]


def _conv(graph: GraphWriter, operators: Contrib, given: list[ir.Value]) -> ir.Value:
    x, past = given
    weight = Weight(names=("weight",), shape=(TEXT.conv_dim, 1, TEXT.linear_conv_kernel_dim), dtype=DType.F32)
    return operators.causal_conv(graph, x, weight, past)


def _gated_norm(graph: GraphWriter, operators: Contrib, given: list[ir.Value]) -> ir.Value:
    x, weight, gate = given
    return operators.gated_rms_norm(graph, x, weight, gate, EPSILON)


def _added_norm(graph: GraphWriter, operators: Contrib, given: list[ir.Value]) -> ir.Value:
    x, more, weight = given
    return operators.added_rms_norm(graph, x, more, weight, EPSILON)[1]


CASES = (
    Case(
        name="GatedRMSNorm",
        shapes={"x": VALUES, "weight": (TEXT.linear_value_head_dim,), "z": VALUES},
        body=_gated_norm,
    ),
    Case(
        name="CausalConvWithState with its own SiLU",
        shapes={"x": (1, TEXT.conv_dim, "tokens"), "past": (1, TEXT.conv_dim, TEXT.linear_conv_kernel_dim - 1)},
        body=_conv,
    ),
    Case(
        name="SkipSimplifiedLayerNormalization",
        shapes={"x": HIDDEN, "more": HIDDEN, "weight": (TEXT.hidden_size,)},
        body=_added_norm,
    ),
)


def session(case: Case, operators: Contrib, threads: int) -> onnxruntime.InferenceSession:
    """The graph of one operator in ONNX Runtime, on CPUs."""
    graph = GraphWriter("node", opset=operators.opset)
    given = [graph.input(name, ir.DataType.FLOAT, shape) for name, shape in case.shapes.items()]
    made = case.body(graph, operators, given)
    graph.output(made, "made", ir.DataType.FLOAT, case.shapes["x"])
    model = graph.model("0")
    for value in model.graph.initializers.values():
        if value.const_value is None and isinstance(value.shape, ir.Shape):
            numbers = np.random.default_rng(0).standard_normal(value.shape.numpy()).astype(np.float32)
            value.const_value = ir.Tensor(numbers, name=value.name)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    content = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    print(f"onnxruntime {onnxruntime.__version__}, {arguments.threads} threads\n")
    print("| fused operator | tokens | fused | plain | times | difference |\n|---|---:|---:|---:|---:|---:|")
    for case in CASES:
        sets = (Cuda(products=ir.DataType.FLOAT), Contrib())
        sessions = [session(case, operators, arguments.threads) for operators in sets]
        for tokens in (1, 512):
            random = np.random.default_rng(1)
            feeds = {
                name: random.standard_normal([n if isinstance(n, int) else tokens for n in shape]).astype(np.float32)
                for name, shape in case.shapes.items()
            }
            first, second = (one.run(None, feeds)[0] for one in sessions)
            best = [float("inf")] * 2
            for _ in range(arguments.rounds * (20 if tokens == 1 else 1)):
                for number, one in enumerate(sessions):
                    start = time.perf_counter()
                    one.run(None, feeds)
                    best[number] = min(best[number], time.perf_counter() - start)
            fused, plain = (taken * 1e6 for taken in best)
            apart = float(np.abs(first - second).max() / np.abs(first).max())
            print(f"| {case.name} | {tokens} | {fused:,.0f} us | {plain:,.0f} us | {fused / plain:.1f} | {apart:.0e} |")


if __name__ == "__main__":
    main()
