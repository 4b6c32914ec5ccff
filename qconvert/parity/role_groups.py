"""Roles that are restored or rounded together: what a policy decides as one, and what engines stack."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from qconvert.core.role import Kind, Part, Section, TensorRole

MOST = 8
"""Groups at most: each costs a pass of the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleGroup:
    """Roles of the text decoder.

    Attributes:
        name: what reports call it.
        roles: of the tensors that are in it; of a ``q_proj`` its halves.
    """

    name: str
    roles: frozenset[TensorRole]

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that it has tensors in."""
        return tuple(sorted({role.layer for role in self.roles if role.layer is not None}))

    def of_layer(self, layer: int) -> frozenset[TensorRole]:
        """Its roles in one layer."""
        return frozenset(role for role in self.roles if role.layer == layer)


QUERIES = "attention query, key, value"
OUTPUT_GATES = "attention output gate"
REST = "everything else"


_NAMES: Mapping[Kind, str] = {
    Kind.EXPERT_GATE: "expert gate and up",
    Kind.EXPERT_UP: "expert gate and up",
    Kind.EXPERT_DOWN: "expert down",
    Kind.SHARED_GATE: "shared expert",
    Kind.SHARED_UP: "shared expert",
    Kind.SHARED_DOWN: "shared expert",
    Kind.ATTENTION_QUERY: QUERIES,
    Kind.ATTENTION_KEY: QUERIES,
    Kind.ATTENTION_VALUE: QUERIES,
    Kind.ATTENTION_OUTPUT: "attention output",
    Kind.LINEAR_QKV: "linear attention inputs",
    Kind.LINEAR_Z: "linear attention inputs",
    Kind.LINEAR_A: "linear attention inputs",
    Kind.LINEAR_B: "linear attention inputs",
    Kind.LINEAR_OUTPUT: "linear attention output",
}


def role_groups(roles: Iterable[TensorRole], *, gates_apart: bool = True) -> tuple[RoleGroup, ...]:
    """The groups of ``roles``, ``MOST`` at most; other sections than the text decoder's are in none.

    Embedding, head, norms, routers and the small parameters of linear attention are one. The output gates of
    ``q_proj`` are a group by themselves with ``gates_apart`` and while there is room.
    """
    found: dict[str, set[TensorRole]] = {}
    for role in roles:
        if role.section is Section.TEXT:
            for one in role.halves or (role,):
                found.setdefault(_name(one), set()).add(one)
    if OUTPUT_GATES in found and (not gates_apart or len(found) > MOST):
        found.setdefault(QUERIES, set()).update(found.pop(OUTPUT_GATES))
    return tuple(RoleGroup(name=name, roles=frozenset(members)) for name, members in found.items())


def _name(role: TensorRole) -> str:
    return OUTPUT_GATES if role.part is Part.OUTPUT_GATE else _NAMES.get(role.kind, REST)


def wholes(roles: Iterable[TensorRole]) -> frozenset[TensorRole]:
    """The stored tensors of ``roles``: a ``q_proj`` for either of its halves."""
    return frozenset(role.whole for role in roles)
