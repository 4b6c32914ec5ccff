"""Checkpoints in layouts that others write are read as their formulas say, from the folder to the float32 matrix."""

from __future__ import annotations

import json
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
from qconvert.io.checkpoint import Checkpoint
from qconvert.numerics.packing import pack_int32
from qconvert.weights.source import CheckpointWeights
from tests.checkpoints import save_checkpoint, tiny_config, tiny_tensors
from tests.edits import edit_quantization, edit_tensors

GROUP = 32
TILE = 128
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


def fp8_by_rows(shape: tuple[int, int], seed: int) -> Written:
    codes, scale = fp8(shape, seed), scales(shape[:1], seed)
    return {"weight": codes, "weight_scale": scale}, codes.float() * scale[:, None]


def fp8_tiles(*, spread: bool) -> Callable[[tuple[int, int], int], Written]:
    def write(shape: tuple[int, int], seed: int) -> Written:
        rows, cols = shape
        codes, scale = fp8(shape, seed), scales((rows // TILE, cols // TILE), seed)
        stored = scale[:, None, :, None].contiguous() if spread else scale
        meant = codes.float() * scale.repeat_interleave(TILE, 0).repeat_interleave(TILE, 1)
        return {"weight": codes, "weight_scale": stored}, meant

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


def in_order(offset: int, *, indexed: bool = False) -> Callable[[tuple[int, int], int], Written]:
    """As GPTQ's layout, groups consecutive, with or without their index."""

    def write(shape: tuple[int, int], seed: int) -> Written:
        rows, cols = shape
        codes, zeros = draw(shape, 0, 16, seed), draw((cols // GROUP, rows), 3, 13, seed)
        signs = draw((rows, cols // GROUP), 0, 2, seed) * 2 - 1  # the largest value of a group gets the lowest code
        scale, index = (scales((rows, cols // GROUP), seed) * signs).half(), torch.arange(cols) // GROUP
        parts = {
            "qweight": pack_int32(codes.to(torch.uint8), 4).T.contiguous(),
            "qzeros": pack_int32((zeros - offset).to(torch.uint8), 4),
            "scales": scale.T.contiguous(),
        }
        if indexed:
            parts["g_idx"] = index.to(torch.int32)
        return parts, (codes - zeros.T[:, index]) * scale.float()[:, index]

    return write


def symmetric_awq(shape: tuple[int, int], seed: int) -> Written:
    rows, cols = shape
    codes, scale = draw(shape, 0, 16, seed), scales((rows, cols // GROUP), seed).half()

    def words(down: Tensor) -> Tensor:
        """Eight outputs a word: 0 2 4 6 1 3 5 7 from its lowest bits on."""
        order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
        return pack_int32(down.unflatten(1, (-1, 8))[:, :, order].flatten(1).to(torch.uint8), 4)

    zeros = torch.full((cols // GROUP, rows), 8)
    parts = {"qweight": words(codes.T), "qzeros": words(zeros), "scales": scale.T.contiguous()}
    return parts, (codes - 8) * scale.float().repeat_interleave(GROUP, dim=1)


def weights_only(shape: tuple[int, int], seed: int) -> Written:
    parts, meant = modelopt_nvfp4(shape, seed)
    return {name: part for name, part in parts.items() if name != "input_scale"}, meant


def block(method: str, **more: Any) -> dict[str, Any]:
    return {"quant_method": method, **more}


def groups(form: str, weights: Mapping[str, Any], inputs: object = None) -> dict[str, Any]:
    group = {"targets": [r"re:.*layers\.\d+\.mlp\.experts\..*"], "weights": weights, "input_activations": inputs}
    return block("compressed-tensors", format=form, config_groups={"group_0": group}, ignore=["re:^mtp.*"])


FP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
FP8 = {"num_bits": 8, "type": "float", "strategy": "tensor"}
GPTQ = {"bits": 4, "group_size": GROUP, "desc_act": True, "sym": False}
BLOCKS = "model.language_model.layers"
AUTO_ROUND = {"bits": 4, "group_size": GROUP, "sym": False, "data_type": "int", "block_name_to_quantize": BLOCKS}
CASES: dict[str, tuple[Callable[[tuple[int, int], int], Written], dict[str, Any]]] = {
    "ModelOpt NVFP4": (modelopt_nvfp4, block("modelopt", quant_algo="NVFP4", ignore=["lm_head", "mtp*"])),
    "ModelOpt FP8": (
        tensor_fp8(()),
        block("modelopt", quantization={"quant_algo": "FP8", "exclude_modules": ["mtp*"]}),
    ),
    "ModelOpt FP8 by rows": (fp8_by_rows, block("modelopt", quant_algo="FP8_PER_CHANNEL_PER_TOKEN", ignore=["mtp*"])),
    "ModelOpt FP8 in tiles": (fp8_tiles(spread=True), block("modelopt", quant_algo="fp8_pb_wo", ignore=["mtp*"])),
    "ModelOpt FP8 in flat tiles": (
        fp8_tiles(spread=False),
        block("modelopt", quant_algo="FP8_PB_REAL", ignore=["mtp*"]),
    ),
    "NVFP4 with 4-bit inputs": (w4a4_nvfp4, groups("nvfp4-pack-quantized", FP4, {**FP4, "dynamic": "local"})),
    "FP8 by the matrix": (tensor_fp8((1,)), groups("float-quantized", FP8, {**FP8, "dynamic": False})),
    "int4 in activation order": (
        pack_reordered,
        groups("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": GROUP, "actorder": "group"}),
    ),
    "GPTQ in activation order": (gptq(1), block("gptq", **GPTQ)),
    "GPTQ of version 2": (gptq(0), block("gptq", checkpoint_format="gptq_v2", **GPTQ)),
    "AutoRound in GPTQ's packing": (
        in_order(1),
        block("auto-round", packing_format="auto_round:auto_gptq", **AUTO_ROUND),
    ),
    "AutoRound in GPTQ's packing with an index": (in_order(1, indexed=True), block("auto-round", **AUTO_ROUND)),
    "AutoRound in GPTQModel's packing": (
        in_order(0, indexed=True),
        block("auto-round", packing_format="auto_round:gptqmodel", **AUTO_ROUND),
    ),
    "AutoRound in its own packing": (in_order(0), block("auto-round", packing_format="auto_round", **AUTO_ROUND)),
    "AutoRound in AWQ's packing": (
        symmetric_awq,
        block("auto-round", packing_format="auto_round:auto_awq", **{**AUTO_ROUND, "sym": True}),
    ),
    "ModelOpt mixed": (
        weights_only,
        block(
            "modelopt",
            quant_algo="MIXED_PRECISION",
            ignore=["mtp*"],
            quantized_layers={
                f"{BLOCKS}.{layer}.mlp.experts": {"quant_algo": "W4A16_NVFP4", "group_size": 16} for layer in range(3)
            },
        ),
    ),
}
each = pytest.mark.parametrize("case", CASES)


def write(path: Path, case: str) -> dict[str, Tensor]:
    """The folder; what each expert's matrix means by its module."""
    make, quantization = CASES[case]
    config = tiny_config(naming="vl", group=TILE if "tiles" in case else GROUP, vision=False)
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


def auto_round(**more: Any) -> dict[str, Any]:
    return block("auto-round", **{**AUTO_ROUND, **more})


def mixed(layers: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    return block("modelopt", quant_algo="MIXED_PRECISION", quantized_layers=layers, **more)


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        (
            block("modelopt", quant_algo="INT4_AWQ"),
            "quant_algo is 'INT4_AWQ'; FP8, FP8_PER_CHANNEL_PER_TOKEN, FP8_PB_WO, FP8_PB_REAL, .*, MIXED_PRECISION",
        ),
        (block("modelopt", quant_algo="MIXED_PRECISION"), "quantized_layers is None; expected an object"),
        (mixed({"a": "FP8"}), r"quantized_layers\['a'\] is 'FP8'"),
        (mixed({"a": {"quant_algo": "MXFP8"}}), r"quantized_layers\['a'\].quant_algo is 'MXFP8'; FP8, "),
        (mixed({"a": {"quant_algo": "NVFP4", "group_size": 32}}), r"\['a'\].group_size is 32; 16 can be read"),
        (auto_round(packing_format="auto_round:fp8_static"), "packing_format is 'auto_round:fp8_static'; auto_round:"),
        (auto_round(data_type="mx_fp"), "data_type is 'mx_fp'; int can be read"),
        (auto_round(act_bits=8), "act_bits is 8; activations of 16 bits"),
        (auto_round(bits=2), "2 bits; 4 and 8 can be read"),
        (auto_round(bits=16), "16 bits; 4 and 8 can be read"),
        (auto_round(bits=8, packing_format="auto_round:auto_awq"), "8 bits; 4 can be read"),
        (auto_round(rotation_config={"hadamard_type": "hadamard"}), "rotation_config: rotated weights"),
        (auto_round(extra_config=["lm_head"]), "extra_config is"),
        (auto_round(extra_config={"lm_head": 4}), r"extra_config\['lm_head'\] is 4"),
        (auto_round(extra_config={"a": {"bits": 3}}), r"extra_config\['a'\] has 3 bits"),
        (auto_round(extra_config={"a(": {"bits": 4}}), "broken pattern"),
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


def bits_of(quantization: dict[str, Any], *modules: str) -> list[str | None]:
    """The schemes that a configuration declares for modules."""
    declared = read_declared({"quantization_config": quantization})
    found = [declared.of(module) for module in modules]
    return [None if one is None else str(one.scheme) for one in found]


def test_what_autoround_says_of_single_modules_decides() -> None:
    query = f"{BLOCKS}.3.self_attn.q_proj"
    asked = (query, f"{BLOCKS}.3.mlp.experts.1.up_proj", "mtp.fc", "lm_head")
    four, eight = "int4-g32-asym", "int8-g32-asym"
    assert bits_of(auto_round(), *asked) == [four] * 4
    extra: dict[str, Any] = {query: {"bits": 16, "data_type": "float"}, "lm_head": {"bits": 8, "group_size": None}}
    assert bits_of(auto_round(extra_config=extra), *asked) == [None, four, four, eight]
    extra = {r"layers\.\d+.*q_proj": {"sym": True}, ".*": {"bits": 8}}
    assert bits_of(auto_round(extra_config=extra), *asked) == ["int4-g32-sym", eight, eight, eight]
    extra = {r"mtp.*": {"bits": 16}, "mtp.fc": {"bits": 8}}
    assert bits_of(auto_round(extra_config=extra), *asked, "mtp.layers.0.mlp.down_proj")[2:] == [eight, four, None]


def test_the_longest_name_of_a_mixed_list_decides() -> None:
    layers = {
        f"{BLOCKS}.0": {"quant_algo": "FP8"},
        f"{BLOCKS}.0.mlp.experts": {"quant_algo": "W4A16_NVFP4"},
        f"{BLOCKS}.0.mlp.shared_expert": {"quant_algo": "UNQUANTIZED"},
        "mtp.layers.0": {"quant_algo": "FP8"},
    }
    asked = [
        f"{BLOCKS}.0.self_attn.q_proj",
        f"{BLOCKS}.0.mlp.experts.7.up_proj",
        f"{BLOCKS}.0.mlp.shared_expert.up_proj",
        f"{BLOCKS}.01.self_attn.q_proj",
        "mtp.layers.0.self_attn.q_proj",
    ]
    assert bits_of(mixed(layers, ignore=["mtp*"]), *asked) == [
        "fp8-tensor-a-static-fp8-token", "fp4-g16", None, None, None,
    ]  # fmt: skip


def test_a_mixed_checkpoint_is_read_matrix_by_matrix(tmp_path: Path) -> None:
    meant = write(tmp_path, "ModelOpt mixed")
    module = f"{BLOCKS}.1.self_attn.o_proj"
    layers = CASES["ModelOpt mixed"][1]["quantized_layers"] | {module: {"quant_algo": "FP8"}}
    edit_quantization(tmp_path, quantized_layers=layers)

    def change(tensors: dict[str, Tensor]) -> None:
        rows, cols = tensors.pop(f"{module}.weight").shape
        parts, meant[module] = tensor_fp8(())((rows, cols), 5)
        tensors.update({f"{module}.{suffix}": part for suffix, part in parts.items()})

    edit_tensors(tmp_path, change)
    with CheckpointWeights.open(tmp_path) as weights:
        for name, values in meant.items():
            found = weights.matrix(role_of(f"{name}.weight"))
            assert torch.allclose(found, values.float(), rtol=2.0**-22, atol=0), name


@pytest.mark.parametrize("case", ["ModelOpt FP8", "ModelOpt mixed"])
def test_a_description_beside_the_configuration_is_read(tmp_path: Path, case: str) -> None:
    meant = write(tmp_path, case)
    with Checkpoint.open(tmp_path) as checkpoint:
        inside = checkpoint.header_hash
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    block = config.pop("quantization_config")
    told = {"producer": {"name": "modelopt"}, "quantization": block.get("quantization", block)}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(told))
    file.write_text(json.dumps(config))
    with CheckpointWeights.open(tmp_path) as weights:
        for module, values in meant.items():
            found = weights.matrix(role_of(f"{module}.weight"))
            assert torch.allclose(found, values.float(), rtol=2.0**-22, atol=0), module
        before = weights.checkpoint.header_hash
        assert before != inside and "hf_quant_config.json" in weights.checkpoint.left_out
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({**told, "note": 1}))
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.header_hash != before
    (tmp_path / "hf_quant_config.json").write_text("[]")
    with pytest.raises(SourceError, match=r"hf_quant_config\.json: expected a JSON object"):
        Checkpoint.open(tmp_path)


def test_a_description_beside_a_checkpoint_in_16_bits_is_of_another(tmp_path: Path) -> None:
    config = tiny_config(vision=False)
    save_checkpoint(tmp_path, config, {name: one.bfloat16() for name, one in tiny_tensors(config).items()})
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    with Checkpoint.open(tmp_path) as checkpoint:
        assert "quantization_config" not in checkpoint.config
