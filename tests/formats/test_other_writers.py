"""Checkpoints in layouts that others write are read as their formulas say, from the folder to the float32 matrix."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qconvert.arch.names import role_of
from qconvert.core.errors import FormatError, SourceError
from qconvert.core.quantized import E2M1_VALUES
from qconvert.formats.declared import read_declared
from qconvert.numerics.packing import pack_int32
from qconvert.weights.source import CheckpointWeights
from tests.checkpoints import save_checkpoint, tiny_config, tiny_tensors
from tests.edits import edit_tensors

GROUP = 32
Parts = dict[str, Tensor]
Written = tuple[Parts, Tensor]
"""What is stored of a matrix by suffix, and what it means."""


def draw(shape: tuple[int, ...], low: int, high: int, seed: int) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def scales(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 0.02 + 0.001


def fp8(shape: tuple[int, ...], seed: int) -> Tensor:
    codes = draw(shape, 0, 127, seed).to(torch.uint8)  # below the NaN
    return (codes | (draw(shape, 0, 2, seed + 1) << 7).to(torch.uint8)).view(torch.float8_e4m3fn)


def fp4(shape: tuple[int, int], seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Packed codes, scales per 16 and what they mean before the second scale."""
    codes, scale = draw(shape, 0, 16, seed), scales((shape[0], shape[1] // 16), seed).mul(1e4).to(torch.float8_e4m3fn)
    values = torch.tensor(E2M1_VALUES)[codes].unflatten(1, (-1, 16)) * scale.float()[..., None]
    packed = (codes[:, 0::2] | codes[:, 1::2] << 4).to(torch.uint8)
    return packed, scale, values.flatten(1)


def modelopt_nvfp4(shape: tuple[int, int], seed: int) -> Written:
    packed, scale, values = fp4(shape, seed)
    second = torch.tensor(2e-5)
    parts = {"weight": packed, "weight_scale": scale, "weight_scale_2": second, "input_scale": torch.tensor(0.1)}
    return parts, values * second


def w4a4_nvfp4(shape: tuple[int, int], seed: int) -> Written:
    packed, scale, values = fp4(shape, seed)
    parts = {"weight_packed": packed, "weight_scale": scale, "input_global_scale": torch.tensor([7.0])}
    return parts | {"weight_global_scale": torch.tensor([3e4])}, values / 3e4


def tensor_fp8(rank: tuple[int, ...]) -> Callable[[tuple[int, int], int], Written]:
    def write(shape: tuple[int, int], seed: int) -> Written:
        codes, scale = fp8(shape, seed), scales(rank, seed)
        return {"weight": codes, "weight_scale": scale, "input_scale": scale * 3}, codes.float() * scale

    return write


def reordered(shape: tuple[int, int], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Signed codes, scales [N, G], the group of every input, and what they mean."""
    rows, cols = shape
    codes, scale = draw(shape, -8, 8, seed), scales((rows, cols // GROUP), seed).bfloat16()
    index = (torch.arange(cols) // GROUP)[torch.randperm(cols, generator=torch.Generator().manual_seed(seed))]
    return codes, scale, index.to(torch.int32), codes * scale.float()[:, index]


def pack_reordered(shape: tuple[int, int], seed: int) -> Written:
    codes, scale, index, meant = reordered(shape, seed)
    parts = {"weight_packed": pack_int32(codes.to(torch.int8), 4), "weight_scale": scale, "weight_g_idx": index}
    return parts | {"weight_shape": torch.tensor(shape)}, meant


def gptq(offset: int) -> Callable[[tuple[int, int], int], Written]:
    def write(shape: tuple[int, int], seed: int) -> Written:
        codes, scale, index, _ = reordered(shape, seed)
        scale = scale.half()
        zeros = draw((shape[1] // GROUP, shape[0]), 3, 13, seed)
        parts = {
            "qweight": pack_int32((codes + 8).to(torch.uint8), 4).T.contiguous(),
            "qzeros": pack_int32((zeros - offset).to(torch.uint8), 4),
            "scales": scale.T.contiguous(),
            "g_idx": index,
        }
        return parts, (codes + 8 - zeros.T[:, index]) * scale.float()[:, index]

    return write


def block(method: str, **more: Any) -> dict[str, Any]:
    return {"quant_method": method, **more}


def groups(form: str, weights: Mapping[str, Any], inputs: object = None) -> dict[str, Any]:
    group = {"targets": [r"re:.*layers\.\d+\.mlp\.experts\..*"], "weights": weights, "input_activations": inputs}
    return block("compressed-tensors", format=form, config_groups={"group_0": group}, ignore=["re:^mtp.*"])


FP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
FP8 = {"num_bits": 8, "type": "float", "strategy": "tensor"}
GPTQ = {"bits": 4, "group_size": GROUP, "desc_act": True, "sym": False}
CASES: dict[str, tuple[Callable[[tuple[int, int], int], Written], dict[str, Any]]] = {
    "ModelOpt NVFP4": (modelopt_nvfp4, block("modelopt", quant_algo="NVFP4", ignore=["lm_head", "mtp*"])),
    "ModelOpt FP8": (
        tensor_fp8(()),
        block("modelopt", quantization={"quant_algo": "FP8", "exclude_modules": ["mtp*"]}),
    ),
    "NVFP4 with 4-bit inputs": (w4a4_nvfp4, groups("nvfp4-pack-quantized", FP4, {**FP4, "dynamic": "local"})),
    "FP8 by the matrix": (tensor_fp8((1,)), groups("float-quantized", FP8, {**FP8, "dynamic": False})),
    "int4 in activation order": (
        pack_reordered,
        groups("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": GROUP, "actorder": "group"}),
    ),
    "GPTQ in activation order": (gptq(1), block("gptq", **GPTQ)),
    "GPTQ of version 2": (gptq(0), block("gptq", checkpoint_format="gptq_v2", **GPTQ)),
}
each = pytest.mark.parametrize("case", CASES)


def write(path: Path, case: str) -> dict[str, Tensor]:
    """The folder; what each expert's matrix means by its module."""
    make, quantization = CASES[case]
    config = tiny_config(naming="vl", group=GROUP, vision=False)
    tensors = {name: one.bfloat16() for name, one in tiny_tensors(config, layout="per-expert").items()}
    meant = {}
    for seed, name in enumerate([name for name in tensors if ".mlp.experts." in name and not name.startswith("mtp.")]):
        module = name.removesuffix(".weight")
        rows, cols = tensors.pop(name).shape
        parts, meant[module] = make((rows, cols), seed)
        tensors |= {f"{module}.{suffix}": part for suffix, part in parts.items()}
    save_checkpoint(path, config | {"quantization_config": quantization}, tensors)
    return meant


@each
def test_is_read_as_its_formula_says(tmp_path: Path, case: str) -> None:
    meant = write(tmp_path, case)
    with CheckpointWeights.open(tmp_path) as weights:
        for module, values in meant.items():
            found = weights.matrix(role_of(f"{module}.weight"))
            assert torch.allclose(found, values.float(), rtol=2.0**-22, atol=0), module
            role = role_of(f"{module}.weight")
            step = weights.row_block(role)
            if step < values.shape[0]:
                assert torch.equal(weights.matrix(role, step, values.shape[0]), found[step:])


@each
def test_a_scale_that_no_rounding_makes_is_named(tmp_path: Path, case: str) -> None:
    name = f"{next(iter(write(tmp_path, case)))}.weight"
    suffixes = ("weight_scale_2", "weight_global_scale", "weight_scale", "scales")

    def spoil(tensors: dict[str, Tensor]) -> None:
        module = name.removesuffix(".weight")
        scale = next(f"{module}.{suffix}" for suffix in suffixes if f"{module}.{suffix}" in tensors)
        tensors[scale] = torch.full_like(tensors[scale], float("nan"))

    edit_tensors(tmp_path, spoil)
    with CheckpointWeights.open(tmp_path) as weights, pytest.raises(FormatError, match=name.removesuffix(".weight")):
        weights.matrix(role_of(name))


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        (block("modelopt", quant_algo="INT4_AWQ"), "quant_algo is 'INT4_AWQ'; FP8, NVFP4, W4A16_NVFP4 can be read"),
        (block("modelopt", quantization=["FP8"]), "quantization is"),
        (block("modelopt", quant_algo="FP8", ignore="lm_head"), "expected a list of names"),
        (
            groups("pack-quantized", {"num_bits": 4, "strategy": "channel", "actorder": "sideways"}),
            "actorder is 'sideways'",
        ),
        (block("bitsandbytes", load_in_4bit=True, bnb_4bit_quant_type="int4"), "bnb_4bit_quant_type is 'int4'"),
        (block("bitsandbytes", load_in_4bit=True, bnb_4bit_use_double_quant=True), "double_quant is set"),
        (block("bitsandbytes", load_in_4bit=True, load_in_8bit=True), "says both"),
        (block("modelopt", quant_algo="NVFP4", group_size=32), "group_size is 32; 16 can be read"),
        (block("fp8", weight_block_size=["a", 128]), "weight_block_size is 'a'; expected a positive whole number"),
        (block("fp8", weight_block_size=[0, 128]), "weight_block_size is 0"),
        (block("fp8", weight_block_size="ab"), "only tiles can be read"),
        (block("compressed-tensors", format="pack-quantized", config_groups={"group_0": 3}), "group_0 is 3"),
        (groups("pack-quantized", {"num_bits": 4, "strategy": "channel"}, 3), "input_activations is 3"),
        (groups("pack-quantized", {"num_bits": True, "strategy": "channel"}), "True bits of type 'int'"),
        (groups("pack-quantized", {"num_bits": 4, "strategy": "channel", "symmetric": "no"}), "symmetric is 'no'"),
        (groups("nvfp4-pack-quantized", {**FP4, "actorder": "group"}), "activation order in nvfp4-pack-quantized"),
        (block("gptq", bits=4.0, group_size=32), "4.0 bits; 4 and 8"),
        (block("gptq", bits=4, group_size=32, meta={"checkpoint_format": "marlin"}), "is 'marlin'"),
        (block("awq", bits=8, group_size=32), "8 bits; 4 can be read"),
        (block("awq", bits=4, group_size=32, zero_point=False), "zero_point is False"),
        (block("awq", bits=4, group_size=32, modules_to_not_convert=["re:visual"]), "reads no patterns"),
        (block("bitsandbytes"), "neither load_in_4bit nor load_in_8bit"),
    ],
)
def test_what_cannot_be_read_is_said(quantization: dict[str, Any], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        read_declared({"quantization_config": quantization})
