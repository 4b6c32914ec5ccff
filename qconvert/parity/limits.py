"""What a conversion may cost at most."""

from __future__ import annotations

from dataclasses import dataclass


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
    """

    kl_mean: float | None = None
    kl_median: float | None = None
    kl_p99: float | None = None
    top1: float | None = None
    perplexity_ratio: float | None = None
    sqnr_min: float | None = None
    router_overlap: float | None = None
