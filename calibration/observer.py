"""Looks at the inputs of matrices while a layer is passed, and sums up what statistics keep of them.

Batches may pass side by side. What is summed per batch is put together in the order of the batches, and an expert sees
its batches in that order anyway: the sums have the same bits however many threads there are.

Shapes: K inputs of a matrix, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from calibration.sites import DOWN, GATE_UP, dense_site, expert_site
from calibration.statistics import CO_VISITS, MAX_ABS, MEAN_ABS, MEAN_SQUARE, POOLED, TOKENS
from qconvert.core.errors import DataError
from qconvert.numerics.input_sums import InputSums, co_visits
from reference_model.layer_pass import InputRounding, LayerRecord


class LayerObserver:
    """Sums of one layer, or of what stands outside layers."""

    def __init__(self, prefix: str, batches: int) -> None:
        """``prefix`` begins the names of the layer's sites; ``batches`` will pass it."""
        self._prefix = prefix
        self._dense: list[dict[str, InputSums]] = [{} for _ in range(batches)]
        self._experts: dict[tuple[str, int], InputSums] = {}
        self._visits: Tensor | None = None

    def rounding(self, batch: int) -> InputRounding:
        """What the layer is to ask for the inputs of ``batch``: they are looked at and stay what they are."""

        def of(module: str) -> Callable[[Tensor], Tensor] | None:
            expert = expert_site(module)
            if expert is not None:
                return partial(self._see_expert, expert)
            site = dense_site(module)
            return None if site is None else partial(self._see, batch, site)

        return of

    def count(self, record: LayerRecord) -> None:
        """See where the router sent the tokens of a batch."""
        routing = record.routing
        found = co_visits(routing.experts, routing.logits.shape[1])
        self._visits = found if self._visits is None else self._visits + found

    def tensors(self, experts: int, inputs: int, width: int) -> dict[str, Tensor]:
        """All that statistics keep, by name.

        Args:
            experts: of the layer, those that hold a folded shared expert among them; 0 outside layers.
            inputs: K of gate and up.
            width: K of down.
        """
        found: dict[str, Tensor] = {}
        for site, sums in self._joined().items():
            found |= {
                f"{site}.{MEAN_ABS}": sums.mean_abs,
                f"{site}.{MEAN_SQUARE}": sums.mean_squares,
                f"{site}.{MAX_ABS}": sums.largest,
                f"{site}.{TOKENS}": torch.tensor([sums.tokens]),
            }
        for site, size in ((GATE_UP, inputs), (DOWN, width)) if experts else ():
            found |= self._stacked(f"{self._prefix}.{site}", experts, size)
        if experts:
            found[f"{self._prefix}.{GATE_UP}.{POOLED}"] = self._pooled(experts, inputs)
        if self._visits is not None:
            found[f"{self._prefix}.{CO_VISITS}"] = self._visits
        return found

    def _joined(self) -> dict[str, InputSums]:
        """Dense sites over all batches, in their order."""
        joined: dict[str, InputSums] = {}
        for batch in self._dense:
            for site, sums in batch.items():
                joined[site] = joined[site].joined(sums) if site in joined else sums
        return joined

    def _stacked(self, site: str, experts: int, size: int) -> dict[str, Tensor]:
        each = [self._experts.get((site, e), InputSums.none(size)) for e in range(experts)]
        return {
            f"{site}.{MEAN_ABS}": torch.stack([one.mean_abs for one in each]),
            f"{site}.{MEAN_SQUARE}": torch.stack([one.mean_squares for one in each]),
            f"{site}.{MAX_ABS}": torch.stack([one.largest for one in each]),
            f"{site}.{TOKENS}": torch.tensor([one.tokens for one in each]),
        }

    def _pooled(self, experts: int, size: int) -> Tensor:
        """Mean squares [K] over all visits of the layer."""
        whole = InputSums.none(size)
        for e in range(experts):
            whole = whole.joined(self._experts.get((f"{self._prefix}.{GATE_UP}", e), InputSums.none(size)))
        return whole.mean_squares

    def _see(self, batch: int, site: str, x: Tensor) -> Tensor:
        seen = self._dense[batch]
        seen[site] = _added(seen.get(site), site, x)
        return x

    def _see_expert(self, where: tuple[str, int], x: Tensor) -> Tensor:
        self._experts[where] = _added(self._experts.get(where), f"{where[0]} of expert {where[1]}", x)
        return x


def _added(sums: InputSums | None, site: str, x: Tensor) -> InputSums:
    try:
        return (InputSums.none(x.shape[-1]) if sums is None else sums).add(x)
    except DataError as error:
        raise DataError(f"{site}: {error}; the checkpoint is damaged, or float32 is too small for it") from None
