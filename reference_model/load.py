"""Fill a model with weights, strictly: whatever is missing, left over or of the wrong shape is named in one error."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

GATE_UP = "experts.gate_up_proj"
DOWN = "experts.down_proj"
EXACT = ("A_log", "dt_bias")
"""Parameters behind an exponential: never rounded below the dtype in which they are stored, nor below fp32."""


class WeightError(ValueError):
    """Weights that do not fit the model; the message names every tensor that is wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertWeights:
    """One routed expert: ``gate`` and ``up`` [F, D], ``down`` [D, F]."""

    gate: Tensor
    up: Tensor
    down: Tensor


class WeightSource(Protocol):
    """Where weights come from: a dictionary, a checkpoint on disk, a quantized one that is dequantized on the way.

    Names are the model's own (``layers.0.mlp.gate.weight``, ``lm_head.weight``, ``mtp.fc.weight``,
    ``visual.merger.norm.weight``): no prefix of the checkpoint, and of routed experts always the fused pair
    ``layers.0.mlp.experts.gate_up_proj`` and ``.down_proj``, however they are stored. Tensors are floating point of any
    precision. A source may give the same buffer again and again: whoever calls it copies before the next call.
    """

    def names(self) -> Collection[str]:
        """All that the source holds."""
        ...

    def tensor(self, name: str) -> Tensor:
        """One tensor that is not of a routed expert.

        Raises:
            KeyError: the source does not hold it.
        """
        ...

    def expert(self, experts: str, index: int) -> ExpertWeights:
        """Routed expert ``index`` of the block ``experts``, for example ``layers.0.mlp.experts``.

        Raises:
            KeyError: the source does not hold it.
        """
        ...


@dataclass(frozen=True, slots=True)
class TensorDictSource:
    """A ``WeightSource`` over a dictionary of fused tensors, such as a model's own ``state_dict()``."""

    tensors: Mapping[str, Tensor]

    @classmethod
    def of_checkpoint(cls, tensors: Mapping[str, Tensor]) -> TensorDictSource:
        """A source over fused tensors under their names in a checkpoint, vision-language or text-only."""
        return cls({name.removeprefix("model.").removeprefix("language_model."): t for name, t in tensors.items()})

    def names(self) -> Collection[str]:
        """The dictionary's keys."""
        return self.tensors.keys()

    def tensor(self, name: str) -> Tensor:
        """The tensor of that name; ``KeyError`` when there is none."""
        return self.tensors[name]

    def expert(self, experts: str, index: int) -> ExpertWeights:
        """Rows of the fused tensors: the first half of ``gate_up_proj`` is the gate."""
        gate_up, down = self.tensors[f"{experts}.gate_up_proj"], self.tensors[f"{experts}.down_proj"]
        if index >= min(len(gate_up), len(down)):
            raise KeyError(f"{experts} has no expert {index}")
        gate, up = gate_up[index].chunk(2)
        return ExpertWeights(gate=gate, up=up, down=down[index])


def load_weights(
    module: nn.Module, source: WeightSource, dtype: torch.dtype, *, prefix: str = "", skip: tuple[str, ...] = ()
) -> None:
    """Replace every parameter of ``module`` by a copy from ``source`` in ``dtype``.

    The module may be on the meta device: nothing is allocated twice. ``A_log`` and ``dt_bias`` stay at least fp32.

    Args:
        module: the model, or a part of it.
        source: gives tensors by name.
        dtype: floating-point dtype of the parameters.
        prefix: what the module's parameter names lack in the source, for example ``layers.3.``.
        skip: prefixes of parameter names that are left as they are, and are no surplus in the source either.

    Raises:
        WeightError: tensors are missing, unknown to the module, of another shape, or not floating point; all named.
    """
    wanted = {name: weight.shape for name, weight in module.named_parameters() if not name.startswith(skip)}
    held = {name.removeprefix(prefix) for name in source.names() if name.startswith(prefix)}
    extra = sorted(name for name in held - wanted.keys() if not name.startswith(skip))
    problems = [f"not a weight of the model: {prefix}{name}" for name in extra]
    loaded: dict[str, Tensor] = {}
    for name, shape in wanted.items():
        if name.endswith((GATE_UP, DOWN)) and name not in held:
            problems.append(f"missing: {prefix}{name}")
        elif name.endswith(GATE_UP):
            if f"{name.removesuffix('gate_up_proj')}down_proj" not in held:
                continue  # said once, at its own name, and not for every expert
            loaded |= _load_experts(source, name.removesuffix(".gate_up_proj"), prefix, wanted, dtype, problems)
        elif not name.endswith(DOWN):
            tensor = _checked(source, prefix + name, shape, problems)
            if tensor is not None:
                loaded[name] = tensor.to(_kept_dtype(name, tensor, dtype), copy=True)
    _raise(problems)
    module.load_state_dict(loaded, strict=False, assign=True)


