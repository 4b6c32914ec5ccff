"""How long both models say the same when they continue the same prompts greedily.

Up to the token where they part both have the same tokens behind them. So only the original has to go on token by token:
the converted model sees what the original said all at once, and parts from it at the first token that it finds less
likely than another.

Shapes: P prompts, B prompts of a batch, T tokens of a prompt, n tokens that follow, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from qconvert.core.metric import Metric
from qconvert.parity.heads import head_slabs
from qconvert.parity.input_rounding import served_rounding
from qconvert.parity.kept_states import StateFolder
from qconvert.parity.model import PLAIN, SERVED
from qconvert.parity.series import Curve
from qconvert.parity.summary import Draws
from qconvert.parity.tensors import Progress
from qconvert.texts.batching import BATCH_TOKENS
from qconvert.weights.source import CheckpointWeights
from reference_model.attention import AttentionCache
from reference_model.cache import LayerCache
from reference_model.delta_net import DeltaNetCache
from reference_model.layer_pass import Batch, InputRounding, Lane, LayerRecord, leave_inputs, pass_layer
from reference_model.layerwise import HiddenStates, embed, finish, look_up
from reference_model.load import ActivationStore

PROMPT_TOKENS = 64
"""Tokens of a prompt; of shorter windows all but none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Common:
    """What became of P prompts.

    Attributes:
        tokens: that both models said before they parted, int64 [P].
        said: that the original said: fewer than ``limit`` where it came to an end.
        limit: at most.
    """

    tokens: NDArray[np.int64]
    said: NDArray[np.int64]
    limit: int

    @property
    def parted(self) -> NDArray[np.bool_]:
        """Whether the models parted, bool [P]."""
        return self.tokens < self.said


@dataclass(frozen=True, slots=True, kw_only=True)
class Continuations:
    """Both ways of running the converted model against the original; they are one where no activation is rounded."""

    plain: Common
    served: Common

    def metrics(self, seed: int) -> Iterator[Metric]:
        """Of both ways."""
        for mode, one in ((PLAIN, self.plain), (SERVED, self.served)):
            yield from common_metrics(one, mode, seed)

    def curves(self) -> Iterator[Curve]:
        """Of both ways, once where they are one."""
        if self.plain is not self.served:
            yield common_curve(self.plain, PLAIN)
        yield common_curve(self.served, SERVED)

    def __str__(self) -> str:
        return (
            f"{len(self.plain.tokens)} prompts were continued greedily, by at most {self.plain.limit} tokens of the "
            "original."
        )


def continue_both(
    original: CheckpointWeights,
    converted: CheckpointWeights,
    batches: Sequence[Tensor],
    number: int,
    limit: int,
    store: ActivationStore,
    rows_bytes: int,
    *,
    folder: StateFolder | None = None,
    progress: Progress = lambda phase, done, total: None,
) -> Continuations:
    """Continue the beginnings of at most so many windows of ``batches`` [B, T]; see ``continued`` and ``in_common``.

    Raises:
        OutputError: something cannot be kept.
    """
    prompts = prompts_of(batches, number)
    said = continued(
        original, prompts, limit, store, rows_bytes, folder=folder, progress=partial(progress, "greedy tokens")
    )
    rounding = served_rounding(converted)
    roundings = [leave_inputs] if rounding is None else [leave_inputs, rounding]
    ways = in_common(converted, roundings, prompts, said, limit, store, rows_bytes)
    return Continuations(plain=ways[0], served=ways[-1])


