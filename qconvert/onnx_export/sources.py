"""What each weight of a graph is made of: which matrices of the checkpoint, read or laid together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from qconvert.arch.shapes import STACKED, expected_roles
from qconvert.core.plan import Matrix, Mosaic, Reading, Slice
from qconvert.core.role import EXPERT_KINDS, Kind, Section, TensorRole
from qconvert.core.scheme import Scheme
from qconvert.core.tensor_info import TensorInfo
from qconvert.plan.folding import check_share, units
from qconvert.plan.row_blocks import mosaic_peak_bytes, packed_peak_bytes, peak_bytes
from qconvert.plan.source import PlannedSource
from qconvert.transform.experts import stacked_role, unstack
from qconvert.transform.shared_expert import FOLDED, Share, matrix_shape, shares
from reference_model.config import TextConfig

_HALVES = {Kind.EXPERT_GATE_UP: (Kind.EXPERT_GATE, Kind.EXPERT_UP), Kind.EXPERT_DOWN: (Kind.EXPERT_DOWN,)}


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceMatrix:
    """One matrix, or one tensor of any shape, before it is decided.

    Attributes:
        role: as it is in the checkpoint, which policies speak of.
        matrix: what gives its numbers.
        itemsize: bytes of an element that is not quantized.
        share: the units of the shared expert that it holds as a routed one.
    """

    role: TensorRole
    shape: tuple[int, ...]
    matrix: Matrix
    itemsize: int
    share: Share | None = None

    @property
    def reading(self) -> Reading:
        """What it reads, or its first tile does."""
        return self.matrix.tiles[0].reading if isinstance(self.matrix, Mosaic) else self.matrix

    @property
    def scheme(self) -> Scheme | None:
        """In the source."""
        return None if self.reading.packed is None else self.reading.packed.scheme

    @property
    def rows_and_cols(self) -> tuple[int, int]:
        """As a matrix: all dimensions but the last one are rows, a vector has one column."""
        cols = self.shape[-1] if len(self.shape) > 1 else 1
        rows = 1
        for size in self.shape[: max(len(self.shape) - 1, 1)]:
            rows *= size
        return rows, cols

    @property
    def rounded_cols(self) -> int:
        """Of the rows that are rounded, which may be cut afterwards."""
        return self.matrix.tiles[0].width if isinstance(self.matrix, Mosaic) else self.rows_and_cols[1]

    @property
    def peak_bytes(self) -> int:
        """Memory that working on it takes at most."""
        if isinstance(self.matrix, Mosaic):
            return mosaic_peak_bytes(self.matrix, 1)
        if self.matrix.packed is not None:
            return packed_peak_bytes(self.matrix.packed, 1)
        rows, cols = self.rows_and_cols
        return peak_bytes(rows, cols, 1, self.itemsize, rounding=True)

    def check_cut(self, scheme: Scheme | None, text: TextConfig) -> None:
        """Refuse units of the shared expert whose edges go through blocks of ``scheme``.

        Raises:
            FormatError: names the matrix.
        """
        if self.share is not None:
            check_share(self.role.path, scheme, self.role.kind, self.share, text)


def matrices_of(
    source: PlannedSource, sections: list[Section], *, fold: bool
) -> Iterator[tuple[TensorRole, list[list[SourceMatrix]]]]:
    """The weights of ``sections`` in the order of the forward pass: matrices below each other, of each its halves.

    With ``fold`` the shared expert stands behind the routed ones, in as many pieces as it takes.
    """
    groups: dict[TensorRole, list[list[SourceMatrix]]] = {}
    experts: dict[TensorRole, dict[int, dict[Kind, SourceMatrix]]] = {}
    for name, role in source.census.roles.items():
        if role.section not in sections:
            continue
        info = source.census.tensors[name]
        reading = source.quantized.get(name)
        if role.kind in EXPERT_KINDS:
            found = _of_experts(info, role, reading)
        elif fold and role.kind in FOLDED:
            found = _of_shared(info, role, reading or Reading(inputs=(_whole(info),)), source.census.config.text)
        else:
            matrix = reading or Reading(inputs=(_whole(info),))
            groups[role] = [[SourceMatrix(role=role, shape=info.shape, matrix=matrix, itemsize=info.dtype.itemsize)]]
            continue
        for place, one in found:
            experts.setdefault(stacked_role(place), {}).setdefault(place.expert or 0, {})[place.kind] = one
    for role, stack in experts.items():
        groups[role] = [[stack[expert][kind] for kind in _HALVES[role.kind]] for expert in range(len(stack))]
    for role in expected_roles(source.census.config, mtp_layers=source.census.mtp_layers):
        if role in groups:
            yield role, groups[role]


def _of_experts(
    info: TensorInfo, role: TensorRole, reading: Reading | None
) -> Iterator[tuple[TensorRole, SourceMatrix]]:
    size = info.dtype.itemsize
    if role.kind in STACKED and role.expert is None:
        for one, part in unstack(info, role):
            shape, matrix = (part.end - part.begin, info.row_width), Reading(inputs=(part,))
            yield one, SourceMatrix(role=one, shape=shape, matrix=matrix, itemsize=size)
    else:
        matrix = reading or Reading(inputs=(_whole(info),))
        yield role, SourceMatrix(role=role, shape=info.shape, matrix=matrix, itemsize=size)


def _of_shared(
    info: TensorInfo, role: TensorRole, reading: Reading, text: TextConfig
) -> Iterator[tuple[TensorRole, SourceMatrix]]:
    """A matrix of the shared expert as that of the experts behind the routed ones."""
    width, shared = text.moe_intermediate_size, text.shared_expert_intermediate_size
    shape = matrix_shape(role.kind, width, text.hidden_size)
    for number, share in enumerate(shares(shared, width), start=text.num_experts):
        tiles = (units(reading, role.kind, share, text),)
        matrix: Matrix = reading if shared == width else Mosaic(tiles=tiles, shape=shape)
        place = replace(role, kind=FOLDED[role.kind], expert=number)
        yield place, SourceMatrix(role=role, shape=shape, matrix=matrix, itemsize=info.dtype.itemsize, share=share)


def _whole(info: TensorInfo) -> Slice:
    return Slice(tensor=info.name, begin=0, end=info.numel // info.row_width)
