"""One layer for many token batches: its weights are read once, its routed experts one at a time.

Batches may pass in several lanes, each with inputs and a rounding of its own: the layer as it is and as an engine runs
it, or fed by another model. All lanes share the routed experts, and the other weights unless they bring their own.

Shapes: B batch, T tokens, D hidden, k experts a token, P marks, Hv heads, dk / dv their widths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from reference_model.attention import AttentionKind
from reference_model.cache import LayerCache
from reference_model.config import LayerType, TextConfig
from reference_model.delta_net import DeltaNetCache
from reference_model.layer import DecoderLayer
from reference_model.load import WeightSource, fill_weights, load_expert
from reference_model.moe import Dispatch, Routing, Visits, combine, dispatch, expert_mlp
from reference_model.span import place_tokens

ROWS_BYTES = 1 << 30
"""Memory for the tokens that pass the experts of a layer together: 13,000 tokens of 35B in fp32."""

InputRounding = Callable[[str], Callable[[Tensor], Tensor] | None]
"""What an engine does to the inputs of a matrix before it multiplies, by the matrix's name without ``.weight``.

Of each routed expert that tokens reach ``layers.0.mlp.experts.3.gate_up_proj`` and ``.down_proj`` are asked for;
``None`` leaves inputs alone. Who only wants to see inputs gives them back unchanged.
"""


def leave_inputs(name: str) -> None:
    """The ``InputRounding`` of engines that round no activations."""


S = TypeVar("S")
T = TypeVar("T")


class Each(Protocol):
    """Calls a function with every item, and gives what it returns in the order of the items.

    It may make several calls at once: those of a pool of threads with one thread of torch each.
    """

    def __call__(self, function: Callable[[S], T], items: Iterable[S], /) -> Iterable[T]:
        """See above."""
        ...


def one_by_one(function: Callable[[S], T], items: Iterable[S]) -> Iterator[T]:
    """The ``Each`` of a single thread."""
    yield from map(function, items)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRecord:
    """What one layer did to one batch: its output ``hidden`` [B, T, D], and where its tokens went."""

    layer: int
    batch: int
    hidden: Tensor
    routing: Routing


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Token ids [B, T], and what ``run_layers`` may be given besides; ``starts`` [B] text tokens came before."""

    ids: Tensor
    mask: Tensor | None = None
    positions: Tensor | None = None
    embeddings: Tensor | None = None
    starts: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """One way through a layer.

    Attributes:
        take: gives the inputs [B, T, D] of a batch.
        give: takes what came of it; it is called in the order of the batches.
        rounding: of what enters the layer's matrices.
        source: where the layer without its routed experts comes from, if not from where those do.
        past: gives what the tokens before a batch have left behind in the layer, ``None`` for nothing.
        give_cache: takes what they and those of the batch have.
        marks: so many states of a DeltaNet layer's memory are wanted, evenly over each window, the last at its end.
        give_states: takes them for a batch, [P, B, Hv, dk, dv]; never called of an attention layer.
        batches: the numbers of those that come this way; ``None`` is all.
    """

    take: Callable[[int], Tensor]
    give: Callable[[LayerRecord], None]
    rounding: InputRounding = leave_inputs
    source: WeightSource | None = None
    past: Callable[[int], LayerCache | None] = lambda batch: None
    give_cache: Callable[[int, LayerCache], None] = lambda batch, cache: None
    marks: int = 0
    give_states: Callable[[int, Tensor], None] = lambda batch, states: None
    batches: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Visit:
    """A batch before the experts: ``hidden`` [B, T, D], and the normed ``inputs`` [B T, D] of what follows.

    ``rows`` [B T k, D] are copies of the inputs sorted by expert; ``parts``, views of them by expert, take the outputs.
    """

    hidden: Tensor
    inputs: Tensor
    routing: Routing
    visits: Visits
    where: Dispatch
    rows: Tensor
    parts: tuple[Tensor, ...]


@torch.no_grad()
def pass_layer(
    config: TextConfig,
    source: WeightSource,
    n: int,
    batches: Sequence[Batch],
    lanes: Sequence[Lane],
    dtype: torch.dtype,
    *,
    block: str = "layers",
    attention: AttentionKind = "sdpa",
    rows_bytes: int = ROWS_BYTES,
    each: Each = one_by_one,
) -> None:
    """Let all ``batches`` pass layer ``n`` of ``block`` in each of the ``lanes``.

    For the same batches and number of threads the results equal those of the whole model bit for bit, whatever the
    lanes: every product has the same operands. ``source`` must have been checked. The layers of every other block than
    ``layers``, such as ``mtp.layers``, are full attention. ``each`` may let batches mix and experts run side by side:
    an expert still sees its batches one after another, in their order.
    """
    prefix = f"{block}.{n}."
    layer_type: LayerType = config.layer_types[n] if block == "layers" else "full_attention"
    plain: dict[int, DecoderLayer] = {}
    layers = []
    for lane in lanes:
        own = source if lane.source is None else lane.source
        if id(own) not in plain:
            plain[id(own)] = load_layer(config, own, prefix, layer_type, dtype, attention)
        layers.append(_rounded(plain[id(own)], prefix, lane.rounding))
    for group in _groups(config, batches, lanes, dtype, rows_bytes):
        _pass_group(config, source, block, n, batches, [(b, lanes[way], layers[way]) for b, way in group], dtype, each)


