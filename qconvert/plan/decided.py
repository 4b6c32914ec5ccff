"""From decided tensors to a plan: their order, their places, and what the configuration says of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qconvert.arch.names import module_of
from qconvert.arch.shapes import kept_by_nature
from qconvert.core.dtypes import DType
from qconvert.core.errors import PlanError
from qconvert.core.plan import Keep, Plan, Slice, Step
from qconvert.core.role import Kind, TensorRole
from qconvert.core.tensor_info import TensorInfo
from qconvert.formats.engine_rules import FOR_ENGINE, ModuleDecision
from qconvert.formats.quantization_config import quantization_config
from qconvert.io.checkpoint import Checkpoint
from qconvert.plan.layout import OutputTensor, lay_out
from qconvert.plan.policy import Rule
from qconvert.plan.row_blocks import peak_bytes
from qconvert.plan.shared_scales import share_second_scales
from qconvert.plan.source import PlannedSource
from reference_model.config_fold import FOLD, NOTE, note_of

QUANTIZATION = "quantization_config"
"""The block of ``config.json`` that engines read."""

StoredAs = tuple[tuple[DType, tuple[int, ...]], ...]
"""Type and shape of each output of a step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decided:
    """One tensor, decided.

    Attributes:
        module: what engines must know of it; ``None`` for what is no linear module.
    """

    step: Step
    stored: StoredAs
    module: ModuleDecision | None

    @property
    def outputs(self) -> tuple[OutputTensor, ...]:
        """What the step writes."""
        pairs = zip(self.step.outputs, self.stored, strict=True)
        return tuple(OutputTensor(name=name, dtype=dtype, shape=shape) for name, (dtype, shape) in pairs)


def keep(info: TensorInfo, role: TensorRole, part: Slice, shape: tuple[int, ...], *, name: str, reason: str) -> Decided:
    """Copy some rows of ``info`` as the tensor ``name`` of ``shape``."""
    step = Step(
        inputs=(part,),
        role=role,
        action=Keep(reason=reason, name=name),
        outputs=(name,),
        peak_bytes=peak_bytes(part.end - part.begin, info.row_width, 1, info.dtype.itemsize, rounding=False),
    )
    return Decided(step=step, stored=((info.dtype, shape),), module=kept_module(role, shape, name))


def kept_module(role: TensorRole, shape: tuple[int, ...], name: str) -> ModuleDecision | None:
    """What the engines' lists must say of a kept tensor; vectors, tables and convolutions are no linear modules."""
    linear_by_nature = role.kind in (Kind.ROUTER, Kind.SHARED_EXPERT_GATE)
    if kept_by_nature(role) is not None and not linear_by_nature:
        return None
    rows, cols = shape[-2:]
    return ModuleDecision(name=module_of(name), shape=(rows, cols), stacked=shape[0] if len(shape) == 3 else 0)


def refuse_by_nature(rule: Rule, role: TensorRole, name: str) -> None:
    """Refuse a rule that rounds what can only be kept.

    Raises:
        PlanError: names the rule and the tensor.
    """
    natural = kept_by_nature(role)
    if natural is not None and rule.scheme is not None:
        raise PlanError(
            f"the policy's rule {rule.match!r} rounds {name} to {rule.scheme}, but that is {natural}: "
            "put a rule with 'keep = true' for it before"
        )


def assemble(
    checkpoint: Checkpoint,
    source: PlannedSource,
    decided: list[Decided],
    *,
    config: Mapping[str, Any],
    decided_by: str,
    shard_bytes: int,
) -> Plan:
    """The plan of ``decided``, which is sorted by name.

    ``config`` is the output's ``config.json`` but for what engines must know of quantized matrices, ``decided_by`` the
    hash of the rules.

    Raises:
        PlanError: an engine would not read the output.
        FormatError: a matrix does not fit its format.
    """
    words: dict[str, _Words] = {}
    decided.sort(key=lambda one: _order(one.step, words))
    modules = [one.module for one in decided if one.module is not None]
    if any(module.scheme is not None for module in modules):
        config = {**config, QUANTIZATION: quantization_config(modules, note_of(config).get(FOR_ENGINE))}
    return Plan(
        steps=tuple(share_second_scales(one.step for one in decided)),
        layout=lay_out((one.outputs for one in decided), shard_bytes),
        source_hash=checkpoint.header_hash,
        policy_hash=decided_by,
        config=dict(config),
        side_files=tuple(file.name for file in checkpoint.side_files),
        left_out=tuple(sorted((*checkpoint.left_out.items(), *source.left_out))),
        source_quantization=source.quantization,
    )


def noted(config: Mapping[str, Any], source: PlannedSource) -> dict[str, Any]:
    """A source's ``config.json``; what it was quantized to moves into a block that no engine reads."""
    written = declared_once(config, source)
    if source.quantization is not None:
        written[NOTE] = {**_note(config), "source_quantization": source.quantization}
    return written


def declared_once(config: Mapping[str, Any], source: PlannedSource) -> dict[str, Any]:
    """The same with one place for what engines must know of quantized matrices, where there is one to know."""
    written = dict(config)
    text = config.get("text_config")
    if source.quantization is not None and isinstance(text, Mapping):
        written["text_config"] = {key: value for key, value in text.items() if key != QUANTIZATION}
        written.setdefault(QUANTIZATION, {})
    return written


def _note(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What is noted already and still holds: a shared expert that is folded, and the engine that alone reads it."""
    note = note_of(config)
    return {key: note[key] for key in (FOLD, FOR_ENGINE) if note.get(key)}


def for_engine(config: Mapping[str, Any], engine: str | None) -> dict[str, Any]:
    """A ``config.json`` that says which engine alone it is for, or that says of none."""
    note = {key: value for key, value in note_of(config).items() if key != FOR_ENGINE}
    note |= {} if engine is None else {FOR_ENGINE: engine}
    written = {key: value for key, value in config.items() if key != NOTE or not isinstance(value, Mapping)}
    return {**written, NOTE: note} if note else written


_Words = list[tuple[int, str]]


def _order(step: Step, known: dict[str, _Words]) -> tuple[_Words, int]:
    """What steps are sorted by; experts of one projection share the words of their name, which ``known`` holds."""
    expert = step.role.expert
    name = step.outputs[0].replace(f".experts.{expert}.", ".experts.")
    words = known.get(name)
    if words is None:
        words = known[name] = [(int(word), "") if word.isdigit() else (-1, word) for word in name.split(".")]
    return words, -1 if expert is None else expert
