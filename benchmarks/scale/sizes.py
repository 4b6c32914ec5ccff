"""What a model takes on the disk and in steps, from its shapes alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cache
from math import prod

from qconvert.arch.shapes import expected_roles, expected_shape
from qconvert.core.dtypes import DType
from qconvert.core.plan import dtype_bytes
from qconvert.core.scheme import Scheme, int4
from qconvert.formats.table import format_for
from qconvert.plan.policy import default_policy
from reference_model.config import ModelConfig

Shapes = Counter[tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """The tensors of a model in BF16, experts one by one, by shape.

    Attributes:
        rounded: what the default policy rounds.
        kept: what it carries as it is.
    """

    rounded: Shapes
    kept: Shapes

    @classmethod
    @cache
    def of(cls, config: ModelConfig) -> Inventory:
        """Count what ``config`` asks for."""
        rounded, kept = Shapes(), Shapes()
        policy = default_policy(int4())  # which tensors are rounded does not depend on the scheme
        for role in expected_roles(config, stacked=False):
            chosen = kept if policy.decide(role).scheme is None else rounded
            chosen[expected_shape(role, config)] += 1
        return cls(rounded=rounded, kept=kept)

    @property
    def source_bytes(self) -> int:
        """Bytes of all tensors."""
        return _dense(self.rounded) + _dense(self.kept)

    @property
    def matrices(self) -> int:
        """How many are rounded, one step each."""
        return self.rounded.total()

    def output_bytes(self, scheme: Scheme) -> int:
        """Bytes of all tensors after the default policy with ``scheme``."""
        form = format_for(scheme)
        return _dense(self.kept) + sum(
            count
            * sum(dtype_bytes(part.dtype, part.shape) for part in form.parts(scheme, (prod(shape[:-1]), shape[-1])))
            for shape, count in self.rounded.items()
        )


def _dense(shapes: Shapes) -> int:
    return sum(count * dtype_bytes(DType.BF16, shape) for shape, count in shapes.items())
