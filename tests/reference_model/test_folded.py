"""A folded shared expert routes and computes what the shared expert did, and is not the router's to choose."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from reference_model.config import ModelConfig, TextConfig
from reference_model.config_fields import ConfigError
from reference_model.config_fold import FOLD, NOTE, fold_block
from reference_model.layer_pass import LayerRecord
from reference_model.layerwise import run_layerwise
from reference_model.load import TensorDictSource, load_weights
from reference_model.model import CausalLM
from reference_model.train import expert_shares, losses
from tests.reference_model import tiny
from tests.tolerances import tolerances

LIMITS = tolerances("folding")
F = tiny.config_json()["moe_intermediate_size"]
WIDTHS = (F, 2 * F, F // 2, 3 * F // 2)


def folded_json(config: dict[str, Any]) -> dict[str, Any]:
    count = -(-config["shared_expert_intermediate_size"] // F)
    counts = {name: config[name] + count for name in ("num_experts", "num_experts_per_tok")}
    return {**config, **counts, NOTE: {FOLD: fold_block(config)}}


def folded_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The textbook fold: units one by one."""
    out = {name: tensor for name, tensor in tensors.items() if ".shared_expert." not in name}
    for name in [name for name in out if name.endswith("experts.gate_up_proj")]:
        mlp = name.removesuffix("experts.gate_up_proj")
        gate, up, down = (tensors[f"{mlp}shared_expert.{part}_proj.weight"] for part in ("gate", "up", "down"))
        count = -(-len(gate) // F)
        gate_up, downs = (out[f"{mlp}experts.{part}"] for part in ("gate_up_proj", "down_proj"))
        more_up, more_down = gate_up.new_zeros(count, *gate_up.shape[1:]), downs.new_zeros(count, *downs.shape[1:])
        for unit in range(len(gate)):
            expert, place = divmod(unit, F)
            more_up[expert, place], more_up[expert, F + place] = gate[unit], up[unit]
            more_down[expert, :, place] = down[:, unit]
        out[f"{mlp}experts.gate_up_proj"] = torch.cat((gate_up, more_up))
        out[f"{mlp}experts.down_proj"] = torch.cat((downs, more_down))
    return out


def both(shared: int, dtype: torch.dtype) -> tuple[CausalLM, CausalLM, TensorDictSource]:
    changes = {"shared_expert_intermediate_size": shared}
    tensors = tiny.checkpoint(**changes)
    source = tiny.source(folded_tensors(tensors))
    with torch.device("meta"):
        folded = CausalLM(folded_config(shared))
    load_weights(folded, source, dtype)
    return tiny.model(tensors, dtype, **changes), folded.requires_grad_(False), source


def folded_config(shared: int = F) -> TextConfig:
    return ModelConfig.from_dict(folded_json(tiny.config_json(shared_expert_intermediate_size=shared))).text


@pytest.mark.parametrize("shared", WIDTHS)
def test_logits_and_drafts_are_the_same(shared: int) -> None:
    ids = tiny.tokens(2, 21)
    for dtype, limit in ((torch.float64, "logits_fp64"), (torch.float32, "logits_fp32")):
        plain, folded, _ = both(shared, dtype)
        ours, theirs = plain(ids), folded(ids)
        bound = LIMITS[limit] * max(1.0, float(ours.logits.abs().max()))
        assert float((theirs.logits - ours.logits).abs().max()) <= bound
        drafts = (
            model.head(model.draft(out.hidden[:, :-1], ids[:, 1:]).hidden)
            for model, out in ((plain, ours), (folded, theirs))
        )
        first, second = drafts
        assert float((first - second).abs().max()) <= bound


def test_the_layerwise_run_is_the_whole_model(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = tiny.tokens(2, 21)
    _, folded, source = both(2 * F, torch.float32)
    records: list[LayerRecord] = []
    rows = run_layerwise(folded.config, source, [ids], torch.float32, on_layer=records.append)
    assert torch.equal(torch.cat([row.logits for row in rows]).view(2, 21, -1), folded(ids).logits)
    assert {record.routing.experts.shape[1] for record in records} == {folded.config.num_experts_per_tok}


def test_the_router_s_statistics_leave_folded_experts_out() -> None:
    ids = tiny.tokens(2, 30)
    plain, folded, _ = both(2 * F, torch.float64)
    for ours, theirs in zip(plain(ids).routings, folded(ids).routings, strict=True):
        assert torch.equal(ours.experts, theirs.experts)
        assert theirs.logits.shape[1] == plain.config.num_experts
        assert torch.allclose(theirs.weights.sum(-1), torch.ones(60, dtype=torch.float64))
    shares = expert_shares(folded, [ids])
    assert shares.shape[1] == plain.config.num_experts
    assert torch.equal(shares, expert_shares(plain, [ids]))
    assert float(losses(folded, ids).balance) == pytest.approx(float(losses(plain, ids).balance))


def test_the_last_experts_weigh_what_the_gate_says() -> None:
    _, folded, _ = both(3 * F // 2, torch.float64)
    mlp = folded.layers[0].mlp
    x = torch.randn(5, folded.config.hidden_size, dtype=torch.float64)
    visits = mlp.visits(x, mlp.gate(x))
    top_k = folded.config.num_experts_per_tok
    assert visits.experts[:, top_k:].tolist() == [[7, 8]] * 5
    gate = torch.sigmoid(x @ mlp.shared_expert_gate.weight.T)
    assert torch.allclose(visits.weights[:, top_k:], gate.expand(5, 2))


def test_the_block_of_the_configuration_gives_the_original_counts() -> None:
    original = tiny.text_config(shared_expert_intermediate_size=2 * F)
    folded = folded_config(2 * F)
    assert (folded.num_experts, folded.num_experts_per_tok) == (original.num_experts, original.num_experts_per_tok)
    assert (folded.folded_experts, folded.stored_experts) == (2, original.num_experts + 2)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": 2}, "version is 2"),
        ({"num_experts": 0}, "num_experts is 0"),
        ({"num_experts": 6}, "num_experts is 8, but"),
        ({"shared_expert_intermediate_size": 2 * F}, "num_experts is 8, but"),
        ({"moe_intermediate_size": "wide"}, "moe_intermediate_size is 'wide'"),
    ],
)
def test_a_block_that_lies_is_one_error(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    config = folded_json(tiny.config_json(shared_expert_intermediate_size=F))
    config[NOTE][FOLD] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=says):
        ModelConfig.from_file(tmp_path / "config.json")


@pytest.mark.parametrize("note", [3, {FOLD: 3}, {FOLD: [1]}])
def test_a_block_of_another_kind_is_one_error(note: object) -> None:
    with pytest.raises(ConfigError, match="expected an object"):
        ModelConfig.from_dict({**tiny.config_json(), NOTE: note})
