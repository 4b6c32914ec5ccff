"""Tensor names <-> roles: one table, total over the architecture's tensors and invertible.

Text tensors stand under ``model.language_model.`` in vision-language checkpoints and under ``model.`` in text-only
ones; everything else has one name. Routed experts are stored stacked (role without expert) or one matrix each.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable

from qconvert.core.errors import SourceError
from qconvert.core.role import Kind, Part, Section, TensorRole


class Naming(enum.Enum):
    """Where the decoder's tensors stand; the value is their prefix."""

    VISION_LANGUAGE = "model.language_model."
    TEXT = "model."


_LAYER: tuple[tuple[Kind, Part, str], ...] = (
    (Kind.INPUT_NORM, Part.WEIGHT, "input_layernorm.weight"),
    (Kind.POST_ATTENTION_NORM, Part.WEIGHT, "post_attention_layernorm.weight"),
    (Kind.ATTENTION_QUERY, Part.WEIGHT, "self_attn.q_proj.weight"),
    (Kind.ATTENTION_KEY, Part.WEIGHT, "self_attn.k_proj.weight"),
    (Kind.ATTENTION_VALUE, Part.WEIGHT, "self_attn.v_proj.weight"),
    (Kind.ATTENTION_OUTPUT, Part.WEIGHT, "self_attn.o_proj.weight"),
    (Kind.ATTENTION_QUERY_NORM, Part.WEIGHT, "self_attn.q_norm.weight"),
    (Kind.ATTENTION_KEY_NORM, Part.WEIGHT, "self_attn.k_norm.weight"),
    (Kind.LINEAR_QKV, Part.WEIGHT, "linear_attn.in_proj_qkv.weight"),
    (Kind.LINEAR_Z, Part.WEIGHT, "linear_attn.in_proj_z.weight"),
    (Kind.LINEAR_A, Part.WEIGHT, "linear_attn.in_proj_a.weight"),
    (Kind.LINEAR_B, Part.WEIGHT, "linear_attn.in_proj_b.weight"),
    (Kind.LINEAR_OUTPUT, Part.WEIGHT, "linear_attn.out_proj.weight"),
    (Kind.LINEAR_CONV, Part.WEIGHT, "linear_attn.conv1d.weight"),
    (Kind.LINEAR_A_LOG, Part.WEIGHT, "linear_attn.A_log"),
    (Kind.LINEAR_DT_BIAS, Part.WEIGHT, "linear_attn.dt_bias"),
    (Kind.LINEAR_NORM, Part.WEIGHT, "linear_attn.norm.weight"),
    (Kind.ROUTER, Part.WEIGHT, "mlp.gate.weight"),
    (Kind.EXPERT_GATE_UP, Part.WEIGHT, "mlp.experts.gate_up_proj"),
    (Kind.EXPERT_DOWN, Part.WEIGHT, "mlp.experts.down_proj"),
    (Kind.EXPERT_GATE, Part.WEIGHT, "mlp.experts.{expert}.gate_proj.weight"),
    (Kind.EXPERT_UP, Part.WEIGHT, "mlp.experts.{expert}.up_proj.weight"),
    (Kind.EXPERT_DOWN, Part.WEIGHT, "mlp.experts.{expert}.down_proj.weight"),
    (Kind.SHARED_GATE, Part.WEIGHT, "mlp.shared_expert.gate_proj.weight"),
    (Kind.SHARED_UP, Part.WEIGHT, "mlp.shared_expert.up_proj.weight"),
    (Kind.SHARED_DOWN, Part.WEIGHT, "mlp.shared_expert.down_proj.weight"),
    (Kind.SHARED_EXPERT_GATE, Part.WEIGHT, "mlp.shared_expert_gate.weight"),
)

_BLOCK: tuple[tuple[Kind, Part, str], ...] = tuple(
    (kind, part, f"{module}.{part.value}")
    for kind, module in (
        (Kind.BLOCK_NORM1, "norm1"),
        (Kind.BLOCK_QKV, "attn.qkv"),
        (Kind.BLOCK_PROJ, "attn.proj"),
        (Kind.BLOCK_NORM2, "norm2"),
        (Kind.BLOCK_FC1, "mlp.linear_fc1"),
        (Kind.BLOCK_FC2, "mlp.linear_fc2"),
    )
    for part in (Part.WEIGHT, Part.BIAS)
)

