"""What the codes of a quantized matrix say by themselves: how many are zero, at the end of their grid, or lost."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from qconvert.core.metric import Metric, exact
from qconvert.core.quantized import CODEBOOKS, E2M1_VALUES, QuantizedTensor
from qconvert.core.role import TensorRole
from qconvert.core.scheme import Codebook, Float, Int, Scheme


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeCounts:
    """Counts over the codes of one matrix, or of several; add them over runs of rows.

    Attributes:
        elements: codes.
        zeros: those that mean zero.
        clipped: those at either end of their grid, where whatever was beyond has been cut off.
        dead_scales: scales that are zero, infinite, NaN, or negative ones of floats: their codes are lost.
    """

    elements: int = 0
    zeros: int = 0
    clipped: int = 0
    dead_scales: int = 0

    def __add__(self, other: CodeCounts) -> CodeCounts:
        return CodeCounts(
            elements=self.elements + other.elements,
            zeros=self.zeros + other.zeros,
            clipped=self.clipped + other.clipped,
            dead_scales=self.dead_scales + other.dead_scales,
        )


class _Compared(Protocol):
    """What is read of a ``TensorComparison``."""

    @property
    def role(self) -> TensorRole: ...
    @property
    def name(self) -> str: ...
    @property
    def codes(self) -> CodeCounts | None: ...
    @property
    def elements(self) -> int: ...
    @property
    def stored_bytes(self) -> int: ...


def count_codes(q: QuantizedTensor, values: Tensor) -> CodeCounts:
    """The counts of ``q``, whose float32 meaning is ``values`` [N, K]."""
    return CodeCounts(elements=q.codes.numel(), zeros=int((values == 0).sum()), clipped=int(at_the_end(q).sum()))


def at_the_end(q: QuantizedTensor) -> Tensor:
    """Which codes stand at either end of their grid, a mask [N, K]."""
    codes = q.codes
    match q.scheme.grid:
        case Int(bits=bits):
            low, high = (-(2 ** (bits - 1)) + 1, 2 ** (bits - 1) - 1) if q.scheme.symmetric else (0, 2**bits - 1)
            outside: Tensor = (codes <= low) | (codes >= high)
            return outside
        case Float(kind="e4m3fn"):
            return (codes.view(torch.uint8) & 0x7F) == 0x7E
        case Float():
            table = E2M1_VALUES
        case Codebook(kind=kind):
            table = CODEBOOKS[kind]
    sizes = torch.tensor(table).abs()
    ends: Tensor = (sizes == sizes.max())[codes.to(torch.int64)]
    return ends


def wrong_scales(values: Tensor, scheme: Scheme) -> Tensor:
    """Which of some float32 scales no rounding makes, as a mask: zero, infinite, NaN, or negative ones of floats."""
    right = values.isfinite() & ((values != 0) if isinstance(scheme.grid, Int) else (values > 0))
    return ~right


def dead_scales(parts: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int]) -> CodeCounts:
    """The counts of a matrix that cannot be read: its wrong scales alone."""
    wanted = scheme.scale_shape(*shape)
    scales = [part for part in parts.values() if part.is_floating_point() and tuple(part.shape) == wanted]
    wrong = sum(int(wrong_scales(part.to(torch.float32), scheme).sum()) for part in scales)
    return CodeCounts(elements=shape[0] * shape[1], dead_scales=wrong)


def code_metrics(tensors: Iterable[_Compared]) -> Iterator[Metric]:
    """Bits per weight of everything and of each role, the shares of codes by role, and the worst single matrices."""
    groups: dict[str, list[_Compared]] = {}
    for one in tensors:
        groups.setdefault(one.role.path, []).append(one)
    everything = [one for members in groups.values() for one in members]
    if everything:
        yield exact("bits_per_weight", "all tensors", _bits(everything))
    rounded: list[tuple[_Compared, CodeCounts]] = []
    for path, members in sorted(groups.items()):
        counted = [(one, one.codes) for one in members if one.codes is not None]
        if not counted:
            continue
        rounded += counted
        total = sum((codes for _, codes in counted), CodeCounts())
        yield exact("bits_per_weight", path, _bits(members))
        yield exact("zero_codes", path, total.zeros / max(total.elements, 1), "fraction")
        yield exact("clipped_codes", path, total.clipped / max(total.elements, 1), "fraction")
        yield exact("dead_scales", path, total.dead_scales, "count")
    for name in ("zeros", "clipped"):
        shares = [(getattr(codes, name) / max(codes.elements, 1), one.name) for one, codes in rounded]
        if shares:
            worst, where = max(shares)
            yield exact(f"{name.removesuffix('s')}_codes_max", where, worst, "fraction")


def _bits(members: Iterable[_Compared]) -> float:
    members = list(members)
    return 8 * sum(one.stored_bytes for one in members) / max(sum(one.elements for one in members), 1)
