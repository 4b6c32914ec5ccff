"""Both models on their way through the layers, side by side: what is summed up of each, and where to go on.

Shapes: B windows, T tokens, D hidden, E experts, k experts a token, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Protocol

import torch
from torch import Tensor

from qconvert.parity.kept_states import KeptStates
from qconvert.parity.layers import MARKS, LayerSums, Passed
from qconvert.parity.lens import Lens
from qconvert.weights.boundaries import Boundaries
from qconvert.weights.source import CheckpointWeights
from reference_model.each import Each
from reference_model.layer_pass import Batch, InputRounding, Lane, LayerRecord, pass_layer
from reference_model.layerwise import HiddenStates, embed
from reference_model.load import ActivationStore


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way of running the converted model, and what is summed up of it."""

    rounding: InputRounding
    hidden: HiddenStates
    sums: list[LayerSums] = field(default_factory=list)


class LayerWatch(Protocol):
    """Who else looks at the original's layers."""

    def see(self, record: LayerRecord) -> None:
        """Take what a layer did to a batch."""
        ...

    def kept(self) -> Iterator[tuple[str, Tensor]]:
        """What a later run has to know of the layers so far, by names of its own."""
        ...

    def restore(self, kept: Callable[[str], Tensor]) -> None:
        """Take up what ``kept`` of an earlier run has given."""
        ...


class LayerRun:
    """Where both models are: before layer ``next_layer``, with the sums of those that have been passed."""

    def __init__(
        self,
        original: CheckpointWeights,
        converted: CheckpointWeights,
        batches: Sequence[Tensor],
        ways: Sequence[Way],
        store: ActivationStore,
        rows_bytes: int,
        layers: bool,
        each: Each,
        lens: Lens | None = None,
        watch: LayerWatch | None = None,
        kept: KeptStates | None = None,
    ) -> None:
        self._watch, self._each, self._lens = watch, each, lens
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
        for n, sums in enumerate(self._sums()):
            wholes = kept(f"sums.{n}")
            states = kept(f"states.{n}")
            sums.extend(LayerSums(*pair) for pair in zip(wholes, states, strict=True))
        self.visits, self.seconds = kept("visits"), kept("seconds")
        if self._lens is not None:
            self._lens.restore(self.next_layer, kept)
        if self._watch is not None:
            self._watch.restore(kept)

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
        if self._lens is not None:
            yield from self._lens.kept(self.next_layer)
        if self._watch is not None:
            yield from self._watch.kept()

    def pass_layer(self, tick: Callable[[], None]) -> None:
        """Let all batches pass the next layer, in the original and in each way of the converted model."""
        n, experts = self.next_layer, self._original.config.text.num_experts
        before, after = self.ours(n), self.ours(n + 1)

        def keep(record: LayerRecord) -> None:
            b, routing = record.batch, record.routing
            after.put(b, record.hidden)
            if self._lens is not None:
                self._lens.see(0, record)
            if self._watch is not None:
                self._watch.see(record)
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
            sums, side = LayerSums(), 1 + len(found)

            def give(record: LayerRecord) -> None:
                if hidden is not None:
                    hidden.put(record.batch, record.hidden)
                    if self._lens is not None:
                        self._lens.see(side, record)
                routing = record.routing
                theirs = Passed(hidden=record.hidden, experts=routing.experts, weights=routing.weights)
                sums.add(known(record.batch), theirs)
                tick()

            def give_states(b: int, states: Tensor) -> None:
                sums.add_states(self._store.get(f"memory.{b}"), states)

            found.append(sums)
            return Lane(
                take=take, give=give, rounding=rounding, marks=marks, give_states=give_states,
                config=self._converted.config.text, experts=self._converted,
            )  # fmt: skip

        marks = MARKS if self._layers else 0
        found: list[LayerSums] = []
        remembered: list[int] = []

        def remember(b: int, states: Tensor) -> None:
            self._store.put(f"memory.{b}", states)
            remembered.append(b)

        lanes = [Lane(take=before.__getitem__, give=keep, marks=marks, give_states=remember)]
        lanes += [lane(way.hidden.__getitem__, way.rounding, way.hidden) for way in self._ways]
        if self._layers:
            lanes.append(lane(before.__getitem__, self._ways[-1].rounding, None))
        start = perf_counter()
        pass_layer(
            self._original.config.text,
            self._original,
            n,
            self._batches,
            lanes,
            torch.float32,
            rows_bytes=self._rows_bytes,
            each=self._each,
        )
        # a layer that passes alone takes little beside those that have passed all before it
        self.seconds[n] = (perf_counter() - start) / (1 + len(self._ways))
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

    def _hidden(self) -> Iterator[tuple[CheckpointWeights, HiddenStates]]:
        yield self._original, self.ours(self.next_layer)
        for way in self._ways:
            yield self._converted, way.hidden

    def _sums(self) -> list[list[LayerSums]]:
        return [*(way.sums for way in self._ways), *([self.forced] if self._layers else [])]
