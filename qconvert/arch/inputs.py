"""Which matrices of a decoder layer read the same inputs."""

from __future__ import annotations

from qconvert.core.role import Kind

READERS: dict[Kind, tuple[Kind, ...]] = {
    Kind.ATTENTION_QUERY: (Kind.ATTENTION_QUERY, Kind.ATTENTION_KEY, Kind.ATTENTION_VALUE),
    Kind.ATTENTION_OUTPUT: (Kind.ATTENTION_OUTPUT,),
    Kind.LINEAR_QKV: (Kind.LINEAR_QKV, Kind.LINEAR_Z, Kind.LINEAR_A, Kind.LINEAR_B),
    Kind.LINEAR_OUTPUT: (Kind.LINEAR_OUTPUT,),
    Kind.SHARED_GATE: (Kind.SHARED_GATE, Kind.SHARED_UP),
    Kind.SHARED_DOWN: (Kind.SHARED_DOWN,),
    Kind.EXPERT_GATE: (Kind.EXPERT_GATE, Kind.EXPERT_UP, Kind.EXPERT_GATE_UP),
    Kind.EXPERT_DOWN: (Kind.EXPERT_DOWN,),
}
"""By the first of them, all that read the same; the router and the shared expert's gate, which nobody rounds, are not
among them."""

FIRST_READER: dict[Kind, Kind] = {kind: first for first, kinds in READERS.items() for kind in kinds}
"""The first of those that read the same, of each."""
