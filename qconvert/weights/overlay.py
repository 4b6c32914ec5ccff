"""Mixtures: some tensors of a model are taken from elsewhere, from another checkpoint or rounded on the way.

What a model with one part restored computes, or one with nothing but one part rounded, is a forward over such a source.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from qconvert.core.role import HALVES, STACKED_KINDS, TensorRole
from qconvert.core.scheme import Scheme
from qconvert.numerics.rounding import quantize, second_scale_for
from qconvert.weights.source import CheckpointWeights, expert_roles, model_role
from reference_model.config import ModelConfig
from reference_model.load import ExpertWeights, WeightSpec


class Matrices(Protocol):
    """Float32 values by role: what a mixture takes its other tensors from."""

    def matrix(self, role: TensorRole, begin: int | None = None, end: int | None = None) -> Tensor:
        """One tensor in its own shape, or a run of its rows.

        Raises:
            KeyError: there is none.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class OverlaidWeights:
    """A ``WeightSource``: ``base``, but for the tensors that are ``chosen``, which are those of ``over``.

    Attributes:
        base: what is not chosen, and the configuration.
        over: what is; of the same architecture and sizes.
        chosen: asked of every role that is read; of a ``q_proj`` it is asked of each half.
    """

    base: CheckpointWeights
    over: Matrices
    chosen: Callable[[TensorRole], bool]

    @property
    def config(self) -> ModelConfig:
        """Sizes and layer pattern of ``base``."""
        return self.base.config

    def specs(self) -> Mapping[str, WeightSpec]:
        """What ``base`` holds."""
        return self.base.specs()

    def matrix(self, role: TensorRole, begin: int | None = None, end: int | None = None) -> Tensor:
        """The float32 values of one tensor, or of a run of its rows; see ``CheckpointWeights.matrix``."""
        return self._mixed(role, begin, lambda: self.base.matrix(role, begin, end), end)

    def tensor(self, name: str) -> Tensor:
        """See ``CheckpointWeights.tensor``; what is chosen is float32."""
        return self._mixed(model_role(name), None, lambda: self.base.tensor(name), None)

    def rows(self, name: str, begin: int, end: int) -> Tensor:
        """See ``CheckpointWeights.rows``; what is chosen is float32."""
        return self._mixed(model_role(name), begin, lambda: self.base.rows(name, begin, end), end)

    def expert(self, experts: str, index: int) -> ExpertWeights:
        """See ``CheckpointWeights.expert``."""
        gate, up, down = (self.matrix(role) for role in expert_roles(experts, index))
        return ExpertWeights(gate=gate, up=up, down=down)

    def _mixed(self, role: TensorRole, begin: int | None, own: Callable[[], Tensor], end: int | None) -> Tensor:
        chosen = [self.chosen(one) for one in role.halves or (role,)]
        if not any(chosen):
            return own()
        other = self.over.matrix(role, begin, end)
        if all(chosen):
            return other
        # of every head the rows of its query, then those of its gate
        row = torch.arange(begin or 0, (begin or 0) + len(other))
        half = row // self.config.text.head_dim % len(HALVES)
        taken = torch.tensor(chosen)[half]
        return torch.where(taken.unsqueeze(1), other, own().to(torch.float32))


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundedWeights:
    """Every matrix of ``base`` as ``scheme`` has it: rounded to nearest, and what its codes mean.

    Attributes:
        search: choose scales by mean squared error.
    """

    base: CheckpointWeights
    scheme: Scheme
    search: bool = False
    _second: dict[TensorRole, float] = field(default_factory=dict)

    def matrix(self, role: TensorRole, begin: int | None = None, end: int | None = None) -> Tensor:
        """The float32 values of one matrix after rounding, or of a run of its rows; it is rounded whole.

        Raises:
            KeyError: no such role.
            DataError, FormatError, ValueError: see ``numerics.rounding.quantize``.
        """
        rounded = quantize(self.base.matrix(role), self.scheme, search=self.search, second=self._second_scale(role))
        return rounded.quantized.dequantize()[begin:end]

    def _second_scale(self, role: TensorRole) -> float:
        if not self.scheme.shares_second_scale:
            return 1.0
        kinds = next((kinds for kinds in STACKED_KINDS if role.kind in kinds), (role.kind,))
        stack = [one for kind in kinds if (one := replace(role, kind=kind)) in self.base.stored]
        if stack[0] not in self._second:
            largest = max(float(self.base.matrix(one).abs().max()) for one in stack)
            self._second[stack[0]] = second_scale_for(self.scheme, largest)
        return self._second[stack[0]]
