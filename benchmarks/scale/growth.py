"""How time and memory grow: least-squares lines through what was measured, and what they say of larger checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """One conversion as a whole process, and the floor of the disk beside it.

    Attributes:
        steps: matrices and tensors that were rounded or copied one by one.
        wall, cpu: seconds.
        peak_rss: bytes.
        disk_read, disk_written: bytes, as the kernel counts them.
        floor: seconds that reading the input while as many bytes as the output has are written takes alone.
    """

    layers: int
    steps: int
    input_bytes: int
    output_bytes: int
    wall: float
    cpu: float
    peak_rss: int
    disk_read: int
    disk_written: int
    floor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Planning:
    """One plan of a checkpoint that is headers over holes.

    Attributes:
        per_expert: one matrix an expert in the source instead of stacked ones.
        shards: files with weights of the source.
        steps: matrices and tensors that the plan decides.
        json: the plan was printed tensor by tensor instead of as a table.
        wall: seconds.
        peak_rss: bytes.
    """

    size: str
    per_expert: bool
    shards: int
    steps: int
    json: bool
    wall: float
    peak_rss: int


@dataclass(frozen=True, slots=True)
class Line:
    """``fixed + slope * x``."""

    fixed: float
    slope: float

    def __call__(self, x: float) -> float:
        """The value at ``x``."""
        return self.fixed + self.slope * x

    def largest_miss(self, points: Sequence[tuple[float, float]]) -> float:
        """How far a point is off at most, as a part of its value."""
        return max(abs(self(x) - y) / y for x, y in points)


def line_through(points: Sequence[tuple[float, float]]) -> Line:
    """The line of least squares: ``slope = sum (x - x') (y - y') / sum (x - x')^2`` with means x', y'.

    Raises:
        ValueError: all points have one x.
    """
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    if not spread:
        raise ValueError("a line needs points at two places")
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread
    return Line(mean_y - slope * mean_x, slope)
