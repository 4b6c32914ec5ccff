"""Which tensors a checkpoint of a given configuration has, and their shapes.

Legend: V vocabulary, D hidden, E experts, F expert width, S shared expert width, L attention heads, H head width,
Hk / Hv linear key / value heads, dk / dv their widths, W vision width, I vision MLP width, M merged vision width.
"""

from __future__ import annotations

from collections.abc import Iterator

from qconvert.core.role import HALVES, Kind, Part, Section, TensorRole
from reference_model.config import ModelConfig, TextConfig, VisionConfig

STACKED = (Kind.EXPERT_GATE_UP, Kind.EXPERT_DOWN)
"""Kinds of a layer's experts when each is one [E, N, K] tensor."""

PER_EXPERT = (Kind.EXPERT_GATE, Kind.EXPERT_UP, Kind.EXPERT_DOWN)
"""Kinds of one expert's matrices when each is a tensor of its own."""

LINEAR_KINDS = frozenset(
    {
        Kind.HEAD,
        Kind.ATTENTION_QUERY,
        Kind.ATTENTION_KEY,
        Kind.ATTENTION_VALUE,
        Kind.ATTENTION_OUTPUT,
        Kind.LINEAR_QKV,
        Kind.LINEAR_Z,
        Kind.LINEAR_A,
        Kind.LINEAR_B,
        Kind.LINEAR_OUTPUT,
        Kind.EXPERT_GATE_UP,
        Kind.EXPERT_GATE,
        Kind.EXPERT_UP,
        Kind.EXPERT_DOWN,
        Kind.SHARED_GATE,
        Kind.SHARED_UP,
        Kind.SHARED_DOWN,
        Kind.MTP_FC,
        Kind.BLOCK_QKV,
        Kind.BLOCK_PROJ,
        Kind.BLOCK_FC1,
        Kind.BLOCK_FC2,
        Kind.MERGER_FC1,
        Kind.MERGER_FC2,
    }
)
"""Matrices that multiply activations: their weights can be quantized."""

KEPT_BY_NATURE: dict[Kind, str] = {
    Kind.EMBEDDING: "a table that is looked up, not multiplied",
    Kind.POSITION_EMBEDDING: "a table that is looked up, not multiplied",
    Kind.PATCH_EMBEDDING: "a convolution over pixels",
    Kind.LINEAR_CONV: "a depthwise convolution",
    Kind.ROUTER: "router: engines read it in 16 bits only",
    Kind.SHARED_EXPERT_GATE: "one row: engines read it in 16 bits only",
    Kind.LINEAR_A_LOG: "decay, an exponent of an exponent",
    Kind.LINEAR_DT_BIAS: "a bias inside the decay",
    **dict.fromkeys(
        (
            Kind.NORM,
            Kind.INPUT_NORM,
            Kind.POST_ATTENTION_NORM,
            Kind.ATTENTION_QUERY_NORM,
            Kind.ATTENTION_KEY_NORM,
            Kind.LINEAR_NORM,
            Kind.MTP_EMBEDDING_NORM,
            Kind.MTP_HIDDEN_NORM,
            Kind.BLOCK_NORM1,
            Kind.BLOCK_NORM2,
            Kind.MERGER_NORM,
        ),
        "a vector",
    ),
}
"""Kind -> why no scheme applies to it."""


def is_linear_weight(role: TensorRole) -> bool:
    """Whether the tensor is a matrix, or a stack of them, that can be quantized."""
    return role.kind in LINEAR_KINDS and role.part is not Part.BIAS


def kept_by_nature(role: TensorRole) -> str | None:
    """Why a tensor can only be kept; ``None`` for linear weights."""
    if role.part is Part.BIAS:
        return "a vector"
    return KEPT_BY_NATURE.get(role.kind)


def expected_shape(role: TensorRole, config: ModelConfig) -> tuple[int, ...]:
    """Shape of the tensor with ``role``, or of the part of ``q_proj`` that it names.

    Raises:
        KeyError: ``config`` has no such tensor (a vision role without a vision tower).
    """
    if role.section is Section.VISION:
        if config.vision is None:
            raise KeyError(str(role))
        return _vision_shapes(config.vision)[role.kind, role.part]
    text = config.text
    if role.kind is Kind.ATTENTION_QUERY and role.part in HALVES:
        return (text.query_dim, text.hidden_size)
    if role.kind is Kind.EXPERT_DOWN and role.expert is None:
        return (text.stored_experts, text.hidden_size, text.moe_intermediate_size)
    return _text_shapes(text)[role.kind]


