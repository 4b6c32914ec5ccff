"""The unit of work and of resume: what happens to every tensor, and where every output byte will stand."""

from __future__ import annotations

import enum
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import xxhash

from qconvert.core.dtypes import DType
from qconvert.core.role import TensorRole
from qconvert.core.scheme import Scheme
from qconvert.core.tensor_info import TensorInfo


class Folding(Enum):
    """What a conversion makes of the shared expert; the value is what manifests say."""

    FOLDED = "folded"
    UNFOLDED = "unfolded"


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """The part of a source tensor that a step reads: one contiguous run of rows.

    Attributes:
        tensor: name in the source checkpoint.
        begin: first row, counted over all leading dimensions: row ``r`` of expert ``e`` of a stacked
            ``[E, N, K]`` tensor is ``e * N + r``.
        end: one past the last row.
    """

    tensor: str
    begin: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """How the parts of a matrix that is quantized in the source are read. Steps of one shape share one.

    Attributes:
        format: name of the format that unpacks them.
        shape: (N, K) of the matrix.
    """

    format: str
    scheme: Scheme
    shape: tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What gives one matrix: rows of a plain tensor, or all parts of a quantized one, in the order of its format."""

    inputs: tuple[Slice, ...]
    packed: Packed | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """A rectangle of one source matrix, and where it lies in the matrix that a step lays together.

    Attributes:
        rows: first and one past the last row, counted from the first that ``reading`` has.
        cols: first and one past the last column.
        width: columns of the source matrix.
        at: row and column of its first element in what is made.
    """

    reading: Reading
    rows: tuple[int, int]
    cols: tuple[int, int]
    width: int
    at: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mosaic:
    """A [N, K] matrix laid together from tiles; it is zero where none lies.

    Attributes:
        tiles: they do not overlap.
        shape: (N, K); rows are counted over all leading dimensions of what is stored.
        nothing: rectangles of source matrices that are left behind and must hold zeros.
    """

    tiles: tuple[Tile, ...]
    shape: tuple[int, int]
    nothing: tuple[Tile, ...] = ()

    @property
    def inputs(self) -> tuple[Slice, ...]:
        """All that is read, each part once."""
        return tuple(dict.fromkeys(part for tile in self.tiles for part in tile.reading.inputs))

    def within(self, begin: int, end: int) -> Iterator[tuple[Tile, int, int]]:
        """The tiles that lie in rows ``begin`` to ``end``, with those rows of their source that do."""
        for tile in self.tiles:
            shift = tile.rows[0] - tile.at[0]
            first, last = max(begin + shift, tile.rows[0]), min(end + shift, tile.rows[1])
            if first < last:
                yield tile, first, last


Matrix = Reading | Mosaic
"""What gives one matrix: it is in the source, or laid together from what is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Keep:
    """Copy the bytes as they are, under ``name``."""

    reason: str
    name: str

    def __str__(self) -> str:
        return "keep"


@dataclass(frozen=True, slots=True, kw_only=True)
class Dequantize:
    """Store a matrix that is quantized in the source as the BF16 tensor ``name``."""

    reason: str
    name: str

    def __str__(self) -> str:
        return "dequantize to BF16"


class Formula(enum.Enum):
    """What is computed in float32 from the numbers of a tensor before they are stored as dense ones."""

    SAME = ""
    ONE_PLUS = "1 + w"
    MINUS_EXP = "-exp(w)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cast:
    """Store the numbers of a tensor, quantized in the source or not, in another element type under ``name``."""

    reason: str
    name: str
    dtype: DType
    formula: Formula = Formula.SAME

    def __str__(self) -> str:
        return f"{self.formula.value} as {self.dtype}".strip()


@dataclass(frozen=True, slots=True, kw_only=True)
class Rescale:
    """Store a tensor, quantized in the source or not, as ``name`` in ``dtype``, times factors that text decides.

    Of a norm these are of what it multiplies by, of a matrix of its columns, its rows, or both.
    """

    reason: str
    name: str
    dtype: DType

    def __str__(self) -> str:
        return f"scale in {self.dtype}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantize:
    """Round a matrix to ``scheme`` and store it as ``format`` does under the module name ``module``.

    Attributes:
        search: choose each scale by mean squared error instead of by the largest value.
        method: how, where it is not to nearest: what looks at inputs, such as ``gptq``.
        scale_over: the matrices that share the second scale, this one among them; empty in a scheme without one.
    """

    reason: str
    module: str
    scheme: Scheme
    format: str
    search: bool = False
    method: str | None = None
    scale_over: tuple[Reading, ...] = ()

    def __str__(self) -> str:
        by = "" if self.method is None else f" by {self.method}"
        return f"{self.scheme} ({self.format}){by}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reencode:
    """Store the codes of a matrix that is quantized in the source as ``format`` does under the module name ``module``.

    Attributes:
        scheme: the source's, with the types that scales are stored and held in.
        allow_scale_rounding: round scales that these types do not hold, instead of refusing them.
    """

    reason: str
    module: str
    scheme: Scheme
    format: str
    allow_scale_rounding: bool = False

    def __str__(self) -> str:
        return f"{self.scheme} ({self.format}), not rounded"