def load_tensor(source: WeightSource, name: str, shape: tuple[int, ...]) -> Tensor:
    """One tensor as the source gives it.

    Raises:
        WeightError: it is missing, of another shape, or not floating point.
    """
    problems: list[str] = []
    tensor = _checked(source, name, shape, problems)
    if tensor is None:
        raise WeightError(problems[0])
    return tensor


def load_expert(
    source: WeightSource, experts: str, index: int, hidden: int, width: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """One routed expert in ``dtype``: gate over up [2 width, hidden], and down [hidden, width].

    Raises:
        WeightError: it is missing, of another shape, or not floating point.
    """
    gate_up, down = torch.empty(2 * width, hidden, dtype=dtype), torch.empty(hidden, width, dtype=dtype)
    problems: list[str] = []
    _copy_expert(source, experts, index, gate_up, down, problems)
    _raise(problems)
    return gate_up, down


def _load_experts(
    source: WeightSource,
    experts: str,
    prefix: str,
    wanted: Mapping[str, torch.Size],
    dtype: torch.dtype,
    problems: list[str],
) -> dict[str, Tensor]:
    """Stack the experts of one block, each copied to its place as it comes."""
    names = f"{experts}.gate_up_proj", f"{experts}.down_proj"
    gate_up, down = (torch.empty(wanted[name], dtype=dtype) for name in names)
    for index in range(gate_up.shape[0]):
        _copy_expert(source, prefix + experts, index, gate_up[index], down[index], problems)
    if _holds(source, prefix + experts, gate_up.shape[0]):
        problems.append(f"not a weight of the model: {prefix}{experts} expert {gate_up.shape[0]}")
    return dict(zip(names, (gate_up, down), strict=True))


def _copy_expert(
    source: WeightSource, experts: str, index: int, gate_up: Tensor, down: Tensor, problems: list[str]
) -> None:
    where = f"{experts} expert {index}"
    try:
        weights = source.expert(experts, index)
    except KeyError:
        problems.append(f"missing: {where}")
        return
    gate, up = gate_up.chunk(2)
    for part, tensor, place in (("gate", weights.gate, gate), ("up", weights.up, up), ("down", weights.down, down)):
        if _fits(tensor, place.shape, f"{where} {part}", problems):
            place.copy_(tensor)


def _checked(source: WeightSource, name: str, shape: tuple[int, ...], problems: list[str]) -> Tensor | None:
    try:
        tensor = source.tensor(name)
    except KeyError:
        problems.append(f"missing: {name}")
        return None
    return tensor if _fits(tensor, shape, name, problems) else None


def _raise(problems: list[str]) -> None:
    if problems:
        raise WeightError(
            f"{len(problems)} weights do not fit the model that config.json describes:\n" + "\n".join(sorted(problems))
        )


def _holds(source: WeightSource, experts: str, index: int) -> bool:
    try:
        source.expert(experts, index)
    except KeyError:
        return False
    return True


def _fits(tensor: Tensor, shape: tuple[int, ...], name: str, problems: list[str]) -> bool:
    if tensor.shape != shape:
        problems.append(f"wrong shape: {name} is {list(tensor.shape)}, expected {list(shape)}")
    elif not tensor.is_floating_point():
        problems.append(f"wrong dtype: {name} is {tensor.dtype}, expected a floating-point one")
    else:
        return True
    return False


def _kept_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    if name.rsplit(".", 1)[-1] not in EXACT:
        return dtype
    return torch.promote_types(torch.promote_types(dtype, tensor.dtype), torch.float32)
