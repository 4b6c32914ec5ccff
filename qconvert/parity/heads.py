"""From final hidden states to scores: the logits of all sides, one slab of every output matrix at a time.

Shapes: T tokens, D hidden, V vocabulary, v entries of a slab.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from qconvert.core.role import Kind, Section, TensorRole
from qconvert.weights.overlay import OverlaidWeights
from qconvert.weights.source import CheckpointWeights
from reference_model.each import Each, one_by_one
from reference_model.layer_pass import InputRounding, leave_inputs
from reference_model.layerwise import HiddenStates

HEAD_SLAB = 8192
"""Vocabulary entries whose logits are in memory at once, of each side, for ``HEAD_ROWS`` tokens."""

HEAD_ROWS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """Whose logits: final hidden states of all batches, and the checkpoint that holds the output matrix."""

    source: CheckpointWeights | OverlaidWeights
    hidden: HiddenStates
    rounding: InputRounding = leave_inputs


Scan = Callable[..., None]
"""Takes the first position, the first vocabulary entry and float32 logits [t, v] of each of its sides.

As ``VocabularyScan.add`` does; every (position, entry) pair is given once.
"""


@torch.no_grad()
def scan_heads(
    sides: Sequence[Side],
    scans: Sequence[tuple[Scan, Sequence[int]]],
    progress: Callable[[int, int], None] = lambda done, total: None,
    each: Each = one_by_one,
) -> None:
    """Give each of ``scans`` the logits of its sides, of all positions but the last of each window.

    Every output matrix is read once, and multiplied once for each side that uses it. ``each`` may do this for several
    runs of positions at once.
    """
    vocabulary = sides[0].source.config.text.vocab_size
    # a matrix that several sides share is dequantized once
    sources = list({id(side.source): side.source for side in sides}.values())
    for slabs in zip(*(head_slabs(source) for source in sources), strict=True):
        first = slabs[0][0]
        matrices = {id(source): slab for source, (_, slab) in zip(sources, slabs, strict=True)}
        see = partial(_see, first, [matrices[id(side.source)] for side in sides], scans)
        progress(first, vocabulary)
        row = 0
        for b in range(len(sides[0].hidden)):
            states = [_scored(side, b) for side in sides]
            rows = range(row, row + len(states[0]), HEAD_ROWS)
            runs = zip(rows, *(torch.split(state, HEAD_ROWS) for state in states), strict=True)
            for _ in each(see, runs):
                pass
            row += len(states[0])
    progress(vocabulary, vocabulary)


@torch.no_grad()  # of the thread that runs it
def _see(
    first: int, matrices: Sequence[Tensor], scans: Sequence[tuple[Scan, Sequence[int]]], run: tuple[int, Tensor]
) -> None:
    """Multiply the states of some positions, and let ``scans`` see the logits."""
    row, *states = run
    logits = [functional.linear(state, matrix) for state, matrix in zip(states, matrices, strict=True)]
    for scan, chosen in scans:
        scan(row, first, *(logits[n] for n in chosen))


def _scored(side: Side, batch: int) -> Tensor:
    state = side.hidden[batch][:, :-1].flatten(0, 1)
    before = side.rounding("lm_head")
    return state if before is None else before(state)


def head_slabs(source: CheckpointWeights | OverlaidWeights) -> Iterator[tuple[int, Tensor]]:
    """Slabs of the output matrix in float32 with their first entry: [v, D] each."""
    kind = Kind.EMBEDDING if source.config.text.tie_word_embeddings else Kind.HEAD
    role = TensorRole(section=Section.TEXT, kind=kind)
    for first in range(0, source.config.text.vocab_size, HEAD_SLAB):
        yield first, source.matrix(role, first, min(first + HEAD_SLAB, source.config.text.vocab_size))