def prompts_of(batches: Sequence[Tensor], number: int) -> list[Tensor]:
    """At most so many prompts [B, T] from token windows [B, T], of one length.

    The beginnings of all windows come first, then what follows them: prompts are of all texts before they are of one.
    """
    length = min(PROMPT_TOKENS, max(ids.shape[1] for ids in batches))
    pieces = [
        [part for part in torch.split(row, length) if len(part) == length] for row in chain.from_iterable(batches)
    ]
    rounds = range(max(map(len, pieces)))
    found = [one[turn] for turn in rounds for one in pieces if turn < len(one)][:number]
    return list(torch.split(torch.stack(found), max(1, BATCH_TOKENS // length)))


@torch.no_grad()
def continued(
    source: CheckpointWeights,
    prompts: Sequence[Tensor],
    limit: int,
    store: ActivationStore,
    rows_bytes: int,
    *,
    folder: StateFolder | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Tensor]:
    """What a model says after each prompt, greedily, in float32, its weights streamed once a token: int64 [B, n].

    Rows that have said an end-of-sequence token repeat it; n is less than ``limit`` when all have.

    Args:
        source: the weights.
        prompts: int64 [B, T] each.
        limit: tokens at most.
        store: where hidden states and caches wait between layers.
        rows_bytes: see ``layer_pass``.
        folder: keeps what was said, and has what an earlier run was told.
        progress: is told of each token.

    Raises:
        OutputError: something cannot be kept.
    """
    ends = torch.tensor(source.config.text.eos_token_ids, dtype=torch.int64)
    said = [prompt[:, :0] for prompt in prompts]
    if folder is not None and folder.holds("said"):
        said = list(torch.split(folder.get("said"), [len(prompt) for prompt in prompts]))
    state = _Decoder(source, store, rows_bytes, len(prompts))
    while said[0].shape[1] < limit:
        if said[0].shape[1] and all(bool(torch.isin(row[:, -1], ends).all()) for row in said):
            break
        likeliest = state.step([torch.cat(pair, dim=1) for pair in zip(prompts, said, strict=True)])
        for b, token in enumerate(likeliest):
            if said[b].shape[1]:
                token = torch.where(torch.isin(said[b][:, -1], ends), said[b][:, -1], token)
            said[b] = torch.cat((said[b], token.unsqueeze(1)), dim=1)
        if folder is not None:
            folder.put("said", torch.cat(said))
        progress(said[0].shape[1], limit)
    state.forget()
    return said


class _Decoder:
    """A model that is told ever longer rows, and remembers what the tokens before have left behind in each layer."""

    def __init__(self, source: CheckpointWeights, store: ActivationStore, rows_bytes: int, batches: int) -> None:
        self._source, self._store, self._rows_bytes = source, store, rows_bytes
        self._hidden = HiddenStates(store=store, count=batches, name="decoded")
        self._seen = 0
        self._kept: dict[tuple[int, int], type[LayerCache]] = {}

    def step(self, rows: Sequence[Tensor]) -> list[Tensor]:
        """The likeliest token after each of the rows [B, T], int64 [B], given that the first of T have been seen."""
        config, seen = self._source.config.text, self._seen
        starts = [torch.full((len(ids),), seen) if seen else None for ids in rows]
        batches = [Batch(ids=ids[:, seen:], starts=start) for ids, start in zip(rows, starts, strict=True)]
        for b, batch in enumerate(batches):
            self._hidden.put(b, look_up(self._source, batch.ids, torch.float32))
        for n in range(config.num_hidden_layers):
            pass_layer(
                config, self._source, n, batches, (self._lane(n),), torch.float32, rows_bytes=self._rows_bytes
            )  # fmt: skip
        self._seen = rows[0].shape[1]
        for b in range(len(rows)):
            self._hidden.put(b, self._hidden[b][:, -1:])
        finish(config, self._source, self._hidden, torch.float32)
        last = torch.cat([self._hidden[b].flatten(0, 1) for b in range(len(rows))])
        return list(torch.split(_likeliest(self._source, last), [len(ids) for ids in rows]))

    def forget(self) -> None:
        """Leave nothing in the store."""
        for n, b in list(self._kept):
            self._take(n, b)
        for b in range(len(self._hidden) if self._seen else 0):
            self._hidden.drop(b)

    def _lane(self, n: int) -> Lane:
        def give(record: LayerRecord) -> None:
            self._hidden.put(record.batch, record.hidden)

        def keep(b: int, cache: LayerCache) -> None:
            self._kept[n, b] = type(cache)
            for i, part in enumerate(_parts(cache)):
                self._store.put(f"cache.{n}.{b}.{i}", part)

        return Lane(take=self._hidden.__getitem__, give=give, past=lambda b: self._take(n, b), give_cache=keep)

    def _take(self, n: int, b: int) -> LayerCache | None:
        kind = self._kept.pop((n, b), None)
        if kind is None:
            return None
        keys = [f"cache.{n}.{b}.{i}" for i in range(2)]
        first, second = (self._store.get(key) for key in keys)
        for key in keys:
            self._store.drop(key)
        if kind is AttentionCache:
            return AttentionCache(keys=first, values=second)
        return DeltaNetCache(conv=first, recurrent=second)


def _parts(cache: LayerCache) -> tuple[Tensor, Tensor]:
    if isinstance(cache, AttentionCache):
        return cache.keys, cache.values
    return cache.conv, cache.recurrent


def _likeliest(source: CheckpointWeights, states: Tensor) -> Tensor:
    """The token with the largest logit, the first of several, of hidden states [R, D] after the norm: int64 [R]."""
    best = torch.full((len(states),), -torch.inf)
    token = torch.zeros(len(states), dtype=torch.int64)
    for first, slab in head_slabs(source):
        value, at = functional.linear(states, slab).max(dim=1)
        token = torch.where(value > best, at + first, token)
        best = torch.maximum(best, value)
    return token


@torch.no_grad()
def in_common(
    source: CheckpointWeights,
    roundings: Sequence[InputRounding],
    prompts: Sequence[Tensor],
    said: Sequence[Tensor],
    limit: int,
    store: ActivationStore,
    rows_bytes: int,
) -> list[Common]:
    """How much of what the original has ``said`` after each prompt a model says too, for each way of running it.

    Args:
        source: the weights.
        roundings: what is done to inputs of matrices, of each way.
        prompts: int64 [B, T] each.
        said: int64 [B, n] each, what ``continued`` gave of the original.
        limit: as it was given there.
        store: where hidden states wait.
        rows_bytes: see ``layer_pass``.

    Raises:
        OutputError: hidden states cannot be kept.
    """
    config, length = source.config.text, prompts[0].shape[1]
    batches = [Batch(ids=torch.cat((p, s[:, :-1]), dim=1)) for p, s in zip(prompts, said, strict=True)]
    ways = [HiddenStates(store=store, count=len(batches), name=f"said.{n}") for n in range(len(roundings))]

    def lane(hidden: HiddenStates, rounding: InputRounding) -> Lane:
        def give(record: LayerRecord) -> None:
            hidden.put(record.batch, record.hidden)

        return Lane(take=hidden.__getitem__, give=give, rounding=rounding)

    for hidden in ways:
        embed(config, source, batches, hidden, torch.float32)
    lanes = [lane(hidden, rounding) for hidden, rounding in zip(ways, roundings, strict=True)]
    for n in range(config.num_hidden_layers):
        pass_layer(config, source, n, batches, lanes, torch.float32, rows_bytes=rows_bytes)
    out, wanted = [], torch.cat(list(said))
    lengths = _lengths(wanted, config.eos_token_ids)
    for hidden, rounding in zip(ways, roundings, strict=True):
        finish(config, source, hidden, torch.float32)
        states = torch.cat([hidden[b][:, length - 1 :] for b in range(len(batches))]).flatten(0, 1)
        before = rounding("lm_head")
        found = _likeliest(source, states if before is None else before(states)).view_as(wanted)
        same = (found == wanted).to(torch.int64).cumprod(dim=1).sum(1)
        out.append(Common(tokens=same.minimum(lengths).numpy(), said=lengths.numpy(), limit=limit))
        for b in range(len(batches)):
            hidden.drop(b)
    return out


def _lengths(said: Tensor, ends: Sequence[int]) -> Tensor:
    """Tokens of each row [P, n] up to its first end, that included: int64 [P]."""
    over = torch.isin(said, torch.tensor(ends, dtype=torch.int64)).to(torch.int64).cummax(1).values
    return said.shape[1] - (over.sum(1) - 1).clamp(min=0)


def common_metrics(found: Common, where: str, seed: int) -> Iterator[Metric]:
    """Mean and median of the tokens in common, and the share of prompts on which the models never parted."""
    draws = Draws(len(found.tokens), seed, block=1)
    tokens = found.tokens.astype(np.float64)
    yield draws.mean("greedy_common_mean", where, tokens, "count", high=True)
    yield draws.median("greedy_common_median", where, tokens, "count", high=True)
    yield draws.mean("greedy_never_parted", where, (~found.parted).astype(np.float64), "fraction", high=True)


def common_curve(found: Common, where: str) -> Curve:
    """The share of prompts on which the models have not parted after so many tokens."""
    return Curve(
        name="greedy_common",
        where=where,
        x_label="tokens after the prompt",
        y_label="prompts still continued alike, %",
        points=tuple(
            (float(n), 100 * float((~found.parted | (found.tokens >= n)).mean())) for n in range(found.limit + 1)
        ),
    )