Action = Keep | Dequantize | Cast | Rescale | Quantize | Reencode


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One tensor's way from source to output.

    Attributes:
        outputs: names of the output tensors that the step writes, all of them and nobody else.
        peak_bytes: memory that the step holds at most while it runs.
        packed: how ``inputs`` are read where they are the parts of one quantized matrix.
        stack: the matrices that are written below each other where they are several: each is read, or laid together,
            or is two of one shape whose rows take turns. ``inputs`` are then those of all of them.
        mosaic: how the matrix is laid together where it is not one of the source's; ``inputs`` are all that it reads.
    """

    inputs: tuple[Slice, ...]
    role: TensorRole
    action: Action
    outputs: tuple[str, ...]
    peak_bytes: int
    packed: Packed | None = None
    stack: tuple[tuple[Matrix, ...], ...] = ()
    mosaic: Mosaic | None = None

    @property
    def reading(self) -> Reading:
        """What the step reads."""
        return Reading(inputs=self.inputs, packed=self.packed)

    @property
    def matrices(self) -> tuple[tuple[Matrix, ...], ...]:
        """What the step reads and writes one below the other."""
        return self.stack or ((self.reading,),)

    @property
    def key(self) -> str:
        """What journals call the step."""
        return self.outputs[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The output's files: every tensor's file, type, shape and offsets, fixed before anything is written.

    ``TensorInfo.begin`` and ``end`` count from the start of the file, header included.
    """

    tensors: tuple[TensorInfo, ...]

    def by_file(self) -> dict[str, tuple[TensorInfo, ...]]:
        """Tensors of each file in the order of their bytes."""
        files: dict[str, list[TensorInfo]] = {}
        for info in self.tensors:
            files.setdefault(info.shard, []).append(info)
        return {name: tuple(infos) for name, infos in files.items()}

    @property
    def hash(self) -> str:
        """xxh3-128 of every tensor's name, type, shape and place."""
        digest = xxhash.xxh3_128()
        for info in self.tensors:
            digest.update(f"{info.name}\0{info.dtype}\0{info.shape}\0{info.shard}\0{info.begin}\n".encode())
        return digest.hexdigest()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, headers not counted."""
        return sum(info.nbytes for info in self.tensors)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A whole conversion, decided.

    Attributes:
        source_hash: xxh3-128 of the source's headers and ``config.json``.
        policy_hash: xxh3-128 of the rules that decided.
        side_files: files of the source that are copied beside the weights.
        left_out: (name, reason) of those that are not, and of tensors that no step reads.
        config: the output's ``config.json``.
        source_quantization: of a source that is quantized: its ``quant_method``, and how many matrices it holds in
            which scheme and format.
    """

    steps: tuple[Step, ...]
    layout: Layout
    source_hash: str
    policy_hash: str
    config: dict[str, Any]
    side_files: tuple[str, ...] = ()
    left_out: tuple[tuple[str, str], ...] = ()
    source_quantization: Mapping[str, Any] | None = None

    @property
    def config_bytes(self) -> bytes:
        """The content of the output's ``config.json``."""
        return (json.dumps(self.config, indent=2, ensure_ascii=False) + "\n").encode()

    def decisions(self) -> Iterator[tuple[str, str, str, int, int]]:
        """(role path, action, reason, tensors, output bytes), one line per kind of decision, in plan order."""
        infos = {info.name: info for info in self.layout.tensors}
        count: Counter[tuple[str, str, str]] = Counter()
        total: Counter[tuple[str, str, str]] = Counter()
        for step in self.steps:
            key = (step.role.path, str(step.action), step.action.reason)
            count[key] += 1
            total[key] += sum(infos[name].nbytes for name in step.outputs)
        for key in count:
            yield (*key, count[key], total[key])

    @property
    def largest_step(self) -> Step:
        """The step that needs most memory."""
        return max(self.steps, key=lambda step: step.peak_bytes)


def dtype_bytes(dtype: DType, shape: tuple[int, ...]) -> int:
    """Bytes of a dense tensor."""
    size = dtype.itemsize
    for n in shape:
        size *= n
    return size
