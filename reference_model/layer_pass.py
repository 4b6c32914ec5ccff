"""One layer for many token batches: its weights are read once, its routed experts one at a time.

Batches may pass in several lanes, each with inputs and a rounding of its own: the layer as it is and as an engine runs
it, fed by another model, or the same layer of another model. What lanes have in common is read once and computed once.

Shapes: B batch, T tokens, D hidden, k experts a token, P marks, Hv heads, dk / dv their widths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from reference_model.attention import AttentionKind
from reference_model.cache import LayerCache
from reference_model.config import LayerType, TextConfig
from reference_model.delta_net import DeltaNetCache
from reference_model.each import Each, one_by_one
from reference_model.layer import DecoderLayer, load_layer, same_weights
from reference_model.load import WeightSource, load_expert
from reference_model.moe import Dispatch, Routing, Visits, combine, dispatch, expert_mlp
from reference_model.span import place_tokens

ROWS_BYTES = 1 << 30
"""Memory for the tokens that pass the experts of a layer together: 13,000 tokens of 35B in fp32."""

InputRounding = Callable[[str], Callable[[Tensor], Tensor] | None]
"""What an engine does to the inputs of a matrix before it multiplies, by the matrix's name without ``.weight``.

Of each routed expert that tokens reach ``layers.0.mlp.experts.3.gate_up_proj`` and ``.down_proj`` are asked for;
``None`` leaves inputs alone. Who only wants to see inputs gives them back unchanged. Rows are rounded one by one: where
all experts of a layer have the same function, it sees every token once.
"""


def leave_inputs(name: str) -> None:
    """The ``InputRounding`` of engines that round no activations."""


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
        take: gives the inputs [B, T, D] of a batch, the same whenever it is asked.
        give: takes what came of it; it is called in the order of the batches, and of the lanes of a batch.
        rounding: of what enters the layer's matrices.
        config: of the model whose layer it is, if not that of the others.
        experts: where routed experts come from, if not from where those of the others do.
        source: where the layer without its routed experts comes from, if not from where those do.
        past: gives what the tokens before a batch have left behind in the layer, ``None`` for nothing.
        give_cache: takes what they and those of the batch have.
        marks: so many states of a DeltaNet layer's memory are wanted, evenly over each window, the last at its end.
        give_states: takes them for a batch, [P, B, Hv, dk, dv], before ``give``; never called of an attention layer.
        batches: the numbers of those that come this way; ``None`` is all.
    """

    take: Callable[[int], Tensor]
    give: Callable[[LayerRecord], None]
    rounding: InputRounding = leave_inputs
    config: TextConfig | None = None
    experts: WeightSource | None = None
    source: WeightSource | None = None
    past: Callable[[int], LayerCache | None] | None = None
    give_cache: Callable[[int, LayerCache], None] | None = None
    marks: int = 0
    give_states: Callable[[int, Tensor], None] = lambda batch, states: None
    batches: tuple[int, ...] | None = None


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
    lanes: every product has the same operands. Lanes with the same inputs and weights mix once, and pass the experts
    once if these are the same, too. Sources must have been checked. The layers of every other block than ``layers``,
    such as ``mtp.layers``, are full attention. ``each`` may let batches mix and experts run side by side: an expert
    still sees its batches one after another, in their order.
    """
    ways, experts = _ways(config, source, block, n, lanes, dtype, attention), f"{block}.{n}.mlp.experts"
    for group in _groups(batches, ways, dtype, rows_bytes):
        _pass_group([_Passing(n, experts, b, batches[b], some) for b, some in group], experts, dtype, each)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Way:
    """A lane, its ``layer`` without routed experts, and where these come from."""

    lane: Lane
    config: TextConfig
    layer: DecoderLayer
    experts: WeightSource

    def mixes_like(self, other: _Way) -> bool:
        """Whether what both make of the same inputs before the experts is the same, and nobody keeps more of one."""
        alone = any(way.lane.past is not None or way.lane.give_cache is not None for way in (self, other))
        same = self.layer is other.layer and self.config == other.config
        return same and self.lane.marks == other.lane.marks and not alone

    def runs_like(self, other: _Way) -> bool:
        """Whether what both make of the same inputs in the experts is the same."""
        return self.experts is other.experts and self.lane.rounding == other.lane.rounding


@dataclass(frozen=True, slots=True, kw_only=True)
class _Mixed:
    """A batch before the experts: ``hidden`` [B, T, D], the normed ``inputs`` [B T, D] of what follows, its places.

    ``states`` [P, B, Hv, dk, dv] are those that the lane wants.
    """

    hidden: Tensor
    inputs: Tensor
    routing: Routing
    visits: Visits
    where: Dispatch
    states: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Visit:
    """A batch among the experts.

    ``rows`` [B T k, D] are copies of the inputs sorted by expert; ``parts``, views of them by expert, take the outputs.
    ``before`` says what is still to be done to the rows of each expert that is reached.
    """

    way: _Way
    before: Mapping[int, Callable[[Tensor], Tensor] | None]
    rows: Tensor
    parts: tuple[Tensor, ...]


class _Passing:
    """One batch on some ways through layer ``n``; each stands for those behind it that are the same.

    Attributes:
        mixed: by the first way of those that mix alike.
        visits: by the first way of those that are the same up to the end.
    """

    def __init__(self, n: int, experts: str, number: int, batch: Batch, ways: Sequence[_Way]) -> None:
        self._n, self._experts, self._number, self._batch, self._ways = n, experts, number, batch, ways
        self._mixes = _firsts(len(ways), self._mix_alike)
        self._runs = _firsts(len(ways), self._run_alike)
        self.mixed: dict[int, _Mixed] = {}
        self.visits: dict[int, _Visit] = {}

    @property
    def ways_to_mix(self) -> list[int]:
        """The numbers that ``mix`` is to be called with."""
        return list(dict.fromkeys(self._mixes))

    @torch.no_grad()  # of the thread that runs it
    def mix(self, way: int) -> None:
        """The first half of the layer."""
        self.mixed[way] = _enter(self._ways[way], self._batch, self._number)

    @torch.no_grad()
    def sort(self) -> None:
        """Get ready for the experts."""
        for way in dict.fromkeys(self._runs):
            mixed, of = self.mixed[self._mixes[way]], self._ways[way].lane.rounding
            x, where = mixed.inputs, mixed.where
            before = {e: of(f"{self._experts}.{e}.gate_up_proj") for e, count in enumerate(where.counts) if count}
            if len(set(before.values())) == 1:
                (first,) = set(before.values())
                x, before = x if first is None else first(x), dict.fromkeys(before)
            rows = x.index_select(0, where.token)
            parts = torch.split(rows, where.counts)
            self.visits[way] = _Visit(way=self._ways[way], before=before, rows=rows, parts=parts)

    @torch.no_grad()
    def leave(self) -> list[tuple[Lane, LayerRecord, Tensor | None]]:
        """What comes of each way behind the experts, and the states that it wants; nothing else is left."""
        outs: dict[int, Tensor] = {}
        for first, mixed in self.mixed.items():
            mlp = self._ways[first].layer.mlp
            shared = mlp.shared(mixed.inputs)
            for run in [run for run in self.visits if self._mixes[run] == first]:
                routed = combine(self.visits.pop(run).rows, mixed.where, mixed.visits.weights)
                whole = routed if shared is None else routed + shared
                outs[run] = mixed.hidden + whole.view_as(mixed.hidden)
        result = []
        for way, mixes, runs in zip(self._ways, self._mixes, self._runs, strict=True):
            mixed = self.mixed[mixes]
            record = LayerRecord(layer=self._n, batch=self._number, hidden=outs[runs], routing=mixed.routing)
            result.append((way.lane, record, mixed.states))
        self.mixed.clear()
        return result

    def _mix_alike(self, first: int, second: int) -> bool:
        ours, theirs = self._ways[first], self._ways[second]
        if not ours.mixes_like(theirs):
            return False
        x, y = (way.lane.take(self._number) for way in (ours, theirs))
        return x is y or torch.equal(x, y)

    def _run_alike(self, first: int, second: int) -> bool:
        return self._mixes[first] == self._mixes[second] and self._ways[first].runs_like(self._ways[second])


def _firsts(count: int, alike: Callable[[int, int], bool]) -> list[int]:
    """For each of ``count`` numbers the first that is like it, which may be itself."""
    found: list[int] = []
    for n in range(count):
        found.append(next((first for first in dict.fromkeys(found) if alike(first, n)), n))
    return found


def _pass_group(group: Sequence[_Passing], experts: str, dtype: torch.dtype, each: Each) -> None:
    """Batches that are in memory together; nothing of them is left when the next ones come."""
    _all(each(lambda task: task[0].mix(task[1]), [(one, way) for one in group for way in one.ways_to_mix]))
    _all(each(_Passing.sort, group))
    visits = [visit for one in group for visit in one.visits.values()]
    for source, config in {id(v.way.experts): (v.way.experts, v.way.config) for v in visits}.values():
        _run_experts(config, source, experts, [v for v in visits if v.way.experts is source], dtype, each)
    visits.clear()
    for left in each(_Passing.leave, group):
        for lane, record, states in left:
            if states is not None:
                lane.give_states(record.batch, states)
            lane.give(record)


def _all(results: Iterable[None]) -> None:
    for _ in results:
        pass


def _ways(
    config: TextConfig,
    source: WeightSource,
    block: str,
    n: int,
    lanes: Sequence[Lane],
    dtype: torch.dtype,
    attention: AttentionKind,
) -> list[_Way]:
    """The lanes with their layers: one where weights are the same, whoever brings them, and nothing is rounded."""
    prefix = f"{block}.{n}."
    plain: dict[int, tuple[TextConfig, DecoderLayer]] = {}
    rounded: dict[tuple[int, InputRounding], DecoderLayer] = {}
    ways = []
    for lane in lanes:
        of = config if lane.config is None else lane.config
        experts = source if lane.experts is None else lane.experts
        own = experts if lane.source is None else lane.source
        if id(own) not in plain:
            layer_type: LayerType = of.layer_types[n] if block == "layers" else "full_attention"
            layer = load_layer(of, own, prefix, layer_type, dtype, attention)
            known = (one for like, one in plain.values() if like == of and same_weights(one, layer))
            plain[id(own)] = of, next(known, layer)
        unrounded = plain[id(own)][1]
        key = id(unrounded), lane.rounding
        if key not in rounded:
            rounded[key] = _rounded(unrounded, prefix, lane.rounding)
        ways.append(_Way(lane=lane, config=of, layer=rounded[key], experts=experts))
    return ways


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
    batches: Sequence[Batch], ways: Sequence[_Way], dtype: torch.dtype, rows_bytes: int
) -> Iterator[list[tuple[int, list[_Way]]]]:
    """Batches, each with ways that it takes, whose tensors fit into ``rows_bytes`` together; none is cut."""
    group: dict[int, list[_Way]] = {}
    held = 0
    for b, batch in enumerate(batches):
        for way in ways:
            if way.lane.batches is not None and b not in way.lane.batches:
                continue
            need = _bytes_of(way, batch, dtype)
            if group and held + need > rows_bytes:
                yield list(group.items())
                group, held = {}, 0
            group.setdefault(b, []).append(way)
            held += need
    if group:
        yield list(group.items())


def _bytes_of(way: _Way, batch: Batch, dtype: torch.dtype) -> int:
    """What ``_Mixed`` and ``_Visit`` hold."""
    config = way.config
    copies = config.num_experts_per_tok + config.folded_experts + 2
    held = batch.ids.numel() * copies * config.hidden_size * dtype.itemsize
    if way.layer.layer_type == "linear_attention":
        head = config.linear_key_head_dim * config.linear_value_head_dim
        held += way.lane.marks * len(batch.ids) * config.linear_num_value_heads * head * max(dtype.itemsize, 4)
    return held


def _enter(way: _Way, batch: Batch, number: int) -> _Mixed:
    """The first half of a layer for one batch, and where its tokens go."""
    config, lane, layer = way.config, way.lane, way.layer
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
    hidden, cache = layer.mix(x, span, None if lane.past is None else lane.past(number))
    if lane.give_cache is not None:
        lane.give_cache(number, cache)
    states = None
    if lane.marks and isinstance(cache, DeltaNetCache) and cache.replay is not None:
        tokens = x.shape[1]
        ends = [-(-tokens * mark // lane.marks) for mark in range(1, lane.marks + 1)]
        states = cache.replay.states(ends)
    del cache
    inputs = layer.post_attention_layernorm(hidden).flatten(0, 1)
    routing: Routing = layer.mlp.gate(inputs)
    visits = layer.mlp.visits(inputs, routing)
    where = dispatch(visits.experts, config.stored_experts)
    return _Mixed(hidden=hidden, inputs=inputs, routing=routing, visits=visits, where=where, states=states)


def _run_experts(
    config: TextConfig, source: WeightSource, name: str, visits: Sequence[_Visit], dtype: torch.dtype, each: Each
) -> None:
    """What ``moe.Experts`` computes, for all visits: experts outside, so that each is read once, if reached at all."""

    @torch.no_grad()
    def run(e: int) -> None:
        reached = [visit for visit in visits if len(visit.parts[e])]
        if not reached:
            return
        gate_up, down = load_expert(source, name, e, dtype)
        for visit in reached:
            part, between = visit.parts[e], visit.way.lane.rounding(f"{name}.{e}.down_proj")
            part.copy_(expert_mlp(part, gate_up, down, visit.before[e], between))

    _all(each(run, range(config.stored_experts)))
