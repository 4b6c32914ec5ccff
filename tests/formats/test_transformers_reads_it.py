"""transformers loads every format without a missing or unexpected key and sees exactly our dequantized numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from qconvert.core.quantized import QuantizedTensor
from qconvert.core.scheme import FP8, FP8_BLOCK, INT8, MXFP4, NVFP4, W8A8, int4
from tests.checkpoints import Naming
from tests.conftest import Prove
from tests.formats.whole_model import Choice, dense, either, routed_experts, write_quantized

INT4 = (int4(32), "pack-quantized")
EXPERTS: dict[str, tuple[Choice, int]] = {
    "int4-g32": (routed_experts(*INT4), 32),
    "int4-g128": (routed_experts(int4(128), "pack-quantized"), 128),
    "int8": (routed_experts(INT8, "pack-quantized"), 32),
    "fp8": (routed_experts(FP8, "float-quantized"), 32),
    "fp8-block": (routed_experts(FP8_BLOCK, "fp8-block"), 128),
    "mxfp4": (routed_experts(MXFP4, "mxfp4-pack-quantized"), 32),
}
MORE: dict[str, tuple[Choice, int]] = {
    "int4-experts-and-dense": (either(routed_experts(*INT4), dense(*INT4)), 32),
    "int4-experts-int8-dense": (either(routed_experts(*INT4), dense(INT8, "pack-quantized")), 32),
    "int4-experts-fp8-dense": (either(routed_experts(*INT4), dense(FP8, "float-quantized")), 32),
    "fp8-experts-and-dense": (either(routed_experts(FP8, "float-quantized"), dense(FP8, "float-quantized")), 32),
    "fp8-block-experts-and-dense": (
        either(routed_experts(FP8_BLOCK, "fp8-block"), dense(FP8_BLOCK, "fp8-block", attention=False)),
        128,
    ),
    "mxfp4-experts-and-dense": (
        either(routed_experts(MXFP4, "mxfp4-pack-quantized"), dense(MXFP4, "mxfp4-pack-quantized")),
        32,
    ),
    "int4-experts-w8a8-dense": (either(routed_experts(*INT4), dense(W8A8, "int-quantized")), 32),
    "w8a8-dense-only": (dense(W8A8, "int-quantized"), 32),
    "nvfp4-dense-only": (dense(NVFP4, "nvfp4-pack-quantized"), 32),
    "fp8-tiles-dense-only": (dense(FP8_BLOCK, "float-quantized", attention=False), 128),
    "int8-dense-only": (dense(INT8, "pack-quantized"), 32),
    "int4-two-layers-of-three": (routed_experts(*INT4, layers=(0, 2)), 32),
    "fp8-block-two-layers-of-three": (routed_experts(FP8_BLOCK, "fp8-block", layers=(0, 2)), 128),
}


TRANSFORMERS = {"engine": "transformers", "version": transformers.__version__}
COMMANDS = {
    "int4-g32": "--scheme int4",
    "int4-g128": "--scheme int4",
    "int8": "--scheme int8",
    "fp8": "--scheme fp8",
    "fp8-block": "--scheme fp8-block",
    "mxfp4": "--scheme mxfp4",
    "int4-experts-and-dense": "--scheme int4",
    "int8-dense-only": "--scheme int8",
    "fp8-experts-and-dense": "--scheme fp8",
    "fp8-block-experts-and-dense": "--scheme fp8-block",
    "mxfp4-experts-and-dense": "--scheme mxfp4",
    "w8a8-dense-only": "--scheme w8a8",
    "nvfp4-dense-only": "--scheme nvfp4",
    "fp8-tiles-dense-only": "--scheme fp8-block --format compressed-tensors",
    "w8a8 experts": "--scheme w8a8",
    "fp8 tiles of experts": "--scheme fp8-block --format compressed-tensors",
    "asymmetric experts": "--scheme int4 --asymmetric",
    "asymmetric linears": "--scheme int4 --asymmetric",
}
"""How `qconvert quantize` is asked for what a case writes."""


def load(path: Path, kind: str) -> Any:
    model, info = getattr(transformers, kind).from_pretrained(path, dtype=torch.bfloat16, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert not {name for name in info["unexpected_keys"] if not name.startswith("mtp.")}
    with torch.no_grad():
        model(torch.arange(3, 12)[None])  # Packed linears become dense in the first forward pass.
    return model


def loaded(state: dict[str, Tensor], module: str, inner: int) -> Tensor:
    """The matrix that transformers holds for a module of the checkpoint."""
    if ".experts." not in module:
        return state[module + ".weight"]
    at, expert, part = module.rsplit(".", 2)
    if part == "down_proj":
        return state[f"{at}.down_proj"][int(expert)]
    gate_up = state[f"{at}.gate_up_proj"][int(expert)]
    return gate_up[:inner] if part == "gate_proj" else gate_up[inner:]


def compare(model: Any, quantized: dict[str, QuantizedTensor], kept: dict[str, Tensor], config: dict[str, Any]) -> None:
    state = model.state_dict()
    inner = config.get("text_config", config)["moe_intermediate_size"]
    text_only_class = not hasattr(model.model, "language_model")
    for name in [*quantized, *kept]:
        here = name.replace("model.language_model.", "model.") if text_only_class else name
        if name.startswith("mtp.") or (text_only_class and ".visual." in name):
            continue
        if name in quantized:
            got = loaded(state, here, inner)
            assert got.dtype == torch.bfloat16 and torch.equal(got, quantized[name].dequantize().bfloat16()), name
        elif ".experts." in name and name.endswith(".weight"):
            assert torch.equal(loaded(state, here.removesuffix(".weight"), inner), kept[name]), name
        else:
            assert torch.equal(state[here], kept[name]), name


@pytest.mark.parametrize("stack_kept", [False, True], ids=["mtp-per-expert", "mtp-stacked"])
@pytest.mark.parametrize("naming", ["vl", "text"])
@pytest.mark.parametrize("case", EXPERTS)
def test_experts_are_our_dequantized_numbers(
    tmp_path: Path, case: str, naming: Naming, stack_kept: bool, prove: Prove
) -> None:
    choose, group = EXPERTS[case]
    written = write_quantized(tmp_path, choose, naming=naming, group=group, stack_kept=stack_kept)
    kind = "Qwen3_5MoeForConditionalGeneration" if naming == "vl" else "Qwen3_5MoeForCausalLM"
    compare(load(tmp_path, kind), *written)
    prove(written=COMMANDS[case], what="experts", result="right", **TRANSFORMERS)


@pytest.mark.parametrize("case", MORE)
def test_other_choices_are_our_dequantized_numbers(tmp_path: Path, case: str, prove: Prove) -> None:
    choose, group = MORE[case]
    written = write_quantized(tmp_path, choose, naming="vl", group=group)
    compare(load(tmp_path, "Qwen3_5MoeForConditionalGeneration"), *written)
    if case in COMMANDS:
        prove(written=COMMANDS[case], what="linears", result="right", **TRANSFORMERS)


@pytest.mark.parametrize("case", ["int4-g32", "fp8", "fp8-block"])
def test_a_text_only_class_reads_a_vision_checkpoint(tmp_path: Path, case: str) -> None:
    choose, group = EXPERTS[case]
    written = write_quantized(tmp_path, choose, naming="vl", group=group)
    compare(load(tmp_path, "AutoModelForCausalLM"), *written)


REFUSED: dict[str, tuple[Choice, bool]] = {
    "w8a8 experts": (routed_experts(W8A8, "int-quantized"), True),
    "fp8 tiles of experts": (routed_experts(FP8_BLOCK, "float-quantized"), True),
    "asymmetric experts": (routed_experts(int4(32, symmetric=False), "pack-quantized"), True),
    "asymmetric linears": (dense(int4(32, symmetric=False), "pack-quantized"), True),
    "int4 beside experts kept one by one": (routed_experts(*INT4, layers=(0, 2)), False),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_transformers_cannot_read_fails_loudly(tmp_path: Path, case: str, prove: Prove) -> None:
    choose, stack_kept = REFUSED[case]
    group = 128 if "tiles" in case else 32
    write_quantized(tmp_path, choose, naming="vl", group=group, stack_kept=stack_kept)
    with pytest.raises(RuntimeError):
        load(tmp_path, "Qwen3_5MoeForConditionalGeneration")
    if case in COMMANDS:
        what = "linears" if "linears" in case else "experts"
        prove(written=COMMANDS[case], what=what, result="refused", **TRANSFORMERS)


def test_transformers_reads_nvfp4_experts_wrong_without_a_word(tmp_path: Path, prove: Prove) -> None:
    written = write_quantized(tmp_path, routed_experts(NVFP4, "nvfp4-pack-quantized"), naming="vl", group=32)
    with pytest.raises(AssertionError, match=r"experts\.\d+\.\w+_proj"):
        compare(load(tmp_path, "Qwen3_5MoeForConditionalGeneration"), *written)
    prove(written="--scheme nvfp4", what="experts", result="wrong", **TRANSFORMERS)
