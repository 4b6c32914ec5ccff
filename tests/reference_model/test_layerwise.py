"""One layer at a time gives the bits of the whole model, and reads only what it needs."""

from __future__ import annotations

import gc
from collections import Counter
from dataclasses import dataclass, field
from math import ceil

import pytest
import torch
from torch import Tensor

import reference_model.layerwise
import reference_model.model
from reference_model.layer_pass import ROWS_BYTES, LayerRecord
from reference_model.layerwise import run_layers, run_layerwise
from reference_model.load import ExpertWeights, TensorDictSource, WeightError
from tests.reference_model import tiny

BATCHES = (tiny.tokens(2, 70), tiny.tokens(1, 300, seed=1), tiny.tokens(3, 1, seed=2))
VOCABULARY = tiny.text_config().vocab_size
WHOLE = tiny.model(tiny.checkpoint())


@dataclass(frozen=True)
class BytesStore:
    """Keeps bytes, not tensors: what a caller still holds of a tensor is then its own."""

    kept: dict[str, tuple[bytes, torch.dtype, torch.Size]] = field(default_factory=dict)

    def put(self, key: str, value: Tensor) -> None:
        self.kept[key] = value.contiguous().view(torch.uint8).numpy().tobytes(), value.dtype, value.shape

    def get(self, key: str) -> Tensor:
        raw, dtype, shape = self.kept[key]
        return torch.frombuffer(bytearray(raw), dtype=dtype).view(shape)

    def drop(self, key: str) -> None:
        del self.kept[key]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rows_bytes", [0, ROWS_BYTES])
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}])
def test_every_bit_equals_the_whole_model(dtype: torch.dtype, rows_bytes: int, changes: dict[str, bool]) -> None:
    tensors = tiny.checkpoint(**changes)
    records: list[LayerRecord] = []
    rows: list[list[Tensor]] = [[] for _ in BATCHES]
    config = tiny.text_config(**changes)
    source, store = tiny.source(tensors), BytesStore()
    for part in run_layerwise(
        config, source, BATCHES, dtype, on_layer=records.append, store=store, rows_bytes=rows_bytes
    ):
        assert part.begin == sum(len(r) for r in rows[part.batch])
        rows[part.batch].append(part.logits)
    assert not store.kept
    whole = tiny.model(tensors, dtype, **changes)
    for b, ids in enumerate(BATCHES):
        expected = whole(ids, keep_hidden_states=True)
        assert expected.hidden_states is not None
        assert torch.equal(torch.cat(rows[b]).view_as(expected.logits), expected.logits)
        mine = [record for record in records if record.batch == b]
        assert [record.layer for record in mine] == [0, 1, 2, 3]
        for record, hidden, routing in zip(mine, expected.hidden_states[1:], expected.routings, strict=True):
            assert torch.equal(record.hidden, hidden)
            assert torch.equal(record.routing.experts, routing.experts)
            assert torch.equal(record.routing.logits, routing.logits)


@dataclass(frozen=True)
class CountingSource(TensorDictSource):
    """Remembers what was asked for: names, and rows of names."""

    asked: Counter[str] = field(default_factory=Counter)
    read: list[tuple[str, int, int]] = field(default_factory=list)

    def tensor(self, name: str) -> Tensor:
        self.asked[name] += 1
        return self.tensors[name]

    def rows(self, name: str, begin: int, end: int) -> Tensor:
        self.read.append((name, begin, end))
        return self.tensors[name][begin:end]

    def expert(self, experts: str, index: int) -> ExpertWeights:
        self.asked[f"{experts}.{index}"] += 1
        return TensorDictSource(self.tensors).expert(experts, index)


def test_each_weight_is_read_once_and_experts_only_when_reached() -> None:
    source = CountingSource(tiny.source(tiny.checkpoint()).tensors)
    records: list[LayerRecord] = []
    run_layers(tiny.text_config(), source, [tiny.tokens(1, 1)], torch.float32, on_layer=records.append)
    assert set(source.asked.values()) == {1}
    assert not any(name.startswith("mtp.") for name in source.asked)
    read = {name for name in source.asked if ".experts." in name}
    assert read == {f"layers.{r.layer}.mlp.experts.{e}" for r in records for e in r.routing.experts.flatten().tolist()}
    assert len(read) == 4 * 3


def live_bytes() -> int:
    """Bytes of all tensors made since ``gc.freeze`` that anybody still refers to, views counted once."""
    tensors = [x for x in gc.get_objects() if type(x) is Tensor]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


