"""What vLLM's own functions take for quantized.

Usage: lists.py IN OUT, two JSON files. IN is a list of ``{method, mapped, block, names}``, ``block`` a
``quantization_config``, names as vLLM has them; OUT gets a list of ``{name: true, false or null}``,
null where vLLM raises.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vllm.model_executor.layers.quantization.compressed_tensors.utils import find_matched_target, should_ignore_layer
from vllm.model_executor.layers.quantization.utils.gptq_utils import get_dynamic_override
from vllm.model_executor.layers.quantization.utils.quant_utils import is_layer_skipped
from vllm.model_executor.models.qwen3_5 import Qwen3_5MoeForCausalLM, Qwen3_5MoeForConditionalGeneration

Answer = Callable[[str], bool | None]


class QKVParallelLinear:
    """Stands for any linear module: vLLM looks at the class's name."""


class RoutedExperts:
    """Stands for a block of experts."""


def compressed_tensors(block: dict[str, Any], mapped: Callable[[list[str]], list[str]], fused: Any) -> Answer:
    """As ``CompressedTensorsConfig.get_scheme_dict``; experts at the first one's matrices."""
    ignore = mapped(block["ignore"])
    targets = mapped([target for group in block["config_groups"].values() for target in group["targets"]])
    experts = [*targets, *(["RoutedExperts"] if "Linear" in targets else [])]

    def one(name: str, layer: Any, among: list[str]) -> bool:
        ignored = should_ignore_layer(name, ignore, fused)
        return not ignored and find_matched_target(name, layer, among, fused) is not None

    def answer(name: str) -> bool | None:
        if not name.endswith(".experts"):
            return one(name, QKVParallelLinear(), targets)
        parts = {one(f"{name}.0.{part}_proj", RoutedExperts(), experts) for part in ("gate", "up", "down")}
        return parts.pop() if len(parts) == 1 else None

    return answer


def skipped(entries: list[str], fused: Any, mode: Any) -> Answer:
    """As ``Fp8Config`` and ``AutoAWQConfig``."""
    return lambda name: not is_layer_skipped(name, entries, fused, match_mode=mode)


def dynamic(rules: dict[str, Any]) -> Answer:
    """As ``AutoGPTQConfig``."""
    config = SimpleNamespace(dynamic=rules)
    return lambda name: get_dynamic_override(config, name) is not False


def answers(case: dict[str, Any]) -> dict[str, bool | None]:
    """One case."""
    model = Qwen3_5MoeForConditionalGeneration if case["mapped"] else Qwen3_5MoeForCausalLM
    block, fused = case["block"], model.packed_modules_mapping

    def mapped(entries: list[str]) -> list[str]:
        # the main model drops what the draft model keeps
        return [(model.hf_to_vllm_mapper.apply_list([entry]) or [entry])[0] for entry in entries]

    if case["method"] == "compressed-tensors":
        answer = compressed_tensors(block, mapped, fused)
    elif case["method"] == "gptq":
        answer = dynamic(block["dynamic"])
    else:
        mode = "exact" if case["method"] == "fp8" else "substring"
        answer = skipped(mapped(block["modules_to_not_convert"]), fused, mode)
    found: dict[str, bool | None] = {}
    for name in case["names"]:
        try:
            found[name] = answer(name)
        except ValueError:
            found[name] = None
    return found


if __name__ == "__main__":
    cases = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    Path(sys.argv[2]).write_text(json.dumps([answers(case) for case in cases]), encoding="utf-8")
