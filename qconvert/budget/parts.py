"""What a budget decides as one: matrices that engines stack or read in one scheme, and the schemes that fit each.

Routed experts of a layer are one part, because vLLM looks their scheme up once; so are queries, keys and values, the
inputs of linear attention but for the two small ones, and the shared expert's gate and up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qconvert.core.errors import UsageError
from qconvert.core.role import EXPERT_KINDS, Kind, Section, TensorRole
from qconvert.core.scheme import FP8, INT8, Group, Scheme, int4
from qconvert.parity.sensitivity import storable
from qconvert.plan.policy import Rule
from qconvert.weights.source import CheckpointWeights

SCHEMES: dict[str, Scheme] = {
    "int4-g128": int4(128),
    "int4-g64": int4(64),
    "int4-g32": int4(32),
    "int8": INT8,
    "fp8": FP8,
}
"""What a budget can choose among, by name: all that transformers and vLLM read mixed, in routed experts too."""

KEPT = "as it is"
"""What reports call a part that is not rounded."""

DEFAULT_SCHEMES = ("int4-g128", "int4-g32", "int8")
"""fp8 has int8's bytes and more than its loss: it is for whoever wants it for its speed."""

EXPERTS = "routed experts"

_KINDS: tuple[tuple[str, tuple[Kind, ...]], ...] = (
    (EXPERTS, (Kind.EXPERT_GATE, Kind.EXPERT_UP, Kind.EXPERT_DOWN)),
    ("attention query, key, value", (Kind.ATTENTION_QUERY, Kind.ATTENTION_KEY, Kind.ATTENTION_VALUE)),
    ("attention output", (Kind.ATTENTION_OUTPUT,)),
    ("linear attention qkv, z", (Kind.LINEAR_QKV, Kind.LINEAR_Z)),
    ("linear attention output", (Kind.LINEAR_OUTPUT,)),
    ("shared expert gate, up", (Kind.SHARED_GATE, Kind.SHARED_UP)),
    ("shared expert down", (Kind.SHARED_DOWN,)),
)

GROUPS = tuple(name for name, _ in _KINDS)
"""Names of all groups, routed experts first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One group in one layer.

    Attributes:
        roles: of its stored matrices.
        schemes: names in ``SCHEMES`` of those that all of its matrices can be stored in.
        stacked: whether routed experts of this checkpoint are stored in stacks, which may stay beside others that
            are rounded; see the rule ``transformers-experts`` of ``engine_check``.
    """

    group: str
    layer: int
    roles: tuple[TensorRole, ...]
    schemes: tuple[str, ...]
    stacked: bool = False

    @property
    def experts(self) -> bool:
        """Whether these are routed experts."""
        return self.group == EXPERTS


def matches_of(group: str) -> tuple[str, ...]:
    """What rules of a policy match for all of ``group``."""
    kinds = next(kinds for name, kinds in _KINDS if name == group)
    return ("text.expert.*",) if group == EXPERTS else tuple(f"{Section.TEXT.value}.{kind.value}" for kind in kinds)


def parts_of(source: CheckpointWeights, schemes: Sequence[str], *, rules: Sequence[Rule] = ()) -> tuple[Part, ...]:
    """All parts of a checkpoint that nobody has decided, by group, then by layer.

    Args:
        source: the original.
        schemes: names in ``SCHEMES``, all of which an unknown one is told.
        rules: of the user; a part of which they decide any matrix is theirs.

    Raises:
        UsageError: an unknown scheme, one twice, or none.
    """
    _check(schemes)
    of_kind: dict[Kind, dict[int, list[TensorRole]]] = {}
    for role in source.stored:
        if role.section is Section.TEXT and role.layer is not None:
            of_kind.setdefault(role.kind, {}).setdefault(role.layer, []).append(role)
    found = []
    for group, kinds in _KINDS:
        for layer in sorted({layer for kind in kinds for layer in of_kind.get(kind, {})}):
            roles = tuple(role for kind in kinds for role in of_kind.get(kind, {}).get(layer, ()))
            if not any(_decides(rule, role) for rule in rules for role in roles):
                found.append(_part(source, group, layer, roles, schemes))
    return tuple(found)


def _part(
    source: CheckpointWeights, group: str, layer: int, roles: tuple[TensorRole, ...], schemes: Sequence[str]
) -> Part:
    fitting = tuple(name for name in schemes if all(_fits(source, role, SCHEMES[name]) for role in roles))
    first = source.stored[roles[0]].plain
    stacked = first is not None and len(source.checkpoint.tensors[first.tensor].shape) > 2
    return Part(group=group, layer=layer, roles=roles, schemes=fitting, stacked=stacked)


def _decides(rule: Rule, role: TensorRole) -> bool:
    return any(rule.matches(one) for one in role.halves or (role,))


def _check(schemes: Sequence[str]) -> None:
    for name in schemes:
        if name not in SCHEMES:
            raise UsageError(f"a budget cannot choose {name!r}; expected some of {', '.join(SCHEMES)}")
    if not schemes or len(set(schemes)) < len(schemes):
        raise UsageError(f"name schemes to choose among, each once, such as {','.join(DEFAULT_SCHEMES)}")


def _fits(source: CheckpointWeights, role: TensorRole, scheme: Scheme) -> bool:
    """Whether a format and vLLM, which splits experts both ways, take the matrix in a scheme."""
    rows = source.stored[role].shape[0]
    divided = scheme.blocking.size if role.kind in EXPERT_KINDS and isinstance(scheme.blocking, Group) else 1
    return storable(source, role, scheme) and rows % divided == 0
