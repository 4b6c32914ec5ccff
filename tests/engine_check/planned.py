"""Checkpoints as a plan would write them: headers and configuration, no weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from qconvert.convert import plan_conversion
from qconvert.core.tensor_info import TensorInfo
from qconvert.engine_check.rule import Engine, Violation, violations
from qconvert.engine_check.run import RULES
from qconvert.engine_check.view import build_view
from qconvert.plan.policy import Policy
from reference_model.config import ModelConfig

plan = partial(plan_conversion, max_memory=4 << 30)


@dataclass(frozen=True, slots=True, kw_only=True)
class Headers:
    """What an output would be, before a byte of it is written."""

    raw: Mapping[str, Any]
    tensors: tuple[TensorInfo, ...]

    @classmethod
    def of(cls, source: Path, policy: Policy) -> Headers:
        made = plan(source, policy)
        return cls(raw=made.config, tensors=made.layout.tensors)

    @property
    def quantization(self) -> dict[str, Any]:
        return dict(self.raw["quantization_config"])

    def declaring(self, **changes: Any) -> Headers:
        return Headers(raw={**self.raw, "quantization_config": self.quantization | changes}, tensors=self.tensors)

    def found(self, *engines: Engine, tp: int = 1) -> list[Violation]:
        view = build_view(ModelConfig.from_dict(dict(self.raw)), self.raw, self.tensors, tp=tp)
        chosen = [rule for rule in RULES if rule.engine in (engines or tuple(Engine))]
        return [one for rule in chosen for one in violations(rule, view)]
