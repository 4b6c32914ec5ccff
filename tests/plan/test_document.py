from __future__ import annotations

import json
from pathlib import Path

from qconvert.convert import plan_conversion
from qconvert.core.scheme import int4
from qconvert.plan.document import plan_text
from qconvert.plan.policy import default_policy
from tests.checkpoints import make_tiny


def test_the_parts_of_a_plan_are_one_document_with_sorted_keys(tmp_path: Path) -> None:
    make_tiny(tmp_path / "src")
    plan = plan_conversion(tmp_path / "src", default_policy(int4(32)), shard_bytes=200_000)
    text = "".join(plan_text(plan))
    document = json.loads(text)
    assert text == json.dumps(document, indent=2, sort_keys=True) + "\n"
    assert set(document) == {
        "config", "layout", "left_out", "policy_hash", "side_files", "source_hash", "steps",
    }  # fmt: skip
    assert [info["name"] for info in document["layout"]] == [info.name for info in plan.layout.tensors]
    assert [step["outputs"] for step in document["steps"]] == [list(step.outputs) for step in plan.steps]
    assert document["config"] == plan.config
    beside = json.loads("".join(plan_text(plan, {"budget": {"bits": 5.0}, "warnings": []})))
    assert beside == {**document, "budget": {"bits": 5.0}, "warnings": []}


def test_the_longest_part_does_not_grow_with_the_plan(tmp_path: Path) -> None:
    longest = []
    for experts in (4, 16):
        make_tiny(tmp_path / str(experts), experts=experts, mtp=False)
        plan = plan_conversion(tmp_path / str(experts), default_policy(int4(32)))
        longest.append(max(map(len, list(plan_text(plan))[1:])))
    assert longest[1] < 1.2 * longest[0]
