"""One layer at a time gives the bits of the whole model, and reads only what it needs."""

from __future__ import annotations

from collections import Counter
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from reference_model.layerwise import LayerRecord, run_layers, run_layerwise
from reference_model.load import ExpertWeights, TensorDictSource, WeightError
from tests.reference_model import tiny

BATCHES = (tiny.tokens(2, 70), tiny.tokens(1, 300, seed=1), tiny.tokens(3, 1, seed=2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}])
def test_every_bit_equals_the_whole_model(dtype: torch.dtype, changes: dict[str, bool]) -> None:
    tensors = tiny.checkpoint(**changes)
    records: list[LayerRecord] = []
    rows: list[list[Tensor]] = [[] for _ in BATCHES]
    config = tiny.text_config(**changes)
    for part in run_layerwise(config, tiny.source(tensors), BATCHES, dtype, on_layer=records.append):
        assert part.begin == sum(len(r) for r in rows[part.batch])
        rows[part.batch].append(part.logits)
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


class CountingSource(TensorDictSource):
    """Remembers what was asked for."""

    asked: ClassVar[Counter[str]] = Counter()

    def tensor(self, name: str) -> Tensor:
        self.asked[name] += 1
        return self.tensors[name]

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


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("embed_tokens.weight", "missing: embed_tokens.weight"),
        ("layers.2.input_layernorm.weight", "missing: layers.2.input_layernorm.weight"),
        ("layers.2.mlp.experts.gate_up_proj", "missing: layers.2.mlp.experts expert"),
        ("norm.weight", "missing: norm.weight"),
        ("lm_head.weight", "missing: lm_head.weight"),
    ],
)
def test_a_missing_weight_is_named(fault: str, words: str) -> None:
    tensors = dict(tiny.source(tiny.checkpoint()).tensors)
    del tensors[fault]
    with pytest.raises(WeightError, match=words):
        list(run_layerwise(tiny.text_config(), TensorDictSource(tensors), BATCHES, torch.float32))


def test_positions_reach_every_layer() -> None:
    tensors, ids = tiny.checkpoint(), tiny.tokens(2, 9)
    positions = torch.randint(0, 50, (3, 2, 9), generator=torch.Generator().manual_seed(0))
    (hidden,) = run_layers(tiny.text_config(), tiny.source(tensors), [ids], torch.float32, position_ids=[positions])
    assert torch.equal(hidden, tiny.model(tensors)(ids, position_ids=positions).hidden)