def expected_roles(
    config: ModelConfig, *, stacked: bool = True, mtp_layers: int | None = None, vision: bool | None = None
) -> Iterator[TensorRole]:
    """Every tensor of a checkpoint in the order of the forward pass, MTP and vision last.

    Args:
        config: sizes and layer pattern.
        stacked: experts as [E, N, K] tensors, or one matrix each.
        mtp_layers: layers of the MTP head; default what ``config`` says.
        vision: whether the tower is stored; default whether ``config`` has one.
    """
    text = config.text
    yield TensorRole(section=Section.TEXT, kind=Kind.EMBEDDING)
    for layer, layer_type in enumerate(text.layer_types):
        kinds = _FULL_ATTENTION if layer_type == "full_attention" else _LINEAR_ATTENTION
        yield from _layer(Section.TEXT, layer, kinds, text, stacked)
    yield TensorRole(section=Section.TEXT, kind=Kind.NORM)
    if not text.tie_word_embeddings:
        yield TensorRole(section=Section.TEXT, kind=Kind.HEAD)
    count = text.mtp_num_hidden_layers if mtp_layers is None else mtp_layers
    if count:
        for kind in (Kind.MTP_EMBEDDING_NORM, Kind.MTP_HIDDEN_NORM, Kind.MTP_FC):
            yield TensorRole(section=Section.MTP, kind=kind)
        for layer in range(count):
            yield from _layer(Section.MTP, layer, _FULL_ATTENTION, text, stacked)
        yield TensorRole(section=Section.MTP, kind=Kind.NORM)
    if config.vision is not None and vision is not False:
        yield from _vision(config.vision.depth)


_FULL_ATTENTION = (
    Kind.ATTENTION_QUERY,
    Kind.ATTENTION_KEY,
    Kind.ATTENTION_VALUE,
    Kind.ATTENTION_QUERY_NORM,
    Kind.ATTENTION_KEY_NORM,
    Kind.ATTENTION_OUTPUT,
)
_LINEAR_ATTENTION = (
    Kind.LINEAR_QKV,
    Kind.LINEAR_Z,
    Kind.LINEAR_B,
    Kind.LINEAR_A,
    Kind.LINEAR_CONV,
    Kind.LINEAR_DT_BIAS,
    Kind.LINEAR_A_LOG,
    Kind.LINEAR_NORM,
    Kind.LINEAR_OUTPUT,
)
_SHARED = (Kind.SHARED_GATE, Kind.SHARED_UP, Kind.SHARED_DOWN)
_BLOCK = (Kind.BLOCK_NORM1, Kind.BLOCK_QKV, Kind.BLOCK_PROJ, Kind.BLOCK_NORM2, Kind.BLOCK_FC1, Kind.BLOCK_FC2)
_MERGER = (Kind.MERGER_NORM, Kind.MERGER_FC1, Kind.MERGER_FC2)


def _layer(
    section: Section, layer: int, mixer: tuple[Kind, ...], text: TextConfig, stacked: bool
) -> Iterator[TensorRole]:
    for kind in (Kind.INPUT_NORM, *mixer, Kind.POST_ATTENTION_NORM, Kind.ROUTER):
        yield TensorRole(section=section, kind=kind, layer=layer)
    yield from expert_roles(section, layer, text.stored_experts, stacked=stacked)
    shared = () if text.folded_experts else _SHARED
    for kind in (*shared, Kind.SHARED_EXPERT_GATE):
        yield TensorRole(section=section, kind=kind, layer=layer)


def expert_roles(section: Section, layer: int, experts: int, *, stacked: bool) -> Iterator[TensorRole]:
    """The experts' tensors of one layer, those of a folded shared expert among them."""
    if stacked:
        for kind in STACKED:
            yield TensorRole(section=section, kind=kind, layer=layer)
    else:
        for expert in range(experts):
            for kind in PER_EXPERT:
                yield TensorRole(section=section, kind=kind, layer=layer, expert=expert)


