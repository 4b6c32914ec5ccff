"""What a conversion may cost at most."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from qconvert.core.errors import UsageError

OF_WEIGHTS = frozenset({"sqnr_min"})
"""Limits that need no run of the models."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds that a report is judged by; ``None`` reports the number without judging it.

    Attributes:
        kl_mean: largest mean KL(original || converted), nats.
        kl_median: largest median.
        kl_p99: largest 99th percentile.
        top1: smallest share of positions whose likeliest token is the same.
        perplexity_ratio: largest perplexity of the converted model over that of the original.
        sqnr_min: smallest SQNR of any quantized tensor, dB.
        router_overlap: smallest mean top-k overlap of any layer.

    Raises:
        UsageError: a bound that is negative, NaN or infinite; nothing could be judged by it.
    """

    kl_mean: float | None = None
    kl_median: float | None = None
    kl_p99: float | None = None
    top1: float | None = None
    perplexity_ratio: float | None = None
    sqnr_min: float | None = None
    router_overlap: float | None = None

    def __post_init__(self) -> None:
        for name in self.given():
            value = float(getattr(self, name))
            if not math.isfinite(value) or value < 0:
                raise UsageError(f"the limit {name} is {value:g}; it must be a finite number, not below 0")

    def given(self) -> tuple[str, ...]:
        """Names of the bounds that are set."""
        return tuple(one.name for one in fields(self) if getattr(self, one.name) is not None)

    def of_model(self) -> tuple[str, ...]:
        """Names of the bounds that are set and that only a run of the models can be judged by."""
        return tuple(name for name in self.given() if name not in OF_WEIGHTS)
