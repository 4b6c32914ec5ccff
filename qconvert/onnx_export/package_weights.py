"""The weights of a package, read back from its files under the roles of the checkpoint that it was made from.

What the graph computes with is turned back into what the checkpoint says: norms that are stored as ``1 + w``, decays as
``-exp(w)``, stacks of experts whose gate and up rows take turns. Codes stay what they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from qconvert.arch.families import read_config
from qconvert.arch.names import Naming, name_of, role_of
from qconvert.arch.shapes import STACKED, expected_shape
from qconvert.core.errors import FormatError, SourceError
from qconvert.core.plan import Slice
from qconvert.core.role import Kind, Section, TensorRole
from qconvert.core.scheme import Channel, Group, Int, ScaleSpec, Scheme
from qconvert.core.tensor_info import TensorInfo
from qconvert.formats.matmul_nbits import CODES, SCALES, ZERO_POINTS, MatMulNBits
from qconvert.io.checkpoint import Checkpoint
from qconvert.manifest import MANIFEST_FILE
from qconvert.manifest_reader import read_manifest
from qconvert.onnx_export.actions import OFFSET_NORMS
from qconvert.onnx_export.graph_file import read_graph
from qconvert.onnx_export.graph_writer import JOINT
from qconvert.onnx_export.pictures import PROCESSORS
from qconvert.onnx_export.places import misplaced
from qconvert.onnx_export.plan import CONTRIB
from qconvert.quantized_view import Problem, ProblemKind, QuantizedView, Stored
from qconvert.weights.source import CheckpointWeights
from qconvert.weights.unfolded import UnfoldedWeights
from reference_model.config import ModelConfig

_FORMAT = MatMulNBits()
_PARTS = (CODES, SCALES, ZERO_POINTS)
_TURNS = {Kind.EXPERT_GATE_UP: (Kind.EXPERT_GATE, Kind.EXPERT_UP), Kind.EXPERT_DOWN: (Kind.EXPERT_DOWN,)}
"""The matrices of an expert whose rows take turns in a stack."""

_SAME_FLOAT = 2.0**-22
"""Relative difference of exponentials of one number that two ways of computing them may show in float32."""


class PackageWeights(CheckpointWeights):
    """The weights of an ONNX package, plain or in codes; see ``CheckpointWeights``.

    Tensors have the float type of the original where that loses nothing, once ``resemble`` has told which it is:
    float32 of numbers that are BF16 says the same.
    """

    def __init__(self, checkpoint: Checkpoint, *, strict: bool = True) -> None:
        """Look at headers, configuration and graphs; nothing is read. ``checkpoint`` was opened as a package.

        Raises:
            SourceError: weights that are not as qconvert writes them; with ``strict`` also contradictions.
        """
        self.checkpoint = checkpoint
        self._round_to, self._vision = None, False
        self._original: CheckpointWeights | None = None
        self.view, self._places = _survey(checkpoint)
        if strict and self.problems:
            raise SourceError(f"{checkpoint.path}: {self.problems[0]}; export the package again")

    @classmethod
    def open(
        cls, path: Path, *, round_to: torch.dtype | None = None, strict: bool = True, vision: bool = False
    ) -> PackageWeights:
        """Open the package in the folder ``path``; its codes mean float32, and its tower is asked for by nobody."""
        checkpoint = Checkpoint.open(path, package=True)
        try:
            return cls(checkpoint, strict=strict)
        except BaseException:
            checkpoint.close()
            raise

    def resemble(self, original: CheckpointWeights) -> None:
        """Give tensors in the float types of ``original``, which stays open, where that loses nothing."""
        self._original = original

    def unfolded(self) -> CheckpointWeights:
        """These weights under the roles of the original, the shared expert by itself."""
        if not self.view.config.text.folded_experts:
            return self
        whole = _UnfoldedPackage(self.checkpoint, strict=False)
        whole._original = self._original
        return whole

    @cached_property
    def _asked(self) -> Mapping[str, Any]:
        """What was asked of the package, by its manifest; nothing where there is none."""
        if not (self.checkpoint.path / MANIFEST_FILE).is_file():
            return {}
        return read_manifest(self.checkpoint.path).package or {}

    def rounds_inputs(self, role: TensorRole) -> bool:
        """Whether ONNX Runtime may round what a matrix is multiplied with: its kernels for integer codes do."""
        scheme = self._stored(role).scheme
        if scheme is None or self._asked.get("ops", CONTRIB) != CONTRIB:
            return False
        return bool(scheme.weight_bits != 4 or self._asked.get("accuracy_level") != 0)

    @property
    def keeps_halves(self) -> bool:
        """Whether keys and values are float16 between calls."""
        return self._asked.get("dtype") == "float16"

    @property
    def left_out(self) -> frozenset[Section]:
        """Parts of the checkpoint that the package was asked to do without, by its manifest."""
        return frozenset(one for one in (Section.MTP, Section.VISION) if self._asked.get(one.value) is False)

    @property
    def left_out_files(self) -> frozenset[str]:
        """Files beside the checkpoint that nobody needs without these parts."""
        return frozenset(PROCESSORS if Section.VISION in self.left_out else ())

    def raw(self, role: TensorRole, begin: int | None = None, end: int | None = None) -> Tensor:
        """See ``CheckpointWeights.raw``."""
        stored = self._stored(role)
        if stored.plain is None:
            raise KeyError(f"{role} is quantized")
        held = self._rows(stored.plain.tensor, role, begin, end)
        if begin is None and end is None:
            held = held.view(stored.shape)
        if role.kind not in OFFSET_NORMS and role.kind is not Kind.LINEAR_A_LOG:
            return self._alike(role, held)
        if self._original is not None and self._known(role) is not None:
            told = self._original.raw(role, begin, end)
            if _means(told, held, role):
                return told
        wide = held.to(torch.float32)
        return wide - 1.0 if role.kind in OFFSET_NORMS else wide.neg().log()

    def parts(self, role: TensorRole, begin: int | None = None, end: int | None = None) -> dict[str, Tensor]:
        """See ``CheckpointWeights.parts``."""
        stored = self._stored(role)
        return {suffix: self._rows(part.tensor, role, begin, end) for suffix, part in stored.parts.items()}

    def stored_bytes(self, role: TensorRole) -> int:
        """See ``CheckpointWeights.stored_bytes``."""
        stored, place = self._stored(role), self._places[role]
        names = [stored.plain.tensor] if stored.plain else [part.tensor for part in stored.parts.values()]
        return sum(place.rows * self.checkpoint.tensors[name].row_bytes for name in names)

    def _known(self, role: TensorRole) -> torch.dtype | None:
        """The float type of a tensor of the original that is not quantized there."""
        found = None if self._original is None else self._original.stored.get(role)
        if self._original is None or found is None or found.plain is None:
            return None
        return self._original.checkpoint.tensors[found.plain.tensor].dtype.torch_dtype

    def _alike(self, role: TensorRole, held: Tensor) -> Tensor:
        """The same numbers in the original's type, where that has them; 16 bits are what they are."""
        if held.dtype is not torch.float32:
            return held
        narrow = held.to(self._known(role) or held.dtype)
        return narrow if torch.equal(narrow.to(held.dtype), held) else held

    def _rows(self, tensor: str, role: TensorRole, begin: int | None, end: int | None) -> Tensor:
        """Rows of a matrix or vector in a stored tensor; every part has one row for each of the matrix."""
        place = self._places[role]
        first, last = begin or 0, place.rows if end is None else end
        if first == last:
            return self.checkpoint.read(tensor, 0, 0)
        start = place.first + place.step * first
        read = self.checkpoint.read(tensor, start, place.first + place.step * (last - 1) + 1)
        return read if place.step == 1 else read[:: place.step].contiguous()