@dataclass(frozen=True)
class WeighingSource(TensorDictSource):
    """Weighs what is alive whenever it is asked for a weight."""

    alive: list[int] = field(default_factory=list)

    def rows(self, name: str, begin: int, end: int) -> Tensor:
        self.alive.append(live_bytes())
        return self.tensors[name][begin:end]

    def expert(self, experts: str, index: int) -> ExpertWeights:
        self.alive.append(live_bytes())
        return TensorDictSource(self.tensors).expert(experts, index)


def peak(count: int, rows_bytes: int) -> int:
    """Most bytes alive at a time of those that a run makes, over ``count`` batches of 2 x 30 tokens."""
    batches = [tiny.tokens(2, 30, seed=seed) for seed in range(count)]
    source = WeighingSource(tiny.source(tiny.checkpoint()).tensors)
    run = run_layerwise(tiny.text_config(), source, batches, torch.float32, store=BytesStore(), rows_bytes=rows_bytes)
    gc.collect()
    gc.freeze()
    try:
        for _ in run:
            pass
    finally:
        gc.unfreeze()
    return max(source.alive)


def test_what_is_alive_does_not_grow_with_the_number_of_batches() -> None:
    token_bytes = (3 + 2) * 96 * 4
    two = 2 * 60 * token_bytes
    assert peak(12, two) == peak(2, two) > two
    assert peak(12, 0) == peak(2, 0) > two // 2
    assert peak(12, ROWS_BYTES) > 12 * 60 * token_bytes


def test_a_smaller_limit_of_rows_reads_experts_more_often_and_nothing_else() -> None:
    batches = [tiny.tokens(2, 30, seed=seed) for seed in range(5)]
    asked = []
    for room in (ROWS_BYTES, 2 * 60 * (3 + 2) * 96 * 4, 0):
        source = CountingSource(tiny.source(tiny.checkpoint()).tensors)
        run_layers(tiny.text_config(), source, batches, torch.float32, rows_bytes=room)
        asked.append(source.asked)
    for name in asked[0]:
        assert [found[name] for found in asked] == ([1, 3, 5] if ".experts." in name else [1, 1, 1])


def test_ready_embeddings_take_the_place_of_the_table() -> None:
    source, ids = CountingSource(tiny.source(tiny.checkpoint()).tensors), tiny.tokens(2, 9)
    ready = torch.randn(2, 9, 96, generator=torch.Generator().manual_seed(0))
    first, second = run_layers(tiny.text_config(), source, [ids, ids], torch.float32, embeddings=[ready, None])
    assert torch.equal(first, WHOLE(ids, embeddings=ready).hidden)
    assert torch.equal(second, WHOLE(ids).hidden)
    source.read.clear()
    run_layers(tiny.text_config(), source, [ids], torch.float32, embeddings=[ready])
    assert not source.read


def test_inputs_that_do_not_fit_are_named_before_a_weight_is_read() -> None:
    source, ids = CountingSource(tiny.source(tiny.checkpoint()).tensors), tiny.tokens(1, 5)
    for batch, ready, words in (
        (ids[0], None, r"token ids are torch.int64 \[5\], expected whole numbers \[rows, tokens\]"),
        (ids + VOCABULARY, None, "is not of the vocabulary, 0 to"),
        (ids, torch.zeros(1, 4, 96), r"embeddings is \[1, 4, 96\], expected \[1, 5, 96\]"),
        (ids[:, :0], None, "1 rows of 0 tokens: expected at least one token"),
    ):
        with pytest.raises(ValueError, match=words):
            run_layers(tiny.text_config(), source, [ids, batch], torch.float32, embeddings=[None, ready])
    for places, words in (
        ({"attention_masks": [None, torch.ones(1, 4)]}, r"attention_mask is \[1, 4\], expected \[1, 5\]"),
        ({"position_ids": [None, torch.zeros(1, 5)]}, r"position_ids is .* \[1, 5\], expected .* \[3, 1, 5\]"),
        ({"attention_masks": [None]}, "attention_masks has 1 entries for 2 batches"),
    ):
        with pytest.raises(ValueError, match=words):
            run_layers(tiny.text_config(), source, [ids, ids], torch.float32, **places)
    assert not source.asked
    assert not source.read


