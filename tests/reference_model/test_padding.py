"""A row of a batch gets what it gets alone, wherever padding lies and however far the other rows are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache

from reference_model.attention import AttentionKind
from reference_model.cache import Cache
from reference_model.layerwise import run_layers, run_layerwise
from reference_model.model import CausalLM
from tests.reference_model import tiny, upstream
from tests.reference_model.test_model import worst
from tests.tolerances import tolerances

LIMITS = tolerances("reference_model")

MODELS = {dtype: tiny.model(tiny.checkpoint(), dtype) for dtype in (torch.float32, torch.float64)}
PLAIN = tiny.model(tiny.checkpoint(), torch.float64, "plain")


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One forward: ids [B, T], and a mask [B, T] that is ``None`` when all of them are real."""

    ids: Tensor
    mask: Tensor | None


def placed(rows: Sequence[Tensor], order: Sequence[Sequence[bool]]) -> Piece:
    """Put row b's tokens where ``order[b]`` is true, and random tokens elsewhere."""
    mask = torch.tensor(order)
    ids = tiny.tokens(mask.shape[0], mask.shape[1], seed=99)
    for b, row in enumerate(rows):
        ids[b, mask[b]] = row
    return Piece(ids=ids, mask=mask)


def padded(rows: Sequence[Tensor], side: str) -> Piece:
    width = max(len(row) for row in rows)
    blanks = [[False] * (width - len(row)) for row in rows]
    tokens = [[True] * len(row) for row in rows]
    return placed(rows, [a + b if side == "left" else b + a for a, b in zip(blanks, tokens, strict=True)])


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[Tensor], list[Piece]]:
    """Rows [length] and the pieces in which a batch of them is run: prompts padded somehow, then a few decode steps."""
    count = draw(st.integers(1, 4))
    side = draw(st.sampled_from(["left", "right", "holes"]))
    lengths = draw(st.lists(st.one_of(st.integers(1, 6), st.integers(60, 70)), min_size=count, max_size=count))
    seed = draw(st.integers(0, 9))
    prompts = [tiny.tokens(1, length, seed + 10 * b)[0] for b, length in enumerate(lengths)]
    if side == "holes":
        width = max(lengths) + draw(st.integers(0, 3))
        order = [draw(st.permutations([True] * n + [False] * (width - n))) for n in lengths]
        pieces = [placed(prompts, order)]
    else:
        pieces = [padded(prompts, side)]
    rows = prompts
    for n in range(draw(st.integers(1, 4))):
        width = draw(st.sampled_from([1, 1, 3]))
        kept = [draw(st.integers(0, width)) for _ in rows] if draw(st.booleans()) else [width] * count
        new = [tiny.tokens(1, k, seed + 100 + 10 * n + b)[0] for b, k in enumerate(kept)]
        piece = placed(new, [draw(st.permutations([True] * k + [False] * (width - k))) for k in kept])
        pieces.append(piece if min(kept) < width else Piece(ids=piece.ids, mask=None))
        rows = [torch.cat(pair) for pair in zip(rows, new, strict=True)]
    return rows, pieces