def _vision(depth: int) -> Iterator[TensorRole]:
    def both(kind: Kind, layer: int | None = None) -> Iterator[TensorRole]:
        for part in (Part.WEIGHT, Part.BIAS):
            yield TensorRole(section=Section.VISION, kind=kind, layer=layer, part=part)

    yield from both(Kind.PATCH_EMBEDDING)
    yield TensorRole(section=Section.VISION, kind=Kind.POSITION_EMBEDDING)
    for layer in range(depth):
        for kind in _BLOCK:
            yield from both(kind, layer)
    for kind in _MERGER:
        yield from both(kind)


def _text_shapes(c: TextConfig) -> dict[Kind, tuple[int, ...]]:
    hidden, experts, width = c.hidden_size, c.num_experts, c.moe_intermediate_size
    shared = c.shared_expert_intermediate_size
    return {
        Kind.EMBEDDING: (c.vocab_size, hidden),  # [V, D]
        Kind.HEAD: (c.vocab_size, hidden),  # [V, D]
        Kind.NORM: (hidden,),
        Kind.INPUT_NORM: (hidden,),
        Kind.POST_ATTENTION_NORM: (hidden,),
        Kind.ATTENTION_QUERY: (2 * c.query_dim, hidden),  # [L * 2H, D]: query and output gate head by head
        Kind.ATTENTION_KEY: (c.key_value_dim, hidden),
        Kind.ATTENTION_VALUE: (c.key_value_dim, hidden),
        Kind.ATTENTION_OUTPUT: (hidden, c.query_dim),  # [D, L * H]
        Kind.ATTENTION_QUERY_NORM: (c.head_dim,),
        Kind.ATTENTION_KEY_NORM: (c.head_dim,),
        Kind.LINEAR_QKV: (c.conv_dim, hidden),  # [2 Hk dk + Hv dv, D]
        Kind.LINEAR_Z: (c.value_dim, hidden),  # [Hv dv, D]
        Kind.LINEAR_A: (c.linear_num_value_heads, hidden),
        Kind.LINEAR_B: (c.linear_num_value_heads, hidden),
        Kind.LINEAR_OUTPUT: (hidden, c.value_dim),  # [D, Hv dv]
        Kind.LINEAR_CONV: (c.conv_dim, 1, c.linear_conv_kernel_dim),
        Kind.LINEAR_A_LOG: (c.linear_num_value_heads,),
        Kind.LINEAR_DT_BIAS: (c.linear_num_value_heads,),
        Kind.LINEAR_NORM: (c.linear_value_head_dim,),
        Kind.ROUTER: (experts, hidden),
        Kind.EXPERT_GATE_UP: (c.stored_experts, 2 * width, hidden),  # [E, 2F, D], gate rows first
        Kind.EXPERT_GATE: (width, hidden),
        Kind.EXPERT_UP: (width, hidden),
        Kind.EXPERT_DOWN: (hidden, width),  # of one expert; stacked it is [E, D, F]
        Kind.SHARED_GATE: (shared, hidden),
        Kind.SHARED_UP: (shared, hidden),
        Kind.SHARED_DOWN: (hidden, shared),
        Kind.SHARED_EXPERT_GATE: (1, hidden),
        Kind.MTP_FC: (hidden, 2 * hidden),  # over [embedding, hidden]
        Kind.MTP_EMBEDDING_NORM: (hidden,),
        Kind.MTP_HIDDEN_NORM: (hidden,),
    }


def _vision_shapes(c: VisionConfig) -> dict[tuple[Kind, Part], tuple[int, ...]]:
    width, mlp, merged = c.hidden_size, c.intermediate_size, c.merged_size
    weights: dict[Kind, tuple[int, ...]] = {
        Kind.PATCH_EMBEDDING: (width, c.in_channels, c.temporal_patch_size, c.patch_size, c.patch_size),
        Kind.BLOCK_NORM1: (width,),
        Kind.BLOCK_NORM2: (width,),
        Kind.BLOCK_QKV: (3 * width, width),
        Kind.BLOCK_PROJ: (width, width),
        Kind.BLOCK_FC1: (mlp, width),
        Kind.BLOCK_FC2: (width, mlp),
        Kind.MERGER_NORM: (width,),
        Kind.MERGER_FC1: (merged, merged),
        Kind.MERGER_FC2: (c.out_hidden_size, merged),
    }
    return {
        (Kind.POSITION_EMBEDDING, Part.WEIGHT): (c.num_position_embeddings, width),
        **{(kind, Part.WEIGHT): shape for kind, shape in weights.items()},
        **{(kind, Part.BIAS): shape[:1] for kind, shape in weights.items()},
    }