def test_of_the_embedding_rows_that_occur_are_read_once_and_close_ones_together() -> None:
    source = CountingSource(tiny.source(tiny.checkpoint()).tensors)
    batches = [torch.tensor([[7, 3, 4, 7], [5, 0, 3, 9]]), torch.tensor([[VOCABULARY - 1]])]
    hidden = run_layers(tiny.text_config(), source, batches, torch.float32)
    runs = [(0, 10), (VOCABULARY - 1, VOCABULARY)]
    assert source.read == [("embed_tokens.weight", *run) for run in runs]
    for ids, x in zip(batches, hidden, strict=True):
        assert torch.equal(x, WHOLE(ids).hidden)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_the_head_are_the_same_products_in_both_runs(
    dtype: torch.dtype, tie: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference_model.model, "HEAD_COLUMNS", 100)
    monkeypatch.setattr(reference_model.model, "HEAD_ROWS", 32)
    monkeypatch.setattr(reference_model.layerwise, "HEAD_ROWS", 32)
    changes = {"tie_word_embeddings": tie}
    tensors = tiny.checkpoint(**changes)
    source = CountingSource(tiny.source(tensors).tensors)
    rows: list[list[Tensor]] = [[] for _ in BATCHES]
    for part in run_layerwise(tiny.text_config(**changes), source, BATCHES, dtype):
        rows[part.batch].append(part.logits)
    name = "embed_tokens.weight" if tie else "lm_head.weight"
    blocks = [(begin, end) for what, begin, end in source.read if what == name][-ceil(VOCABULARY / 100) :]
    assert blocks == [(n, min(n + 100, VOCABULARY)) for n in range(0, VOCABULARY, 100)]
    assert "lm_head.weight" not in source.asked
    whole = tiny.model(tensors, dtype, **changes)
    for logits, ids in zip(rows, BATCHES, strict=True):
        expected = whole(ids)
        assert torch.equal(torch.cat(logits).view_as(expected.logits), expected.logits)


def test_weights_that_do_not_fit_are_all_named_before_one_is_read() -> None:
    source = CountingSource(dict(tiny.source(tiny.checkpoint()).tensors))
    source.asked.clear()
    del source.tensors["layers.2.input_layernorm.weight"]
    del source.tensors["layers.3.mlp.experts.gate_up_proj"]
    del source.tensors["lm_head.weight"]
    source.tensors["embed_tokens.weight"] = source.tensors["embed_tokens.weight"][:-1]
    source.tensors["norm.weight"] = torch.zeros(96, dtype=torch.int64)
    source.tensors["layers.4.mlp.gate.weight"] = torch.zeros(7, 96)
    del source.tensors["mtp.fc.weight"]  # no layer-wise run needs it
    for run in (run_layers, lambda *given: next(run_layerwise(*given))):
        with pytest.raises(WeightError) as caught:
            run(tiny.text_config(), source, BATCHES, torch.float32)
        assert str(caught.value).splitlines() == [
            "6 weights do not fit the model that config.json describes:",
            "missing: layers.2.input_layernorm.weight",
            "missing: layers.3.mlp.experts.gate_up_proj",
            "missing: lm_head.weight",
            "not a weight of the model: layers.4.mlp.gate.weight",
            "wrong dtype: norm.weight is torch.int64, expected a floating-point one",
            f"wrong shape: embed_tokens.weight is {[VOCABULARY - 1, 96]}, expected {[VOCABULARY, 96]}",
        ]
    assert not source.asked


def test_positions_reach_every_layer() -> None:
    tensors, ids = tiny.checkpoint(), tiny.tokens(2, 9)
    positions = torch.randint(0, 50, (3, 2, 9), generator=torch.Generator().manual_seed(0))
    (hidden,) = run_layers(tiny.text_config(), tiny.source(tensors), [ids], torch.float32, position_ids=[positions])
    assert torch.equal(hidden, tiny.model(tensors)(ids, position_ids=positions).hidden)


def test_logits_in_blocks_are_the_product_with_the_whole_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_model.model, "HEAD_COLUMNS", 7)
    monkeypatch.setattr(reference_model.model, "HEAD_ROWS", 4)
    generator = torch.Generator().manual_seed(0)
    for rows, columns in ((1, 5), (4, 7), (9, 8), (3, 22)):
        hidden = torch.randint(-9, 9, (1, rows, 6), generator=generator).double()  # whole numbers have exact products
        weight = torch.randint(-9, 9, (columns, 6), generator=generator).double()
        assert torch.equal(reference_model.model.head_logits(hidden, weight), hidden @ weight.T)
