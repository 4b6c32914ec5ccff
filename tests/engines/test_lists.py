"""Lists mean to vLLM's own functions what `qconvert check` takes them for, also with entries missing at random."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from qconvert.core.scheme import FP8_BLOCK, int4
from qconvert.engine_check.readers import Reader, VllmAwq, VllmCompressedTensors, VllmFp8, VllmGptq, in_vllm
from qconvert.engine_check.view import View, build_view
from qconvert.plan.policy import default_policy
from qconvert.plan.presets import preset_rules
from reference_model.config import ModelConfig
from tests.checkpoints import make_tiny
from tests.engine_check.planned import Headers
from tests.engines.engine import run_shim

pytestmark = pytest.mark.engines

POLICIES = (
    default_policy(int4(32)),
    default_policy(int4(32), rules=preset_rules("mixed", int4(32))),
    default_policy(FP8_BLOCK),
    default_policy(int4(32)).stored_as("gptq"),
    default_policy(int4(32)).stored_as("awq"),
)
FIELDS = {"compressed-tensors": "ignore", "fp8": "modules_to_not_convert", "awq": "modules_to_not_convert",
          "gptq": "dynamic"}  # fmt: skip
SHARES = (1.0, 0.95, 0.9, 0.7, 0.5, 0.2)


def reader(view: View, block: dict[str, Any]) -> Reader:
    kinds = {"compressed-tensors": VllmCompressedTensors, "fp8": VllmFp8, "awq": VllmAwq, "gptq": VllmGptq}
    made: Reader = kinds[block["quant_method"]](block, view.mapped)
    return made


def asked_for(view: View) -> list[str]:
    """Modules that lists of vLLM decide on; the draft head's experts have a way of their own in GPTQ."""
    sites = [site.name for site in view.sites if site.name != "lm_head"]
    blocks = [block.name for block in view.experts if view.method != "gptq" or not block.in_mtp]
    return [*sites, *blocks]


def test_vllm_takes_the_same_for_quantized(tmp_path: Path) -> None:
    chance = random.Random(1)
    cases: list[dict[str, Any]] = []
    ours: list[dict[str, bool | None]] = []
    for naming in ("vl", "text"):
        make_tiny(tmp_path / naming, naming=naming, group=128)
        for policy in POLICIES:
            headers = Headers.of(tmp_path / naming, policy)
            view = build_view(ModelConfig.from_dict(dict(headers.raw)), headers.raw, headers.tensors)
            field = FIELDS[str(view.method)]
            for share in SHARES:
                entries = headers.quantization[field]
                kept = [entry for entry in entries if chance.random() < share]
                block = headers.quantization | {field: kept if isinstance(entries, list) else {e: {} for e in kept}}
                reads = reader(view, block)
                names = {name: in_vllm(name, mapped=view.mapped) for name in asked_for(view)}
                ours.append(
                    {
                        there: reads.reads_experts(name) if name.endswith(".experts") else reads.reads(name)
                        for name, there in names.items()
                    }
                )
                cases.append(
                    {"method": view.method, "mapped": view.mapped, "block": block, "names": list(names.values())}
                )
    (tmp_path / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
    run_shim("lists.py", tmp_path / "cases.json", tmp_path / "answers.json")
    theirs = json.loads((tmp_path / "answers.json").read_text(encoding="utf-8"))
    assert theirs == ours
    found = [answer for one in ours for answer in one.values()]
    assert {True, False, None} <= set(found)