class _UnfoldedPackage(UnfoldedWeights, PackageWeights):
    """A package whose shared expert is folded, under the roles of the original."""

    def raw(self, role: TensorRole, begin: int | None = None, end: int | None = None) -> Tensor:
        """See ``CheckpointWeights.raw``."""
        return self._alike(role, super().raw(role, begin, end))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Which rows of the stored tensors a matrix has: ``rows`` of them, from ``first`` on, every ``step``-th."""

    first: int
    step: int
    rows: int


def _means(told: Tensor, held: Tensor, role: TensorRole) -> bool:
    """Whether a package that was made from ``told`` holds ``held``."""
    wide = told.to(torch.float32)
    if role.kind in OFFSET_NORMS:
        return told.shape == held.shape and torch.equal((wide + 1.0).to(held.dtype), held)
    if told.shape != held.shape:
        return False
    step = max(_SAME_FLOAT, torch.finfo(held.dtype).eps)
    return torch.allclose(wide.exp().neg(), held.to(torch.float32), rtol=step, atol=0.0)


def _survey(checkpoint: Checkpoint) -> tuple[QuantizedView, Mapping[TensorRole, _Place]]:
    """Every tensor by role, each expert's matrices by themselves, and the rows that they have."""
    path = checkpoint.path
    config = read_config(checkpoint.config, path)
    stored: dict[TensorRole, Stored] = {}
    places: dict[TensorRole, _Place] = {}
    problems = list(_misplaced(checkpoint))
    for base, infos in _by_base(checkpoint).items():
        role = _role(base)
        if role is None:
            raise SourceError(
                f"{path}: {next(iter(infos.values())).name!r} is no weight as qconvert names those of a package, so "
                "that its weights cannot be read; compare log-probabilities that its engine has saved"
            )
        try:
            found = _stored(base, role, infos, config)
        except (FormatError, KeyError) as error:
            problems.append(Problem(kind=ProblemKind.MISSHAPEN, name=base, message=str(error), role=role))
            continue
        for one, place in _matrices(found):
            stored[one.role], places[one.role] = one, place
    view = QuantizedView(config=config, naming=Naming.TEXT, stored=MappingProxyType(stored), problems=tuple(problems))
    return view, MappingProxyType(places)


