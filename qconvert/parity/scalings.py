"""Tensors that are scaled against each other, as AWQ does: one is divided by what those that read it are times.

What they mean together is what it was, so none of them holds a fault by that. Which are scaled is found out from the
numbers, whoever has scaled them: a norm that is another one, and readers whose columns make up for it; rows of up or v,
and columns of down or o.

Shapes: D hidden, N rows, K columns, S factors that several columns may share.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from threading import Lock

import torch
from torch import Tensor

from qconvert.core.awq_fold import AwqFold
from qconvert.core.errors import FormatError
from qconvert.core.role import Kind, Section, TensorRole
from qconvert.core.scheme import Scheme
from qconvert.numerics.awq import repeated_places, value_places
from qconvert.quantized_view import Stored
from qconvert.weights.source import CheckpointWeights
from reference_model.config import ModelConfig, TextConfig

SCALED = 0.1
"""Smallest ``|log2 s|`` of any row that rounding alone does not give, on average of the rows of a matrix."""

FAINT = 0.01
"""The same where rows and columns make up for each other far more closely than by chance: what eight bits can tell."""

CLEARLY = 3.0
"""How many times what is left of their products a faint scaling has to be; rounding alone gives about a half."""

RECIPROCAL = 0.25
"""Largest ``|log2|`` of the product of what a row of up and a column of down were multiplied by.

