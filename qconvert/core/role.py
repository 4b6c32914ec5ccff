"""What a tensor is in the architecture, whatever its name and storage."""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace


class Section(enum.Enum):
    """The part of the model that a tensor belongs to."""

    TEXT = "text"
    MTP = "mtp"
    VISION = "vision"


class Kind(enum.Enum):
    """The function of a tensor inside its section; the value is what policies match."""

    EMBEDDING = "embedding"
    HEAD = "head"
    NORM = "norm"
    INPUT_NORM = "input_norm"
    POST_ATTENTION_NORM = "post_attention_norm"

    ATTENTION_QUERY = "attention.query"
    ATTENTION_KEY = "attention.key"
    ATTENTION_VALUE = "attention.value"
    ATTENTION_OUTPUT = "attention.output"
    ATTENTION_QUERY_NORM = "attention.query_norm"
    ATTENTION_KEY_NORM = "attention.key_norm"

    LINEAR_QKV = "linear_attention.qkv"
    LINEAR_Z = "linear_attention.z"
    LINEAR_A = "linear_attention.a"
    LINEAR_B = "linear_attention.b"
    LINEAR_OUTPUT = "linear_attention.output"
    LINEAR_CONV = "linear_attention.conv"
    LINEAR_A_LOG = "linear_attention.a_log"
    LINEAR_DT_BIAS = "linear_attention.dt_bias"
    LINEAR_NORM = "linear_attention.norm"

    ROUTER = "router"
    EXPERT_GATE_UP = "expert.gate_up"
    EXPERT_GATE = "expert.gate"
    EXPERT_UP = "expert.up"
    EXPERT_DOWN = "expert.down"
    SHARED_GATE = "shared_expert.gate"
    SHARED_UP = "shared_expert.up"
    SHARED_DOWN = "shared_expert.down"
    SHARED_EXPERT_GATE = "shared_expert_gate"

    MTP_FC = "fc"
    MTP_EMBEDDING_NORM = "embedding_norm"
    MTP_HIDDEN_NORM = "hidden_norm"

    PATCH_EMBEDDING = "patch_embedding"
    POSITION_EMBEDDING = "position_embedding"
    BLOCK_NORM1 = "block.norm1"
    BLOCK_NORM2 = "block.norm2"
    BLOCK_QKV = "block.qkv"
    BLOCK_PROJ = "block.proj"
    BLOCK_FC1 = "block.fc1"
    BLOCK_FC2 = "block.fc2"
    MERGER_NORM = "merger.norm"
    MERGER_FC1 = "merger.fc1"
    MERGER_FC2 = "merger.fc2"


class Part(enum.Enum):
    """A named piece of a tensor's module: its weight, its bias, or one half of ``q_proj``.

    ``q_proj`` holds, for every head, the rows of the query and then those of the sigmoid output gate; the two
    halves are ``QUERY`` and ``OUTPUT_GATE``, the whole is ``WEIGHT``.
    """

    WEIGHT = "weight"
    BIAS = "bias"
    QUERY = "query"
    OUTPUT_GATE = "output_gate"


HALVES = (Part.QUERY, Part.OUTPUT_GATE)
"""The halves of ``q_proj``, in the order of their rows inside a head."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRole:
    """One tensor's place in the architecture.

    Attributes:
        layer: index of the decoder, MTP or vision layer; ``None`` outside layers.
        expert: index of a routed expert; ``None`` for everything else and for experts stacked in one tensor.
    """

    section: Section
    kind: Kind
    layer: int | None = None
    expert: int | None = None
    part: Part = Part.WEIGHT

    @property
    def path(self) -> str:
        """What policies match and reports group by, for example ``text.expert.gate``."""
        suffix = "" if self.part is Part.WEIGHT else f".{self.part.value}"
        return f"{self.section.value}.{self.kind.value}{suffix}"

    @property
    def whole(self) -> TensorRole:
        """The tensor that a half of ``q_proj`` is stored in; any other role itself."""
        return replace(self, part=Part.WEIGHT) if self.part in HALVES else self

    @property
    def halves(self) -> tuple[TensorRole, ...]:
        """The query and the output gate of a ``q_proj``; nothing of any other tensor."""
        whole = self.kind is Kind.ATTENTION_QUERY and self.part is Part.WEIGHT
        return tuple(replace(self, part=half) for half in HALVES) if whole else ()

    def __str__(self) -> str:
        layer = "" if self.layer is None else f" layer {self.layer}"
        expert = "" if self.expert is None else f" expert {self.expert}"
        return f"{self.path}{layer}{expert}"


EXPERT_KINDS = frozenset({Kind.EXPERT_GATE_UP, Kind.EXPERT_GATE, Kind.EXPERT_UP, Kind.EXPERT_DOWN})
"""Kinds of routed experts' weights, stacked or not."""

STACKED_KINDS = (
    (Kind.EXPERT_GATE, Kind.EXPERT_UP),
    (Kind.SHARED_GATE, Kind.SHARED_UP),
    (Kind.ATTENTION_QUERY, Kind.ATTENTION_KEY, Kind.ATTENTION_VALUE),
    (Kind.LINEAR_QKV, Kind.LINEAR_Z),
)
"""Matrices of a layer, or of an expert, that engines stack into one product and that share a second scale."""
