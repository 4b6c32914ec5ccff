"""Where inputs are looked at: one place for all matrices that have the same inputs, each expert's apart.

A site is named after the first of its matrices, as the reference model calls it; sites of experts are one for a layer.
"""

from __future__ import annotations

import re

from qconvert.arch.inputs import FIRST_READER
from qconvert.core.coverage import layer_name
from qconvert.core.role import Kind, Section, TensorRole

GATE_UP = "mlp.experts.gate_up_proj"
DOWN = "mlp.experts.down_proj"
HEAD = "lm_head"
MTP_FC = "mtp.fc"

_NAMES: dict[Kind, str] = {
    Kind.ATTENTION_QUERY: "self_attn.q_proj",
    Kind.ATTENTION_OUTPUT: "self_attn.o_proj",
    Kind.LINEAR_QKV: "linear_attn.in_proj_qkv",
    Kind.LINEAR_OUTPUT: "linear_attn.out_proj",
    Kind.SHARED_GATE: "mlp.shared_expert.gate_proj",
    Kind.SHARED_DOWN: "mlp.shared_expert.down_proj",
    Kind.EXPERT_GATE: GATE_UP,
    Kind.EXPERT_DOWN: DOWN,
}
_DENSE = frozenset(_NAMES.values()) - {GATE_UP, DOWN}
_OUTSIDE = {(Section.TEXT, Kind.HEAD): HEAD, (Section.MTP, Kind.MTP_FC): MTP_FC}
_EXPERT = re.compile(r"((?:mtp\.)?layers\.\d+)\.mlp\.experts\.(\d+)\.(gate_up_proj|down_proj)")
_MODULE = re.compile(r"(?:mtp\.)?layers\.\d+\.(.+)")


def site_of(role: TensorRole) -> str | None:
    """Where the inputs of the matrix with ``role`` are looked at; ``None`` for what is no matrix of the decoder."""
    outside = _OUTSIDE.get((role.section, role.kind))
    if outside is not None:
        return outside
    first = FIRST_READER.get(role.kind)
    return None if first is None else f"{layer_name(role.section, role.layer)}.{_NAMES[first]}"


def dense_site(module: str) -> str | None:
    """The site that a module of the reference model is; ``None`` where another one with the same inputs is."""
    if module in (HEAD, MTP_FC):
        return module
    inside = _MODULE.fullmatch(module)
    return module if inside is not None and inside[1] in _DENSE else None


def expert_site(module: str) -> tuple[str, int] | None:
    """Site and number of a matrix of a routed expert, asked for as ``layers.0.mlp.experts.3.gate_up_proj``."""
    found = _EXPERT.fullmatch(module)
    return None if found is None else (f"{found[1]}.mlp.experts.{found[3]}", int(found[2]))
