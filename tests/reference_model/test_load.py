"""Weights fit or the error names every one that does not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from reference_model.load import ExpertWeights, TensorDictSource, WeightError, load_weights
from reference_model.model import CausalLM
from tests.reference_model import tiny


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    return dict(tiny.source(tiny.checkpoint()).tensors)


def empty() -> CausalLM:
    with torch.device("meta"):
        return CausalLM(tiny.text_config())


def test_a_model_gives_back_the_weights_that_it_was_given(tensors: dict[str, Tensor]) -> None:
    model = empty()
    load_weights(model, TensorDictSource(tensors), torch.float32)
    state = model.state_dict()
    assert state.keys() == tensors.keys()
    assert all(torch.equal(state[name], tensors[name]) for name in tensors)


def test_loaded_weights_are_copies(tensors: dict[str, Tensor]) -> None:
    model = empty()
    load_weights(model, TensorDictSource(tensors), torch.float32)
    for tensor in tensors.values():
        tensor.zero_()
    assert all(weight.any() for name, weight in model.named_parameters() if "norm" not in name)
    assert all(weight.requires_grad for weight in model.parameters())


def test_every_fault_is_named_in_one_error(tensors: dict[str, Tensor]) -> None:
    del tensors["layers.1.self_attn.q_proj.weight"]
    del tensors["mtp.fc.weight"]
    tensors["layers.9.mlp.gate.weight"] = torch.zeros(1)
    tensors["layers.0.mlp.gate.weight"] = tensors["layers.0.mlp.gate.weight"].T
    tensors["norm.weight"] = tensors["norm.weight"].to(torch.int8)
    tensors["layers.2.mlp.experts.down_proj"] = tensors["layers.2.mlp.experts.down_proj"][:-1, :, :-2]
    del tensors["mtp.layers.0.mlp.experts.down_proj"]
    for part in ("gate_up_proj", "down_proj"):
        tensors[f"layers.3.mlp.experts.{part}"] = tensors[f"layers.3.mlp.experts.{part}"][[0, 1, 2, 3, 4, 5, 6, 0]]
    with pytest.raises(WeightError) as caught:
        load_weights(empty(), TensorDictSource(tensors), torch.float32)
    message = str(caught.value)
    for line in (
        "missing: layers.1.self_attn.q_proj.weight",
        "missing: mtp.fc.weight",
        "not a weight of the model: layers.9.mlp.gate.weight",
        "wrong shape: layers.0.mlp.gate.weight is [96, 7], expected [7, 96]",
        "wrong dtype: norm.weight is torch.int8",
        "wrong shape: layers.2.mlp.experts expert 3 down is [96, 62], expected [96, 64]",
        "missing: layers.2.mlp.experts expert 6",
        "missing: mtp.layers.0.mlp.experts.down_proj",
        "not a weight of the model: layers.3.mlp.experts expert 7",
    ):
        assert line in message, line


def test_a_faulty_load_leaves_the_model_alone(tensors: dict[str, Tensor]) -> None:
    model = tiny.model(tiny.checkpoint(seed=1))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    del tensors["norm.weight"]
    with pytest.raises(WeightError, match=r"missing: norm\.weight"):
        load_weights(model, TensorDictSource(tensors), torch.float32)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class WithoutExpertFive(TensorDictSource):
    def expert(self, experts: str, index: int) -> ExpertWeights:
        if index == 5:
            raise KeyError(index)
        return TensorDictSource(self.tensors).expert(experts, index)


def test_a_missing_expert_is_named(tensors: dict[str, Tensor]) -> None:
    with pytest.raises(WeightError) as caught:
        load_weights(empty(), WithoutExpertFive(tensors), torch.float32)
    assert "missing: layers.0.mlp.experts expert 5" in str(caught.value)
    assert "missing: mtp.layers.0.mlp.experts expert 5" in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_decay_parameters_are_never_rounded(tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    model = empty()
    load_weights(model, TensorDictSource(tensors), dtype)
    for name, weight in model.state_dict().items():
        exact = name.endswith(("A_log", "dt_bias"))
        assert weight.dtype == (torch.promote_types(dtype, torch.float32) if exact else dtype)
        if exact:
            assert torch.equal(weight.double(), tensors[name].double())


def test_a_part_of_the_model_loads_by_prefix(tensors: dict[str, Tensor]) -> None:
    layer = empty().layers[1]
    load_weights(layer, TensorDictSource(tensors), torch.float32, prefix="layers.1.", skip=("mlp.experts.",))
    assert torch.equal(layer.self_attn.q_proj.weight, tensors["layers.1.self_attn.q_proj.weight"])
    assert layer.mlp.experts.down_proj.is_meta


def test_the_prediction_head_can_be_left_out(tensors: dict[str, Tensor]) -> None:
    with torch.device("meta"):
        model = CausalLM(tiny.text_config(mtp_num_hidden_layers=0))
    with pytest.raises(WeightError, match=r"not a weight of the model: mtp\.fc\.weight"):
        load_weights(model, TensorDictSource(tensors), torch.float32)
    load_weights(model, TensorDictSource(tensors), torch.float32, skip=("mtp.",))
