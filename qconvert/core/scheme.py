"""How numbers are rounded: the grid of codes, what shares a scale, and what engines do to activations."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from qconvert.core.dtypes import DType


@dataclass(frozen=True, slots=True, kw_only=True)
class Int:
    """Integers: ``-2**(bits-1) .. 2**(bits-1)-1`` when symmetric, ``0 .. 2**bits-1`` with a zero point otherwise."""

    bits: int

    def __str__(self) -> str:
        return f"int{self.bits}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Float:
    """A small float: OCP FP8 ``e4m3fn`` (max 448, no infinity) or OCP MX FP4 ``e2m1`` (max 6)."""

    kind: Literal["e4m3fn", "e2m1"]

    def __str__(self) -> str:
        return {"e4m3fn": "fp8", "e2m1": "fp4"}[self.kind]


@dataclass(frozen=True, slots=True, kw_only=True)
class Codebook:
    """Sixteen values in [-1, 1]: bitsandbytes NF4 (Dettmers et al. 2023, arXiv 2305.14314) or FP4."""

    kind: Literal["nf4", "fp4"]

    def __str__(self) -> str:
        return f"bnb-{self.kind}"


Grid = Int | Float | Codebook


@dataclass(frozen=True, slots=True, kw_only=True)
class PerTensor:
    """One scale for the matrix; stored [1, 1]."""

    def __str__(self) -> str:
        return "tensor"


@dataclass(frozen=True, slots=True, kw_only=True)
class Channel:
    """One scale per output row; stored [N, 1]."""

    def __str__(self) -> str:
        return "channel"


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """One scale per ``size`` consecutive inputs of a row; stored [N, K / size]."""

    size: int

    def __str__(self) -> str:
        return f"g{self.size}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One scale per ``rows x cols`` tile, edge tiles smaller; stored [ceil(N / rows), ceil(K / cols)]."""

    rows: int
    cols: int

    def __str__(self) -> str:
        return f"b{self.rows}x{self.cols}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Flat:
    """One scale per ``size`` consecutive elements in row-major order; stored [ceil(N * K / size)]."""

    size: int

    def __str__(self) -> str:
        return f"flat{self.size}"