def _misplaced(checkpoint: Checkpoint) -> Iterator[Problem]:
    """Initializers that a graph reads from elsewhere than where the tensor of their name is."""
    for path in sorted(checkpoint.path.glob("*.onnx")):
        for name, found in misplaced(read_graph(path), checkpoint.tensors):
            first = _base(name.partition(JOINT)[0])[0]
            message = f"{path.name} reads it {found}"
            yield Problem(kind=ProblemKind.MISSHAPEN, name=name, message=message, role=_role(first))


def _by_base(checkpoint: Checkpoint) -> dict[str, dict[str, TensorInfo]]:
    """The stored tensors of each weight, by suffix; a dense one has the suffix of nothing."""
    found: dict[str, dict[str, TensorInfo]] = {}
    for name, info in checkpoint.tensors.items():
        base, suffix = _base(name)
        found.setdefault(base, {})[suffix] = info
    return found


def _base(name: str) -> tuple[str, str]:
    """The weight that a stored tensor belongs to, and which part of it that is."""
    base, _, suffix = name.rpartition(".")
    return (base, suffix) if suffix in _PARTS else (name, "")


def _role(base: str) -> TensorRole | None:
    for name in (base, f"{base}.weight"):
        try:
            return role_of(name)
        except SourceError:
            continue
    return None


def _stored(base: str, role: TensorRole, infos: Mapping[str, TensorInfo], config: ModelConfig) -> Stored:
    """One weight of the graph, a stack as one.

    Raises:
        KeyError: the configuration has no such tensor.
        FormatError: the stored tensors do not fit its shape.
    """
    shape = expected_shape(role, config)
    if "" in infos:
        if infos[""].shape != shape or len(infos) > 1:
            raise FormatError(f"is {list(infos[''].shape)}, config.json asks for {list(shape)}")
        return Stored(role=role, name=base, shape=shape, plain=Slice(tensor=base, begin=0, end=0))
    if missing := [suffix for suffix in (CODES, SCALES) if suffix not in infos]:
        raise FormatError(f"{missing[0]} is missing")
    bits, rest = divmod(infos[CODES].shape[-1] * 8, shape[-1])
    groups = infos[SCALES].shape[-1]
    if rest or shape[-1] % groups:
        raise FormatError(f"{infos[CODES].shape[-1]} bytes and {groups} scales are none of a row of {shape[-1]}")
    stacked = role.kind in STACKED
    scheme = Scheme(
        grid=Int(bits=bits),
        blocking=Channel() if groups == 1 and stacked and bits == 8 else Group(size=shape[-1] // groups),
        symmetric=ZERO_POINTS not in infos,
        scale=ScaleSpec(dtype=infos[SCALES].dtype),
    )
    for spec in _FORMAT.parts(scheme, (shape[-2], shape[-1])):
        wanted = (*shape[:-2], *spec.shape)
        if infos[spec.suffix].shape != wanted:
            raise FormatError(f"{spec.suffix} is {list(infos[spec.suffix].shape)}, expected {list(wanted)}")
    parts = {suffix: Slice(tensor=info.name, begin=0, end=0) for suffix, info in infos.items()}
    return Stored(role=role, name=base, shape=shape, format=_FORMAT, scheme=scheme, parts=parts)


def _matrices(stored: Stored) -> Iterator[tuple[Stored, _Place]]:
    """The tensor itself, or the matrices of each expert of a stack; each with the rows that it has."""
    role = stored.role
    if role.kind not in STACKED:
        width = stored.shape[-1] if len(stored.shape) > 1 else 1
        rows = torch.Size(stored.shape).numel() // width
        yield _placed(stored, role, stored.name, stored.shape, _Place(first=0, step=1, rows=rows))
        return
    experts, height, cols = stored.shape
    kinds = _TURNS[role.kind]
    rows = height // len(kinds)
    for expert in range(experts):
        for turn, kind in enumerate(kinds):
            one = replace(role, kind=kind, expert=expert)
            name = name_of(one, Naming.TEXT).removesuffix(".weight") if stored.plain is None else stored.name
            place = _Place(first=expert * height + turn, step=len(kinds), rows=rows)
            yield _placed(stored, one, name, (rows, cols), place)


def _placed(
    stored: Stored, role: TensorRole, name: str, shape: tuple[int, ...], place: _Place
) -> tuple[Stored, _Place]:
    """``place`` knows which rows these really are; slices say how many there are."""

    def part(one: Slice) -> Slice:
        return Slice(tensor=one.tensor, begin=place.first, end=place.first + place.rows)

    plain = None if stored.plain is None else part(stored.plain)
    parts = MappingProxyType({suffix: part(one) for suffix, one in stored.parts.items()})
    return replace(stored, role=role, name=name, shape=shape, plain=plain, parts=parts), place
