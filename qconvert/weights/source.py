"""Weights of a checkpoint by role or by the reference model's names, dequantized one matrix at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from qconvert.arch.names import Naming, name_of, role_of
from qconvert.core.errors import FormatError, SourceError
from qconvert.core.quantized import QuantizedTensor
from qconvert.core.role import EXPERT_KINDS, Kind, Section, TensorRole
from qconvert.core.scheme import Scheme
from qconvert.formats.base import InputScale, check_scales
from qconvert.io.checkpoint import Checkpoint
from qconvert.quantized_view import Problem, QuantizedView, Stored, view
from reference_model.config import ModelConfig
from reference_model.load import ExpertWeights, WeightSpec

_SHOWN = 20


class CheckpointWeights:
    """A ``WeightSource`` over a checkpoint, plain or quantized, in either expert layout and either naming.

    Attributes:
        checkpoint: the bytes.
        view: where everything is.
    """

    checkpoint: Checkpoint
    view: QuantizedView

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        round_to: torch.dtype | None = None,
        strict: bool = True,
        vision: bool = False,
    ) -> None:
        """Look at headers and configuration; nothing is read.

        Args:
            checkpoint: stays open as long as this is used.
            round_to: type that dequantized matrices pass through, as in an engine that stores them so
                (transformers: BF16); ``None`` keeps them in float32.
            strict: refuse a checkpoint that contradicts itself; otherwise look at ``problems``.
            vision: give the vision tower too, as ``visual.*``, to a model that has one.

        Raises:
            SourceError: all contradictions between headers, configuration and architecture.
        """
        self.checkpoint = checkpoint
        self.view = view(checkpoint)
        self._round_to = round_to
        self._vision = vision
        if strict and self.problems:
            listed = "\n  ".join(str(problem) for problem in self.problems[:_SHOWN])
            more = len(self.problems) - _SHOWN
            raise SourceError(
                f"{checkpoint.path}: {len(self.problems)} tensors contradict config.json:\n  {listed}"
                + (f"\n  ... and {more} more" if more > 0 else "")
            )

    @classmethod
    def open(
        cls, path: Path, *, round_to: torch.dtype | None = None, strict: bool = True, vision: bool = False
    ) -> CheckpointWeights:
        """Open the checkpoint folder ``path``; see the constructor. Closes with ``close`` or ``with``."""
        checkpoint = Checkpoint.open(path)
        try:
            return cls(checkpoint, round_to=round_to, strict=strict, vision=vision)
        except BaseException:
            checkpoint.close()
            raise

    @property
    def config(self) -> ModelConfig:
        """Sizes and layer pattern."""
        return self.view.config

    @property
    def problems(self) -> tuple[Problem, ...]:
        """What contradicts itself and cannot be read."""
        return self.view.problems

    @property
    def stored(self) -> Mapping[TensorRole, Stored]:
        """Every readable tensor by role, routed experts one matrix each."""
        return self.view.stored

    def scheme(self, role: TensorRole) -> Scheme | None:
        """How a matrix is rounded; ``None`` for a plain tensor."""
        return self._stored(role).scheme

    def raw(self, role: TensorRole, begin: int | None = None, end: int | None = None) -> Tensor:
        """A plain tensor, or some of its rows, in the type that is stored.

        Raises:
            KeyError: no such role, or a quantized one.
        """
        stored = self._stored(role)
        rows = stored.plain
        if rows is None:
            raise KeyError(f"{role} is quantized")
        if begin is None and end is None:
            whole = self.checkpoint.tensors[rows.tensor].shape == stored.shape
            if whole:
                return self.checkpoint.read(rows.tensor)
        first = rows.begin + (begin or 0)
        last = rows.end if end is None else rows.begin + end
        return self.checkpoint.read(rows.tensor, first, last)

    def row_block(self, role: TensorRole) -> int:
        """Runs of rows begin at multiples of this number; whole rows for a plain tensor."""
        stored = self._stored(role)
        if stored.format is None or stored.scheme is None:
            return 1
        rows, cols = stored.shape
        return stored.format.row_block(stored.scheme, (rows, cols))

    def parts(self, role: TensorRole, begin: int | None = None, end: int | None = None) -> dict[str, Tensor]:
        """The stored parts of a quantized matrix, or of a run of its rows, by suffix; empty for a plain tensor."""
        stored = self._stored(role)
        if stored.format is None or stored.scheme is None:
            return {}
        rows, cols = stored.shape
        found = {}
        for spec in stored.format.parts(stored.scheme, (rows, cols)):
            part = stored.parts[spec.suffix]
            if spec.rows_per_row == 0 or (begin is None and end is None):
                whole = self.checkpoint.read(part.tensor, part.begin, part.end)
                found[spec.suffix] = whole.view(spec.shape)
            else:
                first, last = spec.rows_of(begin or 0, rows if end is None else end)
                found[spec.suffix] = self.checkpoint.read(part.tensor, part.begin + first, part.begin + last)
        return found

    def quantized(self, role: TensorRole, begin: int | None = None, end: int | None = None) -> QuantizedTensor:
        """Codes and scales of a quantized matrix, or of a run of its rows; see ``row_block``.

        Raises:
            KeyError: no such role, or a plain one.
            FormatError: parts that contradict each other, or scales that are zero or not finite; names the module.
        """
        stored = self._stored(role)
        if stored.format is None or stored.scheme is None:
            raise KeyError(f"{role} is not quantized")
        rows, cols = stored.shape
        run = (rows if end is None else end) - (begin or 0)
        try:
            parts = self.parts(role, begin, end)
            return stored.format.unpack(parts, stored.scheme, (run, cols), whole=(rows, cols))
        except FormatError as error:
            raise FormatError(f"{stored.name}: {error}") from None

    def input_scale(self, role: TensorRole) -> InputScale | None:
        """What is stored of the inputs of a quantized matrix; ``None`` where nothing is.

        Raises:
            FormatError: it is zero, negative or not finite; names the module.
        """
        stored = self._stored(role)
        if stored.format is None or stored.scheme is None:
            return None
        rows, cols = stored.shape
        for spec in stored.format.parts(stored.scheme, (rows, cols)):
            if spec.inputs is not None:
                part = stored.parts[spec.suffix]
                number = self.checkpoint.read(part.tensor, part.begin, part.end)
                try:
                    check_scales(number, spec.suffix)
                except FormatError as error:
                    raise FormatError(f"{stored.name}: {error}") from None
                return InputScale(number=float(number), divides=spec.inputs == "divides")
        return None

    def matrix(self, role: TensorRole, begin: int | None = None, end: int | None = None) -> Tensor:
        """The float32 values of one tensor in its own shape, or of a run of its rows, whatever is stored.

        Raises:
            KeyError: no such role.
            FormatError: a quantized matrix that cannot be read.
        """
        if self._stored(role).plain is not None:
            return self.raw(role, begin, end).to(torch.float32)
        return self.meaning(self.quantized(role, begin, end))

    def meaning(self, quantized: QuantizedTensor) -> Tensor:
        """The float32 values [N, K] that codes stand for, as an engine has them."""
        values = quantized.dequantize()
        return values if self._round_to is None else values.to(self._round_to).to(torch.float32)

    def stored_bytes(self, role: TensorRole) -> int:
        """Bytes of a tensor on disk, with all its parts.

        Raises:
            KeyError: no such role.
        """
        stored = self._stored(role)
        slices = list(stored.parts.values()) if stored.plain is None else [stored.plain]
        infos = [self.checkpoint.tensors[one.tensor] for one in slices]
        widths = [info.row_width * info.dtype.itemsize for info in infos]
        return sum((one.end - one.begin) * width for one, width in zip(slices, widths, strict=True))

    def specs(self) -> Mapping[str, WeightSpec]:
        """All that the reference model could ask for, routed experts one matrix each; of the tower only on request."""
        return {
            name_of(role, Naming.TEXT).removeprefix(Naming.TEXT.value): WeightSpec(
                shape=stored.shape, dtype=self._given_dtype(stored)
            )
            for role, stored in self.stored.items()
            if self._of_model(role)
        }

    def tensor(self, name: str) -> Tensor:
        """A tensor of the reference model that is not a routed expert's, as stored or dequantized to float32.

        Raises:
            KeyError: it is not stored.
        """
        role = self._model_role(name)
        return self.raw(role) if self.stored[role].plain is not None else self.matrix(role)

    def rows(self, name: str, begin: int, end: int) -> Tensor:
        """Rows of a matrix of the reference model that is not a routed expert's, as ``tensor`` gives them.

        Raises:
            KeyError: it is not stored.
        """
        role = self._model_role(name)
        if self.stored[role].plain is not None:
            return self.raw(role, begin, end)
        block, height = self.row_block(role), self.stored[role].shape[0]
        first = begin - begin % block
        return self.matrix(role, first, min(end + -end % block, height))[begin - first : end - first]

    def expert(self, experts: str, index: int) -> ExpertWeights:
        """Expert ``index`` of a block of the reference model such as ``layers.0.mlp.experts``.

        Raises:
            KeyError: one of its matrices is not stored.
        """
        gate, up, down = (
            self.matrix(model_role(f"{experts}.{index}.{part}.weight"))
            for part in ("gate_proj", "up_proj", "down_proj")
        )
        return ExpertWeights(gate=gate, up=up, down=down)

    def close(self) -> None:
        """Close the checkpoint's files."""
        self.checkpoint.close()

    def __enter__(self) -> CheckpointWeights:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _stored(self, role: TensorRole) -> Stored:
        try:
            return self.stored[role]
        except KeyError:
            raise KeyError(f"{self.checkpoint.path} holds no {role}") from None

    def _model_role(self, name: str) -> TensorRole:
        role = model_role(name)
        if role not in self.stored or not self._of_model(role):
            raise KeyError(name)
        return role

    def _given_dtype(self, stored: Stored) -> torch.dtype:
        if stored.plain is None or stored.role.kind in EXPERT_KINDS:
            return torch.float32
        return self.checkpoint.tensors[stored.plain.tensor].dtype.torch_dtype

    def _of_model(self, role: TensorRole) -> bool:
        if role.kind is Kind.HEAD:
            return not self.config.text.tie_word_embeddings
        return self._vision or role.section is not Section.VISION


def model_role(name: str) -> TensorRole:
    """The role of a tensor by the name that the reference model has for it.

    Raises:
        KeyError: the architecture has no such tensor.
    """
    own = name.startswith(("lm_head.", "mtp."))
    try:
        return role_of(name if own else Naming.TEXT.value + name)
    except SourceError:
        raise KeyError(name) from None


def expert_roles(experts: str, index: int) -> tuple[TensorRole, ...]:
    """Gate, up and down of expert ``index`` of a block of the reference model such as ``layers.0.mlp.experts``.

    Raises:
        KeyError: the architecture has no such block.
    """
    return tuple(model_role(f"{experts}.{index}.{part}_proj.weight") for part in ("gate", "up", "down"))