Four-bit rounding moves either by less than a tenth, and more only where one value outweighs the rest; a scale of the
wrong size moves one of them by 1 and the other not at all.
"""

LAYERS = 4
"""Whose factors are in memory at once: threads work on tensors of neighbouring layers."""

_AGREEING = 0.9
"""Share of rows whose products have to be near one before a pair is believed to be scaled."""

_NOTHING = 1e-30

_Layer = tuple[Section, int | None]

_NORMS = (AwqFold.POST_ATTENTION, AwqFold.INPUT, AwqFold.LINEAR_NORM)
_WITNESSES: Mapping[AwqFold, tuple[Kind, ...]] = {
    AwqFold.POST_ATTENTION: (Kind.ROUTER, Kind.SHARED_GATE, Kind.EXPERT_GATE),
    AwqFold.INPUT: (
        Kind.ATTENTION_QUERY, Kind.ATTENTION_KEY, Kind.LINEAR_QKV, Kind.LINEAR_Z, Kind.LINEAR_A, Kind.LINEAR_B,
    ),
    AwqFold.LINEAR_NORM: (Kind.LINEAR_OUTPUT,),
}  # fmt: skip
"""Readers whose rows nothing divides, so that their columns tell what they were multiplied by."""

_PARTNERS: Mapping[Kind, Kind] = {
    Kind.EXPERT_UP: Kind.EXPERT_DOWN,
    Kind.SHARED_UP: Kind.SHARED_DOWN,
    Kind.ATTENTION_VALUE: Kind.ATTENTION_OUTPUT,
}
_BACK = {down: up for up, down in _PARTNERS.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaledView:
    """Matrices of a checkpoint with what a function makes of them: what pairs of matrices are read from."""

    base: CheckpointWeights
    change: Callable[[TensorRole, Tensor, int | None], Tensor]

    @property
    def config(self) -> ModelConfig:
        """Sizes and layer pattern."""
        return self.base.config

    @property
    def stored(self) -> Mapping[TensorRole, Stored]:
        """Every readable tensor by role."""
        return self.base.stored

    def scheme(self, role: TensorRole) -> Scheme | None:
        """See ``CheckpointWeights.scheme``."""
        return self.base.scheme(role)

    def row_block(self, role: TensorRole) -> int:
        """See ``CheckpointWeights.row_block``."""
        return self.base.row_block(role)

    def matrix(self, role: TensorRole, begin: int | None = None, end: int | None = None) -> Tensor:
        """See ``CheckpointWeights.matrix``."""
        return self.change(role, self.base.matrix(role, begin, end), begin)


class Scalings:
    """Finds out what is scaled, and does and undoes it; any thread may ask."""

    def __init__(self, original: CheckpointWeights, converted: CheckpointWeights) -> None:
        self._original, self._converted = original, converted
        self._known: dict[_Layer, dict[TensorRole, Future[Tensor | None]]] = {}
        self._divided: set[TensorRole] = set()
        self._guard = Lock()

    @property
    def found(self) -> Mapping[AwqFold, int]:
        """How many tensors were found to be divided, by fold: experts' up, norms, v."""
        counts = Counter(fold for role in self._divided for fold in AwqFold if role.kind in fold.parts.producers)
        return {fold: counts[fold] for fold in AwqFold if fold in counts}  # roles come as threads and hashes have them

    @property
    def original_scaled(self) -> ScaledView:
        """The original's matrices as they are stored between what the converted model has scaled."""
        return ScaledView(base=self._original, change=self.redone)

    @property
    def converted_undone(self) -> ScaledView:
        """The converted model's matrices as they act between the original's."""
        return ScaledView(base=self._converted, change=self.undone)

    def touches(self, role: TensorRole) -> bool:
        """Whether a tensor is scaled in any way."""
        return any(True for _ in self._of(role))

    def undone(self, role: TensorRole, values: Tensor, begin: int | None) -> Tensor:
        """Rows ``begin`` and on of a converted tensor as they would be without it; the same tensor where it is not."""
        for how, factors in self._of(role):
            values = how(values, factors, begin or 0, False)
        return values

    def redone(self, role: TensorRole, values: Tensor, begin: int | None) -> Tensor:
        """Rows of an original tensor as the converted model would have them without rounding: the inverse."""
        for how, factors in self._of(role):
            values = how(values, factors, begin or 0, True)
        return values

    def _of(self, role: TensorRole) -> Iterator[tuple[_How, Tensor]]:
        """How a tensor is scaled, and by what."""
        yield from self._by_norms(role)
        if role.kind in _PARTNERS and (factors := self._factors(role, self._pair)) is not None:
            yield _change_rows, factors
        elif role.kind in _BACK:
            up = replace(role, kind=_BACK[role.kind])
            if (factors := self._factors(up, self._pair)) is not None:
                yield _change_columns, factors[self._places(up, len(factors))]

    def _by_norms(self, role: TensorRole) -> Iterator[tuple[_How, Tensor]]:
        for fold in _NORMS:
            (kind,) = fold.parts.producers
            norm = TensorRole(section=role.section, kind=kind, layer=role.layer)
            if role == norm and (factors := self._factors(norm, self._norm)) is not None:
                yield (_change_norm if fold.parts.offset else _change_plain_norm), factors
            elif role.kind in fold.parts.readers and (factors := self._factors(norm, self._norm)) is not None:
                yield _change_columns, factors[self._places(norm, len(factors))]

    def _factors(self, producer: TensorRole, find: Callable[[TensorRole], Tensor | None]) -> Tensor | None:
        """What a tensor is divided by; ``None`` where it is not."""
        with self._guard:
            known = self._known.setdefault((producer.section, producer.layer), {})
            while len(self._known) > LAYERS:  # they come one after the other
                del self._known[next(iter(self._known))]
            asked = producer in known
            found = known.setdefault(producer, Future())
        if not asked:  # who asks meanwhile waits for this
            try:
                found.set_result(self._found_by(find, producer))
            except BaseException as error:
                found.set_exception(error)
                raise
        return found.result()

    def _found_by(self, find: Callable[[TensorRole], Tensor | None], producer: TensorRole) -> Tensor | None:
        with suppress(FormatError):  # the fault of one that cannot be read, which says so when its turn comes
            factors = find(producer)
            if factors is not None:
                self._divided.add(producer)
            return factors
        return None

    def _norm(self, norm: TensorRole) -> Tensor | None:
        """S with a norm stored as ``(offset + w) / s - offset``; ``None`` where its readers do not agree."""
        if not self._both(norm) or not (self._is_plain(self._original, norm) and self._is_plain(self._converted, norm)):
            return None
        fold = next(fold for fold in _NORMS if norm.kind in fold.parts.producers)
        offset = fold.parts.offset or 0.0
        before, after = self._original.matrix(norm), self._converted.matrix(norm)
        quotient = torch.where(before == after, 1.0, (offset + before) / (offset + after))
        if torch.equal(before, after) or not bool((quotient.isfinite() & (quotient > 0)).all()):
            return None
        columns = quotient[self._places(norm, len(quotient))].log2()
        votes = []
        for reader in (replace(norm, kind=kind) for kind in _WITNESSES[fold]):
            one = replace(reader, expert=0) if reader.kind is Kind.EXPERT_GATE else reader
            if not self._both(one):
                continue
            ratio = _ratio(self._original.matrix(one), self._converted.matrix(one), 0)
            if ratio is not None:
                votes.append(float((ratio.log2() - columns).abs().mean()) < float(ratio.log2().abs().mean()))
        return quotient if 2 * sum(votes) > len(votes) else None

    def _pair(self, up: TensorRole) -> Tensor | None:
        """S with up stored as ``diag(1/s) up`` and down as ``down diag(s)``; ``None`` where that is not so."""
        down = replace(up, kind=_PARTNERS[up.kind])
        if not (self._both(up) and self._both(down)) or self._converted.scheme(down) is None:
            return None
        exact = self._is_plain(self._converted, up)
        if exact and up.kind is not Kind.ATTENTION_VALUE:
            return None
        stored = self._converted.matrix(up)
        for how, factors in self._by_norms(up):
            stored = how(stored, factors, 0, False)
        rows = _ratio(self._original.matrix(up), stored, 1)
        columns = _ratio(self._original.matrix(down), self._converted.matrix(down), 0)
        if rows is None or columns is None:
            return None
        columns = _by_place(columns, self._places(up, len(rows)), len(rows))
        silent = self._original.matrix(up).square().sum(1) <= _NOTHING  # zeros do not tell what they were divided by
        rows = torch.where(silent, 1 / columns, rows)
        left = (rows * columns).log2().abs()
        agree = left <= RECIPROCAL
        if float(agree.float().mean()) < _AGREEING:
            return None
        factors = torch.where(agree, 1 / rows if exact else (columns / rows).sqrt(), 1.0)
        size = float(factors.log2().abs().mean())
        clear = size > FAINT and size > CLEARLY * float(left[agree].mean())
        return factors if size > SCALED or clear else None

    def _places(self, producer: TensorRole, factors: int) -> Tensor:
        """Which factor each column of readers has, [K] int64."""
        text: TextConfig = self._original.config.text
        if producer.kind is Kind.ATTENTION_VALUE:
            return value_places(text.num_attention_heads, text.num_key_value_heads, text.head_dim)
        if producer.kind is Kind.LINEAR_NORM:
            return repeated_places(text.linear_num_value_heads, factors)
        return torch.arange(factors)

    def _both(self, role: TensorRole) -> bool:
        there = [source.stored.get(role) for source in (self._original, self._converted)]
        return all(one is not None for one in there) and len({one.shape for one in there if one is not None}) == 1

    def _is_plain(self, source: CheckpointWeights, role: TensorRole) -> bool:
        return source.stored[role].plain is not None