Blocking = PerTensor | Channel | Group | Block | Flat


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleSpec:
    """What the stored scales are.

    Attributes:
        dtype: their element type.
        second: that of a second scale for the whole matrix, which multiplies them.
        exact_in: another type that holds every one of them as well, for engines that cast them when they load:
            a model in BF16 with F16 scales, as GPTQ and AWQ store them, is served with BF16 scales.
    """

    dtype: DType
    second: DType | None = None
    exact_in: DType | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Activation:
    """What the engine does to the inputs of the matrix before it multiplies.

    Attributes:
        kind: ``none`` leaves them in 16 bits; ``dynamic`` rounds them on the fly; ``static`` by a stored scale.
        grid: the grid that they are rounded to; ``None`` for ``none``.
        group: inputs that share a scale; ``None`` is the whole token.
    """

    kind: Literal["none", "dynamic", "static"] = "none"
    grid: Int | Float | None = None
    group: int | None = None

    def __str__(self) -> str:
        if self.kind == "none":
            return ""
        return f"-a-{self.kind}-{self.grid}-{'token' if self.group is None else f'g{self.group}'}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """How one matrix is rounded. Hashable; prints as ``int4-g128-sym``."""

    grid: Grid
    blocking: Blocking
    scale: ScaleSpec
    symmetric: bool = True
    activation: Activation = Activation()

    def __str__(self) -> str:
        sign = ("-sym" if self.symmetric else "-asym") if isinstance(self.grid, Int) else ""
        return f"{self.grid}-{self.blocking}{sign}{self.activation}"

    @property
    def weight_bits(self) -> int:
        """Bits of one code, scales not counted."""
        if isinstance(self.grid, Int):
            return self.grid.bits
        return 8 if self.grid == Float(kind="e4m3fn") else 4

    @property
    def code_dtype(self) -> DType:
        """The element type of unpacked codes: see ``QuantizedTensor``."""
        if self.grid == Float(kind="e4m3fn"):
            return DType.F8_E4M3
        return DType.I8 if isinstance(self.grid, Int) and self.symmetric else DType.U8

    @property
    def shares_second_scale(self) -> bool:
        """Whether the second scale follows from the weights, together with those of stacked matrices."""
        return self.scale.second is not None and isinstance(self.grid, Float)

    def scale_shape(self, rows: int, cols: int) -> tuple[int, ...]:
        """Shape of the scales of a [rows, cols] matrix."""
        match self.blocking:
            case PerTensor():
                return (1, 1)
            case Channel():
                return (rows, 1)
            case Group(size=size):
                return (rows, -(-cols // size))
            case Block(rows=block_rows, cols=block_cols):
                return (-(-rows // block_rows), -(-cols // block_cols))
            case Flat(size=size):
                return (-(-rows * cols // size),)

    def weight_only(self) -> Scheme:
        """The same rounding of weights with activations left alone."""
        return replace(self, activation=Activation())


def bnb4(kind: Literal["nf4", "fp4"]) -> Scheme:
    """Four-bit floats of bitsandbytes, one float32 scale per 64 consecutive elements."""
    return Scheme(grid=Codebook(kind=kind), blocking=Flat(size=64), scale=ScaleSpec(dtype=DType.F32))


def int4(group: int = 128, *, symmetric: bool = True) -> Scheme:
    """Four-bit integers with one BF16 scale per ``group`` inputs."""
    return Scheme(grid=Int(bits=4), blocking=Group(size=group), symmetric=symmetric, scale=ScaleSpec(dtype=DType.BF16))


INT8 = Scheme(grid=Int(bits=8), blocking=Channel(), scale=ScaleSpec(dtype=DType.BF16))
"""Eight-bit integers, one BF16 scale per row, activations in 16 bits (W8A16)."""

LLM_INT8 = Scheme(
    grid=Int(bits=8),
    blocking=Channel(),
    scale=ScaleSpec(dtype=DType.F32, second=DType.F32),
    activation=Activation(kind="dynamic", grid=Int(bits=8)),
)
"""bitsandbytes' LLM.int8: the largest value of a row for its scale, over 127; activations are rounded per token."""

FP8 = Scheme(
    grid=Float(kind="e4m3fn"),
    blocking=Channel(),
    scale=ScaleSpec(dtype=DType.BF16),
    activation=Activation(kind="dynamic", grid=Float(kind="e4m3fn")),
)
"""FP8 e4m3, one BF16 scale per row; engines round activations to FP8 per token."""

FP8_BLOCK = Scheme(
    grid=Float(kind="e4m3fn"),
    blocking=Block(rows=128, cols=128),
    scale=ScaleSpec(dtype=DType.BF16),
    activation=Activation(kind="dynamic", grid=Float(kind="e4m3fn"), group=128),
)
"""FP8 e4m3, one BF16 scale per 128 x 128 tile; engines round activations to FP8 per 128 inputs."""

W8A8 = Scheme(
    grid=Int(bits=8),
    blocking=Channel(),
    scale=ScaleSpec(dtype=DType.BF16),
    activation=Activation(kind="dynamic", grid=Int(bits=8)),
)
"""Eight-bit integers, one BF16 scale per row; engines round activations to eight bits per token."""

NVFP4 = Scheme(grid=Float(kind="e2m1"), blocking=Group(size=16), scale=ScaleSpec(dtype=DType.F8_E4M3, second=DType.F32))
"""NVIDIA's NVFP4: FP4 e2m1, one e4m3 scale per 16 inputs, one float32 scale for the matrix; weight-only (A16)."""

MXFP4 = Scheme(grid=Float(kind="e2m1"), blocking=Group(size=32), scale=ScaleSpec(dtype=DType.F8_E8M0))
"""OCP MX FP4 e2m1, one power of two per 32 inputs, activations in 16 bits (weight-only)."""
