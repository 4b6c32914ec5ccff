"""Fill a model with weights, strictly: whatever is missing, left over or of the wrong shape is named in one error.

What a source holds is compared with the model before the first weight is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

GATE_UP = ".gate_up_proj"
DOWN = ".down_proj"
EXACT = ("A_log", "dt_bias")
"""Parameters behind an exponential: never rounded below the dtype in which they are stored, nor below fp32."""

Shape = tuple[int, ...]


class WeightError(ValueError):
    """Weights that do not fit the model; the message names every tensor that is wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSpec:
    """What is known of a tensor before it is read; ``dtype`` is the one in which the source gives it."""

    shape: Shape
    dtype: torch.dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertWeights:
    """One routed expert: ``gate`` and ``up`` [F, D], ``down`` [D, F]."""

    gate: Tensor
    up: Tensor
    down: Tensor


class WeightSource(Protocol):
    """Where weights come from: a dictionary, a checkpoint on disk, a quantized one that is dequantized on the way.

    Names are the model's own (``layers.0.mlp.gate.weight``, ``lm_head.weight``, ``mtp.fc.weight``,
    ``visual.merger.norm.weight``), without the checkpoint's prefix. Tensors are floating point of any precision. A
    source may give the same buffer again and again: whoever calls it copies before the next call.
    """

    def specs(self) -> Mapping[str, WeightSpec]:
        """All that the source holds, by name; nothing is read.

        Routed experts are either the stacked pair ``layers.0.mlp.experts.gate_up_proj`` and ``.down_proj``, or one
        matrix each: ``layers.0.mlp.experts.3.gate_proj.weight``, ``.up_proj.weight``, ``.down_proj.weight``.
        """
        ...

    def tensor(self, name: str) -> Tensor:
        """One tensor that is not of a routed expert.

        Raises:
            KeyError: the source does not hold it.
        """
        ...

    def rows(self, name: str, begin: int, end: int) -> Tensor:
        """Rows ``begin`` to ``end`` of a matrix that is not of a routed expert.

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


class ActivationStore(Protocol):
    """Where hidden states wait for their next layer: in memory, or on disk when they are many.

    A tensor is neither changed by whoever put it in nor by whoever got it.
    """

    def put(self, key: str, value: Tensor) -> None:
        """Keep ``value`` under ``key``, in place of what was there."""
        ...

    def get(self, key: str) -> Tensor:
        """The tensor under ``key``, bit for bit.

        Raises:
            KeyError: there is none.
        """
        ...

    def drop(self, key: str) -> None:
        """Forget ``key``.

        Raises:
            KeyError: there is none.
        """
        ...


@dataclass(frozen=True, slots=True)
class MemoryStore:
    """An ``ActivationStore`` in memory."""

    tensors: dict[str, Tensor] = field(default_factory=dict)

    def put(self, key: str, value: Tensor) -> None:
        """Keep the tensor itself."""
        self.tensors[key] = value

    def get(self, key: str) -> Tensor:
        """The tensor itself; ``KeyError`` when there is none."""
        return self.tensors[key]

    def drop(self, key: str) -> None:
        """Forget it; ``KeyError`` when there is none."""
        del self.tensors[key]


@dataclass(frozen=True, slots=True)
class TensorDictSource:
    """A ``WeightSource`` over a dictionary of tensors with stacked experts, such as a model's own ``state_dict()``."""

    tensors: Mapping[str, Tensor]

    @classmethod
    def of_checkpoint(cls, tensors: Mapping[str, Tensor]) -> TensorDictSource:
        """A source over stacked tensors under their names in a checkpoint, vision-language or text-only."""
        return cls({name.removeprefix("model.").removeprefix("language_model."): t for name, t in tensors.items()})

    def specs(self) -> Mapping[str, WeightSpec]:
        """Shapes and dtypes of the dictionary's tensors."""
        return {name: WeightSpec(shape=tuple(t.shape), dtype=t.dtype) for name, t in self.tensors.items()}

    def tensor(self, name: str) -> Tensor:
        """The tensor of that name; ``KeyError`` when there is none."""
        return self.tensors[name]

    def rows(self, name: str, begin: int, end: int) -> Tensor:
        """A view of some rows; ``KeyError`` when there is no such tensor."""
        return self.tensors[name][begin:end]

    def expert(self, experts: str, index: int) -> ExpertWeights:
        """Rows of the stacked tensors: the first half of ``gate_up_proj`` is the gate."""
        gate, up = self.tensors[experts + GATE_UP][index].chunk(2)
        return ExpertWeights(gate=gate, up=up, down=self.tensors[experts + DOWN][index])


def load_weights(
    module: nn.Module, source: WeightSource, dtype: torch.dtype, *, prefix: str = "", skip: tuple[str, ...] = ()
) -> None:
    """Check the weights of ``source``, then replace every parameter of ``module`` by a copy in ``dtype``.

    The module may be on the meta device: nothing is allocated twice. ``A_log`` and ``dt_bias`` stay at least fp32.

    Args:
        module: the model, or a part of it.
        source: gives tensors by name.
        dtype: floating-point dtype of the parameters.
        prefix: what the module's parameter names lack in the source, for example ``layers.3.``.
        skip: prefixes of parameter names that are left as they are, and are no surplus in the source either.

    Raises:
        WeightError: see ``check_weights``; the module is then unchanged.
        ValueError: ``dtype`` is not floating point.
    """
    check_weights(module, source, prefix=prefix, skip=skip)
    fill_weights(module, source, dtype, prefix=prefix, skip=skip)