_TEXT = "{text}"
_VISION = "model.visual."
_TABLE: tuple[tuple[Section, Kind, Part, str], ...] = (
    (Section.TEXT, Kind.EMBEDDING, Part.WEIGHT, f"{_TEXT}embed_tokens.weight"),
    *((Section.TEXT, kind, part, f"{_TEXT}layers.{{layer}}.{name}") for kind, part, name in _LAYER),
    (Section.TEXT, Kind.NORM, Part.WEIGHT, f"{_TEXT}norm.weight"),
    (Section.TEXT, Kind.HEAD, Part.WEIGHT, "lm_head.weight"),
    (Section.MTP, Kind.MTP_FC, Part.WEIGHT, "mtp.fc.weight"),
    (Section.MTP, Kind.MTP_EMBEDDING_NORM, Part.WEIGHT, "mtp.pre_fc_norm_embedding.weight"),
    (Section.MTP, Kind.MTP_HIDDEN_NORM, Part.WEIGHT, "mtp.pre_fc_norm_hidden.weight"),
    *((Section.MTP, kind, part, f"mtp.layers.{{layer}}.{name}") for kind, part, name in _LAYER),
    (Section.MTP, Kind.NORM, Part.WEIGHT, "mtp.norm.weight"),
    (Section.VISION, Kind.PATCH_EMBEDDING, Part.WEIGHT, f"{_VISION}patch_embed.proj.weight"),
    (Section.VISION, Kind.PATCH_EMBEDDING, Part.BIAS, f"{_VISION}patch_embed.proj.bias"),
    (Section.VISION, Kind.POSITION_EMBEDDING, Part.WEIGHT, f"{_VISION}pos_embed.weight"),
    *((Section.VISION, kind, part, f"{_VISION}blocks.{{layer}}.{name}") for kind, part, name in _BLOCK),
    *(
        (Section.VISION, kind, part, f"{_VISION}merger.{module}.{part.value}")
        for kind, module in (
            (Kind.MERGER_NORM, "norm"),
            (Kind.MERGER_FC1, "linear_fc1"),
            (Kind.MERGER_FC2, "linear_fc2"),
        )
        for part in (Part.WEIGHT, Part.BIAS)
    ),
)

_NAMES = {(section, kind, part, "{layer}" in name, "{expert}" in name): name for section, kind, part, name in _TABLE}
_ROLES = {
    name.format(text=naming.value, layer="#", expert="#"): (section, kind, part, "{layer}" in name, "{expert}" in name)
    for naming in Naming
    for section, kind, part, name in _TABLE
}
_NUMBER = re.compile(r"(?<=\.)(?:0|[1-9][0-9]{0,6})(?=\.)")


def role_of(name: str) -> TensorRole:
    """The role of the tensor ``name``, under either prefix and in either layout of experts.

    Raises:
        SourceError: the architecture has no such tensor.
    """
    numbers = [int(n) for n in _NUMBER.findall(name)]
    entry = _ROLES.get(_NUMBER.sub("#", name)) if "#" not in name else None
    if entry is None:
        raise SourceError(f"tensor {name!r} is not one of this architecture")
    section, kind, part, in_layer, of_expert = entry
    return TensorRole(
        section=section,
        kind=kind,
        part=part,
        layer=numbers[0] if in_layer else None,
        expert=numbers[1] if of_expert else None,
    )


def name_of(role: TensorRole, naming: Naming) -> str:
    """The name of the tensor with ``role``; the inverse of ``role_of``.

    Raises:
        ValueError: a role that is no tensor of its own, such as one half of ``q_proj``.
    """
    key = (role.section, role.kind, role.part, role.layer is not None, role.expert is not None)
    if key not in _NAMES:
        raise ValueError(f"no tensor is stored for the role {role}")
    return _NAMES[key].format(text=naming.value, layer=role.layer, expert=role.expert)


def naming_of(names: Iterable[str]) -> Naming:
    """The naming of a checkpoint, from its tensor names; that of the hub when they do not tell.

    Raises:
        SourceError: the names use both prefixes.
    """
    naming: Naming | None = None
    first = ""
    for name in names:
        if name.startswith(Naming.VISION_LANGUAGE.value):
            found = Naming.VISION_LANGUAGE
        elif name.startswith(Naming.TEXT.value) and not name.startswith(_VISION):
            found = Naming.TEXT
        else:
            continue
        if naming is not None and found is not naming:
            raise SourceError(f"tensor names use two prefixes: {first!r} and {name!r}; expected one")
        naming, first = found, name
    return naming or Naming.VISION_LANGUAGE


def module_of(name: str) -> str:
    """The module that a tensor belongs to: the name without ``.weight`` or ``.bias``."""
    for part in (Part.WEIGHT, Part.BIAS):
        if name.endswith(f".{part.value}"):
            return name[: -len(part.value) - 1]
    return name
