"""Both models over the same tokens, layer by layer side by side: neither is ever in memory as a whole.

A layer of the original passes first, then the same one of the converted model in all ways at once, so that its matrices
are dequantized once, and everything that only this layer needs is forgotten after it.

Shapes: B windows, T tokens, D hidden, E experts, k experts a token, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from time import perf_counter

import torch
from torch import Tensor

from qconvert.memory import available_bytes
from qconvert.parity.drafts import DraftScores, accepted, has_drafts
from qconvert.parity.heads import Scan, Side, scan_heads
from qconvert.parity.input_rounding import served_rounding
from qconvert.parity.kept_states import KeptStates
from qconvert.parity.layers import MARKS, LayerScores, LayerSums, Passed
from qconvert.parity.logits import TokenScores, VocabularyScan
from qconvert.parity.tensors import Progress
from qconvert.weights.boundaries import Boundaries
from qconvert.weights.source import CheckpointWeights
from qconvert.weights.spill import SpillStore
from reference_model.layer_pass import Batch, InputRounding, Lane, LayerRecord, leave_inputs, pass_layer
from reference_model.layerwise import HiddenStates, embed, finish
from reference_model.load import ActivationStore

PLAIN, SERVED = "weights only", "as served"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelComparison:
    """One way of running the converted model against the original.

    Attributes:
        mode: ``weights only``, or ``as served`` with the activation rounding of engines.
        layers: each layer after all those before it.
        forced: each layer alone, fed what the original's is fed; empty where it was not asked for.
        drafts: guesses of the prediction heads; ``None`` where a model has none, or where they were not asked for.
    """

    mode: str
    scores: TokenScores
    layers: tuple[LayerScores, ...]
    forced: tuple[LayerScores, ...] = ()
    drafts: DraftScores | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Seconds that one pass through each of the ``layers`` took, weights read and all, and one through the head."""

    layers: tuple[float, ...]
    head: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Both ways of running the converted model; they are one run where engines round no activation.

    Attributes:
        visits: tokens that the original's router sent to each expert, int64 [L, E].
        cost: what one way of running the converted model took.
    """

    plain: ModelComparison
    served: ModelComparison
    visits: Tensor
    cost: Cost


@dataclass(frozen=True, slots=True, kw_only=True)
class _Way:
    """One way of running the converted model, and what is summed up of it."""

    rounding: InputRounding
    hidden: HiddenStates
    sums: list[LayerSums] = field(default_factory=list)


def compare_models(
    original: CheckpointWeights,
    converted: CheckpointWeights,
    batches: Sequence[Tensor],
    progress: Progress = lambda phase, done, total: None,
    memory: int | None = None,
    *,
    layers: bool = False,
    drafts: bool = False,
    boundaries: Boundaries | None = None,
    scan_original: Scan | None = None,
    scan_served: Scan | None = None,
    on_original: Callable[[LayerRecord], None] | None = None,
    kept: KeptStates | None = None,
) -> Comparison:
    """Run both in float32 over token windows [B, T] and score every position that has a next token.

    Args:
        original: the weights as they were.
        converted: the weights as they are stored now.
        batches: int64 [B, T] each.
        progress: is told of each batch that has passed a layer in one of the ways, and of the logits.
        memory: bytes for what there is of every token, by default half of what is available: two quarters of it for
            what waits between layers, which is otherwise on disk, one for the tokens that enter experts together.
        layers: also let each layer as served pass alone, fed the original's inputs, and compare DeltaNet states.
        drafts: also run the prediction heads, where both models have one.
        boundaries: where the states after each layer are kept, and where an earlier run has left them.
        scan_original: sees the original's logits too.
        scan_served: sees those of the converted model as served too.
        on_original: is told what each of the original's layers did to each batch.
        kept: takes the states that other runs begin from, see there.

    Raises:
        OutputError: hidden states cannot be written to disk.
    """
    quarter = (available_bytes() // 2 if memory is None else memory) // 4
    rounding = served_rounding(converted)
    with SpillStore(2 * quarter) as store:
        roundings = [leave_inputs] if rounding is None else [leave_inputs, rounding]
        ways = [
            _Way(rounding=of, hidden=HiddenStates(store=store, count=len(batches), name=f"way.{n}"))
            for n, of in enumerate(roundings)
        ]
        run = _Run(original, converted, batches, ways, store, quarter, layers, on_original, kept)
        run.start(boundaries)
        total = run.depth * len(batches) * run.lanes
        done = count(run.next_layer * len(batches) * run.lanes + 1)
        while run.next_layer < run.depth:
            run.pass_layer(lambda: progress("layers", next(done), total))
            if boundaries is not None:
                boundaries.save(run.next_layer, run.kept())
        ours = run.ours(run.depth)
        sides = [Side(source=original, hidden=ours)]
        sides += [Side(source=converted, hidden=way.hidden, rounding=way.rounding) for way in ways]
        for side in sides:
            finish(side.source.config.text, side.source, side.hidden, torch.float32)
        if kept is not None:
            kept.keep(ours, kept.original)
        scans = [VocabularyScan(torch.cat([ids[:, 1:].flatten() for ids in batches])) for _ in ways]
        watched: list[tuple[Scan, Sequence[int]]] = [(scan.add, (0, n)) for n, scan in enumerate(scans, start=1)]
        if scan_original is not None:
            watched.append((scan_original, (0,)))
        if scan_served is not None:
            watched.append((scan_served, (len(ways),)))
        before = perf_counter()
        scan_heads(sides, watched, partial(progress, "logits"))
        cost = Cost(layers=tuple(run.seconds.tolist()), head=(perf_counter() - before) / len(sides))
        guesses: list[DraftScores | None] = [None] * len(ways)
        if drafts and has_drafts(original) and has_drafts(converted):
            first, *rest = sides
            by_original = accepted(original, batches, first.hidden, scans[0].likeliest[0], quarter)
            guesses = [
                DraftScores(
                    original=by_original,
                    converted=accepted(converted, batches, side.hidden, scan.likeliest[1], quarter),
                )
                for side, scan in zip(rest, scans, strict=True)
            ]
        results = [
            ModelComparison(
                mode=mode, scores=scan.scores(), layers=tuple(one.scores() for one in way.sums), drafts=guess
            )
            for mode, way, scan, guess in zip((PLAIN, SERVED), ways, scans, guesses, strict=False)
        ]
        forced = tuple(one.scores() for one in run.forced)
        plain, last = results[0], results[-1]
        served = replace(last, mode=SERVED, forced=forced)
        return Comparison(plain=plain, served=served, visits=run.visits, cost=cost)


class _Run:
    """Where both models are: before layer ``next_layer``, with the sums of those that have been passed."""

    def __init__(
        self,
        original: CheckpointWeights,
        converted: CheckpointWeights,
        batches: Sequence[Tensor],
        ways: Sequence[_Way],
        store: ActivationStore,
        rows_bytes: int,
        layers: bool,
        on_original: Callable[[LayerRecord], None] | None = None,
        kept: KeptStates | None = None,
    ) -> None:
        self._on_original = on_original
        self._original, self._converted = original, converted
        self._batches = [Batch(ids=ids) for ids in batches]
        self._ways, self._store, self._rows_bytes, self._layers = ways, store, rows_bytes, layers
        self._states = kept
        config = original.config.text
        self.depth, self.lanes = config.num_hidden_layers, 1 + len(ways) + layers
        self.next_layer = 0
        self.forced: list[LayerSums] = []
        self.visits = torch.zeros(self.depth, config.num_experts, dtype=torch.int64)
        self.seconds = torch.zeros(self.depth, dtype=torch.float64)

    def ours(self, layer: int) -> HiddenStates:
        """The original's inputs of ``layer``; its outputs must not take their place while they are needed."""
        return HiddenStates(store=self._store, count=len(self._batches), name=f"original.{layer % 2}")

    def start(self, boundaries: Boundaries | None) -> None:
        """Embed the tokens, or go on from where an earlier run has stopped."""
        first, *others = (way.hidden for way in self._ways)
        for source, hidden in ((self._original, self.ours(self.next_layer)), (self._converted, first)):
            embed(source.config.text, source, self._batches, hidden, torch.float32)
        for hidden in others:
            for b in range(len(self._batches)):
                hidden.put(b, first[b])
        found = None if boundaries is None else boundaries.load()
        if boundaries is not None and self._states is not None:
            boundaries.claim()
        if found is None:
            self._keep_inputs()
            return
        self.next_layer, kept = found
        if self.next_layer % 2:
            for b in range(len(self._batches)):
                self.ours(0).drop(b)
        for n, (_, hidden) in enumerate(self._hidden()):
            for b in range(len(self._batches)):
                hidden.put(b, kept(f"hidden.{n}.{b}"))
        experts = self._original.config.text.num_experts
        for n, sums in enumerate(self._sums()):
            wholes = kept(f"sums.{n}")
            states = kept(f"states.{n}")
            sums.extend(LayerSums(experts, *pair) for pair in zip(wholes, states, strict=True))
        self.visits, self.seconds = kept("visits"), kept("seconds")

    def kept(self) -> Iterator[tuple[str, Tensor]]:
        """All that a later run has to know, by name."""
        for n, (_, hidden) in enumerate(self._hidden()):
            for b in range(len(self._batches)):
                yield f"hidden.{n}.{b}", hidden[b]
        for n, sums in enumerate(self._sums()):
            yield f"sums.{n}", torch.stack([one.sums for one in sums])
            yield f"states.{n}", torch.stack([one.states for one in sums])
        yield "visits", self.visits
        yield "seconds", self.seconds

    def pass_layer(self, tick: Callable[[], None]) -> None:
        """Let all batches pass the next layer, in the original and in each way of the converted model."""
        n, experts = self.next_layer, self._original.config.text.num_experts
        before, after = self.ours(n), self.ours(n + 1)

        def keep(record: LayerRecord) -> None:
            b, routing = record.batch, record.routing
            after.put(b, record.hidden)
            if self._on_original is not None:
                self._on_original(record)
            if not self._layers:
                before.drop(b)
            self._store.put(f"experts.{b}", routing.experts.to(torch.int16))
            self._store.put(f"weights.{b}", routing.weights)
            self.visits[n] += torch.bincount(routing.experts.flatten(), minlength=experts)
            tick()

        def known(b: int) -> Passed:
            return Passed(
                hidden=after[b], experts=self._store.get(f"experts.{b}"), weights=self._store.get(f"weights.{b}")
            )

        def lane(take: Callable[[int], Tensor], rounding: InputRounding, hidden: HiddenStates | None) -> Lane:
            sums = LayerSums(experts)

            def give(record: LayerRecord) -> None:
                if hidden is not None:
                    hidden.put(record.batch, record.hidden)
                routing = record.routing
                theirs = Passed(hidden=record.hidden, experts=routing.experts, weights=routing.weights)
                sums.add(known(record.batch), theirs)
                tick()

            def give_states(b: int, states: Tensor) -> None:
                sums.add_states(self._store.get(f"memory.{b}"), states)

            found.append(sums)
            return Lane(take=take, give=give, rounding=rounding, marks=marks, give_states=give_states)

        marks = MARKS if self._layers else 0
        found: list[LayerSums] = []
        remembered: list[int] = []

        def remember(b: int, states: Tensor) -> None:
            self._store.put(f"memory.{b}", states)
            remembered.append(b)

        original = Lane(take=before.__getitem__, give=keep, marks=marks, give_states=remember)
        self._pass(self._original, (original,))
        lanes = [lane(way.hidden.__getitem__, way.rounding, way.hidden) for way in self._ways]
        if self._layers:
            lanes.append(lane(before.__getitem__, self._ways[-1].rounding, None))
        start = perf_counter()
        self._pass(self._converted, lanes)
        self.seconds[n] = (perf_counter() - start) / len(lanes)
        for sums, one in zip(self._sums(), found, strict=True):
            sums.append(one)
        for b in range(len(self._batches)):
            self._store.drop(f"experts.{b}")
            self._store.drop(f"weights.{b}")
            if self._layers:
                before.drop(b)
        for b in remembered:
            self._store.drop(f"memory.{b}")
        self.next_layer += 1
        self._keep_inputs()

    def _keep_inputs(self) -> None:
        if self._states is not None:
            self._states.keep(self._ways[-1].hidden, self._states.before(self.next_layer))

    def _pass(self, source: CheckpointWeights, lanes: Sequence[Lane]) -> None:
        pass_layer(
            source.config.text,
            source,
            self.next_layer,
            self._batches,
            lanes,
            torch.float32,
            rows_bytes=self._rows_bytes,
        )

    def _hidden(self) -> Iterator[tuple[CheckpointWeights, HiddenStates]]:
        yield self._original, self.ours(self.next_layer)
        for way in self._ways:
            yield self._converted, way.hidden

    def _sums(self) -> list[list[LayerSums]]:
        return [*(way.sums for way in self._ways), *([self.forced] if self._layers else [])]
