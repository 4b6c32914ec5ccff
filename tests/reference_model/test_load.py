"""Weights fit or the error names every one that does not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from reference_model.load import ExpertWeights, TensorDictSource, WeightError, WeightSpec, load_weights
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
        "wrong shape: layers.2.mlp.experts.down_proj is [6, 96, 62], expected [7, 96, 64]",
        "missing: mtp.layers.0.mlp.experts.down_proj",
        "wrong shape: layers.3.mlp.experts.gate_up_proj is [8, 128, 96], expected [7, 128, 96]",
        "wrong shape: layers.3.mlp.experts.down_proj is [8, 96, 64], expected [7, 96, 64]",
    ):
        assert line in message, line
    assert message.startswith("9 weights do not fit")
    assert len(message.splitlines()) == 10


def test_a_faulty_load_leaves_the_model_alone(tensors: dict[str, Tensor]) -> None:
    model = tiny.model(tiny.checkpoint(seed=1))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    del tensors["norm.weight"]
    with pytest.raises(WeightError, match=r"missing: norm\.weight"):
        load_weights(model, TensorDictSource(tensors), torch.float32)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@dataclass(frozen=True, slots=True)
class OneMatrixEach:
    """A source whose experts are stored one matrix each."""

    tensors: dict[str, Tensor]

    @classmethod
    def of(cls, stacked: dict[str, Tensor]) -> OneMatrixEach:
        apart = {}
        for name, tensor in stacked.items():
            block, _, part = name.rpartition(".")
            for index, one in enumerate(tensor if part in ("gate_up_proj", "down_proj") else ()):
                pieces = {"down_proj": one} if part == "down_proj" else dict(zip(PAIR, one.chunk(2), strict=True))
                apart |= {f"{block}.{index}.{which}.weight": piece for which, piece in pieces.items()}
            if part not in ("gate_up_proj", "down_proj"):
                apart[name] = tensor
        return cls(apart)

    def specs(self) -> Mapping[str, WeightSpec]:
        return TensorDictSource(self.tensors).specs()

    def tensor(self, name: str) -> Tensor:
        return self.tensors[name]

    def rows(self, name: str, begin: int, end: int) -> Tensor:
        return self.tensors[name][begin:end]

    def expert(self, experts: str, index: int) -> ExpertWeights:
        gate, up, down = (self.tensors[f"{experts}.{index}.{part}.weight"] for part in (*PAIR, "down_proj"))
        return ExpertWeights(gate=gate, up=up, down=down)


PAIR = ("gate_proj", "up_proj")


def test_experts_may_be_stored_one_matrix_each(tensors: dict[str, Tensor]) -> None:
    model = empty()
    load_weights(model, OneMatrixEach.of(tensors), torch.float32)
    assert all(torch.equal(model.state_dict()[name], tensors[name]) for name in tensors)


def test_experts_that_do_not_fit_are_named_in_one_line_for_all_of_a_kind(tensors: dict[str, Tensor]) -> None:
    source = OneMatrixEach.of(tensors)
    for index in (0, 2, 3, 4):
        del source.tensors[f"layers.0.mlp.experts.{index}.up_proj.weight"]
    del source.tensors["layers.1.mlp.experts.6.down_proj.weight"]
    for index in range(7):
        for part in (*PAIR, "down_proj"):
            del source.tensors[f"mtp.layers.0.mlp.experts.{index}.{part}.weight"]
    source.tensors["layers.2.mlp.experts.7.gate_proj.weight"] = torch.zeros(64, 96)
    source.tensors["layers.2.mlp.experts.1.gate_proj.weight"] = torch.zeros(64, 95)
    source.tensors["layers.3.mlp.experts.5.down_proj.weight"] = torch.zeros(96, 64, dtype=torch.uint8)
    with pytest.raises(WeightError) as caught:
        load_weights(empty(), source, torch.float32)
    assert str(caught.value).splitlines()[1:] == [
        "missing: layers.0.mlp.experts.{0,2-4}.up_proj.weight",
        "missing: layers.1.mlp.experts.6.down_proj.weight",
        "missing: mtp.layers.0.mlp.experts.down_proj",
        "missing: mtp.layers.0.mlp.experts.gate_up_proj",
        "not a weight of the model: layers.2.mlp.experts.7.gate_proj.weight",
        "wrong dtype: layers.3.mlp.experts.5.down_proj.weight is torch.uint8, expected a floating-point one",
        "wrong shape: layers.2.mlp.experts.1.gate_proj.weight is [64, 95], expected [64, 96]",
    ]


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
