"""What a checkpoint holds, counted from its headers: tensors, parameters and bytes by role."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from qconvert.arch.names import Naming
from qconvert.core.role import EXPERT_KINDS, Section, TensorRole
from qconvert.core.tensor_info import TensorInfo
from reference_model.config import ModelConfig


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

        The embedding counts, as in advertised sizes; MTP head and vision tower do not.
        """
        text = self.config.text
        sizes = [(role, numel) for role, numel in self._sizes() if role.section is Section.TEXT]
        experts = sum(numel for role, numel in sizes if role.kind in EXPERT_KINDS)
        others = sum(numel for role, numel in sizes if role.kind not in EXPERT_KINDS)
        return others + experts * text.num_experts_per_tok // text.num_experts

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    def by_role(self) -> Mapping[TensorRole, TensorInfo]:
        """Role -> place: the inverse of ``roles``."""
        return MappingProxyType({role: self.tensors[name] for name, role in self.roles.items()})

    def _sizes(self) -> Iterator[tuple[TensorRole, int]]:
        return ((role, self.tensors[name].numel) for name, role in self.roles.items())
