"""transformers loads every format without a missing or unexpected key and sees exactly our dequantized numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qconvert.core.scheme import FP8, FP8_BLOCK, INT8, int4
from tests.checkpoints import Naming
from tests.formats.whole_model import routed_experts, write_quantized

transformers = pytest.importorskip("transformers")

CASES = {
    "int4-g32": (int4(32), "pack-quantized", 32),
    "int4-g128": (int4(128), "pack-quantized", 128),
    "int8": (INT8, "pack-quantized", 32),
    "fp8": (FP8, "float-quantized", 32),
    "fp8-block": (FP8_BLOCK, "fp8-block", 128),
}


@pytest.mark.parametrize("fused_mtp", [False, True], ids=["mtp-per-expert", "mtp-fused"])
@pytest.mark.parametrize("naming", ["vl", "text"])
@pytest.mark.parametrize("case", CASES)
def test_experts_are_our_dequantized_numbers(tmp_path: Path, case: str, naming: Naming, fused_mtp: bool) -> None:
    scheme, format_name, group = CASES[case]
    choose = routed_experts(scheme, format_name)
    quantized, kept, config = write_quantized(tmp_path, choose, naming=naming, group=group, fused_mtp=fused_mtp)
    text = config.get("text_config", config)
    kind = "Qwen3_5MoeForConditionalGeneration" if naming == "vl" else "Qwen3_5MoeForCausalLM"
    model, info = getattr(transformers, kind).from_pretrained(tmp_path, dtype=torch.bfloat16, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert not {name for name in info["unexpected_keys"] if not name.startswith("mtp.")}
    state = model.state_dict()
    prefix = "model.language_model." if naming == "vl" else "model."
    for layer in range(text["num_hidden_layers"]):
        at = f"{prefix}layers.{layer}.mlp.experts"
        for expert in range(text["num_experts"]):
            gate, up, down = (
                quantized[f"{at}.{expert}.{part}_proj"].dequantize().bfloat16() for part in ("gate", "up", "down")
            )
            assert torch.equal(state[f"{at}.gate_up_proj"][expert], torch.cat((gate, up)))
            assert torch.equal(state[f"{at}.down_proj"][expert], down)
    for name, tensor in kept.items():
        if not name.startswith("mtp."):
            assert torch.equal(state[name], tensor), name
