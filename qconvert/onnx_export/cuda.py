"""ONNX Runtime's own operators as its CUDA provider has them.

Products run in the type of their weights, with codes in that of the scales, and attention in that of keys and values;
everything else runs in float32: linear attention, norms and router are a small part of the work. So each of the
operators here casts what it takes and gives; what is widened and narrowed again is not cast at all.

Read in the sources and wheels of ONNX Runtime, see docs/onnx.md; not run on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from qconvert.onnx_export.contrib import Contrib
from qconvert.onnx_export.graph_writer import MICROSOFT, Attribute, GraphWriter
from qconvert.onnx_export.standard import gemm
from qconvert.onnx_export.weight import Weight


@dataclass(frozen=True, slots=True, kw_only=True)
class Cuda(Contrib):
    """``com.microsoft`` and opset 23 of ai.onnx for the CUDA provider.

    Attributes:
        products: type in which attention multiplies.
    """

    products: ir.DataType
    unseen: float = -3e4  # finite in float16

    def computes_in(self, weight: Weight) -> ir.DataType:
        """See ``Contrib``."""
        return weight.type

    def rounding(self, accuracy_level: int) -> dict[str, Attribute]:
        """See ``Contrib``. Activations are rounded on CPUs alone."""
        return {}

    @property
    def stored_codes(self) -> dict[str, Attribute]:
        """See ``Contrib``. By default the provider takes codes for laid out as its kernels want them."""
        return {"weights_prepacked": 0}

    def product(self, graph: GraphWriter, x: ir.Value, weight: Weight) -> ir.Value:
        """See ``Contrib``. Gemm, because FusedMatMul has no kernel for bfloat16 there."""
        narrow = graph.cast(x, ir.DataType.FLOAT, weight.type)
        made = gemm(graph, narrow, weight.stored(graph), weight.shape)
        return graph.cast(made, weight.type, ir.DataType.FLOAT)

    def added_rms_norm(
        self, graph: GraphWriter, x: ir.Value, more: ir.Value, weight: ir.Value, eps: float
    ) -> tuple[ir.Value, ir.Value]:
        """See ``OperatorSet``. One pass over the numbers instead of two."""
        normal, mean, deviation, total = graph.ops(
            "SkipSimplifiedLayerNormalization", 4, x, more, weight, domain=MICROSOFT, epsilon=eps
        )
        mean.name = deviation.name = ""  # of use in training only
        return total, normal

    def gated_rms_norm(self, graph: GraphWriter, x: ir.Value, weight: ir.Value, gate: ir.Value, eps: float) -> ir.Value:
        """See ``OperatorSet``. One kernel for five."""
        return graph.op("GatedRMSNorm", x, weight, gate, domain=MICROSOFT, epsilon=eps, activation="silu")

    def causal_conv(self, graph: GraphWriter, x: ir.Value, weight: Weight, past: ir.Value) -> ir.Value:
        """See ``OperatorSet``."""
        return graph.ops(
            "CausalConvWithState", 2, x, weight.dense(graph), None, past, domain=MICROSOFT, activation="silu"
        )[0]

    def attention(
        self,
        graph: GraphWriter,
        query: ir.Value,
        key: ir.Value,
        value: ir.Value,
        bias: ir.Value,
        past_key: ir.Value,
        past_value: ir.Value,
        *,
        heads: int,
        key_heads: int,
    ) -> tuple[ir.Value, ...]:
        """See ``OperatorSet``."""
        given = (query, key, value, bias, past_key, past_value)
        narrow = [graph.cast(one, ir.DataType.FLOAT, self.products) for one in given]
        made = graph.ops("Attention", 3, *narrow, q_num_heads=heads, kv_num_heads=key_heads)
        return tuple(graph.cast(one, self.products, ir.DataType.FLOAT) for one in made)
