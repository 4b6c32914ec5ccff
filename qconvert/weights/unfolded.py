"""A folded checkpoint seen with its shared expert by itself: what one compares with the original, role by role."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from math import gcd
from types import MappingProxyType

import torch
from torch import Tensor

from qconvert.core.dtypes import DType
from qconvert.core.errors import DataError, FormatError
from qconvert.core.plan import Slice
from qconvert.core.quantized import QuantizedTensor
from qconvert.core.role import EXPERT_KINDS, Section, TensorRole
from qconvert.core.scheme import Channel, Group, PerTensor, ScaleSpec
from qconvert.quantized_view import Stored
from qconvert.transform.rectangles import cut
from qconvert.transform.shared_expert import FOLDED, matrix_shape, shares, unfold
from qconvert.weights.source import CheckpointWeights
from reference_model.config import ModelConfig


def unfolded(weights: CheckpointWeights, *, round_to: torch.dtype | None = None) -> CheckpointWeights:
    """``weights`` themselves, or a view of a folded checkpoint under the roles of the original; see there."""
    if not weights.config.text.folded_experts:
        return weights
    return UnfoldedWeights(weights.checkpoint, round_to=round_to, strict=False)


class UnfoldedWeights(CheckpointWeights):
    """The weights of a folded checkpoint under the roles that they have in the original.

    A matrix of the shared expert has the name and the format of the first expert that holds a part of it, and is laid
    together whole for every run of its rows. Where one of its parts is missing or cannot be read, it is missing.
    """

    @property
    def config(self) -> ModelConfig:
        """Sizes and layer pattern of the original."""
        folded = self.view.config
        return replace(folded, text=replace(folded.text, folded_experts=0))

    @property
    def stored(self) -> Mapping[TensorRole, Stored]:
        """Every readable tensor by its role in the original."""
        return self._by_original_role

    def raw(self, role: TensorRole, begin: int | None = None, end: int | None = None) -> Tensor:
        """See ``CheckpointWeights.raw``."""
        if role.kind not in FOLDED or self._stored(role).plain is None:
            return super().raw(role, begin, end)
        pieces = [super(UnfoldedWeights, self).raw(holder) for holder in self._holders(role)]
        self._check_rest(role, pieces[-1])
        return unfold(pieces, role.kind, self.config.text.shared_expert_intermediate_size)[begin:end]

    def parts(self, role: TensorRole, begin: int | None = None, end: int | None = None) -> dict[str, Tensor]:
        """See ``CheckpointWeights.parts``; a matrix of the shared expert has none of its own."""
        return {} if role.kind in FOLDED else super().parts(role, begin, end)

    def quantized(self, role: TensorRole, begin: int | None = None, end: int | None = None) -> QuantizedTensor:
        """See ``CheckpointWeights.quantized``."""
        if role.kind not in FOLDED or self._stored(role).format is None:
            return super().quantized(role, begin, end)
        pieces = [super(UnfoldedWeights, self).quantized(holder) for holder in self._holders(role)]
        self._check_rest(role, pieces[-1].dequantize())
        text = self.config.text
        try:
            whole = unfold(pieces, role.kind, text.shared_expert_intermediate_size)
        except DataError:  # a folded checkpoint was rounded: every piece by itself, with scales of its own
            size = gcd(text.moe_intermediate_size, text.shared_expert_intermediate_size)
            whole = unfold(
                [_by_itself(piece, size) for piece in pieces], role.kind, text.shared_expert_intermediate_size
            )
        rows, cols = whole.shape
        return cut(whole, (begin or 0, rows if end is None else end), (0, cols))

    def stored_bytes(self, role: TensorRole) -> int:
        """See ``CheckpointWeights.stored_bytes``; units that fill the last expert up count."""
        if role.kind not in FOLDED:
            return super().stored_bytes(role)
        return sum(super(UnfoldedWeights, self).stored_bytes(holder) for holder in self._holders(role))

    def _check_rest(self, role: TensorRole, last: Tensor) -> None:
        """Raise ``FormatError`` where the last expert holds units beyond the shared expert's: they would count."""
        text = self.config.text
        *_, share = shares(text.shared_expert_intermediate_size, text.moe_intermediate_size)
        if share.end - share.begin == share.width:
            return
        rows, cols = share.rest(role.kind, text.hidden_size)
        if bool(last[slice(*rows), slice(*cols)].any()):
            name = self.view.stored[list(self._holders(role))[-1]].name
            raise FormatError(
                f"{name} holds units beyond the shared expert's {share.end}, where zeros should be: they would count"
            )

    @cached_property
    def _by_original_role(self) -> Mapping[TensorRole, Stored]:
        routed = self.view.config.text.num_experts
        there = {
            role: stored
            for role, stored in self.view.stored.items()
            if role.kind not in EXPERT_KINDS or role.expert is None or role.expert < routed
        }
        return MappingProxyType(
            there | {role: stored for role in self._shared_roles() if (stored := self._whole(role))}
        )

    def _shared_roles(self) -> Iterator[TensorRole]:
        layers = {
            (role.section, role.layer): None
            for role in self.view.stored
            if role.kind in EXPERT_KINDS and role.section is not Section.VISION
        }
        for section, layer in layers:
            for kind in FOLDED:
                yield TensorRole(section=section, kind=kind, layer=layer)

    def _whole(self, role: TensorRole) -> Stored | None:
        """The matrix of the shared expert as one; its rows lie in several places, of which the first is named."""
        first: Stored | None = None
        for holder in self._holders(role):  # one after the other: a configuration may speak of millions
            if holder not in self.view.stored:
                return None
            first = first or self.view.stored[holder]
        if first is None:
            return None
        text = self.view.config.text
        shape = matrix_shape(role.kind, text.shared_expert_intermediate_size, text.hidden_size)
        plain = None if first.plain is None else Slice(tensor=first.plain.tensor, begin=0, end=shape[0])
        return replace(first, role=role, shape=shape, plain=plain)

    def _holders(self, role: TensorRole) -> Iterator[TensorRole]:
        """The experts' matrices that hold a matrix of the shared expert."""
        text = self.view.config.text
        for expert in range(text.num_experts, text.stored_experts):
            yield replace(role, kind=FOLDED[role.kind], expert=expert)

    def _stored(self, role: TensorRole) -> Stored:
        return self.view.stored[role] if role in self.view.stored else super()._stored(role)


def _by_itself(piece: QuantizedTensor, size: int) -> QuantizedTensor:
    """The same numbers with scales that no other piece shares: one float32 for ``size`` inputs, or for a group."""
    scale = piece.scale.to(torch.float32)
    if piece.second_scale is not None:
        scale = scale * piece.second_scale
    blocking, zero_point = piece.scheme.blocking, piece.zero_point
    if isinstance(blocking, Channel | PerTensor):
        blocking = Group(size=size)
        wanted = (piece.shape[0], -(-piece.shape[1] // size))
        scale = scale.expand(wanted)
        zero_point = None if zero_point is None else zero_point.expand(wanted)
    scheme = replace(piece.scheme, blocking=blocking, scale=ScaleSpec(dtype=DType.F32))
    return replace(piece, scheme=scheme, scale=scale, zero_point=zero_point, second_scale=None)