def run(model: CausalLM, pieces: Sequence[Piece]) -> tuple[list[Tensor], Cache]:
    """Each row's logits of its real tokens, in order, and the cache after them."""
    cache: Cache | None = None
    parts: list[list[Tensor]] = [[] for _ in pieces[0].ids]
    for piece in pieces:
        output = model(piece.ids, attention_mask=piece.mask, cache=cache)
        assert bool(output.logits.isfinite().all())
        cache = output.cache
        for b, part in enumerate(parts):
            part.append(output.logits[b] if piece.mask is None else output.logits[b, piece.mask[b]])
    assert cache is not None
    return [torch.cat(part) for part in parts], cache


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@settings(max_examples=25)
@given(batches())
def test_rows_get_the_logits_that_they_get_alone(dtype: torch.dtype, batch: tuple[list[Tensor], list[Piece]]) -> None:
    rows, pieces = batch
    model = MODELS[dtype]
    limit = LIMITS["fp64_split" if dtype == torch.float64 else "fp32_batched"]
    together, cache = run(model, pieces)
    assert cache.lengths.tolist() == cache.next_position.tolist() == [len(row) for row in rows]
    for row, got in zip(rows, together, strict=True):
        assert worst(got, model(row[None]).logits[0]) <= limit


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["sdpa", "plain"])
def test_every_state_is_that_of_the_row_alone(side: str, kind: AttentionKind) -> None:
    """Logits could hide a state that only matters later: what a layer keeps is compared itself."""
    model = MODELS[torch.float64] if kind == "sdpa" else PLAIN
    rows = [tiny.tokens(1, length, seed=length)[0] for length in (2, 70, 65, 1)]
    _, cache = run(model, [padded(rows, side)])
    for b, row in enumerate(rows):
        alone = model(row[None]).cache
        for got, expected in zip(cache.layers, alone.layers, strict=True):
            for name in ("conv", "recurrent", "keys", "values"):
                if hasattr(expected, name):
                    mine = getattr(got, name)[b]
                    mine = mine[: len(row)] if name in ("keys", "values") else mine
                    assert worst(mine, getattr(expected, name)[0]) <= LIMITS["fp64_split"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_left_padding_equals_that_of_transformers(dtype: torch.dtype) -> None:
    """Left padding and single decode steps, which is where transformers is right."""
    theirs = upstream.build(tiny.config_json(), tiny.checkpoint(), dtype)
    rows = [tiny.tokens(1, length, seed=length)[0] for length in (3, 66, 70)]
    first = padded(rows, "left")
    assert first.mask is not None
    mask, ids = first.mask, first.ids
    limit = LIMITS["fp64_to_upstream" if dtype == torch.float64 else "fp32_to_upstream"]
    past, cache = DynamicCache(config=theirs.config), None
    for step in range(4):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        with upstream.LiftedCasts():
            expected = theirs(ids, attention_mask=mask, position_ids=positions, past_key_values=past).logits
        got = MODELS[dtype](ids, attention_mask=first.mask if step == 0 else None, cache=cache)
        cache = got.cache
        here = mask[:, -ids.shape[1] :]
        assert worst(got.logits[here], expected[here]) <= limit
        ids = tiny.tokens(3, 1, seed=step)
        mask = torch.cat((mask, torch.ones(3, 1, dtype=torch.bool)), dim=1)


def test_a_mask_that_hides_nothing_changes_no_bit() -> None:
    model, ids = MODELS[torch.float32], tiny.tokens(2, 70)
    assert torch.equal(model(ids, attention_mask=torch.ones(2, 70, dtype=torch.int64)).logits, model(ids).logits)


def test_the_last_logits_are_those_of_the_last_real_token() -> None:
    model = MODELS[torch.float64]
    rows = [tiny.tokens(1, length, seed=length)[0] for length in (2, 9, 5)]
    order = [[False, True, False, True] + [False] * 6, [True] * 4 + [False] + [True] * 5, [True] * 5 + [False] * 5]
    piece = placed(rows, order)
    got = model(piece.ids, attention_mask=piece.mask, last_logits_only=True).logits
    assert got.shape[1] == 1
    for b, row in enumerate(rows):
        assert worst(got[b, 0], model(row[None]).logits[0, -1]) <= LIMITS["fp64_split"]


def test_explicit_positions_are_those_of_the_tokens_under_the_mask() -> None:
    model = MODELS[torch.float64]
    rows = [tiny.tokens(1, length, seed=length)[0] for length in (4, 9)]
    own = [torch.randint(0, 50, (3, len(row)), generator=torch.Generator().manual_seed(len(row))) for row in rows]
    piece = padded(rows, "left")
    assert piece.mask is not None
    positions = torch.full((3, *piece.ids.shape), 10_000)
    for b, triples in enumerate(own):
        positions[:, b, piece.mask[b]] = triples
    output = model(piece.ids, attention_mask=piece.mask, position_ids=positions)
    assert output.cache.next_position.tolist() == [int(triples.max()) + 1 for triples in own]
    after = model(tiny.tokens(2, 1), cache=output.cache)
    for b, (row, triples) in enumerate(zip(rows, own, strict=True)):
        alone = model(row[None], position_ids=triples[:, None])
        assert worst(output.logits[b, piece.mask[b]], alone.logits[0]) <= LIMITS["fp64_split"]
        step = model(tiny.tokens(2, 1)[b : b + 1], cache=alone.cache)
        assert worst(after.logits[b], step.logits[0]) <= LIMITS["fp64_split"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_prediction_head_knows_padding_too(side: str) -> None:
    model = MODELS[torch.float64]
    rows = [tiny.tokens(1, length, seed=length)[0] for length in (3, 12, 7)]
    states, following = padded([row[:-1] for row in rows], side), padded([row[1:] for row in rows], side)
    assert states.mask is not None
    hidden = model(states.ids, attention_mask=states.mask).hidden
    first = model.draft(hidden, following.ids, attention_mask=states.mask)
    second = model.draft(first.hidden[:, :1] * 0 + 1, tiny.tokens(3, 1), cache=first.cache)
    for b, row in enumerate(rows):
        alone = model.draft(model(row[None, :-1]).hidden, row[None, 1:])
        assert worst(first.hidden[b, states.mask[b]], alone.hidden[0]) <= LIMITS["fp64_split"]
        more = model.draft(torch.ones_like(alone.hidden[:, :1]), tiny.tokens(3, 1)[b : b + 1], cache=alone.cache)
        assert worst(second.hidden[b], more.hidden[0]) <= LIMITS["fp64_split"]


@settings(max_examples=25)
@given(st.data())
def test_a_rewound_cache_is_that_of_the_shorter_rows(data: st.DataObject) -> None:
    model = MODELS[torch.float64]
    count = data.draw(st.integers(1, 3))
    before = [data.draw(st.integers(0, 5)) for _ in range(count)]
    width = data.draw(st.integers(1, 6))
    kept = [data.draw(st.integers(0, width)) for _ in range(count)]
    rows = [tiny.tokens(1, n + width, seed=b)[0] for b, n in enumerate(before)]
    start = padded([row[:n] for row, n in zip(rows, before, strict=True)], "right") if max(before) else None
    cache = None if start is None else model(start.ids, attention_mask=start.mask).cache
    new = torch.stack([row[n:] for row, n in zip(rows, before, strict=True)])
    output = model(new, cache=cache, rewindable=True)
    lengths = torch.tensor(before) + torch.tensor(kept)
    rewound = output.cache.rewind(lengths)
    assert rewound.lengths.tolist() == rewound.next_position.tolist() == lengths.tolist()
    after = model(tiny.tokens(count, 3, seed=50), cache=rewound).logits
    for b, row in enumerate(rows):
        alone = torch.cat((row[: int(lengths[b])], tiny.tokens(count, 3, seed=50)[b]))
        assert worst(after[b], model(alone[None]).logits[0, -3:]) <= LIMITS["fp64_split"]
    if cache is not None:
        assert torch.equal(model(new, cache=cache).logits, output.logits)


def test_what_cannot_be_rewound_is_an_error() -> None:
    model, ids = MODELS[torch.float64], tiny.tokens(2, 5)
    cache = model(ids).cache
    with pytest.raises(ValueError, match="rewound into its last forward"):
        cache.rewind(torch.tensor([5, 4]))
    later = model(ids, cache=cache, rewindable=True).cache
    with pytest.raises(ValueError, match="rewound into its last forward"):
        later.rewind(torch.tensor([7, 4]))
    with pytest.raises(ValueError, match=r"\[10, 10\] tokens cannot be rewound to \[7, 11\]"):
        later.rewind(torch.tensor([7, 11]))


def test_a_mask_of_another_shape_is_an_error() -> None:
    model = MODELS[torch.float64]
    cache = model(tiny.tokens(2, 5)).cache
    with pytest.raises(ValueError, match=r"attention_mask is \[2, 6\], expected \[2, 1\]"):
        model(tiny.tokens(2, 1), attention_mask=torch.ones(2, 6), cache=cache)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_by_layer_gives_the_same_bits(dtype: torch.dtype) -> None:
    pieces = [
        padded([tiny.tokens(1, length, seed=length)[0] for length in lengths], side)
        for lengths, side in (((3, 70), "left"), ((66, 2, 1), "right"))
    ]
    tensors, ids = tiny.checkpoint(), [tiny.tokens(2, 9), *(piece.ids for piece in pieces)]
    masks = [None, *(piece.mask for piece in pieces)]
    rows: list[list[Tensor]] = [[] for _ in ids]
    for part in run_layerwise(tiny.text_config(), tiny.source(tensors), ids, dtype, attention_masks=masks):
        rows[part.batch].append(part.logits)
    whole = tiny.model(tensors, dtype)
    for logits, batch, mask in zip(rows, ids, masks, strict=True):
        expected = whole(batch, attention_mask=mask).logits
        assert torch.equal(torch.cat(logits).view_as(expected), expected)


def test_layer_by_layer_takes_positions_for_some_batches_only() -> None:
    ids, positions = tiny.tokens(2, 9), torch.randint(0, 50, (3, 2, 9), generator=torch.Generator().manual_seed(0))
    hidden = run_layers(
        tiny.text_config(), tiny.source(tiny.checkpoint()), [ids, ids], torch.float32, position_ids=[None, positions]
    )
    assert torch.equal(hidden[0], MODELS[torch.float32](ids).hidden)
    assert torch.equal(hidden[1], MODELS[torch.float32](ids, position_ids=positions).hidden)