def check_weights(module: nn.Module, source: WeightSource, *, prefix: str = "", skip: tuple[str, ...] = ()) -> None:
    """Compare the parameters of ``module`` with what ``source`` says that it holds; nothing is read.

    Arguments as ``load_weights``.

    Raises:
        WeightError: tensors are missing, unknown to the module, of another shape, or not floating point; all named.
    """
    held = {name.removeprefix(prefix): spec for name, spec in source.specs().items() if name.startswith(prefix)}
    wanted = {name: tuple(p.shape) for name, p in module.named_parameters() if not name.startswith(skip)}
    wanted = _as_stored(wanted, held)
    problems = [f"missing: {prefix}{name}" for name in wanted if name not in held]
    for name, spec in held.items():
        shape = wanted.get(name)
        if shape is None:
            if not name.startswith(skip):
                problems.append(f"not a weight of the model: {prefix}{name}")
        elif spec.shape != shape:
            problems.append(f"wrong shape: {prefix}{name} is {list(spec.shape)}, expected {list(shape)}")
        elif not spec.dtype.is_floating_point:
            problems.append(f"wrong dtype: {prefix}{name} is {spec.dtype}, expected a floating-point one")
    if problems:
        raise WeightError(
            f"{len(problems)} weights do not fit the model that config.json describes:\n"
            + "\n".join(sorted(_joined(problems)))
        )


def fill_weights(
    module: nn.Module, source: WeightSource, dtype: torch.dtype, *, prefix: str = "", skip: tuple[str, ...] = ()
) -> None:
    """``load_weights`` of a source that has been checked already."""
    if not dtype.is_floating_point:
        raise ValueError(f"a model cannot compute in {dtype}, expected a floating-point dtype")
    loaded: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        if name.startswith(skip) or name.endswith(DOWN):
            continue
        if name.endswith(GATE_UP):
            experts = name.removesuffix(GATE_UP)
            down = module.get_parameter(experts + DOWN)
            stacks = _stack_experts(source, prefix + experts, parameter.shape, down.shape, dtype)
            loaded |= dict(zip((name, experts + DOWN), stacks, strict=True))
        else:
            tensor = source.tensor(prefix + name)
            loaded[name] = tensor.to(_kept_dtype(name, tensor, dtype), copy=True)
    module.load_state_dict(loaded, strict=False, assign=True)


def load_expert(source: WeightSource, experts: str, index: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """One routed expert in ``dtype``: gate over up [2F, D], and down [D, F]."""
    weights = source.expert(experts, index)
    return torch.cat((weights.gate, weights.up)).to(dtype), weights.down.to(dtype, copy=True)


def _stack_experts(
    source: WeightSource, experts: str, gate_up: Shape, down: Shape, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """All experts of one block, each copied to its place as it comes."""
    gate_up_E2FD, down_EDF = torch.empty(gate_up, dtype=dtype), torch.empty(down, dtype=dtype)
    for index in range(gate_up[0]):
        weights = source.expert(experts, index)
        gate, up = gate_up_E2FD[index].chunk(2)
        for place, part in ((gate, weights.gate), (up, weights.up), (down_EDF[index], weights.down)):
            place.copy_(part)
    return gate_up_E2FD, down_EDF


_ONE_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.")


def _as_stored(wanted: Mapping[str, Shape], held: Iterable[str]) -> dict[str, Shape]:
    """The wanted names and shapes, routed experts one matrix each in those blocks that are stored so."""
    apart = {match[1] for name in held if (match := _ONE_EXPERT.match(name))}
    result: dict[str, Shape] = {}
    for name, shape in wanted.items():
        block = name.rpartition(".")[0]
        if block not in apart:
            result[name] = shape
            continue
        count, rows, columns = shape
        inside = {"gate_proj": (rows // 2, columns), "up_proj": (rows // 2, columns)}
        if name.endswith(DOWN):
            inside = {"down_proj": (rows, columns)}
        result |= {f"{block}.{n}.{part}.weight": one for n in range(count) for part, one in inside.items()}
    return result


def _joined(problems: Iterable[str]) -> list[str]:
    """The problems, those that differ in nothing but the number of an expert in one line: ``experts.{0-3,7}.``."""
    alone: list[str] = []
    alike: dict[tuple[str, str], list[int]] = {}
    for problem in problems:
        match = _ONE_EXPERT.match(problem)
        if match is None:
            alone.append(problem)
        else:
            alike.setdefault((match[1], problem[match.end() :]), []).append(int(match[2]))
    return alone + [f"{block}.{_runs(numbers)}.{rest}" for (block, rest), numbers in alike.items()]


def _runs(numbers: Iterable[int]) -> str:
    """``3`` for one number, ``{0-3,7}`` for several."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    shown = ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return shown if shown.isdigit() else f"{{{shown}}}"


def _kept_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    if name.rsplit(".", 1)[-1] not in EXACT:
        return dtype
    return torch.promote_types(torch.promote_types(dtype, tensor.dtype), torch.float32)