def _pass_group(
    config: TextConfig,
    source: WeightSource,
    block: str,
    n: int,
    batches: Sequence[Batch],
    group: Sequence[tuple[int, Lane, DecoderLayer]],
    dtype: torch.dtype,
    each: Each,
) -> None:
    """Batches that are in memory together; nothing of them is left when the next ones come."""
    visits = list(each(lambda one: _enter(config, one[2], one[1], batches[one[0]], one[0]), group))
    roundings = [lane.rounding for _, lane, _ in group]
    _run_experts(config, source, f"{block}.{n}.mlp.experts", visits, roundings, dtype, each)
    for b, lane, layer in group:
        visit = visits.pop(0)
        routed = combine(visit.rows, visit.where, visit.visits.weights)
        out = visit.hidden + layer.mlp.with_shared(visit.inputs, routed).view_as(visit.hidden)
        lane.give(LayerRecord(layer=n, batch=b, hidden=out, routing=visit.routing))


def load_layer(
    config: TextConfig,
    source: WeightSource,
    prefix: str,
    layer_type: LayerType,
    dtype: torch.dtype,
    attention: AttentionKind = "sdpa",
) -> DecoderLayer:
    """A layer without its routed experts."""
    with torch.device("meta"):
        layer = DecoderLayer(config, layer_type, attention)
    fill_weights(layer, source, dtype, prefix=prefix, skip=("mlp.experts.",))
    return layer


def _rounded(layer: DecoderLayer, prefix: str, rounding: InputRounding) -> DecoderLayer:
    """A layer with the same weights, of which what enters linear modules is rounded; itself where nothing is."""
    linear = [name for name, module in layer.named_modules() if isinstance(module, nn.Linear)]
    before = {name: round_input for name in linear if (round_input := rounding(f"{prefix}{name}")) is not None}
    if not before:
        return layer
    own = deepcopy(layer, {id(parameter): parameter for parameter in layer.parameters()})  # all but the weights
    for name, round_input in before.items():
        own.get_submodule(name).register_forward_pre_hook(partial(_replace_input, round_input))
    return own


def _replace_input(rounding: Callable[[Tensor], Tensor], module: nn.Module, args: tuple[Tensor]) -> Tensor:
    return rounding(args[0])


def _groups(
    config: TextConfig, batches: Sequence[Batch], lanes: Sequence[Lane], dtype: torch.dtype, rows_bytes: int
) -> Iterator[list[tuple[int, int]]]:
    """Batches, each with the number of its lane, whose ``_Visit`` tensors fit into ``rows_bytes``; none is cut."""
    token_bytes = (config.num_experts_per_tok + config.folded_experts + 2) * config.hidden_size * dtype.itemsize
    group: list[tuple[int, int]] = []
    held = 0
    for b, batch in enumerate(batches):
        need = batch.ids.numel() * token_bytes
        for way, lane in enumerate(lanes):
            if lane.batches is not None and b not in lane.batches:
                continue
            if group and held + need > rows_bytes:
                yield group
                group, held = [], 0
            group.append((b, way))
            held += need
    if group:
        yield group


@torch.no_grad()  # of the thread that runs it
def _enter(config: TextConfig, layer: DecoderLayer, lane: Lane, batch: Batch, number: int) -> _Visit:
    """The first half of a layer for one batch, and where its tokens go."""
    x = lane.take(number)
    span = place_tokens(
        config,
        x,
        attention_mask=batch.mask,
        position_ids=batch.positions,
        starts=batch.starts,
        next_position=batch.starts,
        rewindable=lane.marks > 0,
    )
    hidden, cache = layer.mix(x, span, lane.past(number))
    lane.give_cache(number, cache)
    if lane.marks and isinstance(cache, DeltaNetCache) and cache.replay is not None:
        tokens = x.shape[1]
        ends = [-(-tokens * mark // lane.marks) for mark in range(1, lane.marks + 1)]
        lane.give_states(number, cache.replay.states(ends))
    del cache
    inputs = layer.post_attention_layernorm(hidden).flatten(0, 1)
    routing: Routing = layer.mlp.gate(inputs)
    visits = layer.mlp.visits(inputs, routing)
    where = dispatch(visits.experts, config.stored_experts)
    rows = inputs.index_select(0, where.token)
    return _Visit(
        hidden=hidden,
        inputs=inputs,
        routing=routing,
        visits=visits,
        where=where,
        rows=rows,
        parts=torch.split(rows, where.counts),
    )


def _run_experts(
    config: TextConfig,
    source: WeightSource,
    name: str,
    visits: Sequence[_Visit],
    roundings: Sequence[InputRounding],
    dtype: torch.dtype,
    each: Each,
) -> None:
    """What ``moe.Experts`` computes, for all visits: experts outside, so that each is read once, if reached at all."""

    @torch.no_grad()
    def run(e: int) -> None:
        parts = [(visit.parts[e], of) for visit, of in zip(visits, roundings, strict=True) if visit.where.counts[e]]
        if not parts:
            return
        gate_up, down = load_expert(source, name, e, dtype)
        for part, of in parts:
            before, between = of(f"{name}.{e}.gate_up_proj"), of(f"{name}.{e}.down_proj")
            part.copy_(expert_mlp(part, gate_up, down, before, between))

    for _ in each(run, range(config.stored_experts)):
        pass
