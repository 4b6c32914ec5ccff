"""What a checkpoint holds by its headers: does it fit its configuration, and what does it amount to by role."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from qconvert.arch.names import Naming, name_of, naming_of, role_of
from qconvert.arch.shapes import expected_roles, expected_shape, expert_roles
from qconvert.core.errors import SourceError
from qconvert.core.role import EXPERT_KINDS, Kind, Section, TensorRole
from qconvert.core.tensor_info import TensorInfo
from reference_model.config import ModelConfig

_LISTED = 30
_FEW_LAYERS = 1_000
_FEW_EXPERTS = 10_000
_GATE_UP = (Kind.EXPERT_GATE_UP, Kind.EXPERT_GATE, Kind.EXPERT_UP)


@dataclass(frozen=True, slots=True, kw_only=True)
class CensusLine:
    """All tensors of one role path and element type."""

    path: str
    dtype: str
    tensors: int
    parameters: int
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Census:
    """A checkpoint whose names and shapes are those that its configuration asks for.

    Attributes:
        tensors: name -> place, in the order of the checkpoint.
        roles: name -> role, in the same order.
        mtp_layers: layers of the MTP head that are stored.
        notes: what is unusual but harmless, one sentence each.
    """

    config: ModelConfig
    naming: Naming
    tensors: Mapping[str, TensorInfo]
    roles: Mapping[str, TensorRole]
    mtp_layers: int
    notes: tuple[str, ...] = ()

    def lines(self) -> tuple[CensusLine, ...]:
        """Counts by role path and element type, in the order of first appearance."""
        totals: dict[tuple[str, str], list[int]] = {}
        for name, role in self.roles.items():
            info = self.tensors[name]
            total = totals.setdefault((role.path, info.dtype.value), [0, 0, 0])
            total[0] += 1
            total[1] += info.numel
            total[2] += info.nbytes
        return tuple(
            CensusLine(path=path, dtype=dtype, tensors=count, parameters=parameters, nbytes=nbytes)
            for (path, dtype), (count, parameters, nbytes) in totals.items()
        )

    def parameters(self, section: Section | None = None) -> int:
        """Parameters of a section, or of everything that is stored."""
        return sum(numel for role, numel in self._sizes() if section in (None, role.section))

    @property
    def active_parameters(self) -> int:
        """Decoder parameters that one token uses: k of E routed experts, everything else of the text section.

        Folded experts are always on, like the shared expert that they are. The embedding counts, as in advertised
        sizes; MTP head and vision tower do not.
        """
        text = self.config.text
        sizes = [(role, numel) for role, numel in self._sizes() if role.section is Section.TEXT]
        experts = sum(numel for role, numel in sizes if role.kind in EXPERT_KINDS)
        others = sum(numel for role, numel in sizes if role.kind not in EXPERT_KINDS)
        return others + experts * (text.num_experts_per_tok + text.folded_experts) // text.stored_experts

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    def by_role(self) -> Mapping[TensorRole, TensorInfo]:
        """Role -> place: the inverse of ``roles``."""
        return MappingProxyType({role: self.tensors[name] for name, role in self.roles.items()})

    def _sizes(self) -> Iterator[tuple[TensorRole, int]]:
        return ((role, self.tensors[name].numel) for name, role in self.roles.items())


def check(tensors: Mapping[str, TensorInfo], config: ModelConfig) -> Census:
    """Give every tensor its role and compare with what ``config`` asks for.

    Experts may be stacked in one layer and separate in another. Two things are noted instead of refused: an MTP
    head that the configuration has and the checkpoint has not (many copies drop it) or the reverse, and a head
    that is stored although it is tied to the embedding.

    Raises:
        SourceError: missing, unexpected, doubled or misshapen tensors, or element types that are no weights: one
            message for all of them.
    """
    naming = naming_of(tensors)
    problems: list[str] = []
    notes: list[str] = []
    roles = dict(_roles(tensors, problems))
    present = {role: name for name, role in roles.items()}
    if config.vision is not None and naming is not Naming.VISION_LANGUAGE:
        problems.append(
            f"prefix: config.json has a vision_config, so the decoder's names should begin with "
            f"{Naming.VISION_LANGUAGE.value!r}, not {naming.value!r}"
        )
    mtp_layers = _mtp_layers(present, config, notes)
    _check_counts(present, config, mtp_layers)
    expected = set(_expected(present, config, mtp_layers, problems, naming))
    head = TensorRole(section=Section.TEXT, kind=Kind.HEAD)
    if config.text.tie_word_embeddings and head in present:
        notes.append(f"{present[head]} is stored although it is tied to the embedding; it is carried as it is")
        expected.add(head)

    problems.extend(f"missing: {name_of(role, naming)}" for role in expected if role not in present)
    problems.extend(f"unexpected: {name} ({role})" for name, role in roles.items() if role not in expected)
    problems.extend(_misshapen(tensors, roles, expected, config))
    if problems:
        raise SourceError(_message(sorted(problems)))
    return Census(
        config=config,
        naming=naming,
        tensors=MappingProxyType(dict(tensors)),
        roles=MappingProxyType(roles),
        mtp_layers=mtp_layers,
        notes=tuple(notes),
    )


def _roles(names: Iterable[str], problems: list[str]) -> Iterator[tuple[str, TensorRole]]:
    for name in names:
        try:
            yield name, role_of(name)
        except SourceError:
            problems.append(f"unexpected: {name} (no tensor of this architecture)")


def _mtp_layers(present: Mapping[TensorRole, str], config: ModelConfig, notes: list[str]) -> int:
    stored = {role.layer for role in present if role.section is Section.MTP}
    asked = config.text.mtp_num_hidden_layers
    if not stored:
        if asked:
            notes.append(f"config.json says mtp_num_hidden_layers {asked}, but the checkpoint has no mtp tensors")
        return 0
    count = max((layer for layer in stored if layer is not None), default=0) + 1
    if count > asked:
        notes.append(f"the checkpoint has {count} MTP layers, config.json says mtp_num_hidden_layers {asked}")
    return max(count, asked)


def _check_counts(present: Mapping[TensorRole, str], config: ModelConfig, mtp_layers: int) -> None:
    """Refuse counts that these tensors cannot bear out: listing what is missing would take time and memory.

    Raises:
        SourceError: far more layers or experts than tensors.
    """
    layers = len(config.text.layer_types) + mtp_layers + (config.vision.depth if config.vision else 0)
    if layers > max(len(present), _FEW_LAYERS):
        raise SourceError(
            f"config.json and the tensors' names speak of {layers:,} layers, but there are {len(present):,} tensors"
        )
    split = {(role.section, role.layer) for role in present if role.kind in EXPERT_KINDS and role.expert is not None}
    if len(split) * config.text.stored_experts > max(len(present), _FEW_EXPERTS):
        raise SourceError(
            f"config.json asks for {config.text.stored_experts:,} experts in each of {len(split):,} layers that store "
            f"them one by one, but there are {len(present):,} tensors"
        )


def _expected(
    present: Mapping[TensorRole, str], config: ModelConfig, mtp_layers: int, problems: list[str], naming: Naming
) -> Iterator[TensorRole]:
    """What should be there, experts in the layout that each layer has."""
    layers: dict[tuple[Section, int], tuple[set[Kind], set[Kind]]] = {}
    for role in present:
        if role.kind in EXPERT_KINDS and role.layer is not None:
            stacked, separate = layers.setdefault((role.section, role.layer), (set(), set()))
            (stacked if role.expert is None else separate).add(role.kind)
    for role in expected_roles(config, mtp_layers=mtp_layers):
        if role.kind not in EXPERT_KINDS or role.layer is None:
            yield role
            continue
        stacked, separate = layers.get((role.section, role.layer), (set(), set()))
        family = _GATE_UP if role.kind is Kind.EXPERT_GATE_UP else (Kind.EXPERT_DOWN,)
        if stacked.intersection(family) and separate.intersection(family):
            problems.append(f"doubled: {name_of(role, naming)} is stored stacked and per expert")
        if separate.intersection(family) and not stacked.intersection(family):
            for one in expert_roles(role.section, role.layer, config.text.stored_experts, stacked=False):
                if one.kind in family:
                    yield one
        else:
            yield role


def _misshapen(
    tensors: Mapping[str, TensorInfo],
    roles: Mapping[str, TensorRole],
    expected: set[TensorRole],
    config: ModelConfig,
) -> Iterator[str]:
    shapes: dict[tuple[object, ...], tuple[int, ...]] = {}
    for name, role in roles.items():
        if role not in expected:
            continue
        info = tensors[name]
        key = (role.section, role.kind, role.part, role.expert is None)
        if key not in shapes:
            shapes[key] = expected_shape(role, config)
        if info.shape != shapes[key]:
            yield f"misshapen: {name} is {list(info.shape)}, expected {list(shapes[key])}"
        if not info.dtype.is_weight:
            yield f"element type: {name} is {info.dtype}, expected BF16, F16 or F32"


def _message(problems: list[str]) -> str:
    shown = "\n  ".join(problems[:_LISTED])
    more = f"\n  ... and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
    return f"the tensors are not those that config.json asks for, differences: {len(problems)}\n  {shown}{more}"
