"""Both models over the same tokens, layer by layer side by side: neither is ever in memory as a whole.

The same layer of both passes at once, that of the converted model in all ways, so that a matrix is dequantized once,
what they have in common is computed once, and everything that only this layer needs is forgotten after it.

Shapes: B windows, T tokens, D hidden, E experts, k experts a token, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from time import perf_counter

import torch
from torch import Tensor

from qconvert.memory import available_bytes
from qconvert.numerics.threads import side_by_side
from qconvert.parity.drafts import DraftScores, accepted, has_drafts
from qconvert.parity.heads import Scan, Side, scan_heads
from qconvert.parity.input_rounding import served_rounding
from qconvert.parity.kept_states import KeptStates
from qconvert.parity.layer_run import LayerRun, LayerWatch, Way
from qconvert.parity.layers import LayerScores
from qconvert.parity.lens import Lens
from qconvert.parity.logits import TokenScores, VocabularyScan
from qconvert.parity.tensors import Progress
from qconvert.weights.boundaries import Boundaries
from qconvert.weights.source import CheckpointWeights
from qconvert.weights.spill import SpillStore
from reference_model.layer_pass import leave_inputs
from reference_model.layerwise import HiddenStates, finish

PLAIN, SERVED = "weights only", "as served"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelComparison:
    """One way of running the converted model against the original.

    Attributes:
        mode: ``weights only``, or ``as served`` with the activation rounding of engines.
        layers: each layer after all those before it.
        forced: each layer alone, fed what the original's is fed; empty where it was not asked for.
        drafts: guesses of the prediction heads; ``None`` where a model has none, or where they were not asked for.
        lens: mean KL of what both would say if they ended after each layer; empty where it was not asked for.
    """

    mode: str
    scores: TokenScores
    layers: tuple[LayerScores, ...]
    forced: tuple[LayerScores, ...] = ()
    drafts: DraftScores | None = None
    lens: tuple[float, ...] = ()


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
    watch: LayerWatch | None = None,
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
        layers: also let each layer as served pass alone, fed the original's inputs, compare DeltaNet states, and say
            what both would say if they ended after each layer.
        drafts: also run the prediction heads, where both models have one.
        boundaries: where the states after each layer are kept, and where an earlier run has left them.
        scan_original: sees the original's logits too.
        scan_served: sees those of the converted model as served too.
        watch: sees what each of the original's layers did to each batch.
        kept: takes the states that other runs begin from, see there.

    Raises:
        OutputError: hidden states cannot be written to disk.
    """
    quarter = (available_bytes() // 2 if memory is None else memory) // 4
    rounding = served_rounding(converted)
    with SpillStore(2 * quarter) as store, side_by_side(torch.get_num_threads()) as each:
        roundings = [leave_inputs] if rounding is None else [leave_inputs, rounding]
        ways = [
            Way(rounding=of, hidden=HiddenStates(store=store, count=len(batches), name=f"way.{n}"))
            for n, of in enumerate(roundings)
        ]
        depth = original.config.text.num_hidden_layers
        lens = Lens(batches, depth, 1 + len(ways), store) if layers else None
        run = LayerRun(original, converted, batches, ways, store, quarter, layers, each, lens, watch, kept)
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
        scan_heads(sides, watched, partial(progress, "logits"), each)
        cost = Cost(layers=tuple(run.seconds.tolist()), head=(perf_counter() - before) / len(sides))
        behind = [()] * len(ways) if lens is None else lens.divergences(sides, each)
        guesses: list[DraftScores | None] = [None] * len(ways)
        if drafts and has_drafts(original) and has_drafts(converted):
            first, *rest = sides
            by_original = accepted(original, batches, first.hidden, scans[0].likeliest[0], quarter, each)
            guesses = [
                DraftScores(
                    original=by_original,
                    converted=accepted(converted, batches, side.hidden, scan.likeliest[1], quarter, each),
                )
                for side, scan in zip(rest, scans, strict=True)
            ]
        results = [
            ModelComparison(
                mode=mode, scores=scan.scores(), layers=tuple(one.scores() for one in way.sums), drafts=guess, lens=kl
            )
            for mode, way, scan, guess, kl in zip((PLAIN, SERVED), ways, scans, guesses, behind, strict=False)
        ]
        forced = tuple(one.scores() for one in run.forced)
        plain, last = results[0], results[-1]
        served = replace(last, mode=SERVED, forced=forced)
        return Comparison(plain=plain, served=served, visits=run.visits, cost=cost)