_How = Callable[[Tensor, Tensor, int, bool], Tensor]
"""Undoes a scaling of rows from a number on by factors, or does it."""


def _change_rows(values: Tensor, factors: Tensor, begin: int, redo: bool) -> Tensor:
    some = factors[begin : begin + len(values), None]
    return values / some if redo else values * some


def _change_columns(values: Tensor, factors: Tensor, begin: int, redo: bool) -> Tensor:
    return values * factors if redo else values / factors


def _change_norm(values: Tensor, factors: Tensor, begin: int, redo: bool) -> Tensor:
    some = factors[begin : begin + len(values)]
    return (1.0 + values) / some - 1.0 if redo else (1.0 + values) * some - 1.0


def _change_plain_norm(values: Tensor, factors: Tensor, begin: int, redo: bool) -> Tensor:
    some = factors[begin : begin + len(values)]
    return values / some if redo else values * some


def _by_place(columns: Tensor, places: Tensor, count: int) -> Tensor:
    """The geometric mean of what shares a place, [count]."""
    sums = torch.zeros(count).index_add_(0, places, columns.log2())
    return torch.exp2(sums / torch.bincount(places, minlength=count).clamp(min=1))


def _ratio(before: Tensor, after: Tensor, dim: int) -> Tensor | None:
    """What rows or columns were multiplied by, the least squares; ``None`` where numbers are gone or turned around."""
    signal, product = before.square().sum(dim), (before * after).sum(dim)
    ratio = torch.where(signal > _NOTHING, product / signal.clamp(min=_NOTHING), 1.0)
    return ratio if bool((ratio.isfinite() & (ratio > 0)).all()) else None
